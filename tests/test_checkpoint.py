import errno
import functools
import logging
import shutil

import jax
import jax.numpy as jnp
import pytest
import tensorstore

from guided_distill import checkpoint, sharding
from guided_distill.checkpoint import Checkpoints, is_complete, load_eval_params, mark_complete
from guided_distill.errors import Fault, UserError
from guided_distill.optim import OptimiserConfig
from guided_distill.state import make_state

MESH = sharding.make_mesh()
EVERYWHERE = functools.partial(sharding.by_size, MESH)


def state_at(step, ema=0.9):
    params = {"kernel": jax.random.normal(jax.random.key(step), (64, 64)), "bias": jnp.arange(4.0) + step}
    state = make_state(params, OptimiserConfig(ema=ema))
    if ema:
        state = state.replace(ema=jax.tree.map(lambda p: p + 1, state.ema))
    return sharding.place(MESH, state.replace(step=jnp.int32(step)))


def write(stage_dir, steps, keep=3, ema=0.9):
    with Checkpoints(stage_dir, keep=keep) as checkpoints:
        for step in steps:
            checkpoints.save(step, state_at(step, ema), {"next_index": 10 * step})


def restore(stage_dir, ema=0.9):
    with Checkpoints(stage_dir) as checkpoints:
        return checkpoints.restore_newest(state_at(0, ema))


def same(a, b):
    return jax.tree.all(jax.tree.map(lambda x, y: bool((x == y).all()), a, b))


def truncate_largest_file(directory):
    largest = max((path for path in directory.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_round_trip_of_the_newest_to_the_bit(tmp_path, ema):
    write(tmp_path, [1, 2], ema=ema)
    state, iterator_state = restore(tmp_path, ema)
    assert same(state, state_at(2, ema)) and iterator_state == {"next_index": 20}
    assert (state.ema is None) == (ema == 0.0)


def test_nothing_to_restore(tmp_path):
    assert restore(tmp_path) is None


def test_only_the_newest_are_kept(tmp_path):
    write(tmp_path, [1, 2, 3, 4], keep=2)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["3", "4"]


def test_a_truncated_newest_is_reported_and_the_one_before_it_used(tmp_path, caplog):
    write(tmp_path, [1, 2])
    truncate_largest_file(tmp_path / "checkpoints" / "2")
    with caplog.at_level(logging.WARNING, logger="guided_distill.checkpoint"):
        state, iterator_state = restore(tmp_path)
    assert same(state, state_at(1)) and iterator_state == {"next_index": 10}
    assert "checkpoints/2 cannot be read" in caplog.text
    # The number is free again for the checkpoint that will replace it.
    write(tmp_path, [2])
    assert same(restore(tmp_path)[0], state_at(2))


def test_a_flipped_bit_is_found(tmp_path, caplog):
    write(tmp_path, [1, 2])
    directory = tmp_path / "checkpoints" / "2"
    largest = max((path for path in directory.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    assert same(restore(tmp_path)[0], state_at(1)) and "was changed" in caplog.text


def test_a_whole_checkpoint_of_another_model_is_refused_and_kept(tmp_path):
    write(tmp_path, [1])
    other = sharding.place(MESH, make_state({"kernel": jnp.ones((3, 3))}, OptimiserConfig(ema=0.9)))
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(UserError, match="checkpoints/1 is whole but not of this"):
        checkpoints.restore_newest(other)
    assert same(restore(tmp_path)[0], state_at(1))


def test_a_damaged_checkpoint_is_moved_and_not_lost(tmp_path, caplog):
    write(tmp_path, [1])
    truncate_largest_file(tmp_path / "checkpoints" / "1")
    restore(tmp_path)
    assert "starting this stage over" in caplog.text
    assert [path.name.split("_")[0] for path in (tmp_path / "damaged").iterdir()] == ["1"]


def test_paths_may_be_relative(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write("run/00_teacher", [1])
    assert same(load_eval_params("run", EVERYWHERE), state_at(1).ema)


def test_a_missing_file_is_found(tmp_path, caplog):
    write(tmp_path, [1, 2])
    next(path for path in (tmp_path / "checkpoints" / "2").rglob("*") if path.is_file()).unlink()
    assert same(restore(tmp_path)[0], state_at(1)) and "is missing" in caplog.text


def test_a_checkpoint_whose_checksums_were_never_noted_is_used(tmp_path):
    write(tmp_path, [1, 2])
    (tmp_path / "checksums" / "2.json").unlink()
    assert same(restore(tmp_path)[0], state_at(2))


@pytest.mark.parametrize("name", ["_METADATA", "array_metadatas/process_0", "manifest.ocdbt", "ocdbt.process_0/d"])
@pytest.mark.parametrize("damage", [truncate_largest_file, shutil.rmtree])
def test_one_without_checksums_is_read_before_it_is_used(tmp_path, caplog, name, damage):
    write(tmp_path, [1, 2])
    (tmp_path / "checksums" / "2.json").unlink()
    damaged = tmp_path / "checkpoints" / "2" / "state" / name
    if damaged.is_dir():
        damage(damaged)
    elif damage is shutil.rmtree and name != "array_metadatas/process_0":  # without which Orbax can do
        damaged.unlink()
    else:
        damaged.write_bytes(damaged.read_bytes()[:50])
    assert checkpoint._damage(tmp_path, 2) is not None and checkpoint._damage(tmp_path, 1) is None
    assert same(restore(tmp_path)[0], state_at(1)) and "checkpoints/2 cannot be read" in caplog.text


def test_a_flipped_bit_of_the_manifest_is_damage_without_checksums_too(tmp_path):
    write(tmp_path, [1, 2])
    (tmp_path / "checksums" / "2.json").unlink()
    manifest = tmp_path / "checkpoints" / "2" / "state" / "manifest.ocdbt"
    content = bytearray(manifest.read_bytes())
    content[30] ^= 1
    manifest.write_bytes(content)
    assert same(restore(tmp_path)[0], state_at(1))


def test_one_without_checksums_may_lie_anywhere(tmp_path):
    stage_dir = tmp_path / "a#b%41?c d"
    write(stage_dir, [1, 2])
    (stage_dir / "checksums" / "2.json").unlink()
    assert same(restore(stage_dir)[0], state_at(2))


def test_storage_that_does_not_answer_is_no_damage(tmp_path, monkeypatch):
    write(tmp_path, [1, 2])
    (tmp_path / "checksums" / "2.json").unlink()
    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "_files", unanswered)
        with pytest.raises(Fault, match="checkpoints/2 cannot be read now"):
            restore(tmp_path)
    assert same(restore(tmp_path)[0], state_at(2))


def unanswered(directory):
    raise OSError(errno.EIO, "Input/output error")


def test_checksums_go_with_their_checkpoints(tmp_path):
    write(tmp_path, [1, 2, 3, 4], keep=2)
    assert sorted(path.stem for path in (tmp_path / "checksums").iterdir()) == ["3", "4"]


def test_all_truncated_starts_over(tmp_path, caplog):
    write(tmp_path, [1])
    truncate_largest_file(tmp_path / "checkpoints" / "1")
    assert restore(tmp_path) is None and "cannot be read" in caplog.text


def test_what_samples_is_the_average_where_there_is_one(tmp_path):
    for ema, expected in ((0.9, state_at(1, 0.9).ema), (0.0, state_at(1, 0.0).params)):
        write(tmp_path / str(ema), [1], ema=ema)
        assert same(load_eval_params(tmp_path / str(ema), EVERYWHERE), expected)


def test_a_workdir_stands_for_its_teacher(tmp_path):
    write(tmp_path / "00_teacher", [1])
    write(tmp_path / "01_stage1", [2])
    assert same(load_eval_params(tmp_path, EVERYWHERE), state_at(1).ema)


def test_missing_empty_and_damaged_checkpoints_get_one_line(tmp_path):
    with pytest.raises(UserError, match="nowhere: no such checkpoint"):
        load_eval_params(tmp_path / "nowhere", EVERYWHERE)
    with pytest.raises(UserError, match="holds no checkpoints"):
        load_eval_params(tmp_path, EVERYWHERE)
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(UserError, match="holds no finished checkpoint"):
        load_eval_params(tmp_path, EVERYWHERE)
    write(tmp_path, [3])
    truncate_largest_file(tmp_path / "checkpoints" / "3")
    with pytest.raises(UserError, match="checkpoints/3 cannot be read .*is truncated") as error:
        load_eval_params(tmp_path, EVERYWHERE)
    assert "\n" not in str(error.value)


def test_the_mark_of_a_finished_stage(tmp_path):
    assert not is_complete(tmp_path)
    mark_complete(tmp_path, "done\n")
    assert is_complete(tmp_path) and [path.name for path in tmp_path.iterdir()] == ["STAGE_COMPLETE"]


def pieces_of(stage_dir, name):
    """In how many pieces an array of the checkpoint of step 1 was written."""
    base = {"driver": "file", "path": f"{stage_dir}/checkpoints/1/state/"}
    keys = tensorstore.KvStore.open({"driver": "ocdbt", "base": base}).result().list().result()
    return sum(key.startswith(f"{name}/".encode()) and not key.endswith(b".zarray") for key in keys)


@pytest.mark.parametrize(("fsdp", "whole_bytes", "pieces"), [(1, 2**18, 1), (1, 2**17, 8), (8, 2**18, 8)])
def test_what_all_devices_hold_is_written_once_unless_it_is_large_or_split(
    tmp_path, monkeypatch, fsdp, whole_bytes, pieces
):
    monkeypatch.setattr(checkpoint, "_WHOLE_BYTES", whole_bytes)
    state = make_state({"kernel": jnp.ones((128, 256))}, OptimiserConfig())
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, sharding.place(sharding.make_mesh(fsdp=fsdp), state), {})
    assert pieces_of(tmp_path, "params.kernel") == pieces
