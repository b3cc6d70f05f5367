import importlib
import pathlib

import jax
import pytest
from tiny import tiny_config

from configs import cifar10_small
from guided_distill import pipeline
from guided_distill.differences import differing_keys
from guided_distill.errors import UserError
from guided_distill.experiment import from_config
from guided_distill.factories import call_factory
from guided_distill.stages import make_stages
from guided_distill.teachers import shapes_of

REPO = pathlib.Path(__file__).parents[1]
CONFIGS = sorted(path.stem for path in (REPO / "configs").glob("*.py") if path.stem not in ("common", "__init__"))


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_builds_its_network_and_lists_its_stages(name):
    experiment = from_config(importlib.import_module(f"configs.{name}").get_config().to_dict())
    outside = call_factory(experiment.teacher.factory, "") if experiment.teacher.factory else None
    stages = make_stages(experiment, outside)
    first = ["teacher", *["to_v"] * bool(experiment.to_v.updates), "stage1"]
    assert [stage.name for stage in stages[: len(first)]] == first
    for series in experiment.stage2.series:
        rounds = [stage.num_steps for stage in stages if stage.series == series and stage.model.null_cond]
        assert rounds == experiment.stage2.rounds()
    if experiment.latent_model or name == "imagenet64":
        return  # hundreds of millions of weights take ten seconds to trace; tests of their networks count them
    for stage in {stage.model: stage for stage in stages if stage.objective is not None}.values():
        embedding = shapes_of(stage.init)["embedding"]
        assert bool({"w", "w2"} & embedding.keys()) == stage.model.w_conditioned


def test_the_papers_configs_have_the_papers_numbers():
    cifar, imagenet = (
        from_config(importlib.import_module(f"configs.{name}").get_config().to_dict())
        for name in ("cifar10", "imagenet64")
    )
    assert cifar.stage2.rounds() == imagenet.stage2.rounds() == [512, 256, 128, 64, 32, 16, 8, 4, 2, 1]
    assert (cifar.teacher.batch_size, imagenet.teacher.batch_size) == (128, 2048)
    assert (cifar.stage2.learning_rate, imagenet.stage2.learning_rate) == (5e-5, 1e-4)
    assert cifar.stage2.updates_of(512) == 50_000 and cifar.stage2.updates_of(2) == 100_000
    assert (imagenet.stage1.w_min, imagenet.stage1.w_max) == (0.0, 4.0)


@pytest.mark.parametrize(("size", "least", "most"), [("gpu", 3.5e6, 4e6), ("cores", 0.8e6, 1e6)])
def test_cifar10_is_there_in_small_sizes(size, least, most):
    stages = make_stages(from_config(cifar10_small.get_config(size).to_dict()))
    student = shapes_of(stages[-1].init)
    assert least < sum(leaf.size for leaf in jax.tree.leaves(student)) < most
    with pytest.raises(ValueError, match="configs/cifar10_small.py:tpu: the sizes are gpu, cores"):
        cifar10_small.get_config("tpu")


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("seeed", 1, "config.seeed: no such key"),
        ("stage1.updatess", 1, "config.stage1.updatess: no such key; there are .*updates"),
        ("stage1.updates", "many", "config.stage1.updates is 'many'; it must be of type int"),
        ("stage1.updates", True, "config.stage1.updates is True"),
        ("model.name", "vit", "config.model.name is 'vit'; it must be one of unet, dit, mlp"),
        ("schedule.name", "linear", "config.schedule.name is 'linear'; it must be one of cosine"),
        ("parameterisation", "w", "config.parameterisation is 'w'; it must be one of x, eps, v"),
        ("weighting", "none", "config.weighting is 'none'; it must be one of"),
        ("model.remat_policy", "all", "config.model.remat_policy is 'all'; it must be one of nothing, products"),
        ("stage2.weighting", "none", "config.stage2.weighting is 'none'; it must be one of .*, landing"),
        ("stage2.teacher_steps", 48, "config.stage2.teacher_steps is 48; it must be a power of 2"),
        ("evaluate.w", (0.0, 5.0), r"config.evaluate.w holds 5.0, outside the trained range \[0.0, 4.0\]"),
        ("evaluate.num_steps", (3,), "config.evaluate.num_steps holds 3; students are trained for 2, 1"),
        ("stage1.w_min", 9.0, "w_min 9.0 and w_max 4.0"),
        ("data", 3, "config.data is 3; it must be a group of keys"),
        ("evaluate.w", (), "config.evaluate.w is empty"),
        ("evaluate.w", (1.0, 1.0000001), r"config.evaluate.w is \(1.0, 1.0000001\); name each w once"),
        ("evaluate.num_steps", (2, 1, 2), r"config.evaluate.num_steps is \(2, 1, 2\); name each once"),
        ("evaluate.features", ("classifier", "classifier"), "name each once"),
        ("evaluate.baselines", ("heun", "heun"), "name each once"),
        ("log.every", 0, "config.log.every is 0; it must be at least 1"),
        ("checkpoint.keep", 0, "config.checkpoint.keep is 0"),
        ("stage1.batch_size", 0, "config.stage1.batch_size is 0"),
        ("evaluate.num_samples", 1, "config.evaluate.num_samples is 1; it must be at least 2"),
        ("teacher.num_times", 0, "config.teacher.num_times is 0"),
        ("evaluate.w", 1.0, "config.evaluate.w is 1.0; it must be a list"),
    ],
)
def test_a_wrong_value_gets_one_line_that_names_its_key(key, value, says):
    config = tiny_config()
    group, *rest = key.split(".")
    (config[group] if rest else config)[rest[0] if rest else group] = value
    with pytest.raises(UserError, match=says) as error:
        from_config(config)
    assert "\n" not in str(error.value)


def test_the_weights_of_where_a_step_lands_are_of_the_deterministic_series_alone():
    config = tiny_config()
    config["stage2"]["weighting"], config["stage2"]["series"] = "landing", ("det", "sto")
    with pytest.raises(UserError, match="config.stage2.weighting is 'landing', for the series 'det' alone; 'sto' is"):
        from_config(config)


def test_a_missing_key_is_named():
    config = tiny_config()
    del config["stage1"]["updates"]
    with pytest.raises(UserError, match="config.stage1.updates is missing"):
        from_config(config)


@pytest.mark.parametrize(
    "values", [{"model.patch": 3}, {"model.norm_groups": 3}, {"model.dtype": "float99"}], ids=lambda v: next(iter(v))
)
def test_a_network_that_cannot_be_built_gets_one_line(values, tmp_path):
    with pytest.raises(UserError, match="config.model does not make a network for 8x8x1 samples: .+") as error:
        pipeline.open_run(tiny_config(**values), tmp_path / "new")
    assert "\n" not in str(error.value) and not (tmp_path / "new").exists()


def test_integers_stand_for_floats_and_lists_for_tuples():
    experiment = from_config(tiny_config(**{"stage1.w_max": 4.0}) | {"evaluate": {
        **tiny_config()["evaluate"], "w": [0, 1], "num_steps": [1]}})  # fmt: skip
    assert experiment.evaluate.w == (0.0, 1.0) and experiment.evaluate.num_steps == (1,)
    assert hash(experiment) == hash(experiment)


def test_only_keys_that_change_trained_weights_count_as_different():
    ours = tiny_config()
    theirs = tiny_config(**{"evaluate.num_samples": 3, "log.every": 9, "checkpoint.every": 1})
    assert differing_keys(ours, theirs) == []
    theirs = tiny_config(**{"stage1.learning_rate": 0.25, "seed": 3})
    assert differing_keys(ours, theirs) == ["config.seed: 3 -> 0", "config.stage1.learning_rate: 0.25 -> 0.0005"]
    # What JSON makes of a tuple is the same value.
    assert differing_keys(ours, {**ours, "model": {**ours["model"], "multipliers": [1]}}) == []


def test_what_an_earlier_version_did_not_know_has_its_default():
    ours = tiny_config()
    theirs = {key: value for key, value in ours.items() if key not in ("teacher_dtype", "mesh", "rounds")}
    theirs["teacher"] = {key: value for key, value in ours["teacher"].items() if key != "accumulate"}
    theirs["model"] = {key: value for key, value in ours["model"].items() if key != "remat"}
    assert differing_keys(ours, theirs) == []
    assert differing_keys({**ours, "teacher_dtype": "bfloat16"}, theirs) == [
        "config.teacher_dtype: 'float32' -> 'bfloat16'"
    ]
    assert differing_keys(ours, {key: value for key, value in ours.items() if key != "seed"})


@pytest.mark.parametrize("key", ["mesh.fsdp", "stage1.accumulate", "model.remat"])
def test_how_the_work_is_laid_out_may_change_under_a_workdir(key):
    ours, group, name = tiny_config(), *key.split(".")
    assert differing_keys(ours, {**ours, group: {**ours[group], name: 7}}) == []
