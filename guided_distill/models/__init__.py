"""Networks. A backbone is a Linen module called as module(z, logsnr, label, w, train=..., ...); see `make_model_fn`."""

import functools

from guided_distill.models.dit import DiT, DiTConfig
from guided_distill.models.mlp import MLP, MLPConfig
from guided_distill.models.sd_unet import SDUNet, SDUNetConfig
from guided_distill.models.unet import UNet, UNetConfig

# name in the config -> (module, its frozen config)
BACKBONES = {
    "unet": (UNet, UNetConfig),
    "dit": (DiT, DiTConfig),
    "mlp": (MLP, MLPConfig),
    "sd_unet": (SDUNet, SDUNetConfig),
}


@functools.cache  # so that two runs of one network have the same function, and compiled programs are found again
def make_model_fn(module):
    """ModelFn (params, z [B, *S], logsnr [B], cond, *, dropout_key=None) -> raw [B, *S] of a backbone, nothing bound.

    Without a `dropout_key` the network is in evaluation mode. What cond holds besides "label" and "w" (text, mask, ...)
    goes to the network by its name, but for "null_text", which is there to be guided with.
    """

    def model_fn(params, z, logsnr, cond, *, dropout_key=None):
        rngs = None if dropout_key is None else {"dropout": dropout_key}
        train = dropout_key is not None
        label, w = cond.get("label"), cond.get("w")
        rest = {name: value for name, value in cond.items() if name not in ("label", "w", "null_text")}
        return module.apply({"params": params}, z, logsnr, label, w, train=train, rngs=rngs, **rest)

    return model_fn
