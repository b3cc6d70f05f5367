"""A small classifier trained on the data set itself, whose features serve the evaluation of samples."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.scipy.ndimage import map_coordinates

FEATURES = 64


class Classifier(nn.Module):
    """f32[B,*S] → (features f32[B,64] before dropout, logits f32[B,num_classes]); images are [B,H,W,C] in [-1, 1].

    Samples of other shapes go through two dense layers.
    Convolutions between patchings by 2 × 2 that halve the image down to 4 × 4 or less; `channels` is the width of the
    first convolution, the later ones have twice as many. Patching keeps every convolution at stride 1 and small: XLA's
    gradients of these take no longer on a CPU than any of our own.
    """

    num_classes: int
    channels: int = 32

    @nn.compact
    def __call__(self, x, *, train: bool = False):
        h = self._convolutions(x) if x.ndim == 4 else self._layers(x)
        features = nn.relu(nn.Dense(FEATURES, name="features")(h.reshape(h.shape[0], -1)))
        h = nn.Dropout(0.3, deterministic=not train)(features)
        return features, nn.Dense(self.num_classes, name="logits")(h)

    def _convolutions(self, x):
        x = _patched(x) if x.shape[1] > 8 else x
        h = nn.relu(nn.Conv(self.channels, (3, 3), name="stem")(x))
        level = 0
        while max(h.shape[1:3]) > 4:
            h = nn.relu(nn.Dense(2 * self.channels, name=f"halve_{level}")(_patched(h)))
            h = nn.relu(nn.Conv(2 * self.channels, (3, 3), name=f"conv_{level}")(h))
            level += 1
        return h

    def _layers(self, x):
        h = nn.relu(nn.Dense(self.channels, name="stem")(x.reshape(x.shape[0], -1)))
        return nn.relu(nn.Dense(2 * self.channels, name="dense")(h))


def train_classifier(
    x, label, num_classes: int, *, seed: int, updates: int, batch_size: int = 64, learning_rate: float = 3e-3
) -> dict:
    """Parameters of a Classifier after `updates` of AdamW on cross-entropy, each image under a small random affine map.

    Samples that are no images are taken as they are. 400 updates suffice for the 8 × 8 digits and 800 for 28 × 28. `x`
    is f32[n,H,W,C] in [-1, 1], `label` i32[n]. The same arguments give the same parameters. Raises ValueError when
    there are fewer images than `batch_size`.
    """
    if len(x) < batch_size:
        raise ValueError(f"a batch of {batch_size} cannot be drawn from {len(x)} images")
    x, label = np.asarray(x), np.asarray(label)
    optimizer = optax.adamw(optax.cosine_onecycle_schedule(updates, learning_rate), weight_decay=1e-2)

    @partial(jax.jit, donate_argnums=(0, 1))
    def update(params, opt_state, x, label, key):
        grads = jax.grad(_loss)(params, x, label, key)
        steps, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, steps), opt_state

    init_key, key = jax.random.split(jax.random.key(seed))
    params = Classifier(num_classes).init(init_key, x[:1])["params"]
    opt_state = optimizer.init(params)
    for number, rows in enumerate(_epochs(len(x), batch_size, updates, seed)):
        params, opt_state = update(params, opt_state, x[rows], label[rows], jax.random.fold_in(key, number))
    return params


@jax.jit
def features_and_logits(params, x):
    """(features f32[B,64], logits f32[B,num_classes]) of images f32[B,H,W,C] in [-1, 1]."""
    return _classifier(params).apply({"params": params}, x)


def accuracy(params, x, label, *, batch_size: int = 500) -> float:
    """The share of images f32[n,H,W,C] in [-1, 1] whose largest logit is that of their label i32[n]."""
    hits = 0
    for start in range(0, len(x), batch_size):
        rows = slice(start, start + batch_size)
        _, logits = features_and_logits(params, x[rows])
        hits += int((np.asarray(logits).argmax(1) == np.asarray(label[rows])).sum())
    return hits / len(x)


def _patched(h):
    """[B,H,W,C] → [B,⌈H/2⌉,⌈W/2⌉,4C], odd sides padded with zeros."""
    h = jnp.pad(h, ((0, 0), (0, h.shape[1] % 2), (0, h.shape[2] % 2), (0, 0)))
    batch, height, width, channels = h.shape
    h = h.reshape(batch, height // 2, 2, width // 2, 2, channels).transpose(0, 1, 3, 2, 4, 5)
    return h.reshape(batch, height // 2, width // 2, 4 * channels)


def _epochs(n: int, batch_size: int, updates: int, seed: int):
    """`updates` arrays of `batch_size` row numbers: one random order of the n rows after another, the rest left out."""
    order = np.random.default_rng(seed)
    batches = n // batch_size
    for number in range(updates):
        if number % batches == 0:
            rows = order.permutation(n)
        start = number % batches * batch_size
        yield rows[start : start + batch_size]


def _classifier(params) -> Classifier:
    """The module that a tree of parameters belongs to."""
    return Classifier(num_classes=params["logits"]["bias"].shape[0], channels=params["stem"]["bias"].shape[0])


def _moved(x, key):
    """Each image of f32[B,H,W,C] under its own small affine map: moved by up to a fourteenth of the side, turned,
    sheared and scaled by up to about a tenth; interpolated linearly, edges repeat."""
    batch, height, width, _ = x.shape
    linear_key, shift_key = jax.random.split(key)
    linear = jnp.eye(2)[None] + jax.random.uniform(linear_key, (batch, 2, 2), minval=-0.12, maxval=0.12)
    shift = jax.random.uniform(shift_key, (batch, 2), minval=-1, maxval=1) * max(1.0, height / 14)
    centre = jnp.array([height - 1, width - 1]) / 2
    pixels = jnp.stack(jnp.meshgrid(jnp.arange(height), jnp.arange(width), indexing="ij")).reshape(2, -1)

    def move(image, linear, shift):
        source = linear @ (pixels - centre[:, None]) + (centre + shift)[:, None]
        one_channel = partial(map_coordinates, coordinates=source, order=1, mode="nearest")
        return jax.vmap(one_channel, in_axes=-1, out_axes=-1)(image).reshape(image.shape)

    return jax.vmap(move)(x, linear, shift)


def _loss(params, x, label, key):
    move_key, dropout_key = jax.random.split(key)
    _, logits = _classifier(params).apply(
        {"params": params}, _moved(x, move_key) if x.ndim == 4 else x, train=True, rngs={"dropout": dropout_key}
    )
    return optax.softmax_cross_entropy_with_integer_labels(logits, label).mean()
