"""Our U-Net beside the same network written in PyTorch: an implementation that shares no line with it."""

import dataclasses
import math
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

import configs
from benchmarks import config_step, train_step, unet_torch
from guided_distill.models import UNet, UNetConfig, make_model_fn

CONFIG = UNetConfig(
    channels=16, emb_channels=32, multipliers=(1, 2), num_blocks=2, norm_groups=4, num_classes=5, out_channels=3
)
CONFIGS = {
    "one head": dataclasses.replace(CONFIG, attention_resolutions=(4,)),
    "head dim 8": dataclasses.replace(CONFIG, attention_resolutions=(4, 8), head_dim=8),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_values_and_gradients_agree_with_pytorch(config):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(6, 8, 8, 3)).astype(np.float32)
    logsnr = np.linspace(-20, 20, 6, dtype=np.float32)
    label = np.array([0, 1, 4, 5, 5, 2], np.int32)  # 5 stands for no label
    module = UNet(config)
    params = module.init(jax.random.key(0), x, logsnr, label, None)["params"]
    # Away from the zeros of the initialisation, behind which two networks could differ unseen.
    params = jax.tree.map(lambda p: p + 0.05 * rng.normal(size=p.shape).astype(np.float32), params)
    model_fn = make_model_fn(module)

    def ours(x):
        return model_fn(params, x, jnp.asarray(logsnr), {"label": jnp.asarray(label)})

    model = unet_torch.make_unet(config, 8, 3)
    unet_torch.load_flax(model.eval(), params)
    z = torch.tensor(x).movedim(-1, 1).requires_grad_()
    theirs = model(z, torch.tensor(logsnr), torch.tensor(label).long())
    np.testing.assert_allclose(jax.jit(ours)(x), theirs.detach().movedim(1, -1).numpy(), rtol=1e-4, atol=1e-4)

    (theirs**2).sum().backward()
    gradient = jax.jit(jax.grad(lambda x: (ours(x) ** 2).sum()))(x)
    expected = z.grad.movedim(1, -1).numpy()
    np.testing.assert_allclose(gradient, expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("name", ["teacher", "stage1", "stage2_det_0016"])
def test_each_kind_of_stage_of_a_shipped_config_has_its_peer(name, monkeypatch):
    monkeypatch.setitem(sys.modules, "configs", configs)  # finding a config puts another in its place
    experiment, stage, parent = config_step.load("cifar10_small:cores", name, 2, {})

    def network(one):
        taught = one.model.w_conditioned
        params = train_step.random_params(experiment, w_conditioned=taught)
        return train_step.torch_network(experiment, params, w_conditioned=taught)  # which compares it with ours

    step = train_step.torch_step(experiment, stage, network(stage), None if parent is None else network(parent))
    x, label = train_step.torch_batch(train_step.random_batch(experiment, 2))
    assert 0.0 < step(x, label) < math.inf
