"""The optimiser: learning-rate schedules, Adam with clipping, the moving average, the guard against lost updates."""

import dataclasses

import jax
import jax.numpy as jnp
import optax

from guided_distill.errors import UserError
from guided_distill.sharding import SMALL

DECAYS = ("constant", "linear")


@dataclasses.dataclass(frozen=True)
class OptimiserConfig:
    """Adam as in arXiv 2202.00512, appendix E. The peak learning rate and its horizon are knobs of the step."""

    warmup: int = 0  # updates of linear warm-up
    decay: str = "constant"  # or "linear": to zero at the last update
    weight_decay: float = 0.0
    clip_norm: float = 1.0  # of the gradient of the mean over the global batch
    ema: float = 0.0  # decay of the moving average of parameters; 0 keeps none

    def __post_init__(self):
        if self.decay not in DECAYS:
            raise UserError(f"decay is {self.decay!r}; it must be one of {', '.join(DECAYS)}")


def learning_rate(config, step, peak_lr, updates):
    """The rate of update `step` (0-based): linear warm-up, then constant or a straight line to zero at `updates`."""
    rate = peak_lr * jnp.minimum(1.0, (step + 1) / max(config.warmup, 1))
    return rate * (1.0 - step / updates) if config.decay == "linear" else rate


def make_optimiser(config):
    """The optax chain without its learning rate and its clipping, which are applied by `apply_gradients`."""
    return optax.chain(
        optax.identity(),  # where checkpoints have the state, which is empty, of the clipping
        optax.scale_by_adam(b1=0.9, b2=0.999, eps=1e-8),
        optax.add_decayed_weights(config.weight_decay),
    )


def global_norm(tree):
    """The Euclidean norm of all leaves, the small ones as one vector.

    Most of a U-Net's hundreds of leaves are small, and a GPU's compiler takes its time for a kernel for each of them.
    What is split over devices stays as it is.
    """
    leaves = jax.tree.leaves(tree)
    small = [leaf.ravel() for leaf in leaves if leaf.size < SMALL]
    large = [leaf for leaf in leaves if leaf.size >= SMALL]
    return optax.tree.norm([*large, jnp.concatenate(small)] if small else large)


def apply_gradients(config, state, grads, peak_lr, updates, sound=True):
    """One update of a TrainState: (new state, {lr, grad_norm, skipped}).

    A gradient that is not finite, or that is not `sound` (a loss nobody should learn from), changes nothing but the
    step and the count of skipped updates in a row.
    """
    rate = learning_rate(config, state.step, peak_lr, updates)
    grad_norm = global_norm(grads)
    shrink = jnp.where(grad_norm < config.clip_norm, 1.0, config.clip_norm / grad_norm)
    grads = jax.tree.map(lambda g: shrink * g, grads)
    directions, opt_state = make_optimiser(config).update(grads, state.opt_state, state.params)
    params = jax.tree.map(lambda p, d: p - rate * d, state.params, directions)
    ema = state.ema
    if config.ema:
        # A short run would otherwise average mostly its initialisation.
        decay = jnp.minimum(config.ema, (1.0 + state.step) / (10.0 + state.step))
        ema = jax.tree.map(lambda e, p: decay * e + (1.0 - decay) * p, ema, params)

    learns = jnp.isfinite(grad_norm) & sound
    fresh = state.replace(params=params, ema=ema, opt_state=opt_state, skipped=jnp.zeros_like(state.skipped))
    stale = state.replace(skipped=state.skipped + 1)
    state = jax.tree.map(lambda new, old: jnp.where(learns, new, old), fresh, stale)
    metrics = {"learning_rate": rate, "grad_norm": grad_norm, "skipped": state.skipped}
    return state.replace(step=state.step + 1), metrics
