"""Random draws of the objectives: one key per example, so that nothing depends on the batch it came in."""

import jax


def split_examples(keys, num):
    """[B] keys -> `num` independent lots of [B] keys."""
    lots = jax.vmap(lambda key: jax.random.split(key, num))(keys)
    return [lots[:, i] for i in range(num)]


def uniform(keys, low=0.0, high=1.0):
    """[B] numbers in [low, high), one per key."""
    return low + (high - low) * jax.vmap(jax.random.uniform)(keys)


def strengths(keys, knobs):
    """w [B] ~ U[w_min, w_max], one per key; what a margin beyond both ends draws counts as the end itself.

    Without a margin a network learns the ends of the range worst, as it sees them from one side only.
    """
    w = uniform(keys, knobs.w_min - knobs.w_margin, knobs.w_max + knobs.w_margin)
    return jax.numpy.clip(w, knobs.w_min, knobs.w_max)


def randint(keys, low, high):
    """[B] integers in [low, high), one per key."""
    return jax.vmap(lambda key: jax.random.randint(key, (), low, high))(keys)


def normal_like(keys, x):
    """eps of the shape of x [B, *S], one key per example."""
    return jax.vmap(lambda key: jax.random.normal(key, x.shape[1:], x.dtype))(keys)


def split_batch(batch):
    """A batch -> (x [B, *S], cond without w)."""
    return batch["x"], {name: value for name, value in batch.items() if name != "x"}
