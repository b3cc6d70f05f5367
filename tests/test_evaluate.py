"""Evaluations that are interrupted, extended or of samples from elsewhere give the figures of undisturbed ones."""

import json
import shutil
import threading
import time

import numpy as np
import pytest
from PIL import Image
from tiny import quick_config

from guided_distill import drawing, evaluate, measure_files, pipeline, sample
from guided_distill.errors import Stopped, UserError
from guided_distill.evaluation import reference as references
from guided_distill.workdir import Run

FEW = {"evaluate.num_steps": (1,), "evaluate.w": (0.0, 4.0)}


def config(**values):
    return quick_config(**{**FEW, **values})


def read_rows(workdir):
    return json.loads((workdir / "summary.json").read_text())["rows"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    pipeline.run(config(), workdir)
    return workdir


@pytest.fixture
def run_of(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def drawn(monkeypatch):
    """The rows that samples were drawn for, warming up apart."""
    drawn, draw = [], drawing.drawn

    def noted(run, entry, params, w, *, num, **kwargs):
        if num > 1:
            drawn.append((entry.stage.name, entry.num_steps, w))
        return draw(run, entry, params, w, num=num, **kwargs)

    monkeypatch.setattr(drawing, "drawn", noted)
    return drawn


def test_a_killed_evaluation_loses_the_row_it_was_at(run_of, drawn, monkeypatch):
    whole = read_rows(run_of)
    evaluate.forget(run_of)
    measure_by, done = evaluate.measure_by, []

    def killed(*args):
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(args)
        return measure_by(*args)

    monkeypatch.setattr(evaluate, "measure_by", killed)
    with pytest.raises(KeyboardInterrupt):
        pipeline.evaluate_run(config(), run_of)
    monkeypatch.setattr(evaluate, "measure_by", measure_by)
    kept = read_rows(run_of)
    assert len(kept) == 3
    begun = len(drawn)
    pipeline.evaluate_run(config(), run_of)
    assert len(drawn) - begun == len(whole) - 3
    for row, expected in zip(read_rows(run_of), whole, strict=True):
        assert row["metrics"] == pytest.approx(expected["metrics"], rel=1e-6)
    assert read_rows(run_of)[:3] == kept


@pytest.mark.parametrize("where", ["drawing", "loading"])
def test_a_row_is_measured_while_the_next_is_drawn_and_kept_when_that_is_stopped(run_of, drawn, monkeypatch, where):
    whole = read_rows(run_of)
    evaluate.forget(run_of)
    monkeypatch.setattr(evaluate, "_rows_ahead", lambda mesh: 1)
    measure_by, begun = evaluate.measure_by, []

    def slow(*args):
        time.sleep(0.5)  # longer than a row takes to draw
        begun.append((len(drawn), threading.current_thread()))
        return measure_by(*args)

    monkeypatch.setattr(evaluate, "measure_by", slow)
    of, name = {"drawing": (evaluate, "_advance"), "loading": (Run, "params_of")}[where]
    original = getattr(of, name)

    def stopped(*args):
        if len(drawn) == 4:  # the teacher's rows; then another model is loaded
            raise Stopped
        return original(*args)

    monkeypatch.setattr(of, name, stopped)
    with pytest.raises(Stopped):
        pipeline.evaluate_run(config(), run_of)
    assert len(read_rows(run_of)) == {"drawing": 3, "loading": 4}[where]
    assert begun[0][0] == 2 and begun[0][1] is not threading.main_thread()
    monkeypatch.setattr(of, name, original)
    pipeline.evaluate_run(config(), run_of)
    for row, expected in zip(read_rows(run_of), whole, strict=True):
        assert row["metrics"] == pytest.approx(expected["metrics"], rel=1e-6)
        assert {**row, "metrics": 0, "seconds_per_image": 0} == {**expected, "metrics": 0, "seconds_per_image": 0}


def test_a_costly_row_goes_on_at_the_batch_it_was_stopped_in(run_of, monkeypatch):
    some = config(**{"evaluate.batch_size": 8, "evaluate.num_samples": 24, "evaluate.w": (0.0, 0.3)})
    pipeline.evaluate_run(some, run_of)
    whole = read_rows(run_of)
    evaluate.forget(run_of)
    monkeypatch.setattr(drawing, "_KEPT_CALLS", 1)
    drawn, sample_images, left = [], drawing.sample_images, 5  # a row, and two batches of the next

    def noted(*args, num, w, num_steps, **kwargs):
        nonlocal left
        for index, label, x in sample_images(*args, num=num, w=w, num_steps=num_steps, **kwargs):
            if num > 1:
                if not left:
                    raise Stopped
                left -= 1
                drawn.append((args[0], w, num_steps, index[0]))
            yield index, label, x

    monkeypatch.setattr(drawing, "sample_images", noted)
    write_summary, there = evaluate.write_summary, []

    def seen(run, summary):
        there.append(len(list(run_of.glob("evaluation/batches/*/*.npz"))))
        write_summary(run, summary)

    monkeypatch.setattr(evaluate, "write_summary", seen)
    with pytest.raises(Stopped):
        pipeline.evaluate_run(some, run_of)
    assert len(read_rows(run_of)) == 1 and len(list(run_of.glob("evaluation/batches/*/*.npz"))) == 2
    left = 1000
    pipeline.evaluate_run(some, run_of)
    assert len(drawn) == 3 * len(whole)  # nothing twice
    assert there[:3] == [3, 2, 3]  # a row's batches are there until it is; the second time it is found, nothing goes
    for row, expected in zip(read_rows(run_of), whole, strict=True):
        assert row["metrics"] == expected["metrics"]
    assert not (run_of / "evaluation" / "batches").exists()


def test_further_rows_are_drawn_and_no_others(run_of, drawn):
    before = read_rows(run_of)
    pipeline.evaluate_run(config(**{"evaluate.w": (0.0, 2.0, 4.0)}), run_of)
    assert drawn and {w for _, _, w in drawn} == {2.0} and len(drawn) == len(set(drawn))
    assert [row for row in read_rows(run_of) if row["w"] != 2.0] == before
    report = (run_of / "report.html").read_text()
    assert report.count("w = 2") > 0


def test_an_evaluation_of_other_settings_that_was_killed_leaves_nothing_behind(run_of, monkeypatch):
    before = read_rows(run_of)
    measure_by, done = evaluate.measure_by, []

    def killed(*args):
        done.append(args)
        if len(done) == 2:
            raise KeyboardInterrupt
        return measure_by(*args)

    monkeypatch.setattr(evaluate, "measure_by", killed)
    with pytest.raises(KeyboardInterrupt):
        pipeline.evaluate_run(config(**{"evaluate.num_samples": 8}), run_of)
    monkeypatch.setattr(evaluate, "measure_by", measure_by)
    pipeline.evaluate_run(config(), run_of)
    for row, expected in zip(read_rows(run_of), before, strict=True):
        assert row["metrics"] == pytest.approx(expected["metrics"], rel=1e-6)


def test_rows_of_another_classifier_are_measured_anew(run_of, drawn):
    other = config(**{"evaluate.classifier_updates": 6})
    summary = json.loads((run_of / "summary.json").read_text())
    measure_files.make_references(other, run_of)
    summary["evaluate"]["classifier_updates"] = 6  # as if only the weights behind the figures had changed
    (run_of / "summary.json").write_text(json.dumps(summary))
    pipeline.evaluate_run(other, run_of)
    assert len(drawn) == len(read_rows(run_of)) == len(summary["rows"])


def test_a_picture_that_is_missing_is_made_again_without_drawing(run_of, drawn):
    before = read_rows(run_of)
    (run_of / "comparison.png").unlink()
    pipeline.evaluate_run(config(), run_of)
    assert (run_of / "comparison.png").exists() and (run_of / "report.html").exists()
    assert drawn == [] and read_rows(run_of) == before


def test_another_number_of_samples_measures_all_anew(run_of, drawn):
    pipeline.evaluate_run(config(**{"evaluate.num_samples": 24}), run_of)
    assert {row["num_samples"] for row in read_rows(run_of)} == {24} and len(drawn) == len(read_rows(run_of))


def test_features_that_are_not_finite_are_one_line_and_cost_no_row(run_of, monkeypatch):
    evaluate.forget(run_of)
    features_of, done = evaluate.features_of, []

    def broken(network, x, mesh):
        done.append(None)
        features, logits = features_of(network, x, mesh)
        return (features * np.nan if len(done) > 2 else features), logits

    monkeypatch.setattr(evaluate, "features_of", broken)
    with pytest.raises(UserError, match=r"teacher 1x2 \(2 calls\), w 0, by classifier: 16 of 16 samples .* not finite"):
        pipeline.evaluate_run(config(), run_of)
    assert len(read_rows(run_of)) == 2


def draw(run_of, out, w):
    sample.sample(config(), run_of, num_steps=1, series=None, w=w, labels=None, num=16, seed=0, out=str(out))


def test_samples_of_a_file_are_measured_as_the_runs_own(run_of, tmp_path, capsys):
    draw(run_of, tmp_path / "samples.npz", 4.0)
    row = measure_files.measure_files(config(), run_of, str(tmp_path / "samples.npz"))
    (own,) = (row for row in read_rows(run_of) if row["stage"] == "stage2_det_0001" and row["w"] == 4.0)
    theirs = {key: value for key, value in own["metrics"].items() if key != "distance_to_reference"}
    assert row["metrics"] == pytest.approx(theirs, rel=1e-6)
    assert row["intervals"]["frechet_classifier"] == pytest.approx(own["intervals"]["frechet_classifier"], rel=1e-6)
    for key in ("weights_hash", "reference", "reference_hash", "resize", "num_samples"):
        assert row[key] == own[key]
    assert json.loads((tmp_path / "samples.npz.metrics.json").read_text())["metrics"] == row["metrics"]
    assert "frechet_classifier" in capsys.readouterr().out


def test_pictures_are_measured_as_the_array_they_were_made_of(run_of, tmp_path):
    draw(run_of, tmp_path / "samples.npz", 4.0)
    x = np.round(127.5 * (np.load(tmp_path / "samples.npz")["x"] + 1)).astype(np.uint8)
    np.savez(tmp_path / "rounded.npz", arr_0=x)
    (tmp_path / "pictures").mkdir()
    for k, image in enumerate(x):
        Image.fromarray(image[..., 0]).save(tmp_path / "pictures" / f"{k:03d}.png")
    of_array, of_pictures = (
        measure_files.measure_files(config(), run_of, str(tmp_path / name)) for name in ("rounded.npz", "pictures")
    )
    assert of_pictures["metrics"] == of_array["metrics"]
    assert (tmp_path / "pictures.metrics.json").exists()


def test_the_training_data_are_at_no_distance_from_themselves(run_of):
    row = measure_files.measure_files(config(), run_of, "data:train")
    assert row["metrics"]["frechet_classifier"] == pytest.approx(0.0, abs=1e-6)
    assert row["metrics"]["precision_classifier"] == row["metrics"]["recall_classifier"] == 1.0
    held_out = measure_files.measure_files(config(), run_of, "data:test")
    assert held_out["num_samples"] == 297 and held_out["metrics"]["frechet_classifier"] > 0.01


@pytest.mark.parametrize(
    ("samples", "says"),
    [
        ("data:validation", "there are data:train and data:test"),
        ("{tmp}/none", "no such folder"),
        ("{tmp}/small.npz", "4x4x1, and the images of digits are 8x8x1"),
        ("{tmp}/one.npz", "by classifier: a Fréchet distance needs two samples"),
    ],
)
def test_samples_that_cannot_be_measured(run_of, tmp_path, samples, says):
    np.savez(tmp_path / "small.npz", x=np.zeros((9, 4, 4, 1), np.uint8))
    np.savez(tmp_path / "one.npz", x=np.zeros((1, 8, 8, 1), np.uint8))
    with pytest.raises(UserError, match=says):
        measure_files.measure_files(config(), run_of, samples.format(tmp=tmp_path))


def test_a_reference_made_for_another_run_serves_this_one(run_of, tmp_path, capsys):
    path = run_of / "evaluation" / "reference_classifier.npz"
    made = references.load(path)
    path.unlink()
    measure_files.make_references(config(), run_of)
    assert references.load(path).hash == made.hash and str(path) in capsys.readouterr().err
    given = {"evaluate.reference": str(path)}
    before = read_rows(run_of)
    pipeline.evaluate_run(config(**given), run_of)
    for row, expected in zip(read_rows(run_of), before, strict=True):
        assert row["metrics"] == pytest.approx(expected["metrics"], rel=1e-6)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"evaluate.reference": "nowhere.npz"}, "there is no reference nowhere.npz"),
        ({"evaluate.features": ("vgg",)}, "config.evaluate.features holds 'vgg'"),
        ({"evaluate.features": ("efficientnet_lite0",), "evaluate.reference": "{own}"}, "is of classifier"),
    ],
)
def test_references_and_networks_that_are_wrong(run_of, values, says):
    own = run_of / "evaluation" / "reference_classifier.npz"
    values = {key: value.format(own=own) if isinstance(value, str) else value for key, value in values.items()}
    with pytest.raises(UserError, match=says):
        pipeline.evaluate_run(config(**values), run_of)


def test_a_classifier_of_other_data_is_made_anew(run_of):
    path = run_of / "evaluation" / "classifier.safetensors"
    before, stamp = path.read_bytes(), path.stat().st_mtime_ns
    measure_files.make_references(config(), run_of)
    assert path.stat().st_mtime_ns == stamp
    measure_files.make_references(config(**{"evaluate.classifier_updates": 6}), run_of)
    assert path.read_bytes() != before
    path.write_bytes(b"torn")
    with pytest.raises(UserError, match="classifier.safetensors is damaged"):
        measure_files.make_references(config(), run_of)
