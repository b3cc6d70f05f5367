"""Plots of points in the plane and of errors, as uint8 arrays: what the two-dimensional experiment looks like.

Drawn on matplotlib's own canvas, without pyplot: no state, no window, the same picture on every machine.
"""

import math

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

DPI = 100
# Okabe and Ito's colours, told apart with any kind of colour vision; markers and dashes say the same once more.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1)), (0, (1, 1)), (0, (8, 2)))
GREY = "#B8B8B8"
INK = "#202020"
PANEL = 3.0  # inches
COLUMNS = 5


def trajectories(paths, labels, density=None, *, title) -> np.ndarray:
    """Paths [T, n, 2] of n points from noise (hollow) to samples (filled), coloured by labels [n], uint8[H,W,3].

    `density` = (x [W], y [H], p [H, W]) of the data is drawn as contours behind them, all of its rectangle in view.
    """
    paths, labels = np.asarray(paths), np.asarray(labels)
    figure, (axes,) = _panels(1, 1, size=5.5)
    in_view = np.abs(paths).max()
    if density is not None:
        x, y, p = density
        axes.contour(x, y, p, levels=np.max(p) * np.array([0.03, 0.1, 0.3, 0.7]), colors=GREY, linewidths=1.0, zorder=0)
        in_view = max(in_view, np.abs(x).max(), np.abs(y).max())
    for label, colour in _coloured(labels):
        own = paths[:, labels == label]
        axes.plot(own[..., 0], own[..., 1], color=colour, linewidth=0.7, alpha=0.6, zorder=1)
        axes.scatter(*own[0].T, s=10, facecolors="white", edgecolors=colour, linewidths=0.7, zorder=2)
        axes.scatter(*own[-1].T, s=14, color=colour, linewidths=0, zorder=3)
    _square(axes, in_view)
    axes.set_title(title, color=INK, fontsize=12)
    return _picture(figure)


def guided_densities(panels, reference, *, title) -> np.ndarray:
    """Samples [n, 2], coloured by labels [n], over the data's `reference` [m, 2] in grey, side by side, uint8[H,W,3].

    `panels` is [(panel title, samples, labels), ...]; all panels share one scale, wide enough for every sample.
    """
    columns = min(COLUMNS, len(panels))
    figure, axes_of = _panels(math.ceil(len(panels) / columns), columns)
    in_view = max(np.abs(points).max() for points in (reference, *(samples for _, samples, _ in panels)))
    for axes, (name, samples, labels) in zip(axes_of, panels, strict=False):
        samples, labels = np.asarray(samples), np.asarray(labels)
        axes.scatter(*np.asarray(reference).T, s=3, color=GREY, alpha=0.5, linewidths=0)
        for label, colour in _coloured(labels):
            axes.scatter(*samples[labels == label].T, s=4, color=colour, alpha=0.6, linewidths=0)
        _square(axes, in_view)
        axes.set_title(name, color=INK, fontsize=11)
    for axes in axes_of[len(panels) :]:
        axes.set_axis_off()
    figure.suptitle(title, color=INK, fontsize=13)
    return _picture(figure)


def error_against_steps(curves, *, title, ylabel) -> np.ndarray:
    """Errors against numbers of steps, both logarithmic, one curve each, uint8[H,W,3].

    `curves` is {name: (numbers of steps, positive errors)}. In a name "student, w = 4" the part after the comma gives
    colour and marker, the part before it the dashes, so that curves to be compared look alike.
    """
    figure = Figure(figsize=(8.0, 4.6), dpi=DPI, layout="constrained")
    axes = figure.add_subplot()
    parts = {name: name.rpartition(", ")[::2] for name in curves}
    kinds, subjects = (list(dict.fromkeys(part[k] for part in parts.values())) for k in (0, 1))
    for name, (num_steps, errors) in curves.items():
        dash, k = (group.index(part) for group, part in zip((kinds, subjects), parts[name], strict=True))
        style = {"color": COLOURS[k % len(COLOURS)], "marker": MARKERS[k % len(MARKERS)]}
        style["linestyle"] = DASHES[(dash + k // len(COLOURS)) % len(DASHES)]
        axes.plot(num_steps, errors, label=name, linewidth=1.6, markersize=5, **style)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    ticks = sorted({n for num_steps, _ in curves.values() for n in num_steps})
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticklabels([f"{n:g}" for n in ticks])
    _bare(axes, "number of steps")
    axes.set_ylabel(ylabel, color=INK)
    axes.set_title(title, color=INK, fontsize=12)
    figure.legend(loc="outside right upper", frameon=False, fontsize=10)
    return _picture(figure)


def values_against_w(panels, *, title) -> np.ndarray:
    """Figures of merit against the guidance strength, one panel each, uint8[H,W,3].

    `panels` is {what the panel shows: {name of a curve: (strengths, values)}}; a name has one colour in all panels.
    """
    columns = 2
    figure, axes_of = _panels(math.ceil(len(panels) / columns), columns, size=3.6)
    names = list(dict.fromkeys(name for curves in panels.values() for name in curves))
    for axes, (ylabel, curves) in zip(axes_of, panels.items(), strict=False):
        for name, (strengths, values) in curves.items():
            k = names.index(name) % len(COLOURS)
            style = {"color": COLOURS[k], "marker": MARKERS[k], "linestyle": DASHES[k]}
            axes.plot(strengths, values, label=name, linewidth=1.6, markersize=5, **style)
        axes.set_ylim(bottom=0.0)
        _bare(axes, "guidance strength w")
        axes.set_title(ylabel, color=INK, fontsize=11)
    for axes in axes_of[len(panels) :]:
        axes.set_axis_off()
    figure.legend(*axes_of[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    figure.suptitle(title, color=INK, fontsize=13)
    return _picture(figure)


def _panels(rows, columns, size=PANEL):
    figure = Figure(figsize=(size * columns, size * rows + 0.5), dpi=DPI, layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False).ravel()


def _bare(axes, xlabel):
    """Axes for curves: a faint grid, no frame."""
    axes.grid(color="#E6E6E6", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel(xlabel, color=INK)


def _coloured(labels):
    """(label, its colour) of every label that occurs; the colour belongs to the label, whatever else is drawn."""
    return [(label, COLOURS[int(label) % len(COLOURS)]) for label in np.unique(labels)]


def _square(axes, in_view):
    """The same scale in both directions, round the origin, as far as the coordinate `in_view`."""
    half = 1.05 * in_view
    axes.set(xlim=(-half, half), ylim=(-half, half), aspect="equal")
    axes.tick_params(labelsize=8, colors="#606060")
    for spine in axes.spines.values():
        spine.set_color("#C0C0C0")


def _picture(figure) -> np.ndarray:
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
