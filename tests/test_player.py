"""What the page to play with shows, without the page: of the committed bundle, a student of two steps and a teacher."""

import dataclasses
import importlib.util
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from students import experiments, make_student

import guided_distill
from guided_distill import pictures
from guided_distill.demo import __main__ as command
from guided_distill.demo.player import MAX_SEED, NUM, Drawn, Player, Settings, enlarged, fitted
from guided_distill.errors import UserError
from guided_distill.export import bundle

BUNDLE = Path(__file__).parent / "fixtures" / "bundle_v1"
SHAPE = (8, 8, 1)
GOOD = {"student": "det_0002", "w": 1.0, "label": 3, "seed": 5}


@pytest.fixture(scope="module")
def model():
    return guided_distill.load(BUNDLE)


@pytest.fixture(scope="module")
def player(model):
    return Player(model)


@pytest.fixture(scope="module")
def drawn(player):
    return player.draw(Settings(**GOOD))


def test_it_draws_what_the_bundle_draws(player, drawn, model):
    expected = model.sample(num_steps=2, w=1.0, labels=[3], num=NUM, seed=5)
    np.testing.assert_allclose(drawn.x, expected, atol=1e-5)
    assert (drawn.num_steps, drawn.calls) == (2, 2) and drawn.caption.startswith("det_0002: 2 steps, 2 calls of the")
    assert drawn.picture.dtype == np.uint8 and min(drawn.picture.shape[:2]) > 200
    np.testing.assert_array_equal(player.draw(Settings(**GOOD)).x, drawn.x)
    for other in ({"w": 3.0}, {"label": 4}, {"seed": 6}):
        assert np.abs(player.draw(Settings(**GOOD | other)).x - drawn.x).max() > 1e-3


def test_the_teacher_draws_beside(player, drawn, model):
    beside = player.draw_by_teacher(Settings(**GOOD))
    assert (beside.num_steps, beside.calls, beside.x.shape) == (4, 8, drawn.x.shape)
    alone = dataclasses.replace(model, students=model.students[:1])
    assert Player(alone).draw_by_teacher(Settings(**GOOD)) is None


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"student": "det_0003"}, "student = 'det_0003': there are det_0002"),
        ({"student": "teacher"}, "student = 'teacher': there are det_0002"),
        ({"student": None}, "student = None"),
        ({"w": 4.5}, r"w = 4.5 is outside the trained range \[0, 4\] of det_0002"),
        ({"w": float("nan")}, "w = nan: must be a number"),
        ({"w": "1"}, "w = '1': must be a number"),
        ({"w": None}, "w = None: must be a number"),
        ({"label": 10}, "label = 10: must be a whole number from 0 to 9"),
        ({"label": 0.5}, "label = 0.5: must be a whole"),
        ({"label": True}, "label = True: must be a whole"),
        ({"seed": -1}, f"seed = -1: must be a whole number from 0 to {MAX_SEED}"),
        ({"seed": MAX_SEED + 1}, "must be a whole number"),
        ({"seed": float("inf")}, "must be a whole number"),
        ({"seed": [0]}, r"seed = \[0\]: must be a whole"),
    ],
)
def test_what_is_no_setting_is_refused_by_name(player, wrong, says):
    with pytest.raises(UserError, match=says) as error:
        player.draw(Settings(**GOOD | wrong))
    assert "\n" not in str(error.value)


def as_picture(x):
    return Image.fromarray(enlarged(pictures.to_uint8(x))[..., 0])


def test_a_picture_is_kept_where_nothing_is_painted(player, drawn):
    x = pictures.to_uint8(drawn.x[0]) / np.float32(127.5) - 1.0
    mask = np.zeros(SHAPE, np.uint8)
    mask[:, :4] = 255
    made = player.edit(Settings(**GOOD), as_picture(drawn.x[0]), 2, Image.fromarray(enlarged(mask)[..., 0]))
    np.testing.assert_array_equal(made.x[:, :, 4:], np.broadcast_to(x[:, 4:], made.x[:, :, 4:].shape))
    assert np.abs(made.x[:, :, :4] - x[:, :4]).max() > 1e-3
    others = player.edit(Settings(**GOOD), as_picture(drawn.x[0]), 1)
    assert (others.num_steps, others.calls) == (1, 1) and np.abs(others.x - x).max() > 1e-3


@pytest.mark.parametrize(
    ("picture", "start", "mask", "says"),
    [
        (None, 1, None, "picture: there is none yet"),
        (Image.new("L", (5000, 8)), 1, None, "picture: 5000x8, at most 4096x4096 is taken"),
        (Image.new("L", (8, 8)), 3, None, "start = 3: must be a whole number from 1 to 2"),
        (Image.new("L", (8, 8)), 0, None, "start = 0: must be a whole number from 1 to 2"),
        (Image.new("L", (8, 8)), 1, Image.new("L", (8, 8)), "mask: nothing is painted"),
    ],
)
def test_what_cannot_be_edited_is_refused_by_name(player, picture, start, mask, says):
    with pytest.raises(UserError, match=says):
        player.edit(Settings(**GOOD), picture, start, mask)


def test_pictures_of_any_size_and_kind_are_fitted(drawn):
    np.testing.assert_allclose(fitted(as_picture(drawn.x[0]), SHAPE), np.clip(drawn.x[0], -1, 1), atol=1 / 255)
    for mode in ("1", "L", "P", "RGB", "RGBA", "LA", "I;16", "CMYK"):
        for shape in ((8, 8, 1), (6, 4, 3)):
            x = fitted(Image.new(mode, (31, 17)), shape)
            assert x.shape == shape and x.dtype == np.float32 and np.abs(x).max() <= 1.0


def test_samples_that_are_no_pictures_are_drawn_and_not_edited(tmp_path):
    students = [make_student(experiments()["mlp"], *which)[0] for which in (("det", 2), ("sto", 2))]
    bundle.write(tmp_path, students, 4, 8, {})
    signals = Player(guided_distill.load(tmp_path))
    assert list(signals.students) == ["det_0002", "sto_0002"] and signals.editors == {} and signals.teacher is None
    assert Drawn("sto_0002", np.zeros((NUM, 64, 1)), 2, 2, 0.1).picture.shape[-1] == 3
    with pytest.raises(UserError, match="student = 'det_0002': there are"):
        signals.edit(Settings("det_0002", 1.0, 0, 0), None, 1)


def test_a_bundle_of_a_teacher_alone_is_refused(model):
    with pytest.raises(UserError, match="holds no student of a number of steps: export one"):
        Player(dataclasses.replace(model, students=model.students[1:]))


@pytest.mark.parametrize(
    ("there", "flags", "says"),
    [
        (False, ["--bundle=x"], "error: the page needs gradio, which is not installed: pip install 'guided_distill"),
        (True, ["--bundle=x", "--port=0"], "error: --port=0: must be 1 ... 65535"),
    ],
)
def test_mistakes_of_the_command_are_one_line(monkeypatch, capsys, there, flags, says):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if there else None)
    assert command.main(flags) == 2
    assert capsys.readouterr().err.startswith(says)
