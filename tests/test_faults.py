"""What goes wrong with the machine while a stage trains: one line each, and what was saved is kept."""

import errno
import functools
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from orbax.checkpoint import CheckpointManager
from test_train import EXPERIMENT, fit, prepared

from guided_distill import files, main, metrics, preemption, sharding, train
from guided_distill.checkpoint import Checkpoints
from guided_distill.data import load_dataset, make_batches
from guided_distill.errors import Fault, Stopped, UserError

# What Orbax had still to write when the workdir went is told of when Python collects it, in whichever test comes then.
pytestmark = pytest.mark.filterwarnings(
    "ignore:(?s).*(write_fragment|Event loop is closed):pytest.PytestUnraisableExceptionWarning"
)


def pieces(devices=1, accumulate=1):
    mesh = sharding.make_mesh(jax.devices()[:devices])
    step_fn, *rest = prepared("teacher", mesh, accumulate)
    return step_fn, (mesh, *rest)


@functools.cache
def undisturbed(directory):
    return fit(directory, *pieces())[0]


def same(a, b):
    return jax.tree.all(jax.tree.map(lambda x, y: bool((x == y).all()), a, b))


def goes_on(directory, tmp_path_factory, since):
    """Whether the same call again starts at update `since` and ends as an undisturbed one."""
    state, began = fit(directory, *pieces())
    return began == since and same(state, undisturbed(tmp_path_factory.getbasetemp() / "undisturbed"))


def full(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_told_to_stop_a_stage_saves_where_it_is(tmp_path, tmp_path_factory, monkeypatch):
    asked = iter([False] * 3 + [True])
    monkeypatch.setattr(preemption, "asked", lambda: next(asked))
    with pytest.raises(Stopped):
        fit(tmp_path, *pieces())
    monkeypatch.undo()
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest_step() == 3  # between checkpoints, which are saved every two updates
    assert [line["step"] for line in metrics.read_metrics(tmp_path)] == [1, 2, 3]
    assert goes_on(tmp_path, tmp_path_factory, 3)


def test_a_disk_that_is_full_when_a_checkpoint_is_saved(tmp_path, tmp_path_factory, monkeypatch):
    save = CheckpointManager.save

    def save_until_full(self, step, **arguments):
        return (full if step == 4 else save)(self, step, **arguments)

    monkeypatch.setattr(CheckpointManager, "save", save_until_full)
    with pytest.raises(Fault, match="checkpoints/4 cannot be written .*No space left on device.*before it are kept"):
        fit(tmp_path, *pieces())
    monkeypatch.undo()
    assert goes_on(tmp_path, tmp_path_factory, 2)


def test_a_disk_that_is_full_when_metrics_are_written(tmp_path, tmp_path_factory, monkeypatch):
    flush, flushed = metrics.EventsWriter.flush, []

    def flush_until_full(self):
        flushed.append(1)
        return (full if len(flushed) == 4 else flush)(self)

    monkeypatch.setattr(metrics.EventsWriter, "flush", flush_until_full)
    with pytest.raises(OSError, match="No space left") as caught:
        fit(tmp_path, *pieces())
    assert caught.value.filename.endswith("metrics.jsonl")
    monkeypatch.undo()
    with Checkpoints(tmp_path) as checkpoints:
        since = checkpoints.latest_step()
    assert since < 7 and goes_on(tmp_path, tmp_path_factory, since)


def test_a_disk_that_is_full_when_a_file_is_written_leaves_the_one_before(tmp_path, monkeypatch):
    path = tmp_path / "summary.json"
    files.write_whole(path, "before")
    monkeypatch.setattr(type(files.epath.Path(path)), "write_bytes", full)
    with pytest.raises(OSError, match="summary.json"):
        files.write_whole(path, "after")
    assert path.read_text() == "before"


# What Orbax's own threads still wanted to write when it went, they say to nobody.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("after", [1, 3])
def test_a_workdir_that_vanishes_is_missed_and_not_made_anew(tmp_path, after):
    step_fn, rest = pieces()
    workdir, done = tmp_path / "run", []

    def vanishing(*arguments):
        done.append(1)
        if len(done) == after:
            workdir.rename(tmp_path / "elsewhere")
        return step_fn(*arguments)

    with pytest.raises(Fault, match=r"run/(metrics.jsonl|checkpoints/\d) (is gone|cannot be written)"):
        fit(workdir, vanishing, rest)


class Failing:
    """A source that is read by grain's threads, of which some record cannot be."""

    def __init__(self, source, error):
        self._source, self._error, self._left = source, error, 30

    def __len__(self):
        return len(self._source)

    def __getitem__(self, i):
        self._left -= 1
        if self._left < 0:
            raise self._error
        return self._source[i]


@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), ValueError("not a PNG")])
def test_a_reader_that_dies_is_named_with_stage_and_update(tmp_path, tmp_path_factory, error):
    source = Failing(load_dataset(EXPERIMENT.data).train, error)
    batches = make_batches(source, batch_size=8, seed=1, flip=False)
    with pytest.raises(Fault, match=rf"stage teacher, update \d: no batch can be read \({type(error).__name__}"):
        fit(tmp_path, *pieces(), batches=batches)
    with Checkpoints(tmp_path) as checkpoints:
        since = checkpoints.latest_step()
    assert goes_on(tmp_path, tmp_path_factory, since)


def exploding(step_fn, since):
    def step(state, *rest):
        state, values = step_fn(state, *rest)
        return state, {**values, "loss": values["loss"] * jnp.where(state.step > since, 1e6, 1.0)}

    return step


def test_a_loss_that_explodes_is_given_up_with_the_last_good_state_kept(tmp_path, tmp_path_factory):
    step_fn, rest = pieces()
    with pytest.raises(UserError, match="stage teacher, update 8: the loss is .*e.*, where .* was typical"):
        fit(tmp_path, exploding(step_fn, 3), rest, updates=20)
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest_step() == 2  # 4, 6 and 8 would have been of an exploded state
    assert goes_on(tmp_path, tmp_path_factory, 2)


@pytest.mark.parametrize(("poison", "devices", "accumulate"), [(1e6, 1, 1), (np.nan, 1, 1), (np.nan, 2, 2)])
def test_an_update_whose_loss_is_an_explosion_is_skipped_and_counted(tmp_path, poison, devices, accumulate):
    step_fn, rest = pieces(devices, accumulate)
    states = []

    def poisoned(state, frozen, batch, *others):
        states.append(jax.device_get(state))
        factor = poison if int(state.step) == 4 else 1.0
        # One example, of one device and one part.
        return step_fn(state, frozen, {**batch, "x": batch["x"].at[-1].multiply(factor)}, *others)

    fit(tmp_path, poisoned, rest)
    lines = metrics.read_metrics(tmp_path)
    assert [line["skipped"] for line in lines] == [0, 0, 0, 0, 1, 0, 0]
    before, after, later = states[4:7]
    assert int(after.step) == 5 and int(after.skipped) == 1
    assert same((before.params, before.ema, before.opt_state), (after.params, after.ema, after.opt_state))
    assert not same(after.params, later.params)


def test_what_is_typical_is_known_again_after_a_restart(tmp_path):
    step_fn, rest = pieces()
    with pytest.raises(UserError, match="update 8"):
        fit(tmp_path, exploding(step_fn, 3), rest, updates=20)
    with pytest.raises(UserError, match="update 7"):
        fit(tmp_path, exploding(step_fn, 2), pieces()[1], updates=20)


def looks(losses):
    watch = train._Watch("teacher")
    for k, loss in enumerate(losses):
        watch(k, {"loss": loss, "skipped": 0.0})
    return watch


@pytest.mark.parametrize(
    "losses",
    [
        [0.5] * 3 + [600.0] * 4 + [0.5] * 3 + [600.0] * 4,  # spikes that pass
        [1e-12] * 5 + [5.0] * 20,  # a student that starts as its teacher
        list(np.geomspace(1e-3, 1e3, 200)),  # a rise that is no explosion
        [0.5, float("nan"), float("inf"), 0.5],  # the guard of the update counts these
    ],
)
def test_what_is_no_explosion_is_let_be(losses):
    looks(losses)


def test_a_stage_whose_last_update_explodes_ends_with_the_state_before_it(tmp_path):
    step_fn, rest = pieces()
    states = []

    def poisoned(state, frozen, batch, *others):
        states.append(jax.device_get(state))
        return step_fn(state, frozen, {**batch, "x": batch["x"] * (1e6 if int(state.step) == 6 else 1.0)}, *others)

    ended, _ = fit(tmp_path, poisoned, rest)
    assert same(ended.params, states[-1].params) and int(ended.skipped) == 1
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest_step() == 7


@pytest.mark.parametrize("stop", [5, 6, 7])  # between two looks, at one, and after the next
def test_what_is_skipped_does_not_depend_on_when_a_run_was_told_to_stop(tmp_path, monkeypatch, stop):
    def poisoned(state, frozen, batch, *others):
        factor = {4: 8.0, 6: 30.0}.get(int(state.step), 1.0)  # the first moves what is typical where it is looked at
        return step_fn(state, frozen, {**batch, "x": batch["x"] * factor}, *others)

    monkeypatch.setattr(train, "_EXPLODED", 20.0)
    monkeypatch.setattr(train, "_SCALE", 0.0)
    ended = []
    for name in ("whole", "stopped"):
        step_fn, rest = pieces()
        asked = iter([False] * stop + [True]) if name == "stopped" else iter([])
        monkeypatch.setattr(preemption, "asked", lambda asked=asked: next(asked, False))
        if name == "stopped":
            with pytest.raises(Stopped):
                fit(tmp_path / name, poisoned, rest, updates=9, log_every=3, save_every=100)
            step_fn, rest = pieces()
        ended.append(fit(tmp_path / name, poisoned, rest, updates=9, log_every=3, save_every=100)[0])
    assert same(*ended)


def test_a_fault_is_one_line_and_code_1(monkeypatch, capsys):
    def gone():
        raise OSError(errno.ENOSPC, "No space left on device", "runs/x/summary.json")

    monkeypatch.setattr(main.flag, "parse", lambda argv: None)
    monkeypatch.setattr(main, "_dispatch", gone)
    assert main.main([]) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: runs/x/summary.json: No space left on device; ") and said.count("\n") == 1


@pytest.mark.slow
def test_the_campaign_in_short_ends_with_the_same_parameters():
    line = [sys.executable, "-m", "benchmarks.faults", "--short"]
    done = subprocess.run(line, cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert done.returncode == 0 and "the same parameters, bit for bit" in done.stdout, done.stdout + done.stderr
