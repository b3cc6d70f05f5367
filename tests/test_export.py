"""--mode=export of a finished run: what it leaves, and that it leaves nothing where something is wrong."""

import dataclasses
import json
import runpy

import fake_run
import jax
import numpy as np
import pytest
from test_shapes_of_samples import tiny

import guided_distill
from configs import signal1d
from guided_distill import pipeline, sample
from guided_distill.checkpoint import Checkpoints, mark_complete
from guided_distill.errors import UserError
from guided_distill.export import command, verify
from guided_distill.state import make_state


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run that nothing was trained in: its stages hold weights drawn at random."""
    config, workdir = tiny(signal1d, **{"data.data_dir": "elsewhere"}), tmp_path_factory.mktemp("runs") / "whole"
    this = pipeline.open_run(config, workdir)
    rows = []
    for k, stage in enumerate(this.stages):
        leaves, tree = jax.tree.flatten(stage.init(jax.random.key(k)))
        noise = np.random.default_rng(k)
        params = tree.unflatten([leaf + 0.1 * noise.normal(size=leaf.shape).astype(np.float32) for leaf in leaves])
        with Checkpoints(stage.directory(this.workdir)) as checkpoints:
            checkpoints.save(1, make_state(params, stage.training.optimiser), {})
        mark_complete(stage.directory(this.workdir), "{}")
        rows += [{**fake_run.make_row("student", stage.num_steps, w), "stage": stage.name} for w in (0.0, 4.0)]
    (workdir / "summary.json").write_text(json.dumps({"rows": rows}))
    return config, workdir


def export(run, out, **options):
    given = {"formats": ["bundle"], "stages": None, "with_teacher": False, "licence": None, **options}
    command.export(*run, out=str(out), **given)


@pytest.fixture
def trusting(monkeypatch):
    """Without the fresh processes, which take their time; the slow test has them."""
    for form in ("bundle", "stablehlos"):
        monkeypatch.setattr(
            verify, form, lambda directory, students, *rest: {student.name: 0.0 for student in students}
        )


def images(config, workdir, out, **options):
    given = {"num_steps": 2, "series": None, "w": 1.5, "labels": [0, 1, 2], "num": 5, "seed": 3, **options}
    sample.sample(config, workdir, out=str(out), **given)
    return np.load(out)["x"]


def test_a_bundle_makes_the_images_of_mode_sample(run, trusting, tmp_path):
    config, _ = run
    export(run, tmp_path / "out", with_teacher=True, licence="CC0: mine")
    model = guided_distill.load(tmp_path / "out")
    x = model.sample(num_steps=2, w=1.5, labels=[0, 1, 2], num=5, seed=3)
    np.testing.assert_array_equal(x, images(*run, tmp_path / "x.npz"))
    x = model.sample(num_steps=1, w=0.0, num=20)
    np.testing.assert_array_equal(x, images(*run, tmp_path / "x.npz", num_steps=1, w=0.0, labels=None, num=20, seed=0))
    assert [s.name for s in model.students] == ["det_0001", "det_0002", "teacher"]
    assert {row["w"] for row in model.students[0].figures} == {0.0, 4.0}
    assert model.about["config"]["data"] == json.loads(json.dumps(config["data"])) | {"data_dir": None}
    card = (tmp_path / "out" / "README.md").read_text()
    for said in ("CC0: mine", "| det_0002 | 2 | 1 | deterministic | 0 to 4 |", "| bundle | det_0001 | 0.0e+00 | 0 |"):
        assert said in card
    assert (tmp_path / "out" / "samples.png").stat().st_size > 1000
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "x.npz"]


def test_stages_are_chosen_by_name(run, trusting, tmp_path):
    export(run, tmp_path / "out", stages=["stage1", "stage2_det_0001"])
    model = guided_distill.load(tmp_path / "out")
    assert [(s.name, s.num_steps) for s in model.students] == [("stage1", None), ("det_0001", 1)]
    assert model.sample(num_steps=4, series="stage1", num=2).shape == (2, 64, 1)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (
            {"formats": ["bundle", "gguf"]},
            "--formats=bundle,gguf: there are bundle, stablehlo, onnx, diffusers, not 'gguf'",
        ),
        ({"stages": ["stage2_det_0004"]}, "stage2_det_0004 is no finished student of .*; there are stage1, stage2_det"),
        ({"stages": ["teacher"]}, "teacher is no finished student"),
        ({"formats": ["bundle", "bundle"]}, "--formats=bundle,bundle: each is named once"),
        ({"stages": ["stage1", "stage1"]}, "--stages=stage1,stage1: each is named once"),
        ({"formats": ["diffusers"], "with_teacher": True}, "--with_teacher: its pipeline would be another"),
    ],
)
def test_what_cannot_be_exported_is_named(run, tmp_path, options, says):
    with pytest.raises(UserError, match=says):
        export(run, tmp_path / "out", **options)
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_is_taken_is_left_alone(run, trusting, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    with pytest.raises(UserError, match="out: there is something already"):
        export(run, tmp_path / "out")
    with pytest.raises(UserError, match="mine cannot be written|mine: there is something"):
        export(run, tmp_path / "out" / "mine")
    with pytest.raises(UserError, match="--out is missing"):
        command.export(*run, formats=["bundle"], stages=None, with_teacher=False, licence=None, out=None)
    with pytest.raises(UserError, match="must be a directory of this machine"):
        export(run, "gs://bucket/out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]
    (tmp_path / "empty").mkdir()
    export(run, tmp_path / "empty", stages=["stage2_det_0001"])
    assert (tmp_path / "empty" / "bundle.json").exists()


def test_a_run_without_students_says_so(run, tmp_path):
    with pytest.raises(UserError, match="no student of 1, 2, 4 or 8 deterministic steps is finished"):
        export((run[0], tmp_path / "nowhere"), tmp_path / "out")


@pytest.mark.parametrize("deviation", [1e-9, float("inf"), float("nan")])
def test_what_deviates_is_not_exported(run, monkeypatch, tmp_path, deviation):
    monkeypatch.setattr(verify, "bundle", lambda *_: {"det_0001": 0.0, "det_0002": deviation})
    with pytest.raises(UserError, match="bundle of det_0002, loaded in a fresh process, deviates by .* nothing was"):
        export(run, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_both_formats_are_verified_in_fresh_processes(run, tmp_path, capsys):
    export(run, tmp_path / "out", formats=["bundle", "stablehlo"], with_teacher=True)
    said = capsys.readouterr().err
    card = (tmp_path / "out" / "README.md").read_text()
    for name in ("det_0001", "det_0002", "teacher"):
        assert f"bundle: {name} deviates from the live one by 0.0e+00 (at most 0)" in said
        for kind in ("sampler", "denoiser"):
            assert f"stablehlo: {name}_{kind} deviates from the live one by" in said
            assert f"| stablehlo | {name}_{kind} |" in card
    functions = runpy.run_path(str(tmp_path / "out" / "run_stablehlo.py"))["FUNCTIONS"]
    assert json.dumps(functions).count("batch") > 20
    # A bundle that draws something else does not pass.
    this = pipeline.open_run(*run, create=False)
    students = command._students(this, ["stage2_det_0001"], False)
    model = dataclasses.replace(students[0].model, params=this.params_of(this.stage("stage2_det_0002")))
    swapped = [dataclasses.replace(students[0], model=model)]
    assert verify.bundle(tmp_path / "out", swapped, this.grid, 16)["det_0001"] > 1e-3
