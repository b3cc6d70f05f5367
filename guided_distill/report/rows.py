"""The rows of summary.json as the report takes them: what an older or unfinished summary lacks is None or empty."""

import collections
import dataclasses
import math
import re

from guided_distill.errors import UserError
from guided_distill.files import read_json

PROVENANCE = ("feature_network", "weights_hash", "resize", "reference", "reference_hash", "num_samples", "seed")

_STAGE = re.compile(r"stage(?:1|2_(?P<kind>[a-z]+))(?P<single>_w[^_]+)?(?:_\d+)?")
_STUDENTS = {
    None: "stage-one student",
    "det": "student",
    "sto": "stochastic student",
    "two": "two students",
    "tract": "TRACT student",
    "consistency": "consistency student",
}


@dataclasses.dataclass(frozen=True)
class Row:
    """One model, sampled in one way at one w: its figures, and what they were measured with."""

    stage: str
    model: str
    sampler: str
    num_steps: int
    w: float
    nfe: int | None
    seconds: float | None  # an image
    metrics: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    provenance: dict
    checkpoint: str
    picture: str | None  # within the workdir
    notes: tuple[str, ...]  # what to bear in mind of its figures

    @property
    def is_teacher(self):
        """Whether this is the model that is distilled."""
        return self.model == "teacher"

    @property
    def series(self):
        """What the rows of one curve have in common, in words."""
        if self.is_teacher:
            return f"teacher, {'DDIM' if self.sampler == 'deterministic' else self.sampler.replace('_', ' ')}"
        found = _STAGE.fullmatch(self.stage)
        if not found or found["kind"] not in _STUDENTS:
            return self.stage or self.model
        return _STUDENTS[found["kind"]] + " of one w" * bool(found["single"])

    @property
    def steps(self):
        """8 steps, or 8 steps × 2 calls."""
        text = f"{self.num_steps} step{'s' * (self.num_steps != 1)}"
        if self.nfe in (None, self.num_steps):
            return text
        each = self.nfe / self.num_steps
        return f"{text} × {each:.0f} calls" if each.is_integer() else f"{text}, {self.nfe} calls"


def read_summary(workdir) -> dict:
    """summary.json of a workdir with its "rows" as Rows. Raises UserError where it is missing or something else."""
    path = workdir / "summary.json"
    if not path.exists():
        raise UserError(f"{path} is not there; make it with --mode=evaluate")
    summary = read_json(path)
    try:
        return {**summary, "rows": [_row(row) for row in summary["rows"]]}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path} is not a summary of this program ({error}); delete it") from error


def references(rows) -> dict[float, Row]:
    """{w: the reference teacher}: the deterministic teacher of the most steps."""
    found = {}
    for row in rows:
        if row.is_teacher and row.sampler == "deterministic":
            if row.w not in found or row.num_steps > found[row.w].num_steps:
                found[row.w] = row
    return found


def networks(rows) -> list[str]:
    """The feature networks of the rows' Fréchet distances; first the one that the noise floor is of."""
    count = collections.Counter(network for row in rows for network in map(_network, row.metrics) if network)
    # "classifier; inception_v3" where several measured: the headline is by the first.
    named = [re.split("[; ]", str(row.provenance.get("feature_network", "")))[0] for row in rows]
    return sorted(count, key=lambda network: (network not in named, -count[network]))


def metric_of(kind, network) -> str:
    """The key of a metric: "frechet", "score", "kid", "precision", ... with a feature network."""
    of_inception = {"frechet": "fid", "score": "inception_score", "kid": "kid"}
    if network == "inception_v3" and kind in of_inception:
        return of_inception[kind]
    return f"{kind}_{network}"


def is_number(value) -> bool:
    """Whether this is a finite number: JSON as Python writes it holds NaN as well."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _network(metric):
    if metric == "fid":
        return "inception_v3"
    return metric.removeprefix("frechet_") if metric.startswith("frechet_") else None


def _row(row) -> Row:
    nfe, seconds = row.get("nfe"), row.get("seconds_per_image")
    intervals = {name: tuple(ends) for name, ends in (row.get("intervals") or {}).items()}
    return Row(
        stage=str(row.get("stage", "")),
        model=str(row["model"]),
        sampler=str(row.get("sampler", "deterministic")),
        num_steps=int(row["num_steps"]),
        w=float(row["w"]),
        nfe=int(nfe) if is_number(nfe) else None,
        seconds=float(seconds) if is_number(seconds) else None,
        metrics={name: float(value) for name, value in row["metrics"].items() if is_number(value)},
        intervals={name: ends for name, ends in intervals.items() if len(ends) == 2 and all(map(is_number, ends))},
        provenance={key: row[key] for key in PROVENANCE if row.get(key) is not None},
        checkpoint=str(row.get("checkpoint", "")),
        picture=row.get("picture"),
        notes=tuple(map(str, row.get("notes") or ())),
    )
