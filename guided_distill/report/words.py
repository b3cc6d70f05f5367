"""How metrics and numbers are called and written on the page."""

import math
import re

_METRICS = {
    "fid": ("FID", -1),
    "inception_score": ("Inception Score", 1),
    "kid": ("KID", -1),
    "label_agreement": ("label agreement", 1),
    "diversity": ("diversity within a label", 1),
    "saturation": ("saturation", 0),
    "distance_to_reference": ("distance to the reference", -1),
}
_OF_A_NETWORK = {
    "frechet": ("Fréchet distance", -1),
    "score": ("score", 1),
    "kid": ("KID", -1),
    "precision": ("precision", 1),
    "recall": ("recall", 1),
    "density": ("density", 1),
    "coverage": ("coverage", 1),
    "retrieval": ("captions found again", 1),
}


def short(metric) -> str:
    """A metric in words, without its feature network."""
    return label(metric).partition(" (")[0]


def label(metric) -> str:
    """A metric in words, with its feature network in brackets."""
    spread = re.fullmatch(r"(.+)_(std|se)", metric)
    if spread:
        return f"{label(spread[1])}, standard {'deviation' if spread[2] == 'std' else 'error'}"
    kind, _, network = metric.partition("_")
    if metric not in _METRICS and kind in _OF_A_NETWORK:
        return f"{_OF_A_NETWORK[kind][0]} ({network})"
    return _METRICS.get(metric, (metric,))[0]


def direction(metric) -> int:
    """1 where more of it is better, -1 where less is, 0 where neither or where it is not known."""
    if is_spread(metric):
        return 0
    return (_METRICS.get(metric) or _OF_A_NETWORK.get(metric.partition("_")[0]) or ("", 0))[1]


def has_share(metric) -> bool:
    """Whether a relative change of it says how much was lost: not of a difference to another row, nor of what may be
    below zero."""
    return bool(direction(metric)) and not metric.startswith(("kid", "distance"))


def is_spread(metric) -> bool:
    """Whether it says how far another one is to be trusted."""
    return metric.endswith(("_std", "_se"))


def number(value) -> str:
    """Three significant digits; a dash for what was not measured."""
    if value is None:
        return "–"
    size = abs(value)
    if size >= 1000:
        return f"{value:,.0f}"
    if 0 < size < 1e-4:
        return f"{value:.1e}"
    return f"{value:#.3g}".rstrip(".") if value else "0"


def figure(metric, value) -> str:
    """The value of a metric: shares as percentages."""
    if value is not None and metric in ("label_agreement", "saturation"):
        return f"{100 * value:.1f} %"
    return number(value)


def times(values) -> str:
    """How many times, as one number or as the range of several: 64 × or 33–56 ×."""
    ends = min(values), max(values)
    low, high = (f"{value:.0f}" if value >= 9.95 else f"{value:.1f}".removesuffix(".0") for value in ends)
    return f"{low} ×" if low == high else f"{low}–{high} ×"


def percent(share) -> str:
    """A relative change, with its sign."""
    if math.isinf(share):
        return "infinitely"
    text = f"{100 * share:+.0f} %" if abs(share) >= 0.0995 else f"{100 * share:+.1f} %"
    return "±0 %" if text in ("+0.0 %", "-0.0 %") else text.replace("-", "−")


def change(share, sign) -> str:
    """A relative change of a metric of that direction, said without its sign: 4.0 % worse."""
    if abs(share) < 0.0005:
        return "same"
    return f"{percent(abs(share)).lstrip('+')} {'better' if share * sign > 0 else 'worse'}"


def strengths(values) -> str:
    """Guidance strengths: w = 0, 1, 4."""
    return "w = " + ", ".join(f"{w:g}" for w in values)
