import json
import struct
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event

from guided_distill.errors import UserError
from guided_distill.metrics import MetricWriter, RateMeter, parameter_overview, read_metrics, throughput


def events(logdir: Path) -> list[Event]:
    """Every event below `logdir` in TensorBoard's order: by file name, then by position in the file."""
    found = []
    for path in sorted(logdir.glob("events.out.tfevents.*")):
        data, at = path.read_bytes(), 0
        while at < len(data):
            (length,) = struct.unpack_from("<Q", data, at)
            found.append(Event.FromString(data[at + 12 : at + 12 + length]))
            at += 12 + length + 4
    return found


def shown_points(logdir: Path, tag: str) -> list[tuple[int, float]]:
    """The curve TensorBoard draws: a session start discards what came before it of its own step and later."""
    points = []
    for event in events(logdir):
        if event.HasField("session_log"):
            points = [point for point in points if point[0] < event.step]
        points += [(event.step, value.simple_value) for value in event.summary.value if value.tag == tag]
    return points


def write_steps(logdir, steps, value=0.0, **kwargs):
    with MetricWriter(logdir, **kwargs) as writer:
        for step in steps:
            writer.scalars(step, {"loss": value + step})


def test_scalars_come_back(tmp_path):
    with MetricWriter(tmp_path / "new" / "logs") as writer:
        writer.scalars(3, {"loss": jnp.float32(0.5), "rate": np.float64(2)})
    (line,) = read_metrics(tmp_path / "new" / "logs")
    assert line.pop("time") > 1e9
    assert line == {"step": 3, "loss": 0.5, "rate": 2.0}
    assert shown_points(tmp_path / "new" / "logs", "loss") == [(3, 0.5)]


def test_scalars_are_in_the_files_before_close(tmp_path):
    writer = MetricWriter(tmp_path)
    writer.scalars(1, {"loss": 1.0})
    assert len(read_metrics(tmp_path)) == 1
    assert shown_points(tmp_path, "loss") == [(1, 1.0)]
    writer.close()


def test_flush_hands_images_over(tmp_path):
    writer = MetricWriter(tmp_path)
    writer.images(1, {"grid": np.zeros((4, 4, 1), np.uint8)})
    writer.flush()
    assert any(event.summary.value for event in events(tmp_path))
    writer.close()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_not_finite_stay_valid_json(tmp_path, value):
    with MetricWriter(tmp_path) as writer:
        writer.scalars(1, {"loss": value, "ok": 1.0})

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    line = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert line["loss"] is None and line["ok"] == 1.0
    assert len(shown_points(tmp_path, "loss")) == 1


def test_resume_leaves_one_point_a_step(tmp_path):
    write_steps(tmp_path, range(6))
    write_steps(tmp_path, range(4, 8), value=100.0, restored_step=3)
    expected = [(0, 0.0), (1, 1.0), (2, 2.0), (3, 3.0), (4, 104.0), (5, 105.0), (6, 106.0), (7, 107.0)]
    assert [(line["step"], line["loss"]) for line in read_metrics(tmp_path)] == expected
    assert shown_points(tmp_path, "loss") == expected


def test_a_run_that_starts_over_keeps_nothing(tmp_path):
    write_steps(tmp_path, range(3))
    write_steps(tmp_path, [0], value=100.0)
    assert [line["loss"] for line in read_metrics(tmp_path)] == [100.0]
    assert shown_points(tmp_path, "loss") == [(0, 100.0)]


@pytest.mark.parametrize("torn", [b'{"step": 2, "lo', b'{"step": 2, "time": 1.0, "loss": 7.0}', b'{"step": 2, "\xc3'])
def test_a_torn_last_line_is_dropped(tmp_path, torn):
    write_steps(tmp_path, [1])
    with open(tmp_path / "metrics.jsonl", "ab") as file:
        file.write(torn)
    assert [line["step"] for line in read_metrics(tmp_path)] == [1]
    write_steps(tmp_path, [3], restored_step=2)
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 3]


def test_killed_process_leaves_a_readable_file(tmp_path):
    program = (
        "import os, signal, sys\n"
        "from guided_distill.metrics import MetricWriter\n"
        "writer = MetricWriter(sys.argv[1])\n"
        "for step in range(1, 6): writer.scalars(step, {'loss': 1.0})\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    killed = subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=False)
    assert killed.returncode == -9
    write_steps(tmp_path, [4, 5], restored_step=3)
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3, 4, 5]
    assert [step for step, _ in shown_points(tmp_path, "loss")] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("line", ["not json", "[1]", '{"loss": 1.0}'])
def test_a_damaged_line_is_named(tmp_path, line):
    (tmp_path / "metrics.jsonl").write_text(f'{{"step": 1}}\n{line}\n{{"step": 3}}\n')
    with pytest.raises(UserError, match="metrics.jsonl: line 2"):
        read_metrics(tmp_path)


def test_no_file_no_lines(tmp_path):
    assert read_metrics(tmp_path) == []


def test_disabled_writer_touches_nothing(tmp_path):
    with MetricWriter(tmp_path / "logs", enabled=False) as writer:
        writer.scalars(1, {"loss": 1.0})
        writer.images(1, {"grid": np.zeros((4, 4, 3), np.uint8)})
        writer.text(1, {"config": "{}"})
        writer.flush()
    assert not (tmp_path / "logs").exists()


@pytest.mark.parametrize("channels", [1, 3])
def test_images_and_text_reach_tensorboard(tmp_path, channels):
    with MetricWriter(tmp_path) as writer:
        writer.images(2, {"grid": np.full((5, 7, channels), 200, np.uint8)})
        writer.text(2, {"config": "one\ntwo"})
    values = {value.tag.split("/")[0]: value for event in events(tmp_path) for value in event.summary.value}
    assert (values["grid"].image.height, values["grid"].image.width) == (5, 7)
    assert values["config"].tensor.string_val == [b"    one\n    two"]


def test_parameter_overview_counts_without_reading_values():
    kernel, bias = jax.ShapeDtypeStruct((3, 4), jnp.float32), jax.ShapeDtypeStruct((4,), jnp.float32)
    table = parameter_overview({"dense": {"kernel": kernel, "bias": bias}})
    assert "dense/kernel" in table and "Total: 16" in table


def test_rate_leaves_out_what_came_before_the_first_call():
    times = iter([1000.0, 1002.0, 1003.0])
    meter = RateMeter(clock=lambda: next(times))
    assert meter.update(1) is None
    assert meter.update(11) == 5.0
    assert meter.update(14) == 3.0


def test_import_brings_no_tensorflow():
    program = "import sys, guided_distill.metrics; print({'tensorflow', 'clu.metric_writers'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", program], check=True, capture_output=True).stdout == b"set()\n"


def test_throughput_is_that_of_a_device_and_its_share_of_the_peak():
    found = throughput(4.0, 32, 5e12, 1e14)
    assert found == {"images_per_second": 128.0, "tflops_per_device": 20.0, "mfu": 0.2}
    assert "mfu" not in throughput(4.0, 32, 5e12, None)
