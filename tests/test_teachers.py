"""Teachers from elsewhere: a user's function, combinations of several networks, and what is said of a wrong one."""

import dataclasses
import functools

import analytic as oracles
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from tiny import quick_config

from guided_distill import diffusion, pipeline
from guided_distill.errors import UserError
from guided_distill.experiment import from_config
from guided_distill.guidance import Teacher, autoguidance, ensemble, interval
from guided_distill.models import make_model_fn
from guided_distill.models.mlp import MLP, MLPConfig
from guided_distill.objectives import Knobs, make_stage1
from guided_distill.teachers import flops_of_a_call, load_teacher, outside_teacher, shapes_of

COSINE = diffusion.Cosine()
B = 6
Z = jax.random.normal(jax.random.key(0), (B, 2))
LOGSNR = jnp.linspace(-6.0, 6.0, B)
COND = {"label": jnp.arange(B) % 2, "w": jnp.array([0.0, 0.5, 1.0, 2.0, 3.0, 4.0])}


def linear(params, z, logsnr, cond, *, dropout_key=None):
    """A network of two weights: it knows the label, the noise level and the sample."""
    label = diffusion.expand(cond["label"].astype(jnp.float32), z)
    level = diffusion.expand(jnp.tanh(logsnr / 4), z)
    return params["a"] * z + params["b"] * label * level


def null_cond(cond):
    return {**cond, "label": jnp.full_like(cond["label"], 2)}


def teacher(a, b, **options):
    params = {"a": jnp.float32(a), "b": jnp.float32(b)}
    fields = {"parameterisation": "v", "null_cond": null_cond, "num_classes": 2, "sample_shape": (2,)}
    return Teacher(linear, params, COSINE, **(fields | options))


def velocity_of(some, cond=COND):
    return diffusion.velocity(some.denoiser(some.params)(Z, LOGSNR, cond), *COSINE.alpha_sigma(LOGSNR))


# Combinations


def test_an_ensemble_is_the_mean_of_its_members_before_guidance():
    members = [teacher(0.3, 0.2), teacher(-0.5, 1.0), teacher(0.1, -0.4)]
    together = ensemble(members)
    assert together.params["a"].shape == (3,) and together.calls_per_step == 6
    mean = sum(velocity_of(member) for member in members) / 3
    np.testing.assert_allclose(velocity_of(together), mean, atol=1e-5)


def test_members_may_differ_in_network_and_in_what_they_predict():
    as_eps = teacher(0.4, 0.1, parameterisation="eps")
    members = [teacher(0.3, 0.2), as_eps, ensemble([teacher(0.0, 0.5), teacher(0.2, 0.5)])]
    together = ensemble(members)
    assert isinstance(together.params, tuple) and together.calls_per_step == 8
    mean = sum(velocity_of(member) for member in members) / 3
    np.testing.assert_allclose(velocity_of(together), mean, rtol=1e-4, atol=1e-3)
    with pytest.raises(ValueError, match="same schedule, sample shape and classes"):
        ensemble([members[0], teacher(0.0, 0.0, sample_shape=(3,))])


def test_autoguidance_extrapolates_from_the_weak_to_the_strong_model():
    strong, weak = teacher(0.3, 0.2), teacher(0.1, -0.3)
    without_w = {name: value for name, value in COND.items() if name != "w"}
    good, bad = (linear(t.params, Z, LOGSNR, without_w) for t in (strong, weak))
    w = COND["w"][:, None]
    np.testing.assert_allclose(velocity_of(autoguidance(strong, weak)), (1 + w) * good - w * bad, atol=1e-5)
    # Against itself there is nothing to extrapolate.
    np.testing.assert_allclose(velocity_of(autoguidance(strong, strong)), good, atol=1e-5)


def test_an_interval_guides_inside_and_is_conditional_outside():
    whole = teacher(0.3, 0.2)
    gated = velocity_of(interval(whole, -2.0, 3.0))
    unguided = velocity_of(whole, {**COND, "w": jnp.zeros(B)})
    inside = (LOGSNR >= -2.0) & (LOGSNR < 3.0)
    assert 0 < int(inside.sum()) < B
    np.testing.assert_array_equal(gated, jnp.where(inside[:, None], velocity_of(whole), unguided))


@pytest.mark.parametrize("combine", [ensemble, lambda pair: autoguidance(*pair), lambda pair: interval(pair[0], -1, 1)])
def test_stage_one_learns_any_of_them_as_it_is(combine):
    combined = combine([teacher(0.3, 0.2), teacher(-0.1, 0.6)])
    assert hash(combined.static()) == hash(combined.static())
    knobs = Knobs(*(jnp.float32(1.0),) * 3, jnp.float32(0.0), jnp.float32(4.0), None)
    batch = {"x": Z, "label": COND["label"]}
    guided = combined.denoiser(combined.params)

    @jax.jit
    def losses(keys):
        plain = teacher(0.3, 0.2).denoiser(teacher(0.3, 0.2).params)
        objective = make_stage1(weighting="v_mse")
        return [objective({"student": s, "teacher": guided}, COSINE, batch, knobs, keys)[0] for s in (guided, plain)]

    zero, other = losses(jax.random.split(jax.random.key(1), B))
    assert float(zero.max()) < 1e-10 and float(other.mean()) > 1e-4


# A function of the user's own


def own_teacher():
    """The example of the README: digits of 8x8, a teacher that is no network at all."""
    digits = oracles.classes([*np.linspace(-0.8, 0.8, 10)], 0.4, 0.7)

    def model_fn(params, z, logsnr, cond, *, dropout_key=None):
        prediction = oracles.gaussian(COSINE, digits)(z, logsnr, cond)
        return params["scale"] * diffusion.velocity(prediction, *COSINE.alpha_sigma(logsnr))

    return Teacher(model_fn, {"scale": jnp.ones(())}, COSINE, "v", _null_of_ten, num_classes=10, sample_shape=(8, 8, 1))


def _null_of_ten(cond):
    return {**cond, "label": jnp.full_like(cond["label"], 10)}


def own_teacher_with_a_student():
    given = own_teacher()

    def with_w(params, z, logsnr, cond, *, dropout_key=None):
        w = diffusion.expand(cond["w"], z)
        return given.model_fn(params, z, logsnr, cond) * (1.0 + params["of_w"] * w)

    return dataclasses.replace(given, student=(with_w, lambda key: {"scale": jnp.ones(()), "of_w": jnp.zeros(())}))


def not_a_teacher():
    return 3


def config(name, **values):
    return quick_config(**{"teacher.factory": f"{__name__}:{name}", **values})


@pytest.mark.parametrize(
    ("name", "leaves"),
    [
        pytest.param("own_teacher", None, marks=pytest.mark.slow),
        ("own_teacher_with_a_student", {"scale", "of_w"}),
    ],
)
def test_a_teacher_of_the_users_own_is_distilled_and_evaluated(name, leaves, tmp_path):
    summary = pipeline.run(config(name, **{"evaluate.num_steps": (1,), "evaluate.w": (4.0,)}), tmp_path)
    assert sorted(path.name for path in tmp_path.glob("[0-9]*")) == [
        "01_stage1",
        "02_stage2_det_0002",
        "03_stage2_det_0001",
    ]
    first = summary["rows"][0]
    assert (first["model"], first["checkpoint"]) == ("teacher", f"{__name__}:{name}")
    run = pipeline.open_run(config(name), tmp_path)
    last = run.params_of(run.stages[-1])
    assert ("embedding" in last) if leaves is None else (last.keys() == leaves)


@pytest.mark.parametrize(
    ("name", "values", "says"),
    [
        ("not_a_teacher", {}, "returned a int; a guidance.Teacher is needed"),
        ("nothing", {}, "has no function 'nothing'"),
        ("own_teacher", {"data.num_classes": 9}, "has num_classes 10, the config's data 9"),
    ],
)
def test_what_is_wrong_with_a_teacher_is_named(name, values, says):
    wrong = config(name, **values)
    with pytest.raises(UserError, match=f"config.teacher.factory.*{says}"):
        outside_teacher(wrong["teacher"]["factory"], from_config(wrong))


def test_a_module_that_is_not_there_is_named():
    with pytest.raises(UserError, match="config.teacher.factory: 'nowhere:f' names the module 'nowhere'"):
        outside_teacher("nowhere:f", from_config(quick_config()))


# The teacher of an earlier run


@functools.cache
def trained(directory):
    pipeline.run(quick_config(**{"evaluate.num_steps": (1,), "evaluate.w": (4.0,)}), directory)
    return directory


@pytest.mark.slow
def test_an_earlier_runs_teacher_is_loaded_with_a_student_that_starts_from_it(tmp_path):
    loaded = load_teacher(trained(tmp_path))
    run = pipeline.open_run(quick_config(), tmp_path)
    expected = run.params_of(run.stages[0])
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), loaded.params, expected))
    model_fn, start = loaded.student
    z = jnp.zeros((2, 8, 8, 1))
    cond = {"label": jnp.array([1, 2]), "w": jnp.array([0.0, 3.0])}
    at = (z + 0.3, jnp.zeros(2))
    as_student = model_fn(start(jax.random.key(0)), *at, cond)
    np.testing.assert_array_equal(as_student, loaded.model_fn(loaded.params, *at, {"label": cond["label"]}))


@pytest.mark.slow
def test_a_stage_one_trained_earlier_is_taken_as_it_is(tmp_path):
    first = trained(tmp_path / "first")
    values = {"teacher.checkpoint": str(first), "stage1.checkpoint": str(first), "stage2.series": ("sto",)}
    pipeline.run(quick_config(**values), tmp_path / "second")
    assert sorted(path.name for path in (tmp_path / "second").glob("[0-9]*")) == [
        "02_stage2_sto_0002",
        "03_stage2_sto_0001",
    ]
    with pytest.raises(UserError, match="config.stage1.checkpoint is given without its teacher"):
        from_config(quick_config(**{"stage1.checkpoint": str(first)}))


def test_a_call_has_the_operations_that_its_products_have():
    config = MLPConfig(features=32, num_layers=1, emb_channels=8, num_classes=3, out_channels=2)
    model = Teacher(make_model_fn(MLP(config)), None, COSINE, "v", None, 3, sample_shape=(5, 2))
    one = jnp.zeros(1)

    def init(key):
        return MLP(config).init(key, jnp.zeros((1, 5, 2)), one, one.astype(int), None)["params"]

    kernels = [leaf for path, leaf in flatten_dict(shapes_of(init)).items() if path[-1] == "kernel"]
    assert flops_of_a_call(model, init) == sum(2 * leaf.size for leaf in kernels)
