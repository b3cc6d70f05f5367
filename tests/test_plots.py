"""Plots are pictures that show their data; what they look like is judged by eye."""

import numpy as np
import pytest

from guided_distill import plots

RNG = np.random.default_rng(0)
PATHS, LABELS = RNG.standard_normal((5, 12, 2)), np.arange(12) % 3
AXIS = np.linspace(-2.0, 2.0, 9)
DENSITY = (AXIS, AXIS, np.exp(-(AXIS[:, None] ** 2) - AXIS[None] ** 2))
REFERENCE = RNG.standard_normal((30, 2))
PANELS = [("w = 0", PATHS[0], LABELS), ("w = 1", PATHS[1], LABELS)]
CURVES = {"w = 0": ([1, 2, 4], [0.5, 0.2, 0.1]), "w = 1": ([1, 4], [1.0, 0.3])}


def trajectories(paths=PATHS, labels=LABELS, density=None, title="title"):
    return plots.trajectories(paths, labels, density, title=title)


def guided_densities(panels=PANELS, reference=REFERENCE, title="title"):
    return plots.guided_densities(panels, reference, title=title)


def error_against_steps(curves=CURVES, title="title", ylabel="error"):
    return plots.error_against_steps(curves, title=title, ylabel=ylabel)


W_PANELS = {
    "error": {"teacher": ([0, 4], [1.0, 2.0]), "student": ([0, 4], [1.0, 5.0])},
    "other": {"student": ([0], [1])},
}


def values_against_w(panels=W_PANELS, title="title"):
    return plots.values_against_w(panels, title=title)


DRAWN = {
    values_against_w: [{"panels": {**W_PANELS, "other": {"teacher": ([0], [1])}}}, {"title": "other"}],
    trajectories: [{"paths": PATHS[:, ::-1]}, {"labels": LABELS[::-1]}, {"density": DENSITY}, {"title": "other"}],
    guided_densities: [
        {"panels": PANELS[:1]},
        {"panels": PANELS[::-1]},
        {"reference": REFERENCE[:, ::-1]},
        {"title": "x"},
    ],
    error_against_steps: [{"curves": {"w = 0": CURVES["w = 0"]}}, {"title": "other"}, {"ylabel": "other"}],
}


def colours_in(picture):
    return {f"#{code:06X}" for code in np.unique(picture.astype(int) @ [1 << 16, 1 << 8, 1])}


@pytest.mark.parametrize("draw", DRAWN, ids=lambda draw: draw.__name__)
def test_a_plot_is_a_picture_of_its_arguments(draw):
    picture = draw()
    height, width, channels = picture.shape
    assert picture.dtype == np.uint8 and channels == 3 and 200 < height < 1000 and 300 < width < 1000
    assert (picture[[0, -1]] == 255).all() and len(colours_in(picture)) > 50
    np.testing.assert_array_equal(picture, draw())
    for other in DRAWN[draw]:
        assert not np.array_equal(draw(**other), picture), other


def test_a_class_keeps_its_colour_whatever_else_is_drawn():
    alone = LABELS == 2
    picture = trajectories(PATHS[:, alone], LABELS[alone])
    assert plots.COLOURS[2] in colours_in(picture)
    assert not {plots.COLOURS[0], plots.COLOURS[1]} & colours_in(picture)


def test_more_panels_than_columns_go_into_a_second_row():
    height, width, _ = guided_densities(PANELS * 3).shape
    assert width == plots.COLUMNS * plots.PANEL * plots.DPI and height > 2 * plots.PANEL * plots.DPI


def test_curves_of_one_subject_share_its_colour_and_differ_in_their_dashes(monkeypatch):
    curves = {f"{kind}, w = 4": ([1, 2], [1.0, 2.0]) for kind in ("teacher", "student")}
    picture = error_against_steps(curves)
    assert plots.COLOURS[0] in colours_in(picture) and plots.COLOURS[1] not in colours_in(picture)
    monkeypatch.setattr(plots, "DASHES", ("-",))
    assert not np.array_equal(error_against_steps(curves), picture)
