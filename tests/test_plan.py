"""What a run would cost: operations, memory and traffic of networks whose figures are known."""

import dataclasses
import functools
import importlib
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from rich.console import Console
from tiny import tiny_config

from configs import cifar10, imagenet64
from guided_distill import costs, plan
from guided_distill.chips import CHIPS, parse_topology, peak_flops, topology_of
from guided_distill.errors import UserError
from guided_distill.experiment import from_config

REPO = Path(__file__).parents[1]
LIBTPU = REPO / ".venv" / "tpu"
PARTS = ("__init__", "common", "pieces")  # that are no experiments
NAMES = sorted(path.stem for path in (REPO / "configs").glob("*.py") if path.stem not in PARTS)
CONFIGS = {name: importlib.import_module(f"configs.{name}") for name in NAMES}
KNOWN = {}  # what plans share: each network is traced once


def shape(*sides, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(sides, dtype)


def network(params, x):
    return jnp.tanh(x @ params["a"]) @ params["b"]


PARAMS = {"a": shape(3, 5), "b": shape(5, 2)}


@pytest.mark.parametrize("batch", [1, 8])
def test_operations_of_two_layers_and_of_their_gradients(batch):
    forward = 2 * batch * (3 * 5 + 5 * 2)
    assert costs.cost_of(network, PARAMS, shape(batch, 3)).flops == forward
    gradient = costs.cost_of(lambda p, x: jax.grad(lambda p: network(p, x).sum())(p), PARAMS, shape(batch, 3))
    # The output itself is not needed, nor the gradient of the input: what is left are a, and its and b's gradients.
    assert gradient.flops == 2 * batch * (3 * 5 + 5 * 2 + 5 * 2 + 3 * 5)


def test_operations_of_a_convolution_with_groups_and_of_a_loop():
    def convolve(x, kernel):
        return jax.lax.conv_general_dilated(
            x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=2
        )

    assert costs.cost_of(convolve, shape(4, 8, 8, 6), shape(3, 3, 3, 10)).flops == 2 * (4 * 8 * 8 * 10) * (9 * 3)

    def loop(x, w):
        return jax.lax.scan(lambda x, _: (x @ w, None), x, length=7)[0]

    assert costs.cost_of(loop, shape(4, 6), shape(6, 6)).flops == 7 * 2 * 4 * 6 * 6


def test_of_a_platform_dependent_function_the_accelerators_branch_is_counted():
    def function(x, w):
        return jax.lax.platform_dependent(x, w, cpu=lambda x, w: x @ w @ w, default=lambda x, w: x @ w)

    assert costs.cost_of(function, shape(4, 6), shape(6, 6)).flops == 2 * 4 * 6 * 6


def test_memory_and_traffic_of_a_chain_of_products():
    def chain(x, w):
        return jnp.tanh(jnp.exp(x @ w) * 2.0) @ w

    x, w, hidden = 4 * 8 * 8, 4 * 8 * 8, 4 * 8 * 8
    cost = costs.cost_of(chain, shape(8, 8), shape(8, 8))
    assert cost.peak == 2 * hidden  # the product ends with what is elementwise after it
    # x, w -> tanh(...); that, w -> the result.
    assert cost.moved == (x + w + hidden) + (hidden + w + hidden)
    kept = costs.cost_of(lambda x, w: (x @ w, chain(x, w)), shape(8, 8), shape(8, 8))
    assert kept.peak > cost.peak


def test_lanes_of_a_tpu_round_up_one_dimension():
    tpu, cpu = parse_topology("v5e:2x2"), parse_topology("cpu:1")
    assert cpu.bytes_of((7, 3), 4) == 84
    assert tpu.bytes_of((8, 64, 64, 192), 2) == 8 * 64 * 64 * 256 * 2
    assert tpu.bytes_of((3, 3, 192, 256), 4) == 3 * 3 * 192 * 256 * 4  # the channels that fill their lanes are chosen
    assert tpu.bytes_of((), 4) == 4


def test_topologies():
    topology = parse_topology("v5p:4x4x4")
    assert (topology.chips, topology.kind, str(topology)) == (64, "v5p", "v5p:4x4x4")
    assert parse_topology("h100:8").chips == 8
    kinds = {"TPU v5 lite": "v5e", "TPU v5": "v5p", "TPU v4": "v4", "TPU v6 lite": "v6e"}
    kinds |= {"NVIDIA H100 PCIe": "h100", "NVIDIA H200": "h200", "NVIDIA GH200 480GB": "cpu"}
    kinds |= {"NVIDIA A100-SXM4-80GB": "a100"}
    assert {kind: topology_of(kind, "x", 4).kind for kind in kinds} == kinds
    assert str(topology_of("cpu", "cpu", 8)) == "cpu:8"
    assert peak_flops(jax.devices()[0], "bfloat16") is None
    for wrong in ("v5e", "v9:4x4", "v5e:0x4", "v5e:4xx4", "v5e:-4"):
        with pytest.raises(UserError, match=f"--topology={wrong}"):
            parse_topology(wrong)


def planned(topology="v5e:2x2", fsdp=1, **updates):
    experiment = from_config(tiny_config(**updates))
    return {stage.name: stage for stage in plan.make_plan(experiment, plan.place_for(topology, fsdp), KNOWN)}


def planned_alone(topology, name, fsdp=1, **updates):
    """The plan of one stage; the others are not traced."""
    experiment = from_config(tiny_config(**updates))
    stages = plan.stages_of(experiment)
    by_name = {stage.name: stage for stage in stages}
    stage = by_name[name]
    return plan.plan_stage(experiment, stage, by_name.get(stage.parent), plan.place_for(topology, fsdp), {})


@pytest.fixture(scope="module")
def plans():
    return planned("cpu:4")


def test_parameters_and_their_bytes(plans):
    for stage in plan.stages_of(from_config(tiny_config())):
        ours = plans[stage.name]
        params = stage.init(jax.random.key(0))
        assert ours.parameters == sum(leaf.size for leaf in jax.tree.leaves(params))
        weights = 4 * ours.parameters
        expected = {"weights": weights, "Adam": 2 * weights, "gradients": weights, "EMA": weights, "teacher": weights}
        expected["EMA"] *= stage.name in ("teacher", "stage1")
        if stage.name in ("teacher", "stage1"):
            expected["teacher"] = 4 * plans["teacher"].parameters if stage.name == "stage1" else 0
        assert {name: ours.memory[name] for name in expected} == expected
        assert ours.bytes == sum(expected.values()) + ours.memory["activations"]


def test_an_update_is_three_passes_of_the_student_and_what_the_teacher_is_asked(plans):
    teacher, stage1, stage2 = (plans[name] for name in ("teacher", "stage1", "stage2_det_0001"))
    forward = teacher.useful_flops / 3
    asked = stage1.useful_flops - stage2.useful_flops / 5 * 3
    assert asked == pytest.approx(2 * forward, rel=1e-6)  # guidance: two calls; all batches are the same
    assert stage2.useful_flops == pytest.approx(5 * forward, rel=0.05)  # the branch that takes w is small
    # Executed: without the gradient of the network's input, which nobody needs.
    assert 0.9 * stage2.useful_flops < stage2.flops <= 1.001 * stage2.useful_flops


def test_operations_grow_with_the_batch_and_are_shared_among_chips(plans):
    twice = planned_alone("cpu:4", "stage1", **{"stage1.batch_size": 16})
    spread = planned_alone("cpu:8", "stage1", **{"stage1.batch_size": 16})
    assert twice.flops == 2 * plans["stage1"].flops and spread.flops == plans["stage1"].flops
    # Gradients are there at the peak of the backward pass too, in part, whatever the batch.
    assert 1.8 < twice.memory["activations"] / plans["stage1"].memory["activations"] < 2.4
    assert twice.memory["weights"] == plans["stage1"].memory["weights"]


@pytest.mark.slow
def test_rematerialisation_trades_memory_for_operations():
    updates = {"teacher.batch_size": 64, "model.channels": 32, "model.num_blocks": 3}
    plain, remat = (planned_alone("cpu:4", "teacher", **updates, **{"model.remat": flag}) for flag in (False, True))
    assert remat.memory["activations"] < 0.9 * plain.memory["activations"]
    assert plain.flops * 1.1 < remat.flops < 1.4 * plain.flops and remat.useful_flops == plain.useful_flops
    kept = planned_alone("cpu:4", "teacher", **updates, **{"model.remat": True, "model.remat_policy": "products"})
    assert remat.memory["activations"] < kept.memory["activations"] < 1.05 * plain.memory["activations"]
    assert plain.flops <= kept.flops < 1.02 * plain.flops


def test_collectives(plans):
    weights = 4 * plans["stage1"].parameters
    assert plans["stage1"].sent == {
        "all-gather": 0,
        "reduce-scatter": 0,
        "all-reduce": pytest.approx(2 * 3 / 4 * weights),
    }
    split = planned_alone("cpu:4", "stage1", 4).sent
    teacher = 4 * plans["teacher"].parameters
    assert split["all-reduce"] == 0 and split["reduce-scatter"] == pytest.approx(3 / 4 * weights)
    assert split["all-gather"] == pytest.approx(3 / 4 * (2 * weights + teacher))
    assert set(planned_alone("cpu:1", "stage1").sent.values()) == {0}


def test_fsdp_shares_out_weights_moments_average_and_teacher(plans):
    wide = {"model.channels": 64, "model.emb_channels": 256}
    whole, split = (planned_alone("cpu:4", "stage1", fsdp, **wide) for fsdp in (1, 4))
    for part in ("weights", "Adam", "EMA", "teacher", "gradients"):
        assert 0.25 * whole.memory[part] <= split.memory[part] < 0.3 * whole.memory[part]


def test_a_batch_in_parts_takes_less_memory_and_as_many_operations(plans):
    whole, parts = plans["stage1"], planned_alone("cpu:4", "stage1", **{"stage1.accumulate": 2})
    assert parts.memory["activations"] < 0.6 * whole.memory["activations"]
    assert parts.useful_flops == pytest.approx(whole.useful_flops)
    assert parts.memory["gradients"] > whole.memory["gradients"]


def test_a_teacher_in_bfloat16_takes_half(plans):
    half = planned_alone("cpu:4", "stage1", teacher_dtype="bfloat16")
    assert half.memory["teacher"] == pytest.approx(plans["stage1"].memory["teacher"] / 2)


def test_a_step_takes_as_long_as_its_slowest_part(plans):
    stage, chip = plans["stage1"], CHIPS["cpu"]
    times = (stage.flops / chip.float32, stage.moved / chip.memory_speed, stage.sent["all-reduce"] / chip.link_speed)
    assert stage.seconds == pytest.approx(max(times)) and stage.days == pytest.approx(4 * stage.seconds / 86400)


@pytest.mark.parametrize(
    ("topology", "fsdp", "updates", "says"),
    [
        ("v5e:4x4", 1, {}, "config.teacher.batch_size is 8, which does not divide over the 16 chips of v5e:4x4"),
        ("cpu:4", 3, {}, "config.mesh.fsdp is 3, which does not divide 4 chips"),
        ("cpu:4", 1, {"stage2.batch_size": 6}, "config.stage2.batch_size is 6"),
    ],
)
def test_what_cannot_be_planned_is_named(topology, fsdp, updates, says):
    with pytest.raises(UserError, match=says):
        planned(topology, fsdp, **updates)


def test_what_does_not_fit_comes_with_what_would(monkeypatch, plans):
    experiment, place = from_config(tiny_config()), plan.place_for("cpu:4")
    assert plan.advice(experiment, list(plans.values()), place, {}) == []
    needs = max(stage.bytes for stage in plans.values())
    small = dataclasses.replace(CHIPS["cpu"], memory=needs / 0.95 * 0.9)
    monkeypatch.setitem(CHIPS, "cpu", small)
    lines = "\n".join(plan.advice(experiment, list(plans.values()), place, {}))
    assert "needs" in lines and "--config.model.remat=True" in lines and ".accumulate=2" in lines
    assert "no size of config.mesh.fsdp" in lines  # no weight is worth splitting
    worst = max(plans.values(), key=lambda stage: stage.bytes)
    batch = plan.largest_batch(worst, place)
    assert 0 < batch < worst.batch_size and batch % 4 == 0
    monkeypatch.setitem(CHIPS, "cpu", dataclasses.replace(small, memory=needs / 100))
    assert plan.largest_batch(worst, place) == 0


@pytest.mark.slow
def test_weights_that_do_not_fit_are_to_be_split(monkeypatch):
    experiment = from_config(tiny_config(**{"model.channels": 64, "model.emb_channels": 256}))
    place, known = plan.place_for("cpu:4"), {}
    plans = plan.make_plan(experiment, place, known)
    needs = max(stage.bytes for stage in plans)
    monkeypatch.setitem(CHIPS, "cpu", dataclasses.replace(CHIPS["cpu"], memory=0.9 * needs))
    assert "--config.mesh.fsdp=2" in "\n".join(plan.advice(experiment, plans, place, known))


@pytest.mark.slow
def test_the_plan_prints_every_stage():
    console = Console(width=140, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    plan.dry_run(tiny_config(), console, topology="v5e:2x2")
    console.file.close()
    printed = console.export_text()
    assert all(name in printed for name in ("teacher", "stage1", "stage2_det_0002", "stage2_det_0001", "v5e:2x2"))
    assert "all-reduce" in printed and re.search(r"\S+ days on 4 chips", printed)


@pytest.mark.slow
@pytest.mark.parametrize("topology", ["v5e:16x16", "v4:4x4x4"])
def test_imagenet64_fits_as_shipped(topology):
    experiment, place = from_config(imagenet64.get_config().to_dict()), plan.place_for(topology)
    stages = plan.make_plan(experiment, place, KNOWN)
    assert all(stage.batch_size == 2048 and stage.fits(place.topology) for stage in stages)
    assert stages[0].parameters == 295_900_035


@pytest.mark.slow
def test_cifar10_is_counted_as_published():
    stages = plan.make_plan(from_config(cifar10.get_config().to_dict()), plan.place_for("v4:2x2x2"), KNOWN)
    assert stages[0].parameters == 60_015_363 and math.isclose(stages[0].useful_flops / 3 / 16, 35.8e9, rel_tol=0.01)


@pytest.mark.slow
@pytest.mark.skipif(not LIBTPU.exists(), reason="compiles for a TPU: make .venv/extras")
def test_a_small_config_is_compiled_for_a_tpu_that_is_not_there(tmp_path):
    line = [sys.executable, "-m", "guided_distill.main", "--config=configs/digits.py", "--mode=plan", "--compile"]
    line += ["--topology=v5e:2x2", "--config.model.channels=8", "--config.model.emb_channels=16"]
    line += ["--config.model.norm_groups=4", "--config.model.multipliers=(1,)"]
    line += ["--config.model.attention_resolutions=()"]
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path), "PYTHONPATH": str(LIBTPU)}
    first = subprocess.run(line, cwd=REPO, env=environment, capture_output=True, text=True)
    assert first.returncode == 0, first.stderr
    assert "stage2_det_0016: compiling for 4 TPU v5 lite" in first.stdout and "stage1, sampler" in first.stdout
    again = subprocess.run(line, cwd=REPO, env=environment, capture_output=True, text=True)
    assert again.returncode == 0 and "compiling" not in again.stdout and again.stdout.count("known from") == 5


@pytest.mark.slow
def test_stable_diffusion_fits_as_shipped():
    config = CONFIGS["stable_diffusion"].get_config()
    experiment, place = from_config(config.to_dict()), plan.place_for("h100:16")  # v5p has more for a smaller share
    stages = plan.make_plan(experiment, place, KNOWN)
    assert all(stage.batch_size == 512 and stage.fits(place.topology) for stage in stages)


def test_a_value_that_products_read_again_later_is_made_again():
    def function(x, w):
        hidden = jnp.exp(x)
        between = hidden @ w
        for _ in range(60):
            between = jnp.tanh(between @ w)
        return hidden.T @ between

    size, result = 64 * 8 * 4, 8 * 8 * 4
    # Two products live at a time, and at the end one, the result and exp(x), which is not kept till then.
    assert costs.cost_of(function, shape(64, 8), shape(8, 8)).peak == 2 * size + result


def test_what_is_only_used_in_bfloat16_is_written_so():
    def function(dtype, x, w):
        return (jnp.exp(x @ w) * 2.0 + x).astype(dtype) @ w.astype(dtype)

    x, w = shape(64, 64), shape(64, 64)
    narrow, wide = (costs.cost_of(functools.partial(function, dtype), x, w) for dtype in (jnp.bfloat16, jnp.float32))
    assert narrow.peak == wide.peak / 2

    def gradient(x, w):
        return jax.grad(lambda w: (x @ w.astype(jnp.bfloat16)).astype(jnp.float32).sum())(w)

    assert costs.cost_of(gradient, shape(64, 64, dtype=jnp.bfloat16), w).results == 64 * 64 * 2


@pytest.mark.slow
def test_memory_is_what_the_compiler_says():
    """results/plan/tpu.md: MiB of a chip, compiled to the end."""
    found = {
        "imagenet64": ("v5e:16x16", {"teacher": 6018, "stage1": 7249, "stage2_det_0512": 6120}),
        "cifar10": ("v5e:2x2", {"teacher": 2059, "stage1": 2466, "stage2_det_0512": 2125}),
    }
    for config, (topology, sizes) in ((CONFIGS[name], entry) for name, entry in found.items()):
        plans = plan.make_plan(from_config(config.get_config().to_dict()), plan.place_for(topology), KNOWN)
        ours = {stage.name: stage.bytes / 2**20 for stage in plans}
        assert {name: ours[name] for name in sizes} == pytest.approx(sizes, rel=0.25)
