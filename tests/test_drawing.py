"""Batches of a row of an evaluation that are kept are gone on with, and those of anything else, or damaged, are not."""

import itertools
import types

import numpy as np
import pytest

from guided_distill import drawing

NUM, SIZE = 10, 4
MODEL = types.SimpleNamespace(num_labels=lambda conditions: 3)


@pytest.fixture
def sampled(monkeypatch):
    """The first images of the batches that were drawn: of image k all values are k."""
    sampled = []

    def sample_images(*_, first, num, batch_size, **__):
        for start in range(first, num, batch_size):
            index = np.arange(start, min(start + batch_size, num))
            sampled.append(start)
            yield index, (index % 3).astype(np.int32), np.broadcast_to(index[:, None, None], (len(index), 40, 40)) * 1.0

    monkeypatch.setattr(drawing, "sample_images", sample_images)
    return sampled


def make_run(workdir, seed=0, batch_size=SIZE, conditions=None, given=None):
    return types.SimpleNamespace(
        workdir=workdir,
        experiment=types.SimpleNamespace(evaluate=types.SimpleNamespace(seed=seed, batch_size=batch_size)),
        conditions=conditions,
        outside=None,
        grid=None,
        mesh=None,
        is_main=True,
        shown=lambda x: 2 * x,
        given=lambda stage: given,
        checkpoint_of=lambda stage: workdir / "weights",
    )


def make_entry(calls=16):
    stage = types.SimpleNamespace(name="stage1", model=MODEL)
    return types.SimpleNamespace(stage=stage, calls=calls, sampler="deterministic", file=lambda w: f"stage1_w{w:g}")


def draw(run, entry=None, w=0.0, num=NUM):
    entry = entry or make_entry()
    keep = drawing.row_directories(run)(entry, w, num)
    return drawing.drawn(run, entry, None, w, num=num, num_steps=4, keep=keep)


def test_a_row_is_gone_on_with_at_the_batch_it_was_left_at(tmp_path, sampled):
    run = make_run(tmp_path)
    undisturbed = list(draw(run, make_entry(calls=1)))
    begun = draw(run)
    first = [next(begun), next(begun)]
    sampled.clear()
    again = list(draw(run))
    assert sampled == [8] and [batch.anew for batch in again] == [False, False, True]
    assert [batch.seconds for batch in again[:2]] == [batch.seconds for batch in first]
    for batch, expected in zip(again, undisturbed, strict=True):
        for name in ("index", "label", "x"):
            np.testing.assert_array_equal(getattr(batch, name), getattr(expected, name), strict=True)


def test_a_cheap_row_leaves_nothing(tmp_path, sampled):
    list(draw(make_run(tmp_path), make_entry(calls=15)))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "damage",
    [lambda content: b"", lambda content: content[:300], lambda content: content.replace(b"x.npy", b"y.npy")],
    ids=["empty", "half", "another array"],
)
def test_a_damaged_batch_is_drawn_again(tmp_path, sampled, damage):
    run = make_run(tmp_path)
    list(draw(run))
    file = drawing.row_directories(run)(make_entry(), 0.0, NUM) / "00000004.npz"
    file.write_bytes(damage(file.read_bytes()))
    sampled.clear()
    assert [list(batch.index) for batch in draw(run)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert sampled == [4, 8]


def test_no_wrong_byte_of_a_kept_batch_changes_an_image(tmp_path, sampled):
    run = make_run(tmp_path)
    expected = [batch.x for batch in draw(run)]
    file = drawing.row_directories(run)(make_entry(), 0.0, NUM) / "00000000.npz"
    content = file.read_bytes()
    header = content.index(b"\x93NUMPY", content.index(b"x.npy"))
    places = [*range(header, header + 128, 3), *range(content.index(b"PK\1\2"), len(content), 3)]
    for place, wrong in zip(places, itertools.cycle([0xFF, 1, 8, 12, 14])):
        file.write_bytes(content[:place] + bytes([content[place] ^ wrong]) + content[place + 1 :])
        for batch, x in zip(draw(run), expected, strict=True):
            np.testing.assert_array_equal(batch.x, x, strict=True)


def test_a_row_of_another_w_is_another(tmp_path, sampled):
    run, entry = make_run(tmp_path), make_entry()
    at = drawing.row_directories(run)
    for w in (0.0, 0.3):
        list(draw(run, w=w))
    drawing.forget(at(entry, 0.0, NUM))
    sampled.clear()
    list(draw(run, w=0.3))
    assert sampled == []
    drawing.forget(drawing.kept(tmp_path))
    list(draw(run, w=0.3))
    assert sampled == [0, 4, 8]


@pytest.mark.parametrize(
    "changed",
    [
        {"seed": 1},
        {"batch_size": 5},
        {"conditions": {"tokens": np.ones((3, 2), np.int32)}},
        {"given": "elsewhere"},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_what_samples_are_made_of_names_their_batches(tmp_path, sampled, changed):
    list(draw(make_run(tmp_path, conditions={"tokens": np.zeros((3, 2), np.int32)})))
    sampled.clear()
    list(draw(make_run(tmp_path, **{"conditions": {"tokens": np.zeros((3, 2), np.int32)}, **changed})))
    assert sampled[0] == 0 and len(sampled) == -(-NUM // changed.get("batch_size", SIZE))


def test_other_weights_and_another_number_of_samples_name_others(tmp_path, sampled):
    run = make_run(tmp_path)
    list(draw(run))
    (tmp_path / "weights" / "checksums").mkdir(parents=True)
    (tmp_path / "weights" / "checksums" / "7.json").write_text("{}")
    sampled.clear()
    list(draw(run))
    assert sampled == [0, 4, 8]
    list(draw(run, num=NUM - 1))
    assert sampled == [0, 4, 8, 0, 4, 8]
