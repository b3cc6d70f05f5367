"""What a run writes down: TensorBoard events, `metrics.jsonl`, the rate of steps, the parameter overview.

`clu.metric_writers` would do the first two, but importing it needs TensorFlow; `clu.parameter_overview` does not.
tensorboardX's SummaryWriter hands events to a thread and its flush() does not wait for that queue, so that a killed run
lost points below its newest checkpoint: its EventsWriter writes at once.
"""

import json
import math
import textwrap
import time

import numpy as np
from clu.parameter_overview import get_parameter_overview
from etils import epath
from tensorboardX import record_writer, summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog

from guided_distill.errors import Fault, UserError
from guided_distill.files import BucketFile, in_bucket, naming, write_whole

METRICS_FILE = "metrics.jsonl"


class MetricWriter:
    """Writes scalars, images and texts of one stage to TensorBoard and the scalars to `metrics.jsonl` as well.

    In a bucket both are a segment for each time the run goes on, put there every minute and at every `flush`.

    `restored_step` is the step of the checkpoint that the run goes on from, 0 for a run that starts over: what `logdir`
    holds of later steps (of all steps, at 0) is dropped, since those steps are about to be written again.
    `enabled=False`, on every process but the first, makes each call do nothing.
    Raises UserError when an earlier `metrics.jsonl` holds a line that is not a metrics line, and Fault, from scalars(),
    when it is gone. Usable in a `with` block.
    """

    def __init__(self, logdir: epath.PathLike, *, restored_step: int = 0, enabled: bool = True):
        self._enabled = enabled
        if not enabled:
            return
        logdir = epath.Path(logdir)
        logdir.mkdir(parents=True, exist_ok=True)
        for path in _metrics_files(logdir):
            _drop_lines_after(path, restored_step)
        self._objects = []  # of a bucket, each written by this process alone
        self._path = _segment(logdir) if in_bucket(logdir) else logdir / METRICS_FILE
        # Flushed with each line: kill -9 may then tear the last one and lose no other.
        self._lines = self._object(self._path) if in_bucket(logdir) else open(self._path, "ab")
        for scheme in ("gs", "s3", "az"):
            record_writer.register_writer_factory(scheme, _Objects(self._object))
        # tensorboardX names its file by the second and truncates: a quick restart would wipe the segment before it.
        segment = sum(1 for _ in logdir.glob("events.out.tfevents.*"))
        self._events = EventsWriter(str(logdir / "events"), filename_suffix=f".{segment:04d}")
        # TensorBoard then forgets the earlier segments' points of this step and later: no step is drawn twice.
        restart = SessionLog(status=SessionLog.START)
        first_step = restored_step + 1 if restored_step else 0
        self._events.write_event(Event(wall_time=time.time(), step=first_step, session_log=restart))

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Writes named scalars of a step; a value that is not finite is `null` in `metrics.jsonl`."""
        if not self._enabled:
            return
        values = {name: float(value) for name, value in values.items()}
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        line = json.dumps({"step": int(step), "time": time.time(), **finite}, allow_nan=False)
        if not in_bucket(self._path) and not self._path.exists():
            # What is open can still be written to, and would be lost.
            raise Fault(f"{self._path} is gone; bring the workdir back, or start in another")
        with naming(self._path):
            self._lines.write((line + "\n").encode())
            for name, value in values.items():
                self._write_event(step, summary.scalar(name, value))
            self._lines.flush()
            self._events.flush()

    def images(self, step: int, images: dict[str, np.ndarray]) -> None:
        """Writes named pictures, uint8[H,W,C] with one or three channels."""
        if not self._enabled:
            return
        for name, image in images.items():
            self._write_event(step, summary.image(name, image, dataformats="HWC"))

    def text(self, step: int, texts: dict[str, str]) -> None:
        """Writes named texts, shown by TensorBoard as they are (indented, since it reads Markdown)."""
        if not self._enabled:
            return
        for name, text in texts.items():
            self._write_event(step, summary.text(name, textwrap.indent(text, "    ")))

    def flush(self) -> None:
        """Hands everything written so far to the file system or the bucket."""
        if not self._enabled:
            return
        with naming(self._path):
            self._lines.flush()
            self._events.flush()
            for file in self._objects:
                file.put()

    def close(self) -> None:
        """Writes what is left and closes the files."""
        if not self._enabled:
            return
        self._lines.close()
        self._events.close()

    def _write_event(self, step: int, content: summary.Summary) -> None:
        self._events.write_event(Event(wall_time=time.time(), step=int(step), summary=content))

    def __enter__(self) -> "MetricWriter":
        return self

    def __exit__(self, kind, *_) -> None:
        try:
            self.close()
        except OSError:
            if kind is None:  # else what went wrong first is what to tell
                raise

    def _object(self, path) -> BucketFile:
        self._objects.append(BucketFile(path))
        return self._objects[-1]


class _Objects:
    """How tensorboardX opens files of a bucket: as `make` does."""

    def __init__(self, make):
        self.open = make

    def directory_check(self, path):
        pass


def read_metrics(logdir: epath.PathLike) -> list[dict]:
    """The lines of `metrics.jsonl` in the order of writing, without a torn last one; empty where there is no file.

    In a bucket, those of its segments one after the other. A value that was not finite is None. Raises UserError for a
    line that is not a metrics line.
    """
    files = _metrics_files(epath.Path(logdir))
    return [_parse(path, number, line) for path in files for number, line in _whole_lines(path)]


def parameter_overview(params) -> str:
    """A table of name, shape, type and size of every array (or ShapeDtypeStruct) in a tree, and their total."""
    return get_parameter_overview(params, include_stats=False)


class RateMeter:
    """Steps per second between one call and the next."""

    def __init__(self, clock=time.perf_counter):
        self._clock = clock
        self._last = None

    def update(self, step: int) -> float | None:
        """Steps per second since the last call; None at the first, which comes after the step that compiled."""
        now, last = self._clock(), self._last
        self._last = (step, now)
        return None if last is None else (step - last[0]) / (now - last[1])


def _metrics_files(logdir: epath.Path) -> list[epath.Path]:
    """`metrics.jsonl`, or in a bucket a segment `metrics.<number>.jsonl` for each time the run went on."""
    whole = [logdir / METRICS_FILE] if (logdir / METRICS_FILE).exists() else []
    return whole + sorted(logdir.glob("metrics.*.jsonl"))


def _segment(logdir: epath.Path) -> epath.Path:
    numbers = [int(path.name.split(".")[1]) for path in logdir.glob("metrics.*.jsonl")]
    return logdir / f"metrics.{max(numbers, default=-1) + 1:04d}.jsonl"


def throughput(steps_per_second, batch_size, flops, peak_flops) -> dict[str, float]:
    """Images a second of all devices, TFLOP a second of each, and their share of the peak where it is known (MFU).

    `flops` are those of an update on one device that the algorithm needs: what is recomputed to save memory is not
    counted.
    """
    found = {
        "images_per_second": steps_per_second * batch_size,
        "tflops_per_device": steps_per_second * flops / 1e12,
    }
    return found if peak_flops is None else {**found, "mfu": steps_per_second * flops / peak_flops}


def _whole_lines(path: epath.Path) -> list[tuple[int, str]]:
    """Numbered lines that end in a newline: what follows the last newline was torn by the end of the process."""
    if not path.exists():
        return []
    # Bytes: a torn line may end inside a character.
    whole, _, _ = path.read_bytes().rpartition(b"\n")
    lines = whole.decode("utf-8", errors="replace").split("\n") if whole else []
    return list(enumerate(lines, start=1))


def _parse(path: epath.Path, number: int, line: str) -> dict:
    try:
        record = json.loads(line)
    except json.JSONDecodeError:
        record = None
    if not isinstance(record, dict) or not isinstance(record.get("step"), int):
        raise UserError(f"{path}: line {number} is {line[:60]!r}, not a JSON object with a 'step'; remove that line")
    return record


def _drop_lines_after(path: epath.Path, restored_step: int) -> None:
    """Keeps the whole lines of steps up to `restored_step` (none at 0: nothing was restored) and replaces the file."""
    if not path.exists():
        return
    numbered = _whole_lines(path) if restored_step else []
    kept = [line + "\n" for number, line in numbered if _parse(path, number, line)["step"] <= restored_step]
    write_whole(path, "".join(kept))
