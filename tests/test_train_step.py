"""The benchmarks of the train step count all the operations of what they are given, and take what they say."""

import sys

import jax
import jax.numpy as jnp
import pytest

from benchmarks import config_step
from benchmarks.train_step import flops
from guided_distill.errors import UserError


def loss(w, x):
    return jnp.sum(jnp.tanh(x @ w) @ w)


def test_a_gradient_counts_about_twice_its_forward_jitted_or_not():
    w, x = jnp.ones((64, 64)), jnp.ones((256, 64))
    forward, both = flops(loss, w, x), jax.value_and_grad(loss, argnums=(0, 1))
    assert forward == pytest.approx(2 * 2 * 256 * 64 * 64, rel=0.1)
    assert flops(both, w, x) == pytest.approx(3 * forward, rel=0.1)
    assert flops(jax.jit(both), w, x) == flops(both, w, x)


def test_every_round_of_a_scan_counts():
    def chain(w, x):
        return jax.lax.scan(lambda x, _: (x @ w, None), x, length=3)[0]

    w, x = jnp.ones((32, 32)), jnp.ones((16, 32))
    assert flops(jax.jit(chain), w, x) == pytest.approx(3 * flops(jnp.matmul, x, w), rel=0.01)


def test_kernels_are_of_the_kind_they_are():
    kinds = {
        "sm90_xmma_fprop_implicit_gemm_bf16bf16_bf16f32": "convolutions",
        "cudnn::cnn::wgrad2d_grouped_direct_kernel": "convolutions",
        "loop_convert_fusion_3": "XLA's fusions",
        "input_convert_reduce_fusion": "XLA's fusions",
        "wrapped_convert_2": "XLA's fusions",
        "gemm_fusion_dot_convert": "matrix products",
        "nvjet_hsh_128x256_64x4": "matrix products",
        "cudnn_generated_fort_native_sdpa_sm90_flash_fprop": "attention by cuDNN",
        "MemcpyD2D": "copies and transposes",
        "void nchwToNhwcKernel": "copies and transposes",
        "something_else": "other",
    }
    assert {name: config_step.kind_of(name) for name in kinds} == kinds


def test_a_stage_of_a_config_is_found_or_refused_by_name(monkeypatch):
    monkeypatch.setitem(sys.modules, "configs", sys.modules["configs"])  # finding a config puts another in its place
    settings = config_step.changes_of(["model.remat=True", "model.dtype=bfloat16", "stage1.w_max=6.0"])
    experiment, stage, parent = config_step.load("cifar10_small:cores", "stage1", 8, settings)
    assert (stage.name, parent.name, stage.training.batch_size) == ("stage1", "teacher", 8)
    assert (experiment.model.remat, experiment.model.dtype, stage.w_range[1]) == (True, "bfloat16", 6.0)
    for wrong, says in (
        (("nope", "stage1"), "--config=nope: no such file"),
        (("digits", "stage3"), "stage1, stage2_det_0016"),
        (("mixture2d", "stage1"), "U-Nets of pictures"),
    ):
        with pytest.raises(UserError, match=says):
            config_step.load(*wrong, None, {})
