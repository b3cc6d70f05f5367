"""From an imported latent model to pictures: the chain, its evaluation, and what can be asked of the students."""

import dataclasses
import itertools
import shutil
from unittest import mock

import jax
import numpy as np
import pytest
from latent_run import (
    COLOURS,
    MODEL,
    PAINTS_IN,
    drawn_like,
    latent_config,
    random_params,
    write_model,
    write_pairs,
)
from PIL import Image
from small_clip import write_clip

from guided_distill import evaluate, generate, pipeline, sample
from guided_distill.data import load_dataset, make_batches
from guided_distill.encode import encode
from guided_distill.errors import UserError
from guided_distill.evaluation.clip_scores import make_scorer
from guided_distill.experiment import from_config
from guided_distill.interop.clip_folder import read_clip
from guided_distill.interop.latent_folder import read_latent, write_latent
from guided_distill.latent_space import open_space
from guided_distill.masks import draw_mask, shrink
from guided_distill.models.clip import TextEncoder, VisionEncoder, clip_pixels, clip_score
from guided_distill.sharding import make_mesh, place
from guided_distill.teachers import shapes_of
from guided_distill.workdir import Run

TOLD = {"num_steps": 2, "series": None, "w": 1.0, "num": 4, "seed": 0, "labels": None}


def test_the_score_is_clips_own(tmp_path):
    folder = write_clip(tmp_path / "clip")
    captions = ["a cat", "dogs " * 9, "b"]
    scorer = make_scorer(folder, captions, make_mesh())
    x = np.random.default_rng(1).uniform(-1, 1, (5, 8, 8, 3)).astype(np.float32)
    label = np.array([0, 2, 1, 0, 2])
    text, vision, params, tokenizer = read_clip(folder)
    embedding = TextEncoder(text).apply({"params": params["text"]}, tokenizer.encode(captions))[1][label]
    pictures = VisionEncoder(vision).apply({"params": params["vision"]}, clip_pixels(x, 16))
    expected = clip_score(pictures, embedding)
    assert np.ptp(expected) > 1.0
    np.testing.assert_allclose(scorer(x, label), expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "vocab.json"])
def test_a_clip_model_that_lacks_a_file_is_named(tmp_path, name):
    folder = write_clip(tmp_path / "clip")
    (folder / name).unlink()
    with pytest.raises(UserError, match=name):
        make_scorer(folder, ["a"], make_mesh())


@pytest.fixture(scope="module")
def encoded(tmp_path_factory):
    """A model, its latents of captioned pictures, and the config of a run on them: (folder, config)."""
    folder = tmp_path_factory.mktemp("chain")
    write_model(folder / "model")
    config = latent_config(folder, **{"data.holdout": 3})
    encode(config, f"folder:{write_pairs(folder / 'pairs')}")
    config["data"]["holdout"] = 0
    return folder, config


@pytest.fixture
def finished(encoded, monkeypatch):
    """The same with every stage as if trained, its weights random."""
    monkeypatch.setattr(Run, "finished", lambda self, stage: True)
    monkeypatch.setattr(Run, "params_of", lambda self, stage: place(self.mesh, drawn_like(shapes_of(stage.init))))
    return encoded


def test_the_teacher_is_the_imported_one(encoded):
    folder, config = encoded
    run = pipeline.open_run(config, folder / "run")
    theirs = read_latent(folder / "model")[1]["unet"]
    jax.tree.map(np.testing.assert_array_equal, run.params_of(run.stage("teacher")), theirs)
    assert [stage.name for stage in run.stages if not run.finished(stage)][0] == "to_v"


def draw(finished, out, **told):
    folder, config = finished
    sample.sample(config, folder / "run", out=str(out), **{**TOLD, **told})
    return np.load(out, allow_pickle=False)["x"] if out.suffix == ".npz" else Image.open(out)


def test_pictures_are_drawn_of_new_captions(finished, tmp_path):
    out = tmp_path / "x.npz"
    x = draw(finished, out, captions=["red", "blue"])
    assert x.shape == (4, 8, 8, 3) and np.abs(x).max() <= 1.0
    np.testing.assert_array_equal(x[0], draw(finished, out, captions=["red"])[0])
    assert np.abs(x[1] - draw(finished, out, captions=["red", "green"])[1]).max() > 0.0
    with pytest.raises(UserError, match="has 8 tokens; the text encoder takes 6"):
        draw(finished, out, captions=["abcdefgh"])


def test_a_list_of_captions_stands_for_those_held_out(finished, tmp_path, monkeypatch, capsys):
    folder, config = finished
    (tmp_path / "captions.txt").write_text("red\n\nblue one\n")
    config = {**config, "evaluate": {**config["evaluate"], "captions": str(tmp_path / "captions.txt")}}
    run = pipeline.open_run(config, folder / "run", create=False)
    assert run.captions == ["red", "blue one"] and len(run.conditions["text"]) == 2
    np.testing.assert_allclose(run.conditions["text"], run.space.embed(["red", "blue one"]), atol=2e-3)
    (tmp_path / "captions.txt").write_text("red\nvermilion\n")
    monkeypatch.setattr(evaluate, "evaluate", mock.Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        pipeline.evaluate_run(config, folder / "run")
    assert "which lose their end: 1" in capsys.readouterr().err
    with pytest.raises(UserError, match="nowhere.txt cannot be read"):
        _ = pipeline.open_run(
            {**config, "evaluate": {**config["evaluate"], "captions": "nowhere.txt"}}, folder / "run", create=False
        ).captions


def test_a_picture_is_edited_in_latent_space(finished, tmp_path):
    folder, _ = finished
    Image.new("RGB", (8, 8), (255, 0, 0)).save(tmp_path / "red.png")
    hole = Image.new("L", (8, 8))
    hole.paste(255, (4, 0, 8, 8))
    hole.save(tmp_path / "hole.png")
    given = sample.From(image=str(tmp_path / "red.png"), mask=str(tmp_path / "hole.png"), start=1)
    x = draw(finished, tmp_path / "x.npz", captions=["blue"], begin=given)
    assert np.ptp(x, axis=0).max() > 1e-3  # each image has a noise of its own
    space = open_space(folder / "model")
    red = space.encode(np.array([1, -1, -1], np.float32) * np.ones((1, 8, 8, 3), np.float32))
    # What the mask keeps is the latent of the picture, at the side of the latent.
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(type(space), "decode", lambda self, z: z)
        z = draw(finished, tmp_path / "z.npz", captions=["blue"], begin=given)
    np.testing.assert_allclose(z[:, :, :2], np.repeat(red[:, :, :2], 4, 0), atol=1e-5)
    assert np.abs(z[:, :, 2:] - red[:, :, 2:]).max() > 1e-3
    with pytest.raises(UserError, match="is 4x4x3, the model's pictures are 8x8x3"):
        Image.new("RGB", (4, 4)).save(tmp_path / "small.png")
        draw(finished, tmp_path / "x.npz", begin=sample.From(image=str(tmp_path / "small.png")))


@pytest.mark.parametrize(
    ("model", "updates", "says"),
    [
        (MODEL, {"parameterisation": "v", "to_v.updates": 0}, "predicts eps, and the config says v"),
        (MODEL, {"model.channels": 16}, "is another network than config.model .channels: 8 -> 16"),
        (PAINTS_IN, {}, "extra_channels: 5 -> 0"),
        (
            dataclasses.replace(MODEL, unet=dataclasses.replace(MODEL.unet, w_conditioned=True)),
            {},
            "takes w: name it as",
        ),
    ],
)
def test_an_imported_model_unlike_the_config_is_named(encoded, tmp_path, model, updates, says):
    folder, _ = encoded
    shutil.copytree(folder / "latents", tmp_path / "latents")
    write_model(tmp_path / "model", model)
    with pytest.raises(UserError, match=says):
        pipeline.open_run(latent_config(tmp_path, **updates), tmp_path / "run")


@pytest.mark.parametrize(
    ("updates", "seed", "says"),
    [
        ({}, 1, "was encoded by another model than config.latent_model"),
        ({"model.context_dim": 16}, 0, "context_dim: 8 -> 16|captions of .* are 8 wide"),
        ({"evaluate.captions": "nowhere.txt"}, 0, "nowhere.txt cannot be read"),
        ({"evaluate.clip": "nowhere"}, 0, "nowhere holds no config.json"),
    ],
)
def test_what_would_fail_late_is_named_at_once(encoded, tmp_path, updates, seed, says):
    folder, _ = encoded
    shutil.copytree(folder / "latents", tmp_path / "latents")
    write_model(tmp_path / "model", seed=seed)
    with pytest.raises(UserError, match=says):
        pipeline.open_run(latent_config(tmp_path, **updates), tmp_path / "run")


def test_a_network_that_takes_w_begins_at_stage_two(encoded, tmp_path):
    """Its sinusoid of w may be of another width than ours; the first halving starts from its weights and moves them."""
    folder, _ = encoded
    student = dataclasses.replace(MODEL, unet=dataclasses.replace(MODEL.unet, w_conditioned=True, w_channels=16))
    params = random_params(student, seed=1)
    write_latent(tmp_path / "student", student, params)
    given = {"to_v.updates": 0, "stage1.checkpoint": str(tmp_path / "student")}
    with pytest.raises(UserError, match=r"config.stage1.checkpoint: .* \(w_channels: 16 -> 256\)"):
        pipeline.open_run(latent_config(folder, **given), tmp_path / "run")
    config = latent_config(folder, **given, **{"model.w_channels": 16, "stage2.updates": 1})
    run = pipeline.open_run(config, tmp_path / "run")
    stage1, halving = run.stage("stage1"), run.stage("stage2_det_0002")
    assert run.finished(stage1) and not run.finished(halving)
    jax.tree.map(np.testing.assert_array_equal, run.params_of(stage1), params["unet"])
    with pipeline.RunProgress(1, enabled=False) as progress:
        pipeline.train_stage(run, halving, progress)
    kernel, moved = (tree["embedding"]["w"]["kernel"] for tree in (params["unet"], run.params_of(halving)))
    assert 0.0 < np.abs(moved - kernel).max() < 1e-2


def test_what_does_not_go_together_is_named(tmp_path):
    for updates, says in (
        ({"data.data_range": 1.0}, "config.data.data_range names a range"),
        ({"schedule.beta_end": 0.02}, "config.model.betas, num_betas and zero_terminal_snr are"),
        ({"schedule.zero_terminal_snr": True, "model.zero_terminal_snr": True}, "an eps says nothing of the image"),
        ({"model.extra_channels": 3}, "config.model.extra_channels is 3"),
        ({"evaluate.features": ("classifier",)}, "config.evaluate.features holds 'classifier'"),
    ):
        with pytest.raises(UserError, match=says):
            from_config(latent_config(tmp_path, **updates))


def test_a_network_that_paints_in_is_told_the_hole(tmp_path, monkeypatch):
    write_model(tmp_path / "model", PAINTS_IN)
    config = latent_config(tmp_path, PAINTS_IN, **{"data.holdout": 3, "data.flip": True})
    encode(config, f"folder:{write_pairs(tmp_path / 'pairs')}")
    config["data"]["holdout"] = 0
    train, space = load_dataset(from_config(config).data).train, open_space(tmp_path / "model")
    batch = next(make_batches(train, batch_size=4, seed=0, flip=True))
    assert batch["mask"].shape == (4, 4, 4, 1) and batch["masked"].shape == (4, 4, 4, 4)
    for i, flipped in itertools.product(range(4), (False, True)):
        colour = list(COLOURS.values())[(1, 2, 4, 5)[i] % 4]  # every third picture is held out
        hole = draw_mask(np.random.default_rng((i, flipped, 0)), 8)
        around = (np.array(colour, np.float32) / 127.5 - 1.0) * (1.0 - hole)
        found = train.read([i], [flipped], None)
        np.testing.assert_array_equal(found["mask"][0], shrink(hole, 4))
        np.testing.assert_allclose(found["masked"], space.encode(around[None]), atol=5e-3)
    monkeypatch.setattr(Run, "finished", lambda self, stage: True)
    monkeypatch.setattr(Run, "params_of", lambda self, stage: place(self.mesh, drawn_like(shapes_of(stage.init))))
    Image.new("RGB", (8, 8), (255, 0, 0)).save(tmp_path / "red.png")
    hole = Image.new("L", (8, 8), 127)
    hole.save(tmp_path / "none.png")
    hole.paste(128, (4, 0, 8, 8))  # the middle between black and white lies between these two
    hole.save(tmp_path / "half.png")
    Image.new("L", (8, 8), 255).save(tmp_path / "all.png")
    drawn, told_of = [], []
    sampler = generate.sample_images
    monkeypatch.setattr(generate, "sample_images", lambda *a, **k: told_of.append(k["conditions"]) or sampler(*a, **k))
    for name in ("half", "all"):
        given = sample.From(image=str(tmp_path / "red.png"), mask=str(tmp_path / f"{name}.png"))
        drawn.append(draw((tmp_path, config), tmp_path / "x.npz", captions=["blue"], begin=given))
    assert np.abs(drawn[0] - drawn[1]).max() > 1e-3
    kept = np.zeros((8, 8, 3), np.float32)
    kept[:, :4] = [1.0, -1.0, -1.0]
    np.testing.assert_allclose(told_of[0]["masked"], space.encode(kept[None]), atol=1e-5)
    assert told_of[0]["mask"][0, 0, :, 0].tolist() == [0, 0, 1, 1] and told_of[1]["mask"].min() == 1
    told = {**TOLD, "captions": ["blue"], "out": str(tmp_path / "x.png")}
    for begin, says in (
        (sample.From(), "give it --image and --mask besides --caption"),
        (sample.From(image=str(tmp_path / "red.png")), "give it --image and --mask, and no --start"),
        (sample.From(image=str(tmp_path / "red.png"), mask=str(tmp_path / "none.png")), "holds nothing white"),
    ):
        with pytest.raises(UserError, match=says):
            sample.sample(config, tmp_path / "run", **told, begin=begin)
