"""What a block keeps for its backward pass where memory is short: rematerialisation by policy (jax.checkpoint)."""

import flax.linen as nn
from jax import lax

_PRODUCTS = (lax.conv_general_dilated_p, lax.dot_general_p)


def _keep_products(primitive, *_, **__):
    return primitive in _PRODUCTS


# What is not kept is computed again. Of "products" that is norms, activations and sums, almost no operations.
POLICIES = {"nothing": None, "products": _keep_products}


def rematerialised(module, config, **options):
    """A Linen module class as config.remat and config.remat_policy want it; `options` are those of nn.remat."""
    return nn.remat(module, policy=POLICIES[config.remat_policy], **options) if config.remat else module
