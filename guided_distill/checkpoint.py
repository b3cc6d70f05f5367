"""Checkpoints of a stage through Orbax: asynchronous, the newest few kept, unreadable ones named and passed over."""

import contextlib
import dataclasses
import json
import logging
import time
import zlib

import jax
import orbax.checkpoint as ocp
import tensorstore
from etils import epath

from guided_distill import distributed
from guided_distill.errors import Fault, UserError
from guided_distill.files import absolute, in_bucket, write_whole

_log = logging.getLogger(__name__)
COMPLETE = "STAGE_COMPLETE"
_WHOLE_BYTES = 2**23  # a millisecond from a device


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """How often and how many."""

    every: int = 1000  # updates between two checkpoints
    keep: int = 2


class Checkpoints:
    """The checkpoints of one stage directory. Use as a context manager: leaving waits for the last save.

    Orbax writes in the background; once a checkpoint is on disk its files' sizes and checksums are noted beside it, so
    that a damaged one is known by name before anything of it is used. (Orbax notices a truncated file but not a
    flipped bit.)
    """

    def __init__(self, stage_dir, *, keep=2):
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=True)
        self._stage_dir = absolute(stage_dir)
        self._manager = _Manager(_step_dir(self._stage_dir, "x").parent, options=options)
        self._unsealed = None

    def save(self, step, state, iterator_state):
        """Starts writing the TrainState and the state of the batch iterator (JSON) at `step`.

        Raises Fault where this, or the save before it, cannot be written.
        """
        self._seal()
        newest = self.latest_step()
        if newest is not None and not _step_dir(self._stage_dir, newest).exists():
            # Orbax would make the directory anew, and the run would end with a part of itself.
            raise Fault(f"{_step_dir(self._stage_dir, newest)} is gone; bring the workdir back, or start in another")
        if distributed.is_main():
            _checksums_path(self._stage_dir, step).unlink(missing_ok=True)
        state = state if distributed.several() else jax.tree.map(_one_copy, state)
        items = ocp.args.Composite(state=ocp.args.StandardSave(state), batches=ocp.args.JsonSave(iterator_state))
        with self._written(step):
            self._manager.save(step, args=items)
        self._unsealed = step

    def seal_if_written(self):
        """Notes the checksums of the last save if it has finished; returns at once otherwise. Raises as `save`."""
        if self._unsealed is not None and not self._manager.is_saving_in_progress():
            self._seal()

    def _seal(self):
        step, self._unsealed = self._unsealed, None
        if step is not None:
            with self._written(step):
                self._manager.wait_until_finished()
                if distributed.is_main():
                    _write_checksums(self._stage_dir, step)

    @contextlib.contextmanager
    def _written(self, step):
        try:
            yield
        except Exception as error:  # Orbax and TensorStore raise what they like for a full disk.
            raise Fault(
                f"checkpoint {_step_dir(self._stage_dir, step)} cannot be written ({_reason(error)}); those before it "
                "are kept, and the same command goes on from there"
            ) from error

    def restore_newest(self, like):
        """(state, iterator state) of the newest undamaged checkpoint, or None where there is none.

        `like` is a state (or its shapes) whose structure and shardings the restored one takes. A checkpoint that is
        damaged is named in the log and moved out of the way, and the one before it is used. Raises UserError for one
        that is whole and still cannot be restored: it is of another model or of another version of this code.
        """
        arguments = ocp.args.Composite(
            state=ocp.args.StandardRestore(jax.tree.map(ocp.utils.to_shape_dtype_struct, like)),
            batches=ocp.args.JsonRestore(),
        )
        while (step := distributed.agreed(self._newest_undamaged)) is not None:
            self._manager.reload()  # it remembers those that were moved
            try:
                item = self._manager.restore(step, args=arguments)
                return item["state"], item["batches"]
            except Exception as error:  # as above, for a damaged file
                damage, where = _reason(error), _step_dir(self._stage_dir, step)
                if distributed.several():  # the others may wait for this one inside Orbax, and never come back here
                    raise Fault(f"{where} cannot be read ({damage}); where it is damaged, move it away") from error
                if _checksums_path(self._stage_dir, step).exists():
                    raise UserError(f"{where} is whole but not of this model or code ({damage})") from error
            if distributed.is_main():
                self._move_aside(step, damage)
        self._manager.reload()
        return None

    def _newest_undamaged(self):
        """The newest step whose files are as they were written, as far as that was noted; moves others aside."""
        for step in sorted(_steps(self._stage_dir), reverse=True):
            damage = _damage(self._stage_dir, step)
            if damage is None:
                return step
            self._move_aside(step, damage)
        return None

    def _move_aside(self, step, damage):
        where, aside = _step_dir(self._stage_dir, step), self._stage_dir / "damaged" / f"{step}_{time.time_ns()}"
        if in_bucket(where):  # where there are no directories, neither to make nor to rename
            for file in _files(where):
                file.copy(aside / file.relative_to(where))
            where.rmtree()
        else:
            aside.parent.mkdir(parents=True, exist_ok=True)
            where.rename(aside)
        _checksums_path(self._stage_dir, step).unlink(missing_ok=True)
        then = "going back to the one before it" if _steps(self._stage_dir) else "starting this stage over"
        _log.warning("checkpoint %s cannot be read (%s); %s", where, damage, then)

    def latest_step(self):
        """The newest step on disk, or None."""
        return self._manager.latest_step()

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        try:
            self._seal()
            self._manager.close()
        except Exception:
            if kind is None:  # else what went wrong first is what to tell
                raise


class _Manager(ocp.CheckpointManager):
    """Orbax's, less its own look at JAX's preemption service, which would mix up the numbers `preemption` counts."""

    def reached_preemption(self, step):
        return False


def _one_copy(array):
    """An array of this process for Orbax to write whole, where it would write a small one in as many pieces as copies.

    What is split over devices, and a large array, of which each device writes a part at the same time, stays as it is.
    """
    return array.addressable_data(0) if array.is_fully_replicated and array.nbytes < _WHOLE_BYTES else array


def _step_dir(stage_dir, step):
    return epath.Path(stage_dir) / "checkpoints" / str(step)


def _steps(stage_dir):
    """The steps of the finished checkpoints on disk."""
    directory = _step_dir(stage_dir, "x").parent
    return ocp.utils.checkpoint_steps(directory) if directory.exists() else []


def _checksums_path(stage_dir, step):
    return epath.Path(stage_dir) / "checksums" / f"{step}.json"


def _files(directory):
    # epath has no recursive glob, for fear of what it would cost on an object store.
    for path in directory.iterdir():
        yield from _files(path) if path.is_dir() else (path,)


def _checksum(path):
    """[bytes, CRC-32] of a file, read in pieces: a checkpoint may be larger than memory."""
    size, crc = 0, 0
    with path.open("rb") as file:
        while piece := file.read(1 << 24):
            size, crc = size + len(piece), zlib.crc32(piece, crc)
    return [size, crc]


def _write_checksums(stage_dir, step):
    directory = _step_dir(stage_dir, step)
    if not directory.exists():  # the save failed, and has said so
        return
    found = {str(path.relative_to(directory)): _checksum(path) for path in _files(directory)}
    path = _checksums_path(stage_dir, step)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(found))
    for old in path.parent.glob("*.json"):
        if not _step_dir(stage_dir, old.stem).exists():
            old.unlink()


def _damage(stage_dir, step):
    """What the noted checksums say is wrong, or None; where a run was stopped before it noted them, what is unreadable.

    For one process alone: Orbax reads with all of them, and where one fails the others wait for it.
    """
    path = _checksums_path(stage_dir, step)
    if not path.exists():
        return _unreadable(_step_dir(stage_dir, step))
    try:
        noted = json.loads(path.read_text())
        noted.items()
    except (ValueError, AttributeError):
        return f"its checksums, {path}, are not what was noted"
    for name, expected in noted.items():
        file = _step_dir(stage_dir, step) / name
        found = _checksum(file) if file.exists() else None
        if found != expected:
            what = "is missing" if found is None else "is truncated" if found[0] < expected[0] else "was changed"
            return f"{name} {what}"
    return None


def _unreadable(directory):
    """What of a checkpoint is cut short or gone, or None, after every value of its arrays' store was read.

    Raises Fault where it cannot be told, as the storage does not answer.
    """
    base = f"{directory / 'state'}/"
    try:
        for file in (directory / "state/_METADATA", directory / "batches/metadata",
                     *_files(directory / "state/array_metadatas")):  # fmt: skip
            json.loads(file.read_text())
        base = base if in_bucket(directory) else {"driver": "file", "path": base}
        store = tensorstore.KvStore.open({"driver": "ocdbt", "base": base}).result()
        keys = store.list().result()
        # A file that is missing is read as one with nothing in it, and would be restored as zeros.
        if not keys or not all(store.read(key).result().value for key in keys):
            return "a file of state/ is missing"
    except Exception as error:  # TensorStore raises ValueErrors of all kinds
        damaged = isinstance(error, json.JSONDecodeError | UnicodeDecodeError | FileNotFoundError | NotADirectoryError)
        said = str(error)
        if damaged or said.startswith(("DATA_LOSS", "OUT_OF_RANGE", "NOT_FOUND")) or "Error decoding" in said:
            return _reason(error)
        raise Fault(f"{directory} cannot be read now ({_reason(error)}); the same command goes on from it") from error
    return None


def _reason(error):
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:120]}"


def mark_complete(stage_dir, text):
    """Marks a stage as done, in one rename, after its last checkpoint is known to be on disk."""
    write_whole(epath.Path(stage_dir) / COMPLETE, text)


def is_complete(stage_dir):
    """Whether the stage in this directory has finished."""
    return (epath.Path(stage_dir) / COMPLETE).exists()


def find_stage(path, name="teacher"):
    """The stage directory that `path` names: itself, or that of stage `name` in a run's workdir.

    Raises UserError where there is none.
    """
    path = absolute(path)
    if not path.exists():
        raise UserError(f"{path}: no such checkpoint; give a stage directory of an earlier run, or its workdir")
    stages = [path] if (path / "checkpoints").exists() else sorted(path.glob(f"[0-9][0-9]_{name}"))
    if not stages:
        raise UserError(f"{path}: holds no checkpoints/; give a stage directory of an earlier run, or its workdir")
    return stages[0]


def load_eval_params(path, sharding_of):
    """The parameters to sample with (the moving average where there is one) of the newest checkpoint of a stage.

    `path` as in `find_stage`; `sharding_of` says where an array of a shape lies. Raises UserError where there is none
    or it cannot be read.
    """
    stage_dir = find_stage(path)
    steps = _steps(stage_dir)
    if not steps:
        raise UserError(f"{stage_dir / 'checkpoints'}: holds no finished checkpoint")
    newest = _step_dir(stage_dir, max(steps))
    damage = distributed.agreed(lambda: _damage(stage_dir, max(steps)))
    if damage is None:
        try:
            return _read_eval_params(newest, sharding_of)
        except Exception as error:  # as above
            damage = _reason(error)
    remedy = f"delete {stage_dir / COMPLETE} and run again: the stage goes on from the checkpoint before it"
    raise UserError(f"{newest} cannot be read ({damage}); {remedy}")


def _read_eval_params(path, sharding_of):
    handler = ocp.CompositeCheckpointHandler(state=ocp.PyTreeCheckpointHandler(), batches=ocp.JsonCheckpointHandler())
    with ocp.Checkpointer(handler) as reader:
        tree = reader.metadata(path).item_metadata["state"].tree
        which = "ema" if tree.get("ema") is not None else "params"
        shapes = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding_of(leaf.shape)), tree[which]
        )
        restore = ocp.args.PyTreeRestore(
            item={which: shapes},
            restore_args=ocp.checkpoint_utils.construct_restore_args({which: shapes}),
            partial_restore=True,
        )
        return reader.restore(path, ocp.args.Composite(state=restore))["state"][which]
