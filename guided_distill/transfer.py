"""Style transfer by encoder distillation: N calls from an image to its noise, N calls from there to another domain.

(arXiv 2210.03142, section 5.3; two models joined by their common noise, arXiv 2203.08382.)
"""

import dataclasses
import json
import sys

import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from guided_distill import diffusion, generate, pictures, samplers, sharding
from guided_distill.data import read_records
from guided_distill.errors import UserError
from guided_distill.files import absolute, read_json, write_whole
from guided_distill.workdir import open_run

REFERENCE_STEPS = 512  # of DDIM, encoding and decoding
_MOST_IMAGES = 1000
_MOST_STEPS = 16  # of what is compared
_SHOWN = 10


@dataclasses.dataclass(frozen=True)
class Model:
    """One way to encode and to decode in a domain: networks with their weights, and the steps they take."""

    encoder: tuple  # (static Teacher, params)
    decoder: tuple
    num_steps: int
    grid: diffusion.Grid


def transfer(config, workdir, *, target, w):
    """Encodes the test images of the run in `workdir` and decodes them there and in the run in `target`, at strength w.

    For every N of the distilled encoder: the error of reconstruction within the source domain, and the distance to
    what 512 + 512 DDIM steps make of an image in the target domain, each beside DDIM at N + N and at 16 + 16. Prints
    the table and leaves transfer.json and transfer.png in `workdir`. Raises UserError for a run without an encoder, and
    for domains of different shape or classes.
    """
    source = open_run(config, workdir, create=False)
    path = absolute(target) / "config.json"
    if not path.exists():
        raise UserError(f"--target={target}: holds no config.json; give the workdir of a finished run")
    here = {"mesh": dict(config["mesh"])} if "mesh" in config else {}  # not where the target was trained
    other = open_run({**read_json(path), **here}, target, create=False)
    _check(source, other, w)
    data = _test_images(source)
    found, shown = {}, {}
    for name, decoding in (("reconstruction", source), ("transfer", other)):
        truth = data["x"] if decoding is source else _through(source, decoding, _ddim_both, REFERENCE_STEPS, data, w)
        shown[name] = [("images", data["x"])] if decoding is source else [("DDIM 512 + 512", truth)]
        for label, make, num_steps in _ways(source):
            made = _through(source, decoding, make, num_steps, data, 0.0 if decoding is source else w)
            found[name, label, num_steps] = float(np.mean((made - truth) ** 2))
            shown[name].append((f"{label} {num_steps} + {num_steps}", made))
    _report(source, found, shown, w, num=len(data["x"]))
    return found


def _ways(run):
    trained = [stage.num_steps for stage in run.stages if stage.series == "encode" and stage.num_steps <= _MOST_STEPS]
    yield from (("distilled", _distilled, n) for n in trained)
    yield from (("DDIM", _ddim_both, n) for n in sorted({*trained, _MOST_STEPS}, reverse=True))


def _check(source, other, w):
    ours, theirs = source.experiment, other.experiment
    for run in (source, other):
        run.require_finished()
    if not any(stage.series == "encode" for stage in source.stages):
        raise UserError(f"{source.workdir} has no encoder: train one with config.stage2.series=('det', 'encode')")
    for num_steps in (stage.num_steps for stage in source.stages if stage.series == "encode"):
        for run in (source, other):
            if not any(stage.name == f"stage2_det_{num_steps:04d}" for stage in run.stages):
                raise UserError(f"{run.workdir} has no student stage2_det_{num_steps:04d} to decode with")
    if source.stages[0].model.schedule != other.stages[0].model.schedule:
        raise UserError(f"--target={other.workdir}: its schedule is not the source's; they have no noise in common")
    if ours.data.text_length or theirs.data.text_length:
        raise UserError("--mode=transfer: captions cannot be transferred yet; both runs must be of classes")
    for what in ("sample_shape", "num_classes"):
        if getattr(ours.data, what) != getattr(theirs.data, what):
            raise UserError(
                f"--target={other.workdir}: its data have {what} {getattr(theirs.data, what)}, the source's "
                f"{getattr(ours.data, what)}"
            )
    if not theirs.stage1.w_min <= w <= theirs.stage1.w_max:
        raise UserError(f"--w={w:g} is outside the range [{theirs.stage1.w_min}, {theirs.stage1.w_max}] of the target")


def _test_images(run):
    size = run.mesh.size
    num = min(len(run.dataset.test), _MOST_IMAGES) // size * size
    return read_records(run.dataset.test, range(num))


def _distilled(encoding, decoding, num_steps):
    return Model(
        _network(encoding, encoding.stage(f"encode_{num_steps:04d}")),
        _network(decoding, decoding.stage(f"stage2_det_{num_steps:04d}")),
        num_steps,
        decoding.grid,
    )


def _ddim_both(encoding, decoding, num_steps):
    """The stage-one students' DDIM: one call a step, as the distilled ones."""
    grid = diffusion.make_grid(decoding.stages[0].model.schedule, max(num_steps, decoding.grid.num_intervals))
    return Model(
        _network(encoding, encoding.stage("stage1")),
        _network(decoding, decoding.stage("stage1")),
        num_steps,
        sharding.place(decoding.mesh, grid),
    )


def _network(run, stage):
    return stage.model, run.params_of(stage)


def _through(encoding, decoding, make, num_steps, data, w):
    """The images of `data`, encoded at w = 0 and decoded at w."""
    mesh = encoding.mesh
    model = make(encoding, decoding, num_steps)
    steps = jnp.asarray(num_steps, jnp.int32)

    def run(network, sampler, z, strength):
        static, params = network
        cond = {"label": jnp.asarray(data["label"]), "w": jnp.full(len(z), strength, jnp.float32)}
        z, cond = sharding.spread(mesh, (z, cond))
        return generate.compiled(static, sampler, mesh)(params, model.grid, None, cond, steps, z)

    z = run(model.encoder, samplers.encode, jnp.asarray(data["x"]), 0.0)
    return sharding.to_host(run(model.decoder, samplers.deterministic, z, w))


def _report(run, found, shown, w, num):
    table = Table(title=f"{num} test images; mean square per value; target at w = {w:g}")
    for column in ("way", "calls", "reconstruction error", f"distance to DDIM {REFERENCE_STEPS} + {REFERENCE_STEPS}"):
        table.add_column(column, justify="left" if column == "way" else "right")
    rows = []
    for label, num_steps in dict.fromkeys((label, n) for _, label, n in found):
        errors = [found[name, label, num_steps] for name in ("reconstruction", "transfer")]
        table.add_row(label, f"{num_steps} + {num_steps}", *(f"{error:.5f}" for error in errors))
        rows.append({"way": label, "num_steps": num_steps, "reconstruction": errors[0], "transfer": errors[1]})
    Console(file=sys.stderr).print(table)
    content = {"rows": rows, "w": w, "num_images": num, "reference_steps": REFERENCE_STEPS}
    write_whole(run.workdir / "transfer.json", json.dumps(content, indent=1) + "\n")
    headings = {"reconstruction": "within the domain, w = 0", "transfer": f"into the other domain, w = {w:g}"}
    groups = [
        (headings[name], [(label, images[:_SHOWN]) for label, images in rows_shown])
        for name, rows_shown in shown.items()
    ]
    pictures.save_png(run.workdir / "transfer.png", pictures.comparison(groups, "the same test image down each column"))
