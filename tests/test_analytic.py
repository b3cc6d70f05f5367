"""The analytic teacher against numerical integrals, autodiff and exact flows, and as a teacher of both stages."""

import dataclasses

import analytic as gaussians
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_samplers import GUIDED

from guided_distill import analytic, diffusion, samplers
from guided_distill.objectives import Knobs, make_stage1, make_stage2

COSINE = diffusion.Cosine()
SCHEDULES = [make() for make in diffusion.SCHEDULES.values()]
each_schedule = pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
LINE = {  # two classes on a line, one of two Gaussians and one of a single one, given as two
    "means": [[[-1.0], [0.5]], [[1.2], [9.0]]],
    "stds": [[0.3, 0.2], [0.4, 0.1]],
    "weights": [[0.7, 0.3], [1.0, 0.0]],
    "prior": [0.4, 0.6],
}
PLANE = {"means": [[[-1.0, 0.3], [0.5, -0.2]], [[0.8, 1.0], [0.0, 1.2]]], "stds": [[0.3, 0.5], [0.4, 0.3]]}
MIXTURE = analytic.make_mixture2d()
W = np.array([0.0, 0.5, 1.0, 2.0, 4.0], np.float32)


def in_plane(schedule):
    return dataclasses.replace(
        MIXTURE, schedule=schedule, model_fn=analytic.mixture_teacher(schedule, [[[0.0]]], [[1.0]]).model_fn
    )


def noise(num, dim=2, seed=0):
    return np.random.default_rng(seed).standard_normal((num, dim)).astype(np.float32)


def make_cond(num, num_labels, w=W):
    return {"label": np.arange(num, dtype=np.int32) % num_labels, "w": np.resize(w, num)}


# The posterior


def in_float64(params):
    return jax.tree.map(lambda array: array.astype(np.float64), params)


def integrated(params, z, label, alpha, sigma):
    """E[x | z, label] by a Riemann sum over a grid, exact to rounding where the grid resolves sigma / alpha."""
    mean, std, weight, prior = (params[name] for name in ("mean", "std", "weight", "prior"))
    axis, dim = np.linspace(-4.0, 4.0, 4001 if mean.shape[-1] == 1 else 401), mean.shape[-1]
    x = np.stack(np.meshgrid(*[axis] * dim, indexing="ij"), -1).reshape(-1, dim)
    classes = range(len(prior)) if label == len(prior) else [label]
    density = sum(
        prior[c] * weight[c, k] / std[c, k] ** dim * np.exp(-((x - mean[c, k]) ** 2).sum(-1) / (2 * std[c, k] ** 2))
        for c in classes
        for k in range(mean.shape[1])
    )
    density = density * np.exp(-((z - alpha * x) ** 2).sum(-1) / (2 * sigma**2))
    return density @ x / density.sum()


@pytest.mark.parametrize("spec", [LINE, PLANE], ids=["line", "plane"])
@each_schedule
def test_posterior_mean_is_the_integral_over_x(schedule, spec):
    teacher = analytic.mixture_teacher(schedule, **spec)
    params = in_float64(teacher.params)
    for t in (0.3, 0.9):
        logsnr = schedule.logsnr(np.full(3, t))
        alpha, sigma = schedule.alpha_sigma(logsnr)
        z, label = 1.5 * noise(3, teacher.sample_shape[0]).astype(float), np.arange(3)
        raw = teacher.model_fn(params, z, logsnr, {"label": label})
        x, eps = diffusion.to_prediction("v", raw, z, alpha, sigma)
        expected = [integrated(params, *given) for given in zip(z, label, alpha, sigma, strict=True)]
        assert x.dtype == np.float64
        np.testing.assert_allclose(x, expected, atol=1e-9)
        np.testing.assert_allclose(diffusion.diffuse(x, eps, alpha, sigma), z, atol=1e-12)


@each_schedule
def test_one_gaussian_a_class_is_the_gaussian_denoiser(schedule):
    means = [-1.0, 0.5, 1.0]
    teacher = analytic.mixture_teacher(schedule, [[[m, m]] for m in means], [[0.4]] * 3)
    plain = jax.jit(dataclasses.replace(teacher, null_cond=None).denoiser(teacher.params))
    z, logsnr = jnp.asarray(noise(60)), jnp.linspace(-20.0, 20.0, 60)
    cond = {"label": jnp.arange(60) % 3}
    expected = jax.jit(gaussians.gaussian(schedule, gaussians.classes(means, 0.4, 0.0)))(z, logsnr, cond)
    for got, part in zip(plain(z, logsnr, cond), expected, strict=True):
        np.testing.assert_allclose(got, part, atol=2e-6)


@each_schedule
def test_no_condition_is_the_mean_over_classes_by_their_posterior_probability(schedule):
    params = analytic.mixture_teacher(schedule, **LINE).params
    z = 2.0 * noise(20, 1).astype(float)
    at = schedule.alpha_sigma(schedule.logsnr(np.linspace(0.0, 1.0, 20)))
    of = [np.full(20, c) for c in range(3)]
    log_densities = [analytic.log_density(params, z, label, *at) for label in of]
    probability = [params["prior"][c] * np.exp(log_densities[c] - log_densities[2]) for c in range(2)]
    np.testing.assert_allclose(sum(probability), 1.0, atol=1e-6)
    parts = [analytic.posterior(params, z, label, *at) for label in of]
    for first, second, whole in zip(*parts, strict=True):
        mean = probability[0][:, None] * first + probability[1][:, None] * second
        np.testing.assert_allclose(mean, whole, atol=1e-5)


@each_schedule
def test_eps_is_minus_sigma_times_the_score(schedule):
    params = jax.tree.map(jnp.asarray, analytic.mixture_teacher(schedule, **PLANE).params)

    def log_p(z, label, alpha, sigma):
        """Written out anew, by jax.scipy and a table of the classes that a label stands for."""
        std = jnp.sqrt(alpha**2 * params["std"] ** 2 + sigma**2)
        density = jax.scipy.stats.norm.pdf(z[None, None], alpha * params["mean"], std[..., None]).prod(-1)
        of_class = jnp.array([[1.0, 0.0], [0.0, 1.0], [0.5, 0.5]])[label]
        return jnp.log((of_class * (params["weight"] * density).sum(-1)).sum())

    @jax.jit
    def both(z, label, alpha, sigma):
        own = analytic.log_density(params, z, label, alpha, sigma), analytic.posterior(params, z, label, alpha, sigma)
        return own, jax.vmap(jax.value_and_grad(log_p))(z, label, alpha, sigma)

    alpha, sigma = schedule.alpha_sigma(jnp.linspace(-15.0, 5.0, 30))
    (value, prediction), (expected, score) = both(noise(30), np.arange(30) % 3, alpha, sigma)
    np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(prediction.eps, -sigma[:, None] * score, rtol=1e-4, atol=1e-5)


def test_finite_in_float32_at_both_ends_and_far_from_everything():
    z = np.concatenate([noise(6), 1e4 * noise(6)])

    @jax.jit
    def raw_outputs(label):
        return [
            in_plane(schedule).model_fn(
                MIXTURE.params, jnp.asarray(z), schedule.logsnr(jnp.full(12, t)), {"label": label}
            )
            for schedule in SCHEDULES
            for t in (0.0, 1.0)
        ]

    raw = np.stack(raw_outputs(np.arange(12) % 4))
    assert raw.dtype == np.float32 and np.isfinite(raw).all()


def test_a_component_without_weight_does_not_exist():
    z, label, at = noise(20, 1), np.full(20, 1), (np.full(20, 0.8), np.full(20, 0.6))
    one = analytic.mixture_teacher(COSINE, [[[1.2]]], [[0.4]]).params
    two = analytic.mixture_teacher(COSINE, **LINE).params
    for got, expected in zip(
        analytic.posterior(two, z, label, *at), analytic.posterior(one, z, 0 * label, *at), strict=True
    ):
        np.testing.assert_allclose(got, expected, rtol=1e-6)


# The teacher


@each_schedule
def test_guided_teacher_is_the_combination_for_every_row_alone(schedule):
    teacher = in_plane(schedule)
    denoiser = jax.jit(lambda *inputs: teacher.denoiser(teacher.params)(*inputs))
    z, cond = noise(30), make_cond(30, 3)
    logsnr = schedule.logsnr(np.linspace(0.05, 0.95, 30)).astype(np.float32)
    at = schedule.alpha_sigma(logsnr.astype(float))
    conditional, unconditional = (
        analytic.posterior(teacher.params, z.astype(float), label, *at) for label in (cond["label"], np.full(30, 3))
    )
    guided = denoiser(z, logsnr, cond)
    for got, own, null in zip(guided, conditional, unconditional, strict=True):
        w = cond["w"][:, None].astype(float)
        np.testing.assert_allclose(got, (1 + w) * own - w * null, atol=5e-5)
    order = np.random.default_rng(0).permutation(30)
    permuted = denoiser(*jax.tree.map(lambda array: array[order], (z, logsnr, cond)))
    for got, expected in zip(permuted, guided, strict=True):
        np.testing.assert_array_equal(got, expected[order])


def test_teachers_of_one_schedule_share_their_compiled_programs():
    first, second = (analytic.mixture_teacher(COSINE, [[[m]], [[1.0]]], [[0.3]] * 2).static() for m in (0.0, 0.5))
    assert first == second and hash(first) == hash(second)
    assert first.data_range is None and first.sample_shape == (1,) and first.calls_per_step == 2


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"stds": [[0.3], [0.4]]}, "shapes"),
        ({"prior": [1.0]}, "shapes"),
        ({"stds": [[0.3, 0.0], [0.4, 0.1]]}, "positive"),
        ({"weights": [[0.7, 0.7], [1.0, 0.0]]}, "sum to 1"),
        ({"prior": [1.5, -0.5]}, "sum to 1"),
    ],
)
def test_a_wrong_specification_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        analytic.mixture_teacher(COSINE, **LINE | wrong)


# Exact flows


def guided_line(w, mu, s, u, r_1):
    """(mean, slope): the guided flow of r = sigma / alpha from r_1 to 0 takes z / alpha to mean + slope z / alpha."""
    r = np.exp(np.linspace(-12.0, np.log(r_1), 20001))
    h = (s**2 + r**2) ** ((1 + w) / 2) * (u**2 + r**2) ** (-w / 2)
    h_0 = s ** (1 + w) * u**-w
    return mu * (1 + w) * h_0 * np.trapezoid(r**2 / ((s**2 + r**2) * h), np.log(r)), h_0 / h[-1]


def test_guided_gaussian_moments_give_their_table_and_the_integral_over_r():
    means, stds = analytic.guided_gaussian_moments(np.array([*GUIDED]), 1.0, 0.5, 1.0)
    np.testing.assert_allclose(np.stack([means, stds], 1), [row[0] for row in GUIDED.values()], atol=1e-5)
    for w in (0.0, 0.5, 3.0):
        mean, slope = guided_line(w, -0.7, 0.3, 1.1, r_1=1e6)
        assert analytic.guided_gaussian_moments(w, -0.7, 0.3, 1.1) == pytest.approx((mean, 1e6 * slope), rel=1e-5)


@each_schedule
def test_solver_reproduces_the_exact_guided_gaussian(schedule):
    """Of two classes, the second is all there is without a condition: N(0, 1), whose prior is one but for rounding."""
    teacher = analytic.mixture_teacher(schedule, [[[1.0]], [[0.0]]], [[0.5], [1.0]], prior=[1e-30, 1.0])
    z, cond = np.repeat([[0.0], [1.0]], len(W), 0), {"label": np.zeros(2 * len(W), int), "w": np.tile(W, 2)}
    at_zero, at_one = analytic.solve_guided_ode(teacher, z, cond, 200).reshape(2, -1)
    (alpha,), (sigma,) = schedule.alpha_sigma(schedule.logsnr(np.ones(1)))
    for k, w in enumerate(W.astype(float)):
        mean, slope = guided_line(w, 1.0, 0.5, 1.0, sigma / alpha)
        assert (at_zero[k], at_one[k] - at_zero[k]) == pytest.approx((mean, slope / alpha), abs=1e-6), w


@each_schedule
def test_gaussian_flow_is_the_solution_for_one_gaussian_and_composes(schedule):
    teacher = analytic.mixture_teacher(schedule, [[[0.5, -0.3]]], [[0.2]])
    grid = diffusion.Grid(*(table.astype(float) for table in diffusion.make_grid(schedule, 4)))
    z = noise(10).astype(float)
    mean = np.array([[0.5, -0.3]])
    whole = analytic.gaussian_flow(z, mean, 0.2, grid.at(4), grid.at(0))
    cond = make_cond(10, 1)
    # The solver ends with x_hat, the flow with z_0: they differ by sigma_0 eps.
    np.testing.assert_allclose(analytic.solve_guided_ode(teacher, z, cond, 200), whole, atol=2e-4)
    middle = analytic.gaussian_flow(z, mean, 0.2, grid.at(4), grid.at(2))
    np.testing.assert_allclose(analytic.gaussian_flow(middle, mean, 0.2, grid.at(2), grid.at(0)), whole, atol=1e-12)


def test_solver_is_of_order_four():
    z, cond = noise(10), make_cond(10, 3)
    exact, *coarse = (analytic.solve_guided_ode(MIXTURE, z, cond, n) for n in (500, 50, 100))
    errors = [np.abs(x - exact).max() for x in coarse]
    assert 10 < errors[0] / errors[1] < 24 and errors[1] < 1e-6


@each_schedule
def test_deterministic_sampler_tends_to_the_solution_to_first_order(schedule):
    teacher, z, cond = in_plane(schedule), noise(30), make_cond(30, 3)
    exact = analytic.solve_guided_ode(teacher, z, cond, 150)

    @jax.jit
    def sample(params, grid, z, cond, num_steps):
        return samplers.deterministic(teacher.denoiser(params), grid, z, cond, num_steps)

    def error(num_steps):
        return np.linalg.norm(sample(teacher.params, grid, z, cond, num_steps) - exact) / np.sqrt(len(z))

    grid = diffusion.make_grid(schedule, 256)
    errors = [error(n) for n in (64, 128, 256)]
    assert errors[-1] < 0.02
    # With discrete betas sigma goes like the root of t at the clean end, which makes it log(N) / N.
    least = 1.6 if isinstance(schedule, diffusion.DiscreteBetas) else 1.8
    for coarse, fine in zip(errors, errors[1:], strict=False):
        assert least < coarse / fine < 2.2


def test_solver_refuses_what_it_would_get_wrong():
    for other in ({"w_conditioned": True}, {"guided": lambda params: None}):
        with pytest.raises(ValueError, match="classifier-free"):
            analytic.solve_guided_ode(dataclasses.replace(MIXTURE, **other), noise(1), make_cond(1, 1))


# Samples


def moments(x):
    return np.concatenate([x.mean(0), np.cov(x.T).ravel()])


def test_samples_without_guidance_are_distributed_as_the_data_of_their_class():
    num = 2400
    x = analytic.solve_guided_ode(MIXTURE, noise(num), make_cond(num, 3, w=[0.0]), 30)
    for label in range(3):
        mean, std, weight = (MIXTURE.params[name][label].astype(float) for name in ("mean", "std", "weight"))
        centre = weight @ mean
        covariance = (mean - centre).T @ (weight[:, None] * (mean - centre)) + weight @ std**2 * np.eye(2)
        np.testing.assert_allclose(moments(x[label::3]), [*centre, *covariance.ravel()], atol=0.06)


def test_data_are_fixed_and_are_the_mixture():
    data, again = analytic.make_mixture2d_data(), analytic.make_mixture2d_data()
    assert data.keys() == {"train", "test"}
    for split, num in (("train", 20_000), ("test", 4_000)):
        x, label = data[split]
        assert x.shape == (num, 2) and label.shape == (num,) and (x.dtype, label.dtype) == (np.float32, np.int32)
        np.testing.assert_array_equal(x, again[split][0])
        np.testing.assert_allclose(np.bincount(label) / num, MIXTURE.params["prior"], atol=0.03)
        for c in range(3):
            np.testing.assert_allclose(
                x[label == c].mean(0), MIXTURE.params["weight"][c] @ MIXTURE.params["mean"][c], atol=0.05
            )
        # The mean of log p over its own samples is greatest at the true parameters.
        wider = MIXTURE.params | {"std": 1.1 * MIXTURE.params["std"]}
        narrower = MIXTURE.params | {"std": 0.9 * MIXTURE.params["std"]}
        mean_log_p = [
            analytic.log_density(params, x, label, np.ones(num), np.zeros(num)).mean()
            for params in (MIXTURE.params, wider, narrower)
        ]
        assert mean_log_p[0] > max(mean_log_p[1:])
    assert not set(data["train"][0][:, 0]) >= set(data["test"][0][:, 0])


# A teacher of both stages


def in_one_call(schedule):
    """A student that is the guided teacher itself: a network that takes w, as stage one should end with."""
    teacher = in_plane(schedule)

    def model_fn(params, z, logsnr, cond, *, dropout_key=None):
        w = cond["w"][:, None]
        own, null = (teacher.model_fn(params, z, logsnr, c) for c in (cond, teacher.null_cond(cond)))
        return own + w * (own - null)

    return dataclasses.replace(teacher, model_fn=model_fn, w_conditioned=True)


@each_schedule
def test_loss_of_both_stages_is_zero_for_the_guided_teacher_and_its_two_steps(schedule):
    teacher, student, num = in_plane(schedule), in_one_call(schedule), 64
    grid = diffusion.make_grid(schedule, 8)
    knobs = Knobs(np.int32(4), np.int32(1), np.float32(0.0), np.float32(0.0), np.float32(4.0), grid)
    x, label = (array[:num] for array in analytic.make_mixture2d_data()["test"])

    @jax.jit
    def losses(params, batch, knobs, keys):
        guided = teacher.denoiser(params)
        unguided = dataclasses.replace(teacher, null_cond=None).denoiser(params)
        halved = gaussians.two_step_student(schedule, guided, 4)
        students = [
            (make_stage1, student.denoiser(params)),
            (make_stage1, unguided),
            (make_stage2, halved),
            (make_stage2, guided),
        ]
        return [
            make(weighting="snr_trunc")({"student": one, "teacher": guided}, schedule, batch, knobs, keys)[0]
            for make, one in students
        ]

    keys = jax.random.split(jax.random.key(0), num)
    same, unguided, halved, unhalved = losses(teacher.params, {"x": x, "label": label}, knobs, keys)
    assert float(same.max()) < 1e-7 and float(halved.max()) < 1e-6
    assert float(unguided.mean()) > 1e-2 and float(unhalved.mean()) > 1e-3
