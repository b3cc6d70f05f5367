"""A run on several processes of this machine is the run on one."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import curves
import numpy as np
import pytest
from quickly import COMPILED_QUICKLY

from guided_distill.metrics import read_metrics

REPO = pathlib.Path(__file__).parents[1]
TINY = [
    "--config=configs/signal1d.py",
    *("--config.teacher.updates=20 --config.stage1.updates=60 --config.stage2.updates=20".split()),
    *("--config.stage2.final_updates=20 --config.stage2.teacher_steps=2 --config.stage2.final_num_steps=(1,)".split()),
    *("--config.teacher.warmup=1 --config.evaluate.num_steps=(1,) --config.evaluate.num_samples=96".split()),
    *("--config.evaluate.batch_size=64 --config.evaluate.w=(0.,4.) --config.evaluate.classifier_updates=20".split()),
    *("--config.log.every=1 --config.log.sample_every=0 --config.checkpoint.every=8".split()),
]
STAGES = ["00_teacher", "01_stage1", "02_stage2_det_0001"]
pytestmark = pytest.mark.slow


def line_of(processes, workdir, port):
    """The command of the whole chain by launch/local.sh, and how it is run."""
    environment = {
        **os.environ,
        "XLA_FLAGS": COMPILED_QUICKLY,
        "PROGRAM": f"{sys.executable} -m guided_distill.main",
        "PORT": str(port),
    }
    line = [REPO / "launch" / "local.sh", str(processes), *TINY, f"--workdir={workdir}"]
    return line, {"cwd": REPO, "env": environment, "text": True, "stderr": subprocess.PIPE}


@pytest.fixture(scope="module")
def run(tmp_path_factory, free_port):
    """Number of processes -> the workdir of the whole chain; of two, they were told to stop on the way."""
    done = {}

    def run(processes):
        if processes not in done:
            workdir = tmp_path_factory.mktemp("runs") / str(processes)
            if processes > 1:
                stopped_in(workdir, processes, free_port())
            line, options = line_of(processes, workdir, free_port())
            ended = subprocess.run(line, timeout=500, **options)
            assert ended.returncode == 0, ended.stderr
            done[processes] = workdir
        return done[processes]

    return run


def stopped_in(workdir, processes, port):
    """Begins the run and sends SIGTERM in stage one: all processes save at one update, and say so."""
    line, options = line_of(processes, workdir, port)
    process, seen = subprocess.Popen(line, **options), workdir / "01_stage1" / "metrics.jsonl"
    deadline = time.monotonic() + 400
    while process.poll() is None and time.monotonic() < deadline:
        if seen.exists() and seen.read_bytes().count(b"\n") >= 2:
            break
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=200)
    assert process.returncode == 75 and said.count("stopped as told") == processes, said


def curves_of(processes, layout, port):
    """{stage: [[loss, norm of the gradient]]} of the first updates by processes of one device each; each one's own."""
    environment = {**os.environ, "XLA_FLAGS": COMPILED_QUICKLY, "PYTHONPATH": str(REPO)}
    lines = [
        [sys.executable, REPO / "tests" / "curves.py", f"127.0.0.1:{port}", str(processes), str(k), json.dumps(layout)]
        for k in range(processes)
    ]
    started = [
        subprocess.Popen(line, cwd=REPO, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for line in lines
    ]
    said = [process.communicate(timeout=500) for process in started]
    assert not any(process.returncode for process in started), said
    return [json.loads(out.splitlines()[-1]) for out, _ in said]


@pytest.mark.parametrize(
    ("processes", "layout"),  # devices, of which weights are split over so many, and batches in parts
    [(2, (2,)), (4, (4, 2, 2))],
)
def test_the_losses_are_those_of_one_process(processes, layout, free_port):
    found = curves_of(processes, layout, free_port())
    assert all(theirs == found[0] for theirs in found)  # means over all of the batch
    for name, curve in found[0].items():
        expected = curves.curve(curves.QUICK, name, 1)[0]
        np.testing.assert_allclose(np.array(curve)[:, 0], expected[:, 0], rtol=1e-5)


def losses(workdir, stage):
    return np.array([line["loss"] for line in read_metrics(workdir / stage) if "loss" in line])


def test_the_evaluation_split_among_processes_is_that_of_one(run):
    for stage in STAGES:
        ours, theirs = losses(run(2), stage), losses(run(1), stage)
        np.testing.assert_allclose(ours[:20], theirs[:20], rtol=1e-5)
        np.testing.assert_allclose(ours, theirs, rtol=1e-3)  # rounding grows
    one, several = (json.loads((run(n) / "summary.json").read_text()) for n in (1, 2))
    assert [row["nfe"] for row in several["rows"]] == [row["nfe"] for row in one["rows"]]
    for ours, theirs in zip(several["rows"], one["rows"], strict=True):
        for name, value in theirs["metrics"].items():
            np.testing.assert_allclose(ours["metrics"][name], value, rtol=2e-2, atol=1e-4, err_msg=name)


def test_every_file_is_written_once(run):
    """By one process: no events of another, no lines twice, nothing half written."""
    one, two = run(1), run(2)
    for workdir in (one, two):
        for stage in STAGES:
            segments = len(list((workdir / stage).glob("events.out.tfevents.*")))
            assert segments == (2 if workdir == two and stage == "01_stage1" else 1)  # one a start
            steps = [line["step"] for line in read_metrics(workdir / stage)]
            assert len(set(steps)) == len(steps)
    names = [{str(path.relative_to(workdir)) for path in workdir.glob("*")} for workdir in (one, two)]
    assert names[0] == names[1]
    pictures = [
        {path.name for path in (workdir / "evaluation").iterdir() if "tfevents" not in path.name}
        for workdir in (one, two)
    ]
    assert pictures[0] == pictures[1] and not any(name.endswith(".tmp") for name in pictures[0])
