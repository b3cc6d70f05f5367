"""Latents: encoded once and read often; the chain from an imported model to pictures of captions."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import jax
import numpy as np
import pytest
from latent_run import FIRST, TEXT, latent_config, write_model, write_pairs, write_shards
from PIL import Image

from guided_distill import data, latents, masks
from guided_distill.encode import encode
from guided_distill.errors import UserError
from guided_distill.experiment import from_config
from guided_distill.latent_space import open_space
from guided_distill.models.autoencoder import Autoencoder, tiled_decode
from guided_distill.models.clip import TextEncoder

REPO = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model, twelve captioned pictures, and their latents with flips; every third is held out."""
    folder = tmp_path_factory.mktemp("latents")
    write_model(folder / "model")
    write_pairs(folder / "pairs")
    encode(latent_config(folder, **{"data.holdout": 3, "data.flip": True}), f"folder:{folder / 'pairs'}")
    return folder


def dataset(folder, **updates):
    return data.load_dataset(from_config(latent_config(folder, **updates)).data)


def test_latents_are_what_the_autoencoder_says(place):
    train = dataset(place).train
    space = open_space(place / "model")
    assert len(train) == 8 and train.texts(3) == ["green", "blue", "red"]
    batch = data.read_range(train, 0, 2)
    green = np.full((1, 8, 8, 3), -1.0, np.float32) + np.array([0, 2, 0], np.float32)
    params = space.params["autoencoder"]
    moments = Autoencoder(FIRST).apply({"params": params}, green, method="moments")
    np.testing.assert_allclose(batch["x"][0], FIRST.scale * moments.mean[0], rtol=2e-3, atol=2e-3)
    tokens = space._tokenizer.encode(["green", ""])
    states, _ = TextEncoder(TEXT).apply({"params": space.params["text_encoder"]}, tokens)
    np.testing.assert_allclose(batch["text"][0], states[0], rtol=2e-3, atol=2e-3)
    np.testing.assert_allclose(batch["null_text"][1], states[1], rtol=1e-5, atol=1e-5)
    picture = space.decode(batch["x"])
    assert picture.shape == (2, 8, 8, 3) and np.abs(picture).max() <= 1.0


def test_what_is_larger_than_the_model_was_made_for_is_decoded_by_tiles_and_no_other(place):
    space = open_space(place / "model")
    params = {"params": space.params["autoencoder"]}
    whole = jax.jit(lambda z: Autoencoder(FIRST).apply(params, z, method="decode"))
    z = np.random.default_rng(0).normal(size=(2, 5, 4, 4)).astype(np.float32)
    by_tiles, at_once = np.clip(tiled_decode(whole, z, factor=2, tile=4, overlap=1), -1.0, 1.0), space.decode(z)
    assert np.abs(by_tiles - at_once).max() > 1e-2
    made_for_5 = dataclasses.replace(space, model=dataclasses.replace(space.model, latent_side=5))
    with mock.patch("guided_distill.latent_space._WHOLE", 4):
        np.testing.assert_allclose(space.decode(z), by_tiles, atol=1e-5)
        np.testing.assert_allclose(space.decode(z[:, :4]), np.clip(whole(z[:, :4]), -1.0, 1.0), atol=1e-5)
        np.testing.assert_array_equal(made_for_5.decode(z), at_once)


def test_the_posterior_is_drawn_anew_and_the_same_for_the_same_place(place):
    train = dataset(place).train
    mean = train.read([0], [False], None)["x"][0]
    draws = np.stack([train.read([0], [False], [seed])["x"][0] for seed in range(2000)])
    np.testing.assert_array_equal(draws[3], train.read([0], [False], [3])["x"][0])
    with mock.patch.object(np.random, "default_rng", side_effect=AssertionError):
        np.testing.assert_array_equal(train.read([0], [False], None)["x"][0], mean)
    std = FIRST.scale * _std(place)
    assert std.min() > 1e-3
    np.testing.assert_allclose(draws.std(0) / std, 1.0, atol=0.12)
    assert np.abs((draws.mean(0) - mean) / std).max() < 0.12


def _std(place):
    params = open_space(place / "model").params["autoencoder"]
    green = np.full((1, 8, 8, 3), -1.0, np.float32) + np.array([0, 2, 0], np.float32)
    return np.exp(0.5 * Autoencoder(FIRST).apply({"params": params}, green, method="moments").logvar)[0]


def test_flips_are_those_of_the_picture(tmp_path):
    """A latent is flipped by encoding the flipped picture: a network with padding at two sides does not commute."""
    write_model(tmp_path / "model")
    write_pairs(tmp_path / "pairs", num=2)
    image = np.zeros((8, 8, 3), np.uint8)
    image[:, :3] = 255
    for name in ("000", "001"):
        Image.fromarray(image if name == "000" else image[:, ::-1]).save(tmp_path / "pairs" / f"{name}.png")
    encode(latent_config(tmp_path, **{"data.flip": True}), f"folder:{tmp_path / 'pairs'}")
    train = dataset(tmp_path).train
    one, other = (train.read([i], [flip], None)["x"] for i, flip in ((0, True), (1, False)))
    np.testing.assert_array_equal(one, other)
    assert np.abs(one - train.read([0], [False], None)["x"]).max() > 1e-3


def test_batches_do_not_depend_on_the_number_of_hosts(place):
    train = dataset(place).train
    of_all = {"batch_size": 4, "seed": 0, "flip": True}
    whole = data.make_batches(train, **of_all)
    halves = [data.make_batches(train, **of_all, process_index=p, process_count=2) for p in (0, 1)]
    for _ in range(3):
        batch, parts = next(whole), [next(half) for half in halves]
        for name, rows in batch.items():
            np.testing.assert_array_equal(rows, np.concatenate([part[name] for part in parts]))


def test_shards_of_webdataset_hold_the_same_pairs(tmp_path):
    files = data.pairs.open_pairs(write_pairs(tmp_path / "files"), 8)
    shards = data.pairs.open_pairs(write_shards(tmp_path / "shards", tmp_path / "files"), 8)
    assert len(files) == len(shards) == 12
    for one, other in zip(files, shards, strict=True):
        assert one["text"] == other["text"] and one["label"] == other["label"] == 0
        np.testing.assert_array_equal(one["image"], other["image"])


def test_pictures_stand_upright_and_what_is_hidden_is_none(tmp_path):
    image = Image.new("RGB", (8, 8))
    image.paste((255, 0, 0), (0, 0, 8, 4))
    turned = image.getexif()
    turned[0x0112] = 3  # taken upside down
    image.save(tmp_path / "A.JPG", exif=turned, quality=95)
    (tmp_path / "A.TXT").write_text("red below")
    (tmp_path / "._A.JPG").write_bytes(b"no picture")
    (pair,) = data.pairs.open_pairs(tmp_path, 8, captioned=True)
    assert pair["text"] == "red below" and pair["image"][6, 4, 0] > 200 > 50 > pair["image"][1, 4, 0]


def test_classes_are_subfolders_or_say_themselves(tmp_path):
    for name in ("cat", "dog"):
        write_pairs(tmp_path / name, num=2)
    (tmp_path / "dog" / "001.cls").write_text("7")
    assert [int(pair["label"]) for pair in data.pairs.open_pairs(tmp_path, 8)] == [0, 0, 1, 7]
    (tmp_path / "dog" / "001.cls").write_text("seven")
    with pytest.raises(UserError, match="the class of dog/001.png is b'seven'"):
        data.pairs.open_pairs(tmp_path, 8)[3]


def test_a_folder_of_pictures_is_a_data_set(tmp_path):
    write_pairs(tmp_path / "pairs")
    config = data.DataConfig(f"folder:{tmp_path / 'pairs'}", 8, 3, 1, holdout=3, text_length=4, vocabulary=64)
    found = data.load_dataset(config)
    batch = next(data.make_batches(found.train, batch_size=2, seed=0, flip=False))
    assert len(found.test) == 4 and batch["x"].shape == (2, 8, 8, 3) and batch["tokens"].shape == (2, 4)
    assert data.read_captions(found.test, 4) == ["red", "white", "blue", "green"]


def test_an_interrupted_encoding_goes_on_and_ends_the_same(tmp_path, capsys):
    config = latent_config(tmp_path)
    write_model(tmp_path / "model")
    source = f"folder:{write_pairs(tmp_path / 'pairs')}"
    for k, caption in ((0, "turquoise"), (5, "vermilion"), (6, "yellow")):  # the encoder takes six letters
        (tmp_path / "pairs" / f"{k:03d}.txt").write_text(caption)
    with mock.patch("guided_distill.encode._SHARD", 4):
        encode(config, source)
        assert "which lost their end: 2" in capsys.readouterr().err
        folder = tmp_path / "latents"
        expected = data.read_range(dataset(tmp_path).train, 0, 12)
        (folder / latents.ABOUT).rename(folder / latents.UNFINISHED)
        latents.shard_path(folder, "train", 1, 3).unlink()
        with pytest.raises(UserError, match="is not finished; give the same --mode=encode command again"):
            dataset(tmp_path)
        kept = latents.shard_path(folder, "train", 0, 3)
        before = kept.stat().st_mtime_ns
        encode(config, source)
    assert "which lost their end: 1" in capsys.readouterr().err
    assert kept.stat().st_mtime_ns == before
    for name, rows in data.read_range(dataset(tmp_path).train, 0, 12).items():
        np.testing.assert_array_equal(rows, expected[name])


@pytest.mark.slow
def test_several_processes_share_the_encoding(place, tmp_path, free_port):
    """Each writes every other shard, and together they write what one does."""
    whole = latent_config(place, **{"data.holdout": 3, "data.flip": True})
    (tmp_path / "config.py").write_text(
        "import json\n\nimport ml_collections\n\n\n"
        "def get_config():\n"
        f"    return ml_collections.ConfigDict(json.loads({json.dumps(json.dumps(whole))}), convert_dict=True)\n"
    )
    environment = {
        **os.environ,
        "PROGRAM": f"{sys.executable} -m guided_distill.main",
        "PORT": str(free_port()),
        "PYTHONPATH": str(REPO),
    }
    line = [REPO / "launch" / "local.sh", "2", f"--config={tmp_path / 'config.py'}", "--mode=encode"]
    line += [f"--source=folder:{place / 'pairs'}", f"--config.data.name=latents:{tmp_path / 'latents'}"]
    done = subprocess.run(line, cwd=REPO, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("8 train, 4 test latents") == 1
    ours, theirs = (dataset(place, **{"data.name": f"latents:{folder / 'latents'}"}) for folder in (place, tmp_path))
    for split in ("train", "test"):
        expected, found = (data.read_range(records, 0, 4) for records in (getattr(ours, split), getattr(theirs, split)))
        for key, values in expected.items():
            np.testing.assert_allclose(found[key], values, atol=2e-3, err_msg=key)


@pytest.mark.parametrize(
    ("updates", "message"),
    [
        ({"data.shape": (8, 8, 4)}, "data.shape: latents of .* are 4x4x4, the config says 8x8x4"),
        ({"data.text_length": 7}, "data.text_length: captions of .* have 8 tokens, the config says 7"),
        ({"data.holdout": 3}, "was said to --mode=encode"),
        ({"data.num_classes": 5}, "was encoded for 4 classes, the config says 5"),
        ({"data.name": "latents:gs://bucket/x"}, "mount the bucket"),
    ],
)
def test_a_set_unlike_the_config_is_named(place, updates, message):
    with pytest.raises(UserError, match=message):
        dataset(place, **updates)


def test_a_set_of_other_settings_is_left_alone(place):
    with pytest.raises(UserError, match="was made with another counts, flips, shards, source; delete it"):
        encode(latent_config(place), f"folder:{place}")
    about = json.loads((place / "latents" / latents.ABOUT).read_text())
    assert about["counts"] == {"train": 8, "test": 4}


@pytest.mark.parametrize(
    ("updates", "source", "message"),
    [
        ({"data.name": "digits"}, "folder:.", "--mode=encode writes to 'latents:DIR'"),
        ({"latent_model": None}, "folder:.", "config.latent_model is missing"),
        ({"data.shape": (4, 4, 3)}, "folder:.", "latents of .* have 4 channels"),
        ({}, "folder:nowhere", "nowhere: no such folder of pictures"),
        ({"data.text_length": 0, "data.num_classes": 1}, "CLASSES", "label 1 of picture 2 of .* is outside 0..0"),
        ({}, "BARE", "001.png has no caption"),
    ],
)
def test_what_cannot_be_encoded_is_named(place, tmp_path, updates, source, message):
    for name in ("cat", "dog"):
        write_pairs(tmp_path / "classes" / name, num=2)
    (write_pairs(tmp_path / "bare", num=2) / "001.txt").unlink()
    source = {"CLASSES": f"folder:{tmp_path / 'classes'}", "BARE": f"folder:{tmp_path / 'bare'}"}.get(source, source)
    updates = {"data.name": f"latents:{tmp_path / 'latents'}"} | updates
    with pytest.raises(UserError, match=message):
        encode(latent_config(place, **updates), source)


def test_masks_are_never_empty_and_a_quarter_is_whole():
    drawn = [masks.draw_mask(np.random.default_rng(seed), 32) for seed in range(400)]
    assert all(mask.shape == (32, 32, 1) and set(np.unique(mask)) <= {0, 1} and mask.any() for mask in drawn)
    whole = np.mean([mask.all() for mask in drawn])
    assert 0.18 < whole < 0.32
    shares = [mask.mean() for mask in drawn if not mask.all()]
    assert np.min(shares) < 0.05 and np.max(shares) > 0.4
    np.testing.assert_array_equal(masks.draw_mask(np.random.default_rng(5), 32), drawn[5])


def test_a_mask_shrinks_to_its_nearest_pixels():
    mask = np.zeros((1, 8, 8, 1))
    mask[:, 2:5] = 1
    assert masks.shrink(mask, 4)[0, :, 0, 0].tolist() == [0, 1, 1, 0]
    assert masks.shrink(mask[0], 8).tolist() == mask[0].tolist()
