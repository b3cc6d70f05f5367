"""The checker of the paper's claim must be able to fail, for every claim."""

import copy

import pytest

from benchmarks import claims
from guided_distill.errors import UserError
from guided_distill.files import write_json


def row(model, stage, num_steps, w, **metrics):
    return {"model": model, "stage": stage, "num_steps": num_steps, "w": w, "metrics": metrics}


def good_summary():
    rows = []
    for w in (0.0, 1.0):
        for n, frechet, distance in ((32, 10.0, 0.0), (4, 20.0, 0.02), (2, 30.0, 0.05), (1, 90.0, 0.2)):
            values = {"frechet_classifier": frechet, "distance_to_reference": distance, "label_agreement": 0.98}
            rows.append(row("teacher", "teacher", n, w, **values))
        for n in (4, 2, 1):
            values = {"frechet_classifier": 11.0, "distance_to_reference": 0.005, "label_agreement": 0.98}
            rows.append(row("student", f"stage2_det_{n:04d}", n, w, **values))
    return {"rows": rows, "noise_floor": 1.0, "classifier_test_accuracy": 0.99}


def missed(summary):
    return [what for what, _, _, held in claims.checks(summary, "digits") if not held]


def spoilt(num_steps, w, model="student", **metrics):
    summary = copy.deepcopy(good_summary())
    for one in summary["rows"]:
        if (one["model"], one["num_steps"], one["w"]) == (model, num_steps, w):
            one["metrics"].update(metrics)
    return summary


def test_a_good_run_holds_every_claim():
    assert missed(good_summary()) == []


@pytest.mark.parametrize(
    ("summary", "says"),
    [
        (spoilt(4, 1.0, frechet_classifier=12.6), "frechet, 4 steps, w 1: 1.15 x reference + floor"),
        (spoilt(2, 0.0, frechet_classifier=14.1), "frechet, 2 steps, w 0: 1.3 x reference + floor"),
        (spoilt(1, 0.0, frechet_classifier=46.0), "frechet, 1 steps, w 0: 0.5 x teacher 1x2"),
        (spoilt(4, 0.0, distance_to_reference=0.011), "distance, 4 steps, w 0: 0.5 x teacher 4x2"),
        (spoilt(2, 1.0, label_agreement=0.95), "label agreement, 2 steps, w 1: at least"),
        (spoilt(4, 0.0, label_agreement=1.01), "label agreement, 4 steps, w 0: at most"),
        ({**good_summary(), "classifier_test_accuracy": 0.9}, "classifier, held-out accuracy"),
    ],
)
def test_each_claim_can_be_missed(summary, says):
    assert missed(summary) == [says]


def test_a_reference_that_ignores_its_label_is_found():
    assert "label agreement, reference, w 1" in missed(spoilt(32, 1.0, model="teacher", label_agreement=0.9))


KID, RETRIEVAL = "kid_efficientnet_lite0", "retrieval_efficientnet_lite0"


def captioned(**changes):
    """A run on captions that holds every bound, but for what changes in its student at w = 2."""
    student = {KID: 0.1009, f"{KID}_se": 2e-4, "distance_to_reference": 0.01, RETRIEVAL: 0.18}
    rows = []
    for w in (0.0, 2.0):
        rows.append(row("teacher", "teacher", 16, w, **student | {KID: 0.1, "distance_to_reference": 0.0}))
        rows.append(row("teacher", "teacher", 4, w, **student | {KID: 0.3, "distance_to_reference": 0.021}))
        rows.append(row("student", "stage1", 4, w, **student | {KID: 9.0}))
        rows.append(row("student", "stage2_det_0004", 4, w, **student | (changes if w else {})))
    return {"rows": rows}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({}, []),
        ({KID: 0.1013}, ["kid, 4 steps, w 2: reference + error + 1e-3"]),
        ({"distance_to_reference": 0.0106}, ["distance, 4 steps, w 2: 0.5 x teacher 4x2"]),
        ({RETRIEVAL: 0.22}, ["retrieval, off the reference's, 4 steps, w 2:"]),
        ({RETRIEVAL: 0.14}, ["retrieval, off the reference's, 4 steps, w 2:"]),
    ],
)
def test_each_claim_of_captions_can_be_missed(changes, says):
    assert [what for what, _, _, held in claims.caption_checks(captioned(**changes)) if not held] == says


def natural(**changes):
    """A run on natural images that holds every bound, but for what changes: {"teacher_4": distance at w = 1, ...}."""
    frechet = {"teacher_32": 10.0, "teacher_4": 20.0, "stage2_det_0004_4": 11.9, "stage2_det_0008_8": 10.9}
    rows = []
    for w in (0.0, 1.0):
        for name, value in (frechet | (changes if w else {"stage2_det_0004_4": 13.9})).items():
            stage, _, steps = name.rpartition("_")
            rows.append(row("any", stage, int(steps), w, frechet_efficientnet_lite0=value))
    return {"rows": rows}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({}, []),
        ({"stage2_det_0004_4": 12.1}, ["frechet, 4 steps, w 1: 1.2 x teacher 32x2"]),
        ({"stage2_det_0008_8": 11.1}, ["frechet, 8 steps, w 1: 1.1 x teacher 32x2"]),
        ({"teacher_4": 16.9}, ["frechet, 4 steps, w 1: 0.7 x teacher 4x2"]),
    ],
)
def test_each_claim_of_natural_images_can_be_missed(changes, says):
    assert [what for what, _, _, held in claims.natural_checks(natural(**changes)) if not held] == says


def test_what_is_no_evaluated_run_is_said(tmp_path):
    with pytest.raises(UserError, match="summary.json is not there"):
        claims.of_run(tmp_path, "emoji_text")
    unfinished = captioned()
    del unfinished["rows"][-1]
    write_json(tmp_path / "summary.json", unfinished)
    with pytest.raises(UserError, match="'student', 4, 2.0.*which --bounds=emoji_text asks for"):
        claims.of_run(tmp_path, "emoji_text")
    students = [one for one in natural()["rows"] if one["stage"] != "teacher"]
    write_json(tmp_path / "summary.json", {"rows": students})
    with pytest.raises(UserError, match="no row that --bounds=cifar10 asks for"):
        claims.of_run(tmp_path, "cifar10")
