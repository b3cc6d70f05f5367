"""The whole chain, tiny, in this process; `test_main` runs it as a user does."""

import itertools
import json
import pathlib
import re
import shutil

import jax
import numpy as np
import pytest
from etils import epath
from fake_bucket import fake_bucket
from stopping import Stopped, stop_after
from tiny import quick_config

from guided_distill import errors, metrics, pipeline, preemption, sample
from guided_distill.errors import UserError

STAGES = ["00_teacher", "01_stage1", "02_stage2_det_0002", "03_stage2_det_0001"]


def weights(workdir):
    run = pipeline.open_run(quick_config(), workdir)
    return {stage.name: jax.device_get(run.params_of(stage)) for stage in run.stages}


def assert_same(ours, theirs):
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), ours, theirs))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    pipeline.run(quick_config(**{"log.sample_every": 4}), workdir)
    return workdir


def test_what_a_run_leaves(finished):
    assert sorted(path.name for path in finished.iterdir() if path.is_dir()) == [*STAGES, "evaluation"]
    for name in STAGES:
        stage = finished / name
        assert (
            (stage / "STAGE_COMPLETE").exists() and list(stage.glob("events.*")) and list(stage.glob("samples/*.png"))
        )
        assert [line["step"] for line in metrics.read_metrics(stage)] == list(
            range(1, 7 if name == "00_teacher" else 5)
        )
    assert json.loads((finished / "config.json").read_text())["stage1"]["w_max"] == 4.0
    assert (finished / "comparison.png").stat().st_size > 1000
    assert "<html" in (finished / "report.html").read_text()


def test_rows_of_the_summary(finished):
    summary = json.loads((finished / "summary.json").read_text())
    found = [(row["stage"], row["model"], row["num_steps"], row["nfe"], row["w"]) for row in summary["rows"]]
    expected = [("teacher", "teacher", n, 2 * n) for n in (4, 2, 1)]
    expected += [("stage1", "student", n, n) for n in (2, 1)]
    expected += [(f"stage2_det_{n:04d}", "student", n, n) for n in (2, 1)]
    assert found == [(*entry, w) for entry in expected for w in (0.0, 4.0)]
    for row in summary["rows"]:
        values = row["metrics"]
        assert set(values) == {
            "frechet_classifier", "score_classifier", "kid_classifier", "kid_classifier_std", "kid_classifier_se",
            "precision_classifier", "recall_classifier", "density_classifier", "coverage_classifier",
            "label_agreement", "diversity", "saturation", "distance_to_reference",
        }  # fmt: skip
        low, high = row["intervals"]["frechet_classifier"]
        assert low <= values["frechet_classifier"] <= high
        assert len(row["weights_hash"]) == len(row["reference_hash"]) == 64 and row["seed"] == 0
        assert row["feature_network"] == "classifier" and row["resize"] == "none"
        assert row["reference"] == "digits/train (1500 images)"
        assert (finished / row["picture"]).exists()
        assert np.isfinite(list(values.values())).all() and row["num_samples"] == 16 and row["seconds_per_image"] > 0
        # The reference is its own reference, up to the half precision it is kept in.
        is_reference = row["num_steps"] == 4
        assert (values["distance_to_reference"] < 1e-6) == is_reference
    assert list(summary["diagnostics"]) == ["stage1", "stage2_det_0002", "stage2_det_0001"]
    assert summary["noise_floors"] == {"classifier": summary["noise_floor"]}
    assert summary["noise_floor"] > 0 and 0 <= summary["classifier_test_accuracy"] <= 1


def test_the_same_call_again_changes_nothing(finished):
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.is_file()}
    pipeline.run(quick_config(), finished)
    after = {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.is_file()}
    changed = {path.name for path in after if before.get(path) != after[path]}
    assert changed <= {"config.json"}


def test_an_interrupted_evaluation_keeps_its_rows(finished):
    path = finished / "summary.json"
    summary = json.loads(path.read_text())
    kept = summary["rows"][:5]
    path.write_text(json.dumps({**summary, "rows": kept}))
    pipeline.run(quick_config(), finished)
    again = json.loads(path.read_text())
    assert again["rows"][:5] == kept
    for row, expected in zip(again["rows"], summary["rows"], strict=True):
        assert row["metrics"] == pytest.approx(expected["metrics"], rel=1e-6)


def test_a_chain_interrupted_in_every_stage_ends_with_the_same_weights(finished, tmp_path, monkeypatch):
    for stop in (3, 2, 3, 1):
        stop_after(monkeypatch, stop)
        with pytest.raises(Stopped):
            pipeline.run(quick_config(), tmp_path)
    monkeypatch.undo()
    pipeline.run(quick_config(), tmp_path)
    assert_same(weights(tmp_path), weights(finished))


BUCKET = "gs://bucket/runs/whole"


def bytes_in(files):
    """{name within the run: content}, Orbax's own files apart; metrics and events as one file each, its segments."""
    found = {}
    for name, content in sorted(files):
        if not re.match(r"\d\d_\w+/check(points|sums)/", name):
            name = re.sub(r"metrics(\.\d+)?\.jsonl$", "metrics", re.sub(r"events\.out\..*", "events", name))
            found[name] = found.get(name, b"") + content
    return found


def files_of(workdir):
    workdir = pathlib.Path(workdir)
    return bytes_in((str(p.relative_to(workdir)), p.read_bytes()) for p in workdir.rglob("*") if p.is_file())


def timeless(summary):
    return {**summary, "rows": [{**row, "seconds_per_image": None} for row in summary["rows"]]}


@pytest.mark.slow
def test_a_run_in_a_bucket_stopped_on_the_way_is_the_run_on_disk(finished, tmp_path, monkeypatch):
    config = quick_config(**{"log.sample_every": 4})
    with fake_bucket(monkeypatch) as store:
        asks = itertools.count()
        # Before the second update of stage one, and when four rows of the evaluation are measured.
        monkeypatch.setattr(preemption, "asked", lambda: next(asks) in (8, 27))
        for rows in (0, 4):
            with pytest.raises(errors.Stopped):
                pipeline.run(config, BUCKET)
            summary = store.get("/bucket/runs/whole/summary.json")
            assert len(json.loads(summary.getvalue())["rows"]) == rows if rows else summary is None
        pipeline.run(config, BUCKET)
        under = "/bucket/runs/whole/"
        there = {name.removeprefix(under): file.getvalue() for name, file in store.items() if name.startswith(under)}
        theirs, ours = files_of(finished), bytes_in(there.items())
        assert ours.keys() == theirs.keys()
        for name in theirs:
            if name.endswith(".png"):
                assert ours[name] == theirs[name], name
        assert timeless(json.loads(ours["summary.json"])) == timeless(json.loads(theirs["summary.json"]))
        for name in STAGES:
            losses = [
                [line["loss"] for line in metrics.read_metrics(run / name)] for run in (epath.Path(BUCKET), finished)
            ]
            assert losses[0] == losses[1]
        pictures_shown = [report["report.html"].count(b"data:image/webp") for report in (ours, theirs)]
        assert pictures_shown[0] == pictures_shown[1] > 0
        runs = [pipeline.open_run(config, workdir) for workdir in (BUCKET, finished)]
        assert_same(*(run.params_of(run.stages[-1]) for run in runs))  # which come from those of all stages before it
        before = dict(store)
        for out in (f"{BUCKET}/drawn/samples.npz", str(tmp_path / "samples.npz")):
            workdir = BUCKET if "://" in out else finished
            sample.sample(config, workdir, num_steps=1, series=None, w=1.0, labels=None, num=8, seed=3, out=out)
        (drawn,) = store.keys() - before.keys()
        assert drawn == under + "drawn/samples.npz"
        assert store[drawn].getvalue() == (tmp_path / "samples.npz").read_bytes()
        pipeline.open_run(quick_config(**{"teacher.checkpoint": BUCKET}), tmp_path)  # a teacher may lie there


def test_a_teacher_trained_earlier_is_taken_as_it_is(finished, tmp_path):
    pipeline.run(quick_config(**{"teacher.checkpoint": str(finished)}), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == [*STAGES[1:], "evaluation"]
    assert_same(weights_with(tmp_path, finished), weights(finished))


def weights_with(workdir, teacher):
    run = pipeline.open_run(quick_config(**{"teacher.checkpoint": str(teacher)}), workdir)
    return {stage.name: jax.device_get(run.params_of(stage)) for stage in run.stages}


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"model.features": 32}, "00_teacher is another model .config.model.features: 16 -> 32"),
        ({"parameterisation": "eps"}, "config.parameterisation: 'v' -> 'eps'"),
        ({"teacher.checkpoint": "{finished}/01_stage1"}, "01_stage1 is another stage; a teacher is needed"),
    ],
)
def test_a_teacher_of_another_model_is_refused(finished, tmp_path, values, says):
    values = {"teacher.checkpoint": "{finished}", **values}
    values = {
        key: value.format(finished=finished) if isinstance(value, str) else value for key, value in values.items()
    }
    with pytest.raises(UserError, match=says):
        pipeline.run(quick_config(**values), tmp_path)


@pytest.mark.parametrize("values", [{"clip_targets": False}, {"stage2.series": ("det", "encode")}])
def test_a_stage_one_that_is_to_be_clipped_is_refused_where_it_would_not_be(finished, tmp_path, values):
    given = {"teacher.checkpoint": str(finished), "stage1.checkpoint": str(finished)}
    pipeline.open_run(quick_config(**given), tmp_path)
    with pytest.raises(UserError, match="01_stage1 was trained to be clipped .*; set config.clip_targets=True, and"):
        pipeline.open_run(quick_config(**given, **values), tmp_path)


def test_a_teacher_without_its_config_is_held_against_the_network(finished, tmp_path):
    shutil.copytree(finished / "00_teacher", tmp_path / "00_teacher")
    with pytest.raises(UserError, match="has another shape of .*: it is a checkpoint of another model"):
        pipeline.run(quick_config(**{"teacher.checkpoint": str(tmp_path), "model.features": 32}), tmp_path / "new")


def test_an_unfinished_teacher_is_refused(finished, tmp_path):
    shutil.copytree(finished / "00_teacher", tmp_path / "00_teacher", ignore=shutil.ignore_patterns("STAGE_COMPLETE"))
    with pytest.raises(UserError, match="00_teacher is not finished"):
        pipeline.open_run(quick_config(**{"teacher.checkpoint": str(tmp_path)}), tmp_path / "new")


def test_figures_of_weights_that_change_are_forgotten(finished, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(finished, workdir)
    last = workdir / "03_stage2_det_0001"
    (last / "STAGE_COMPLETE").unlink()
    stamp = (workdir / "summary.json").stat().st_mtime_ns
    pipeline.run(quick_config(), workdir)
    assert (workdir / "summary.json").stat().st_mtime_ns > stamp


def test_more_of_the_surface_keeps_the_rows_there_are(finished, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(finished, workdir)
    before = json.loads((workdir / "summary.json").read_text())["rows"]
    pipeline.evaluate_run(quick_config(**{"evaluate.w": (0.0, 2.0, 4.0)}), workdir)
    after = json.loads((workdir / "summary.json").read_text())["rows"]
    assert [row for row in after if row["w"] != 2.0] == before and len(after) == 3 * len(before) // 2


def test_a_workdir_of_another_config_is_refused_and_evaluation_may_change(finished):
    with pytest.raises(UserError, match="config.stage1.updates: 4 -> 9"):
        pipeline.open_run(quick_config(**{"stage1.updates": 9}), finished)
    pipeline.open_run(quick_config(**{"evaluate.num_samples": 8}), finished)
    pipeline.open_run(quick_config(), finished)


def test_a_config_that_nothing_was_trained_with_may_change(tmp_path):
    pipeline.open_run(quick_config(), tmp_path)
    pipeline.open_run(quick_config(seed=5), tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["seed"] == 5


def test_mistakes_leave_no_workdir_behind(tmp_path):
    for config, says in (
        (quick_config(**{"data.name": "no_such_set", "data.data_dir": str(tmp_path)}), "no_such_set"),
        (quick_config(**{"stage1.batch_size": 9}), "config.stage1.batch_size is 9.*8 devices.*such as 16"),
    ):
        with pytest.raises(UserError, match=says):
            pipeline.run(config, tmp_path / "new")
        assert not (tmp_path / "new").exists()


def test_evaluating_a_run_that_is_not_finished_names_the_stage(tmp_path):
    with pytest.raises(UserError, match="00_teacher: this stage is not finished"):
        pipeline.evaluate_run(quick_config(), tmp_path)
