"""Checkpoints of a stage through Orbax: asynchronous, the newest few kept, unreadable ones named and passed over."""

import dataclasses
import logging

import jax
import orbax.checkpoint as ocp
from etils import epath

from guided_distill.errors import UserError
from guided_distill.files import write_whole

_log = logging.getLogger(__name__)
COMPLETE = "STAGE_COMPLETE"


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """How often and how many."""

    every: int = 1000  # updates between two checkpoints
    keep: int = 2


class Checkpoints:
    """The checkpoints of one stage directory. Use as a context manager: leaving waits for the last save."""

    def __init__(self, stage_dir, *, keep=2):
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=True)
        self._directory = epath.Path(stage_dir) / "checkpoints"
        self._manager = ocp.CheckpointManager(self._directory, options=options)

    def save(self, step, state, iterator_state):
        """Starts writing the TrainState and the state of the batch iterator (JSON) at `step`."""
        self._manager.save(
            step,
            args=ocp.args.Composite(state=ocp.args.StandardSave(state), batches=ocp.args.JsonSave(iterator_state)),
        )

    def restore_newest(self, like):
        """(state, iterator state) of the newest readable checkpoint, or None where there is none.

        `like` is a state (or its shapes) whose structure and shardings the restored one takes. A checkpoint that cannot
        be read is named in the log and deleted, and the one before it is used.
        """
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                item = self._manager.restore(
                    step,
                    args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract), batches=ocp.args.JsonRestore()),
                )
                return item["state"], item["batches"]
            except Exception as error:  # Orbax and TensorStore raise what they like for a damaged file.
                reason = str(error).strip().split("\n")[0][:120]
                _log.warning(
                    "checkpoint %s cannot be read (%s: %s); going back to the one before it",
                    self._directory / str(step),
                    type(error).__name__,
                    reason,
                )
                self._manager.delete(step)
        return None

    def latest_step(self):
        """The newest step on disk, or None."""
        return self._manager.latest_step()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._manager.wait_until_finished()
        self._manager.close()


def mark_complete(stage_dir, text):
    """Marks a stage as done, in one rename, after its last checkpoint is known to be on disk."""
    write_whole(epath.Path(stage_dir) / COMPLETE, text)


def is_complete(stage_dir):
    """Whether the stage in this directory has finished."""
    return (epath.Path(stage_dir) / COMPLETE).exists()


def load_eval_params(path, sharding):
    """The parameters to sample with (the moving average where there is one) of the newest checkpoint under `path`.

    `path` is a stage directory, or a run's workdir, whose teacher stage is then meant. Raises UserError where there
    is none or it cannot be read.
    """
    path = epath.Path(path)
    if not path.exists():
        raise UserError(f"{path}: no such checkpoint; give a stage directory of an earlier run, or its workdir")
    stages = [path] if (path / "checkpoints").exists() else sorted(path.glob("[0-9][0-9]_teacher"))
    if not stages:
        raise UserError(f"{path}: holds no checkpoints/; give a stage directory of an earlier run, or its workdir")
    directory = stages[0] / "checkpoints"
    steps = sorted((int(p.name) for p in directory.iterdir() if p.name.isdigit()), reverse=True)
    if not steps:
        raise UserError(f"{directory}: holds no finished checkpoint")
    try:
        handler = ocp.CompositeCheckpointHandler(
            state=ocp.PyTreeCheckpointHandler(), batches=ocp.JsonCheckpointHandler()
        )
        with ocp.Checkpointer(handler) as reader:
            newest = directory / str(steps[0])
            tree = reader.metadata(newest).item_metadata["state"].tree
            which = "ema" if tree.get("ema") is not None else "params"
            abstract = {
                which: jax.tree.map(
                    lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree[which]
                )
            }
            restore = ocp.args.PyTreeRestore(
                item=abstract,
                restore_args=ocp.checkpoint_utils.construct_restore_args(abstract),
                partial_restore=True,
            )
            return reader.restore(newest, ocp.args.Composite(state=restore))["state"][which]
    except Exception as error:
        reason = str(error).strip().split("\n")[0][:120]
        raise UserError(f"{directory / str(steps[0])}: cannot be read ({type(error).__name__}: {reason})") from error
