"""Captions as conditions: their tokens, guidance away from no caption, and whether pictures show what they say."""

from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import plain_features
import pytest
from captioned import captioned_config
from latent_run import drawn_like
from small_clip import write_clip

from guided_distill import data, evaluate, pictures, sample
from guided_distill.data import load_dataset, make_batches, read_range, read_tokens
from guided_distill.errors import UserError
from guided_distill.evaluation import captions
from guided_distill.evaluation.clip_scores import make_scorer
from guided_distill.experiment import from_config
from guided_distill.guidance import null_caption
from guided_distill.sharding import place
from guided_distill.teachers import initial_params, make_model, shapes_of
from guided_distill.text import end_of_text, hashed_words
from guided_distill.workdir import Run, open_run

EXPERIMENT = from_config(captioned_config())
LENGTH, VOCABULARY = EXPERIMENT.data.text_length, EXPERIMENT.data.vocabulary
END = end_of_text(VOCABULARY)


def tokens_of(*texts, length=LENGTH, vocabulary=VOCABULARY):
    return hashed_words(texts, length=length, vocabulary=vocabulary)


def test_a_word_is_a_number_wherever_it_stands():
    rows = tokens_of("Red square", "square: red", "", "red  SQUARE", length=4, vocabulary=4096)
    assert rows[0, 0] == rows[1, 2] and rows[0, 1] == rows[1, 0] and (rows[0] == rows[3]).all()
    assert (rows[2] == 4095).all() and rows.max(where=rows < 4095, initial=0) < 4095 and rows.dtype == np.int32


def test_a_long_caption_loses_its_end_and_keeps_the_end_of_text():
    rows = tokens_of("a b c d e f", length=4, vocabulary=4096)
    assert (rows[0, :3] == tokens_of("a b c", length=4, vocabulary=4096)[0, :3]).all() and rows[0, 3] == 4095


def test_words_of_any_script_are_words():
    rows = tokens_of("\u732b \u043a\u043e\u0442 caf\u00e9", length=4, vocabulary=4096)
    assert len(set(rows[0].tolist())) == 4


def perturbed():
    params = initial_params(EXPERIMENT, False, jax.random.key(0))
    return jax.tree.map(lambda p: p + 0.1 * jnp.cos(jnp.arange(p.size, dtype=p.dtype)).reshape(p.shape), params)


def test_guidance_leads_away_from_the_empty_caption():
    model, params = make_model(EXPERIMENT, w_conditioned=False), perturbed()
    z = jax.random.normal(jax.random.key(1), (2, *model.sample_shape))
    logsnr, tokens = jnp.zeros(2), jnp.asarray(tokens_of("a red square", "a blue square"))

    def velocity(tokens):
        return model.model_fn(params, z, logsnr, {"label": jnp.zeros(2, jnp.int32), "tokens": tokens})

    said, unsaid = velocity(tokens), velocity(jnp.asarray(tokens_of("", "")))
    assert jnp.abs(said - unsaid).max() > 1e-3
    cond = {"label": jnp.zeros(2, jnp.int32), "tokens": tokens, "w": jnp.array([0.0, 3.0])}
    guided = model.denoiser(params)(z, logsnr, cond)
    at = model.schedule.alpha_sigma(logsnr)
    w = jnp.array([0.0, 3.0])[:, None, None, None]
    v = (1 + w) * said - w * unsaid
    alpha, sigma = (value[:, None, None, None] for value in at)
    np.testing.assert_allclose(guided.x, alpha * z - sigma * v, atol=2e-5)


def test_no_caption_takes_the_label_with_it():
    cond = null_caption(10, END)({"label": jnp.arange(2), "tokens": jnp.asarray(tokens_of("a", "b"))})
    assert (cond["label"] == 10).all() and (cond["tokens"] == END).all()


def test_a_caption_of_another_order_is_another_caption():
    model, params = make_model(EXPERIMENT, w_conditioned=False), perturbed()
    z, logsnr = jnp.ones((2, *model.sample_shape)), jnp.zeros(2)
    tokens = jnp.asarray(tokens_of("white on green", "green on white"))
    out = model.model_fn(params, z, logsnr, {"label": jnp.zeros(2, jnp.int32), "tokens": tokens})
    assert jnp.abs(out[0] - out[1]).max() > 1e-4


def test_batches_bring_the_caption_of_their_picture():
    train = load_dataset(EXPERIMENT.data).train
    batch = next(make_batches(train, batch_size=16, seed=0, flip=False))
    colours = batch["x"][:, 4, 4]
    for colour, row in zip(colours, batch["tokens"], strict=True):
        name = next(name for name, value in zip(("red", "green", "blue", "white"), np.eye(3).tolist() + [[1, 1, 1]],
                    strict=True) if (colour > 0).tolist() == [bool(v) for v in value])  # fmt: skip
        assert (row == tokens_of(f"a {name} square")[0]).all()


@pytest.mark.parametrize("values", [{"data.text_length": 0}, {"evaluate.features": ("classifier",)}])
def test_what_does_not_go_together_is_named(values):
    with pytest.raises(UserError, match=r"config.model.text is given|config.evaluate.features holds 'classifier'"):
        from_config(captioned_config(**values))


def test_captions_that_are_not_there_are_named():
    config = captioned_config()
    config["data"]["text_length"], config["data"]["name"] = 4, "captioned:uncaptioned"
    with pytest.raises(UserError, match="no captions"):
        load_dataset(from_config(config).data)


def likeness(ours, theirs):
    return captions.likeness(*(tokens_of(*texts, length=4, vocabulary=4096) for texts in (ours, theirs)), 4095)


def test_captions_are_alike_by_their_words():
    alike = likeness(["red square", "sky"], ["square red", "red sky", "cat", ""])
    np.testing.assert_allclose(alike, [[1.0, 1 / 3, 0.0, 0.0], [0.0, 0.5, 0.0, 0.0]])


def test_real_pictures_find_their_own_captions():
    real, names = np.arange(12.0)[:, None] * 10, [f"picture {chr(97 + i)}" for i in range(12)]
    alike = likeness(names, names)
    assert captions.retrieval(real, alike, real) == 1.0
    assert captions.retrieval(real[::-1] + 1000.0, alike, real) == 5 / 12  # the last five are nearest to all


def test_a_caption_unlike_all_is_left_out():
    real, alike = np.arange(12.0)[:, None], likeness(["cat", "dog"], ["cat"] * 12)
    assert captions.retrieval(real[:2], alike, real) == 1.0
    assert captions.retrieval(real[:1], alike[1:], real) == 0.0


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("activation", "relu", "config.model.text.activation is 'relu'"),
        ("heads", 3, "width 16 does not divide by heads 3"),
    ],
)
def test_an_encoder_that_cannot_be_is_named(key, value, says):
    config = captioned_config()
    config["model"]["text"][key] = value
    with pytest.raises(UserError, match=says):
        from_config(config)


@pytest.mark.parametrize("values", [{"data.holdout": 1}, {"data.text_length": 1}])
def test_what_leaves_nothing_is_named(values):
    with pytest.raises(UserError, match="is 1, which leaves nothing"):
        from_config(captioned_config(**values))


def test_a_set_with_a_test_split_holds_nothing_out():
    with pytest.raises(UserError, match="data.holdout"):
        load_dataset(from_config(captioned_config(**{"data.holdout": 4})).data)


@pytest.mark.parametrize("in_memory", [True, False])
def test_what_is_held_out_is_not_trained_on(in_memory):
    images, words = np.arange(10, dtype=np.uint8).reshape(10, 1, 1, 1), tuple("abcdefghij")
    source = data.ArraySource(images, np.arange(10), np.arange(10)[:, None], words)
    if not in_memory:
        whole, source = source, mock.MagicMock()
        source.__len__.return_value = 10
        source.__getitems__ = lambda indices: [whole[i] for i in indices]
    train, test = data.held_out(source, 4)
    assert read_tokens(test)[:, 0].tolist() == [0, 4, 8]
    assert data.read_captions(test, 3) == ["a", "e", "i"]
    assert read_tokens(train)[:, 0].tolist() == [1, 2, 3, 5, 6, 7, 9]
    assert read_range(train, 2, 4)["label"].tolist() == [3, 5]


@pytest.mark.slow
def test_pictures_are_drawn_of_captions(tmp_path, monkeypatch):
    monkeypatch.setattr(Run, "finished", lambda self, stage: True)
    monkeypatch.setattr(Run, "params_of", lambda self, stage: place(self.mesh, drawn_like(shapes_of(stage.init))))
    told = {"num_steps": 2, "series": None, "w": 1.0, "num": 4, "seed": 0}
    out = tmp_path / "x.npz"
    sample.sample(captioned_config(), tmp_path, **told, labels=None, captions=["a red square", "sky"], out=str(out))
    drawn = np.load(out, allow_pickle=False)
    assert drawn["x"].shape == (4, 8, 8, 3) and drawn["label"].tolist() == [0, 1, 0, 1]
    sample.sample(captioned_config(), tmp_path, **told, labels=None, out=str(out))
    assert np.load(out)["label"].max() < len(read_range(load_dataset(EXPERIMENT.data).test, 0, 8)["tokens"])
    with pytest.raises(UserError, match="has 6 words; the model takes 4"):
        sample.sample(captioned_config(), tmp_path, **told, labels=None, captions=["a b c d e f"], out=str(out))
    with pytest.raises(UserError, match="labels: 2 is outside"):
        sample.sample(captioned_config(), tmp_path, **told, labels=[2], captions=["a", "b"], out=str(out))


@pytest.mark.slow
def test_an_evaluation_of_captions_scores_each_picture_with_its_own(tmp_path, monkeypatch):
    plain_features.use(monkeypatch)
    monkeypatch.setattr(Run, "params_of", lambda self, stage: place(self.mesh, drawn_like(shapes_of(stage.init))))
    folder, file, titles = write_clip(tmp_path / "clip"), tmp_path / "captions.txt", []
    file.write_text("a red square\na blue one\n")
    blank = np.zeros((1, 1, 3), np.uint8)
    monkeypatch.setattr(pictures, "comparison", lambda groups, title: titles.append(title) or blank)
    named = {"evaluate.clip": str(folder), "evaluate.captions": str(file)}
    run = open_run(captioned_config(**named), tmp_path / "run")
    rows = evaluate.evaluate(run, mock.MagicMock())["rows"]
    score = make_scorer(folder, ["a red square", "a blue one"], run.mesh)
    teacher = rows[0]
    x = np.load(tmp_path / "run" / "evaluation" / f"teacher_deterministic_{teacher['num_steps']:04d}_w0.images.npy")
    own, swapped = (score(x, (np.arange(len(x)) + shift) % 2).mean() for shift in (0, 1))
    assert teacher["metrics"]["clip_score"] == pytest.approx(own, abs=0.02) and abs(own - swapped) > 0.1
    assert all(0.0 <= row["metrics"]["retrieval_efficientnet_lite0"] <= 1.0 for row in rows)
    assert titles == ["captioned:squares: the same noise and caption down each column"]
