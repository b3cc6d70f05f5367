"""Distils a Flax denoiser of one's own by library calls alone: python examples/own_denoiser.py"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import guided_distill as gd

UPDATES, TEACHER_STEPS, OMEGA = 1000, 8, "snr_trunc"
MESH, NULL_COND, RNG = gd.make_mesh(), gd.null_label(3), np.random.default_rng(0)
GRID = gd.place(MESH, gd.make_grid(gd.Cosine(), TEACHER_STEPS))


class Denoiser(nn.Module):  # yours: here v of points z [B, 2]; label 3 stands for none, and only students are given w
    @nn.compact
    def __call__(self, z, logsnr, label, w=None, *, train=False):
        h = nn.Dense(64)(z) + nn.Dense(64)(logsnr[:, None] / 20.0) + nn.Embed(4, 64)(label)
        if w is not None:  # zero at first: a student starts as its teacher without guidance
            h += nn.Dense(64, kernel_init=nn.initializers.zeros, name="strength")(w[:, None])
        for _ in range(2):
            h += nn.Dense(64)(nn.swish(h))
        return nn.Dense(2)(nn.swish(h))


def batch():  # yours: here points on three arcs of a circle
    label = RNG.integers(0, 3, 256).astype(np.int32)
    angle = 2.0 * np.pi / 3.0 * label + RNG.normal(0.0, 0.3, 256)
    x = 0.8 * np.stack([np.cos(angle), np.sin(angle)], -1).astype(np.float32)
    return gd.shard_batch(MESH, {"x": x, "label": label})


def fit(objective, model, params, teacher=None, num_steps=TEACHER_STEPS):
    optimiser, frozen = gd.OptimiserConfig(decay="linear", ema=0.99), {"teacher": teacher.params} if teacher else {}
    step = gd.make_train_step(objective, model.static(), teacher and teacher.static(), optimiser, MESH)
    knobs = gd.Knobs(num_steps=num_steps, updates=UPDATES, peak_lr=3e-3, w_min=0.0, w_max=4.0, grid=GRID)
    state = gd.place(MESH, gd.make_state(jax.tree.map(jnp.copy, params), optimiser))  # copies: a step donates its state
    for _ in range(UPDATES):
        state, metrics = step(state, frozen, batch(), knobs, jax.random.key(num_steps))
    return dataclasses.replace(model, params=state.eval_params)


inputs, model_fn = (jnp.zeros((1, 2)), jnp.zeros(1), jnp.zeros(1, int)), gd.make_model_fn(Denoiser())
fresh = Denoiser().init(jax.random.key(0), *inputs)["params"]
teacher = gd.Teacher(model_fn, fresh, gd.Cosine(), "v", NULL_COND, num_classes=3, sample_shape=(2,), data_range=None)
teacher = fit(gd.make_denoise(weighting=OMEGA, null_cond=NULL_COND, cond_dropout=0.1), teacher, fresh)  # yours exists
params = gd.student_params(teacher.params, Denoiser().init(jax.random.key(1), *inputs, jnp.zeros(1))["params"])
student = fit(gd.make_stage1(weighting=OMEGA), dataclasses.replace(teacher, w_conditioned=True), params, teacher)
halve, z = gd.make_stage2(weighting=OMEGA), gd.initial_noise(gd.image_keys(0, jnp.arange(300)), (2,))
cond = {"label": jnp.arange(300) % 3, "w": jnp.ones(300)}
draw = jax.jit(lambda model, params, *rest: gd.samplers.deterministic(model.denoiser(params), *rest), static_argnums=0)
reference = draw(teacher.static(), teacher.params, GRID, z, cond, TEACHER_STEPS)
for num_steps in (4, 2, 1):
    student = fit(halve, student, student.params, student, num_steps)
    for name, model in (("student", student), ("teacher", teacher)):
        x = draw(model.static(), model.params, GRID, z, cond, num_steps)
        print(f"{name}, {num_steps} steps: {((x - reference) ** 2).mean():.5f} from the teacher of {TEACHER_STEPS}")
