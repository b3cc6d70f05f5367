"""A workdir in a bucket, as far as that can be seen without one: `fake_bucket` says what stands in for it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fake_bucket import fake_bucket

from guided_distill import sharding
from guided_distill.checkpoint import Checkpoints, is_complete, load_eval_params, mark_complete
from guided_distill.errors import UserError
from guided_distill.files import BucketFile
from guided_distill.metrics import MetricWriter, read_metrics
from guided_distill.optim import OptimiserConfig
from guided_distill.state import make_state

STAGE = "gs://bucket/run/00_teacher"
MESH = sharding.make_mesh()


@pytest.fixture
def store(monkeypatch):
    with fake_bucket(monkeypatch) as store:
        yield store


def state_at(step):
    state = make_state({"kernel": jax.random.normal(jax.random.key(step), (64, 64))}, OptimiserConfig())
    return sharding.place(MESH, state.replace(step=jnp.int32(step)))


def write_steps(steps, restored=0, value=0.0):
    with MetricWriter(STAGE, restored_step=restored) as writer:
        for step in steps:
            writer.scalars(step, {"loss": value + step})


def names(store, part):
    return sorted(name.rpartition("/")[2] for name in store if part in name)


def test_metrics_are_a_segment_per_restart_and_one_series(store):
    write_steps(range(1, 6))
    write_steps(range(4, 8), restored=3, value=100.0)
    assert [line["loss"] for line in read_metrics(STAGE)] == [1.0, 2.0, 3.0, 104.0, 105.0, 106.0, 107.0]
    assert names(store, "metrics") == ["metrics.0000.jsonl", "metrics.0001.jsonl"]
    assert [name[-5:] for name in names(store, "tfevents")] == [".0000", ".0001"]
    write_steps([1], value=7.0)
    assert [line["loss"] for line in read_metrics(STAGE)] == [8.0]


def test_metrics_are_there_once_flushed(store):
    writer = MetricWriter(STAGE)
    writer.scalars(1, {"loss": 1.0})
    assert read_metrics(STAGE) == []  # not an object a line
    writer.flush()
    assert [line["step"] for line in read_metrics(STAGE)] == [1] and names(store, "tfevents")
    writer.close()


def test_a_file_is_put_there_once_a_minute_and_once_more_a_mebibyte(store):
    now = [0.0]
    file = BucketFile("gs://bucket/file", clock=lambda: now[0])
    for data, seconds, there in ((b"a", 59, 0), (b"b", 61, 2), (b"c" * 2**21, 130, 2), (b"", 240, 2 + 2**21)):
        now[0] = seconds
        file.write(data)
        file.flush()
        assert (store["/bucket/file"].size if store else 0) == there
    file.close()


def test_checkpoints_come_back_to_the_bit_and_only_the_newest_are_kept(store):
    with Checkpoints(STAGE) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, state_at(step), {"next_index": 10 * step})
    with Checkpoints(STAGE) as checkpoints:
        state, iterator_state = checkpoints.restore_newest(state_at(0))
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), state, state_at(3)))
    assert iterator_state == {"next_index": 30} and names(store, "checksums") == ["2.json", "3.json"]
    params = load_eval_params(STAGE, lambda shape: sharding.replicated(MESH))
    np.testing.assert_array_equal(params["kernel"], state.params["kernel"])
    mark_complete(STAGE, "done")
    assert is_complete(STAGE)


def largest_of(store, step):
    return max((name for name in store if f"checkpoints/{step}/" in name), key=lambda name: store[name].size)


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(store, caplog):
    with Checkpoints(STAGE) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, state_at(step), {"next_index": step})
    damaged = store[largest_of(store, 2)]
    damaged.seek(damaged.size // 2)
    damaged.write(b"?")
    with Checkpoints(STAGE) as checkpoints:
        assert int(checkpoints.restore_newest(state_at(0))[0].step) == 1
        checkpoints.save(2, state_at(2), {"next_index": 2})
    assert "checkpoints/2 cannot be read" in caplog.text and any("/damaged/2_" in name for name in store)
    with Checkpoints(STAGE) as checkpoints:
        assert int(checkpoints.restore_newest(state_at(0))[0].step) == 2


def test_one_without_checksums_is_read_before_it_is_used(store, caplog):
    with Checkpoints(STAGE) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, state_at(step), {"next_index": step})
    del store[next(name for name in store if name.endswith("checksums/2.json"))]
    with Checkpoints(STAGE) as checkpoints:
        assert int(checkpoints.restore_newest(state_at(0))[0].step) == 2
    del store[largest_of(store, 2)]
    with Checkpoints(STAGE) as checkpoints:
        assert int(checkpoints.restore_newest(state_at(0))[0].step) == 1
    assert "checkpoints/2 cannot be read" in caplog.text


def test_a_checkpoint_that_was_never_finished_is_not_there(store):
    with Checkpoints(STAGE) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, state_at(step), {"next_index": step})
    del store["/bucket/run/00_teacher/checkpoints/2/commit_success.txt"]  # what kill -9 leaves: it is written last
    assert float(load_eval_params(STAGE, lambda shape: sharding.replicated(MESH))["kernel"][0, 0]) == float(
        state_at(1).params["kernel"][0, 0]
    )
    with Checkpoints(STAGE) as checkpoints:
        assert int(checkpoints.restore_newest(state_at(0))[0].step) == 1


def test_nothing_there_is_one_line(store):
    with pytest.raises(UserError, match="gs://bucket/none: no such checkpoint"):
        load_eval_params("gs://bucket/none", lambda shape: sharding.replicated(MESH))
