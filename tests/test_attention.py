"""Attention: what it computes, whose kernel does where, and that the TPU's computes the same in less memory.

The kernel runs here interpreted, and is compiled for a TPU that is not there.
"""

import functools
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from latent_run import drawn_like
from tiny import tiny_config

from guided_distill import costs, diagnostics, diffusion, generate, sharding
from guided_distill.experiment import from_config
from guided_distill.models import attention
from guided_distill.models.attention import Attention, implementation
from guided_distill.models.remat import POLICIES
from guided_distill.plan import ahead
from guided_distill.stages import make_stages
from guided_distill.teachers import shapes_of

REPO = Path(__file__).parents[1]
LIBTPU = REPO / ".venv" / "tpu"


def test_attention_is_softmax_of_scaled_products_by_heads():
    rng = np.random.default_rng(0)
    x, context = rng.normal(size=(2, 3, 8)).astype(np.float32), rng.normal(size=(2, 5, 6)).astype(np.float32)
    module = Attention(2, jnp.float32, bias=True)
    params = drawn_like(jax.eval_shape(module.init, jax.random.key(0), x, context)["params"])
    q, k, v = (h @ params[n]["kernel"] + params[n]["bias"] for n, h in (("q", x), ("k", context), ("v", context)))
    heads = []
    for own in (slice(0, 4), slice(4, 8)):
        weights = np.exp(np.einsum("btd,bsd->bts", q[..., own], k[..., own]) / 2.0)
        heads.append(weights / weights.sum(-1, keepdims=True) @ v[..., own])
    expected = np.concatenate(heads, -1) @ params["out"]["kernel"] + params["out"]["bias"]
    np.testing.assert_allclose(module.apply({"params": params}, x, context), expected, rtol=1e-4, atol=1e-5)


def test_flash_attention_is_asked_for_only_where_every_device_of_the_kind_has_it():
    asked = {
        ("bfloat16", 40, "gpu"): "cudnn",
        ("float32", 40, "gpu"): None,
        ("bfloat16", 160, "gpu"): None,
        ("bfloat16", 36, "gpu"): None,
        ("bfloat16", 160, "tpu"): "splash",
        ("bfloat16", 640, "tpu"): None,
        ("float32", 160, "tpu"): None,
        ("bfloat16", 40, "cpu"): None,
    }
    assert {key: implementation(*key) for key in asked} == asked


def test_the_kernel_is_for_long_sequences_in_whole_blocks():
    assert attention.are_many(4096, 4096) and attention.are_many(9216, 9216)
    assert not any(attention.are_many(*tokens) for tokens in ((1024, 1024), (4096, 77), (4100, 4100)))


@pytest.mark.parametrize(("tokens", "head_dim", "block"), [(4096, 40, 1024), (4096, 160, 512), (4480, 40, 896)])
def test_blocks_are_equal_and_as_large_as_fits(tokens, head_dim, block):
    assert attention.block(tokens, head_dim) == block


def draw(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def with_gradients(how, *arguments):
    """how(q, k, v), and the gradients of a sum over it that no two elements enter alike."""

    def loss(*arguments):
        h = how(*arguments)
        return jnp.sum(h * draw(9, *h.shape)), h

    return jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(*arguments)


def test_the_kernel_computes_the_same_with_its_gradients_on_each_device_for_its_rows():
    mesh = sharding.make_mesh(jax.devices()[:4], fsdp=2)
    q, k, v = draw(0, 4, 256, 1, 40), draw(1, 4, 128, 1, 40), draw(2, 4, 128, 1, 40)
    rows = jax.device_put((q, k, v), sharding.batched(mesh))
    with jax.numpy_rank_promotion("allow"):  # of the kernel's own making
        got = with_gradients(functools.partial(attention.by_splash, mesh=mesh, interpret=True), *rows)
    assert got[1].sharding.is_equivalent_to(sharding.batched(mesh), 4)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5),
        got,
        with_gradients(attention.attend, q, k, v),
    )


@pytest.fixture
def seen(monkeypatch):
    """The meshes on which the kernel is called for, as on a TPU; XLA computes what it would."""
    meshes = []

    def by_splash(q, k, v, mesh):
        meshes.append(dict(mesh.shape))
        return jax.nn.dot_product_attention(q, k, v)

    monkeypatch.setattr(attention, "by_splash", by_splash)
    monkeypatch.setattr(attention, "implementation", lambda *_: "splash")
    monkeypatch.setattr(attention, "are_many", lambda *_: True)
    return meshes


def test_networks_that_are_trained_and_sampled_know_their_mesh(seen):
    # A network of its own size, for which no program has been made yet.
    experiment = from_config(tiny_config(**{"model.attention_resolutions": (8,), "model.channels": 12}))
    mesh = sharding.make_mesh(jax.devices()[:4], fsdp=2)
    stages = make_stages(experiment)[:2]
    (teacher, student), size = map(shapes_of, (stage.init for stage in stages)), 8
    model, grid = stages[1].model, diffusion.make_grid(experiment.schedule, 4)
    cond = model.cond_shapes(size)
    label = {"label": cond["label"]}

    def edit():
        keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), size))
        picture = jax.ShapeDtypeStruct(model.sample_shape, jnp.float32)
        generate.compiled_edit(model, mesh).trace(student, grid, keys, cond, 4, picture, picture, 2)

    def look():
        batch = label | {"x": jax.ShapeDtypeStruct((size, *model.sample_shape), jnp.float32)}
        of_mesh = diagnostics._make_look(model, stages[1].teacher, "det", 1, None, mesh)
        of_mesh.trace(student, teacher, batch, grid, 4, 2, 1.0)

    def first_prediction():
        diagnostics._make_first_prediction(model, size, mesh).trace(student, grid, label, 1.0)

    programs = dict(ahead.programs(experiment, stages, mesh))
    assert len(programs) == 4  # the steps and the samplers of both
    for trace in [*programs.values(), edit, look, first_prediction]:
        seen.clear()
        trace()
        assert seen and all(shape == {"data": 2, "fsdp": 2} for shape in seen)


def test_what_the_kernel_is_not_for_is_left_to_xla(seen):
    mesh, q = sharding.make_mesh(jax.devices()[:4]), draw(0, 4, 8, 1, 8)
    attention.attend(q, q, q)  # no mesh is known
    rows = PartitionSpec("data")
    jax.shard_map(attention.attend, mesh=mesh, in_specs=rows, out_specs=rows)(q, q, q)  # it is split already
    with sharding.visible(mesh):
        attention.attend(q[:3], q[:3], q[:3])
        attention.attend(q, q, q, causal=True)
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((4,), ("data",))):  # nobody says of what
        attention.attend(q, q, q)
    assert not seen
    with sharding.visible(mesh):
        attention.attend(q, q, q)
    assert len(seen) == 1


def test_a_gpu_that_is_not_here_is_not_asked_for_its_kernel(monkeypatch):
    monkeypatch.setattr(attention, "implementation", lambda *_: "cudnn")
    q = draw(0, 2, 8, 1, 8)
    np.testing.assert_allclose(attention.attend(q, q, q), jax.nn.dot_product_attention(q, q, q), rtol=1e-5)


@pytest.mark.parametrize("platform", ["tpu", "gpu", "cpu"])
def test_a_plan_counts_the_products_of_the_kernel_and_no_scores_of_it(platform):
    q, k = (jax.ShapeDtypeStruct((2, tokens, 4, 16), jnp.bfloat16) for tokens in (4096, 8192))
    scores = 2 * 4 * 4096 * 8192
    product = 2 * scores * 16  # operations
    with sharding.imagined(platform):
        forward = costs.cost_of(attention.attend, q, k, k)
        both = costs.cost_of(
            jax.grad(lambda q, k, v: (attention.attend(q, k, v).astype(jnp.float32) ** 2).sum(), (0, 1, 2)), q, k, k
        )
    assert forward.flops == 2 * product
    if platform == "cpu":
        assert both.flops == (2 + 4) * product and both.peak > 2 * scores
    else:  # the scores are made again for the gradients
        assert both.flops == (2 + 5) * product and both.peak < scores / 2 and both.moved < scores


@pytest.mark.parametrize("platform", ["tpu", "gpu"])
def test_a_plan_of_what_is_rematerialised_counts_the_kernel_again(platform):
    q, product = jax.ShapeDtypeStruct((2, 4096, 4, 16), jnp.bfloat16), 2 * (2 * 4 * 4096 * 4096 * 16)

    def counted(keep):
        def loss(q, k, v):
            h = jax.checkpoint(lambda *given: jnp.sin(attention.attend(*given)), policy=keep)(q, k, v)
            return (h.astype(jnp.float32) ** 2).sum()

        with sharding.imagined(platform):
            return costs.cost_of(jax.grad(loss, (0, 1, 2)), q, q, q).flops

    assert [counted(keep) for keep in POLICIES.values()] == [(2 + 2 + 5) * product] * len(POLICIES)


def test_a_plan_counts_the_members_of_an_ensemble():
    q = jax.ShapeDtypeStruct((3, 2, 4096, 4, 16), jnp.bfloat16)
    with sharding.imagined("tpu"):
        cost = costs.cost_of(jax.vmap(attention.attend), q, q, q)
    assert cost.flops == 3 * 2 * (2 * (2 * 4 * 4096 * 4096 * 16))


COMPILED = """
import jax, jax.numpy as jnp
from guided_distill import costs, sharding
from guided_distill.chips import parse_topology
from guided_distill.models.attention import attend
from guided_distill.plan import ahead

def gradients(context, q):
    def loss(q, k, v):
        with context():
            return (attend(q, k, v).astype(jnp.float32) ** 2).sum()

    return jax.grad(loss, (0, 1, 2))

for topology in map(parse_topology, ("v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2")):
    mesh = sharding.make_mesh(ahead.devices_of(topology))
    for tokens, head_dim in ((4096, 40), (4480, 40), (9216, 64), (4096, 512)):
        whole, own = ((images, tokens, 8, head_dim) for images in (32, 8))  # fewer lie in on-chip memory
        q = jax.ShapeDtypeStruct(whole, jnp.bfloat16, sharding=sharding.batched(mesh))
        found = jax.jit(gradients(lambda: sharding.visible(mesh), q)).lower(q, q, q).compile()
        q = jax.ShapeDtypeStruct(own, jnp.bfloat16)
        plan = costs.cost_of(gradients(lambda: sharding.imagined("tpu"), q), q, q, q, bytes_of=topology.bytes_of)
        temporaries = found.memory_analysis().temp_size_in_bytes
        scores = 8 * 8 * tokens**2 * 4
        kernels = found.as_text().count("tpu_custom_call")
        print(topology, tokens, head_dim, kernels, temporaries / scores, (plan.peak - plan.results) / temporaries)
"""


@pytest.mark.slow
@pytest.mark.skipif(not LIBTPU.exists(), reason="compiles for a TPU: make .venv/extras")
def test_the_kernel_is_compiled_for_every_kind_of_tpu_and_takes_what_plans_say():
    flags = {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_ACCELERATOR_TYPE": "v5litepod-4"}
    environment = os.environ | flags | {"TPU_WORKER_HOSTNAMES": "localhost", "PYTHONPATH": f"{LIBTPU}:{REPO}"}
    done = subprocess.run([sys.executable, "-c", COMPILED], cwd=REPO, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = [line.split() for line in done.stdout.splitlines()]
    assert len(found) == 16
    for _, _, head_dim, kernels, of_scores, planned in found:
        assert int(kernels) == 2, done.stdout  # forwards and backwards
        assert float(of_scores) < (0.2 if int(head_dim) <= 128 else 0.9), done.stdout
        assert 0.8 < float(planned) < 1.25, done.stdout
