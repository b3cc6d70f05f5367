"""Charts of the report: points lie where their values say, and what is compared is what the page defines."""

import math

import numpy as np
import pytest
from fake_run import make_row, make_rows, make_run, make_summary

from guided_distill import report
from guided_distill.report import charts, headline, sections, words
from guided_distill.report.rows import metric_of, read_summary


def read_rows(tmp_path, rows):
    make_run(tmp_path / "run", make_summary(rows), with_pictures=False)
    return read_summary(tmp_path / "run")["rows"]


def drawn(points, x=None, y=None, **more):
    x, y = x or charts.scale([a for a, _ in points]), y or charts.scale([b for _, b in points])
    curve = charts.Curve("curve", 0, points, ["tip"] * len(points), **more)
    return charts.panel("title", [curve], x, y, x_label="x", y_label="y")


def test_points_lie_within_the_frame_to_the_right_and_upwards():
    rng = np.random.default_rng(0)
    points = sorted((float(a), float(b)) for a, b in rng.normal(0, 50, (20, 2)))
    marks = drawn(points)["curves"][0]["marks"]
    across, down = [mark[0] for mark in marks], [mark[1] for mark in marks]
    assert across == sorted(across)
    np.testing.assert_array_equal(np.argsort(down), np.argsort([-b for _, b in points]))
    assert charts.LEFT <= min(across) and max(across) <= charts.WIDTH - charts.RIGHT
    assert charts.TOP <= min(down) and max(down) <= charts.HEIGHT - charts.BOTTOM


def test_doublings_are_equally_far_apart_and_are_the_ticks():
    steps = [1, 2, 4, 8, 16]
    panel = drawn([(n, 1.0) for n in steps], x=charts.scale(steps, log=True, ticks=steps))
    at = [x for x, _ in panel["x_ticks"]]
    assert [text for _, text in panel["x_ticks"]] == ["1", "2", "4", "8", "16"]
    np.testing.assert_allclose(np.diff(at), np.diff(at)[0], atol=0.11)
    assert at == [mark[0] for mark in panel["curves"][0]["marks"]]


@pytest.mark.parametrize("values", [[0.0, 5.0], [-1.0, 2.0], [3.0], [0.0], [1e-9, 1e-8], [2.0, 1e6], [7.0, 7.1]])
@pytest.mark.parametrize("log", [True, False])
def test_every_scale_holds_its_values_and_has_ticks(values, log):
    scale = charts.scale(values, log=log)
    assert all(0 <= scale.share(value) <= 1 for value in values) and scale.log == (log and min(values) > 0)
    assert 2 <= len(scale.ticks) <= 12 and all(scale.low <= tick <= scale.high for tick in scale.ticks)


def test_notes_do_not_lie_on_one_another():
    points = [(1.0, 1.0), (1.001, 1.001), (2.0, 2.0)]
    notes = drawn(points, notes=["a", "b", "c"])["curves"][0]["notes"]
    assert [note[3] for note in notes] == ["a", "c"] and notes[1][2] == "end"


def test_intervals_stand_round_their_points():
    panel = drawn([(1, 2.0), (2, 3.0)], y=charts.scale([1, 4]), intervals=[(1.5, 2.5), None])
    ((x, low, high),) = panel["curves"][0]["whiskers"]
    assert low > panel["curves"][0]["marks"][0][1] > high and x == panel["curves"][0]["marks"][0][0]


def test_many_points_become_few_of_the_same_mean():
    points = [(float(k), math.sin(k)) for k in range(1200)]
    few = charts.thinned(points)
    assert len(few) == 120
    np.testing.assert_allclose(np.mean(few, axis=0), np.mean(points, axis=0))
    assert charts.thinned(points[:50]) == points[:50] and charts.thinned([]) == []


def test_a_panel_for_each_w_with_the_reference_as_a_level_line(tmp_path):
    found = sections.quality(read_rows(tmp_path, make_rows()), "classifier", 3.6)
    assert [panel["title"] for panel in found["panels"]] == ["w = 0", "w = 1", "w = 4"]
    for panel in found["panels"]:
        assert len(panel["curves"]) == 3 and [style for style, _ in panel["rules"]] == ["reference", "floor"]
    names = ["student", "teacher, DDIM", "stage-one student", "reference teacher, 32 steps × 2 calls"]
    assert [name for _, name in found["legend"]] == [*names, "noise floor, 3.60"]


def test_curves_run_through_w_in_its_order_with_the_reference_in_each_panel(tmp_path):
    rows = read_rows(tmp_path, make_rows()[::-1])
    found = sections.tradeoff(rows, metric_of("score", "classifier"), metric_of("frechet", "classifier"))
    assert [panel["title"] for panel in found["panels"]] == ["1 step", "2 steps", "4 steps", "8 steps"]
    for panel in found["panels"]:
        assert panel["curves"][0]["style"] == "reference" and len(panel["curves"]) == 4
        assert all(np.diff([mark[0] for mark in curve["marks"]]).min() > 0 for curve in panel["curves"])
    assert sections.tradeoff(rows, metric_of("coverage", "classifier"), metric_of("density", "classifier")) is None


def test_a_series_keeps_its_style_whatever_else_is_there(tmp_path):
    rows = read_rows(tmp_path, [make_row("teacher", 8, 0.0, sampler="heun"), make_row("student", 1, 0.0)])
    style = sections.styles(rows)
    assert (style["student"], style["teacher, DDIM"]) == (0, 1) and style["teacher, heun"] not in (0, 1)


@pytest.mark.parametrize(
    ("stage", "series"),
    [
        ("stage1", "stage-one student"),
        ("stage1_w1", "stage-one student of one w"),
        ("stage2_det_0004", "student"),
        ("stage2_det_w0.5_0004", "student of one w"),
        ("stage2_sto_0004", "stochastic student"),
        ("mine", "mine"),
    ],
)
def test_series_of_a_stage(tmp_path, stage, series):
    (row,) = read_rows(tmp_path, [make_row("student", 4, 0.0, stage=stage)])
    assert row.series == series


def test_distances_below_the_floor_are_all_the_same(tmp_path):
    rows = read_rows(tmp_path, [make_row("teacher", 32, 0.0), make_row("student", 1, 0.0, 1.1)])
    (verdict,) = headline.verdicts(rows, "frechet_classifier", 3.6)
    assert verdict.change == 0 and verdict.within and verdict.fewer_calls == 64 and verdict.faster == pytest.approx(64)
    (verdict,) = headline.verdicts(rows, "frechet_classifier", None)
    assert verdict.change == pytest.approx(0.1) and not verdict.within


@pytest.mark.parametrize(("high", "surely"), [(1.05, True), (1.06, False), (None, True)])
def test_an_interval_that_reaches_past_five_percent_is_said(tmp_path, high, surely):
    row = make_row("student", 1, 1.0)
    row["intervals"] = {"frechet_classifier": [10.0, 11.0 * high]} if high else {}
    make_run(tmp_path / "run", make_summary([make_row("teacher", 32, 1.0), row]), with_pictures=False)
    text = report.write_report(tmp_path / "run").read_text()
    assert ("interval of its distance reaches past" not in text) == surely


@pytest.mark.parametrize(
    ("value", "text"), [(None, "–"), (0, "0"), (12.345, "12.3"), (100.0, "100"), (1234.5, "1,234"), (2e-7, "2.0e-07")]
)
def test_numbers(value, text):
    assert words.number(value) == text


def test_directions_of_metrics():
    better_by_less = ("fid", "frechet_classifier", "kid", "kid_classifier", "distance_to_reference")
    assert {words.direction(name) for name in better_by_less} == {-1}
    better_by_more = ("inception_score", "score_x", "precision_x", "recall_inception_v3", "coverage_x", "diversity")
    assert {words.direction(name) for name in better_by_more} == {1}
    assert {words.direction(name) for name in ("saturation", "score_x_std", "kid_x_se", "anything")} == {0}
    assert words.change(0.1, -1) == "10 % worse" and words.change(-0.021, -1) == "2.1 % better"
    assert words.times([33.1, 56.4]) == "33–56 ×" and words.times([64, 64]) == "64 ×"
