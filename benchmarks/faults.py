"""A campaign of faults: runs of the smallest chain, killed and damaged at seeded moments, against undisturbed ones.

    python -m benchmarks.faults [--seed=0] [--short] [--out=results/faults.md]

Prints a line per fault (what, where it hit, exit code) and per run whether it ended with the parameters of the
undisturbed run; exits with 1 where one did not. A run of two processes is held against an undisturbed one of two.
"""

import argparse
import concurrent.futures
import contextlib
import dataclasses
import json
import multiprocessing
import os
import pathlib
import random
import signal
import socket
import sys
import tempfile
import time

# One device, as on a user's machine, and compiled in a hurry.
os.environ.update(XLA_FLAGS="--xla_backend_optimization_level=0", JAX_PLATFORMS="cpu")
_CACHE = tempfile.TemporaryDirectory()
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", _CACHE.name)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"

import jax  # noqa: E402
import numpy as np  # noqa: E402

from guided_distill import main, pipeline, sharding  # noqa: E402, F401
from guided_distill.checkpoint import load_eval_params  # noqa: E402

REPO = pathlib.Path(__file__).parents[1]
STAGES = ("00_teacher", "01_stage1", "02_stage2_det_0002", "03_stage2_det_0001")
UPDATES, EVERY, ROWS = 40, 4, 14
_PATIENCE = 600  # seconds for a moment or for the end to come
_CHAIN = [
    "--config=configs/signal1d.py",
    *("--config.model.features=16 --config.model.num_layers=1 --config.model.emb_channels=8".split()),
    *("--config.teacher.batch_size=8 --config.teacher.warmup=4 --config.stage1.batch_size=8".split()),
    *("--config.stage2.batch_size=8 --config.stage2.teacher_steps=4".split()),
    *(f"--config.{key}={UPDATES}" for key in ("teacher.updates", "stage1.updates", "stage2.updates")),
    f"--config.stage2.final_updates={UPDATES}",
    *("--config.evaluate.num_samples=16 --config.evaluate.batch_size=16 --config.evaluate.num_steps=(1,2)".split()),
    *("--config.evaluate.w=(0.,4.) --config.evaluate.classifier_updates=5 --config.log.every=1".split()),
    *(f"--config.log.sample_every=0 --config.checkpoint.every={EVERY} --config.checkpoint.keep=3".split()),
]


@dataclasses.dataclass(frozen=True)
class Fault:
    """What happens to a run, and when: at an update of a stage, while it saves, or after a row of the evaluation."""

    kind: str  # "kill -9", "SIGTERM", and then "truncated" or "flipped", which damage the newest checkpoint as well
    place: str  # "update", "save", "row"
    stage: str
    at: int


def campaign(seed, *, runs, two, faults):
    """[(processes, [Fault])]: `runs` of one process and `two` of two, each with so many faults, in order of time."""
    rng = random.Random(seed)
    return [(1 + (k >= runs), _faults(rng, faults)) for k in range(runs + two)]


def _faults(rng, count):
    moments = [(stage, place) for stage in STAGES for place in ("update", "save")] + [("evaluation", "row")] * 2
    chosen = sorted(rng.sample(range(len(moments)), count))
    rows = iter(sorted(rng.sample(range(1, ROWS), 2)))
    found = []
    for stage, place in (moments[k] for k in chosen):
        kinds = ("kill -9", "SIGTERM") if place != "update" else ("kill -9", "SIGTERM", "truncated", "flipped")
        at = next(rows) if place == "row" else rng.randrange(2 * EVERY, UPDATES // 2) + (place == "save") * UPDATES // 4
        found.append(Fault(rng.choice(kinds), place, stage, at))
    return found


@contextlib.contextmanager
def processes_of(workdir, count, log):
    """The run as a process: forked from this one, to import nothing anew, or launch/local.sh for several."""
    child = multiprocessing.get_context("fork").Process(target=_become, args=(workdir, count, log))
    child.start()
    try:
        yield child
    finally:
        _kill(child)
        child.join()


def _become(workdir, count, log):
    os.setsid()
    os.chdir(REPO)
    with open(log, "ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    arguments = [*_CHAIN, f"--workdir={workdir}"]
    if count > 1:
        os.environ.update(PROGRAM=f"{sys.executable} -m guided_distill.main", PORT=str(_free_port()))
        os.execv("launch/local.sh", ["launch/local.sh", str(count), *arguments])
    sys.argv = ["main", *arguments]  # where config flags look
    sys.exit(main.main())


def _kill(child):
    """All processes at once, as when the machine goes; of one alone launch/local.sh would stop the other."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)


def _free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def inflict(workdir, count, fault, log):
    """Starts or continues the run, and does what `fault` says; returns (where it hit, exit code)."""
    deadline = time.monotonic() + _PATIENCE
    with processes_of(workdir, count, log) as child:
        while not _reached(workdir, fault) and child.is_alive():
            if time.monotonic() > deadline:
                raise TimeoutError(f"{fault} was not reached in {_PATIENCE} s:\n{log.read_text()[-4000:]}")
            time.sleep(0.001)
        in_time = child.is_alive()
        if fault.kind == "kill -9":
            _kill(child)
        else:
            child.terminate()
        child.join(300)
        code = child.exitcode
    where = _where(workdir, fault) if in_time else "after its end"
    if fault.kind in ("truncated", "flipped"):
        where += f"; {_damage(workdir / fault.stage, fault.kind)}"
    return where, code


def _reached(workdir, fault):
    directory = workdir / fault.stage
    if fault.place == "row":
        return _rows(workdir) >= fault.at
    if (directory / "STAGE_COMPLETE").exists():
        return True
    if fault.place == "save":
        return _unfinished(directory) >= fault.at
    return _lines(directory) >= fault.at


def _rows(workdir):
    with contextlib.suppress(FileNotFoundError):
        return len(json.loads((workdir / "summary.json").read_text())["rows"])
    return 0


def _lines(directory):
    path = directory / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def _unfinished(directory):
    """The step of a checkpoint that is being written, -1 for none."""
    found = (directory / "checkpoints").glob("*.orbax-checkpoint-tmp*")
    return max((int(path.name.split(".")[0]) for path in found), default=-1)


def _where(workdir, fault):
    if fault.place == "row":
        return f"evaluation, {_rows(workdir)} rows"
    torn = _unfinished(workdir / fault.stage)
    where = f"{fault.stage}, update {_lines(workdir / fault.stage)}"
    return f"{where}, checkpoint {torn} half written" if torn >= 0 else where


def _damage(stage_dir, kind):
    """Truncates the largest file of the newest checkpoint, or flips one of its bits; says which checkpoint it was."""
    newest = max((path for path in (stage_dir / "checkpoints").iterdir() if path.name.isdigit()), key=_number)
    largest = max((path for path in newest.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    if kind == "flipped":
        content[len(content) // 2] ^= 1
    largest.write_bytes(content if kind == "flipped" else content[: len(content) // 2])
    (stage_dir / "STAGE_COMPLETE").unlink(missing_ok=True)
    return f"checkpoint {newest.name} damaged"


def _number(path):
    return int(path.name)


def finish(workdir, count, log):
    """Runs to the end; returns the exit code."""
    with processes_of(workdir, count, log) as child:
        child.join(_PATIENCE)
        return child.exitcode


def difference(ours, theirs):
    """The largest absolute difference between the parameters of two finished runs, over all stages."""
    # In a process of its own: one that has used a device cannot be forked.
    with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as pool:
        return pool.submit(_difference, ours, theirs).result()


def _difference(ours, theirs):
    whole = sharding.replicated(sharding.make_mesh())
    pairs = ([load_eval_params(run / stage, lambda shape: whole) for run in (ours, theirs)] for stage in STAGES)
    gaps = [jax.tree.map(lambda a, b: float(np.abs(a - b).max()), *pair) for pair in pairs]
    return max(jax.tree.leaves(gaps))


def suffer(directory, name, count, faults, say):
    """One run through all its faults and to its end; returns (workdir, whether each went as it must)."""
    workdir, log, good = directory / name, directory / f"{name}.log", True
    for fault in faults:
        where, code = inflict(workdir, count, fault, log)
        # A signal may also meet a run that has ended, or one that does not listen yet and has nothing to save.
        good &= code in ((-signal.SIGKILL,) if fault.kind == "kill -9" else (75, -signal.SIGTERM)) or code == 0
        say(f"| {name} | {count} | {fault.kind} | {where} | {code} |")
    code = finish(workdir, count, log)
    return workdir, good and code == 0


def run_campaign():
    """Runs the campaign and prints its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--short", action="store_true", help="one run of one process with three faults")
    parser.add_argument("--runs", type=int, default=5, help="of one process")
    parser.add_argument("--two", type=int, default=2, help="runs of two processes")
    parser.add_argument("--out", type=pathlib.Path, help="a file for the table, too")
    args = parser.parse_args()
    sizes = {"runs": 1, "two": 0, "faults": 3} if args.short else {"runs": args.runs, "two": args.two, "faults": 6}
    table, start = [], time.monotonic()

    def say(line):
        table.append(line)
        print(line, flush=True)

    with tempfile.TemporaryDirectory() as temporary:
        directory, bad = pathlib.Path(temporary), 0
        undisturbed = {}
        say("| run | processes | fault | where it hit | exit code |\n|---|---|---|---|---|")
        for k, (count, faults) in enumerate(campaign(args.seed, **sizes)):
            if count not in undisturbed:
                whole = directory / f"undisturbed{count}"
                if finish(whole, count, directory / "undisturbed.log"):
                    sys.exit((directory / "undisturbed.log").read_text())
                undisturbed[count] = whole
            workdir, good = suffer(directory, f"{k}", count, faults, say)
            gap = difference(workdir, undisturbed[count]) if good else float("nan")
            bad += gap != 0.0
            outcome = "the same parameters, bit for bit" if gap == 0.0 else f"differs by {gap:.3g}"
            say(f"| {k} | {count} | {len(faults)} faults | to its end | {outcome} |")
            if not good:
                print((directory / f"{k}.log").read_text()[-4000:], file=sys.stderr)
        print(f"seed {args.seed}: {bad} runs ended otherwise; {time.monotonic() - start:.0f} seconds")
    if args.out:
        args.out.write_text("\n".join(table) + "\n")
    sys.exit(bad > 0)


if __name__ == "__main__":
    run_campaign()
