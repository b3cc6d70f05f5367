"""CLIP beside transformers': both text encoders, the image tower, the tokenizer on many scripts, pixels, keys."""

import gzip
import importlib.util
import json
import pathlib

import jax
import numpy as np
import pytest
import torch
import transformers
from torch_modules import arrays, close, shake
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from guided_distill.interop import diffusers_configs, diffusers_names
from guided_distill.interop.clip_tokenizer import END, START, read_tokenizer
from guided_distill.interop.tensors import export_tree, import_tree
from guided_distill.models import clip
from guided_distill.models.latent_models import LATENT_MODELS, part_shapes

TEXT = {
    "vocab_size": 99,
    "max_position_embeddings": 16,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 37,
    "bos_token_id": 97,
    "eos_token_id": 98,
}
TEXTS = {"sd1": TEXT | {"hidden_act": "quick_gelu"}, "sd2": TEXT | {"hidden_act": "gelu"}}
PADS = {"sd1": 98, "sd2": 0}


# Text encoders


def tokens(pad):
    rows = np.full((3, 16), pad, np.int64)
    rng = np.random.default_rng(0)
    for row, length in zip(rows, (0, 5, 14), strict=True):
        row[: length + 2] = [97, *rng.integers(1, 97, length), 98]
    return rows


@pytest.mark.parametrize("name", TEXTS)
def test_a_text_encoder_agrees_and_goes_back_bit_for_bit(name):
    theirs = shake(transformers.CLIPTextModelWithProjection(transformers.CLIPTextConfig(**TEXTS[name])))
    said = json.loads(theirs.config.to_json_string()) | {"architectures": ["CLIPTextModelWithProjection"]}
    config = diffusers_configs.read_text_encoder(said, name)
    assert (config.activation, config.projection) == (TEXTS[name]["hidden_act"], 512)
    names, state = diffusers_names.text_encoder(config), arrays(theirs)
    params = import_tree(names, part_shapes(config), state, name)
    given = tokens(PADS[name])
    states, embedding = jax.jit(clip.TextEncoder(config).apply)({"params": params}, given)
    expected = theirs(torch.tensor(given))
    close(states, expected.last_hidden_state)
    close(embedding, expected.text_embeds)
    back = export_tree(names, params)
    assert back.keys() == state.keys()
    for key, value in state.items():
        np.testing.assert_array_equal(back[key], value, err_msg=key)


@pytest.mark.parametrize("name", ["sd1", "sd2_base"])
def test_every_key_of_a_published_text_encoder_has_its_place_at_full_size(name):
    config = LATENT_MODELS[name].text_encoder
    said = diffusers_configs.write_text_encoder(config)
    assert diffusers_configs.read_text_encoder(said, name) == config
    with torch.device("meta"):
        theirs = transformers.CLIPTextModel(transformers.CLIPTextConfig(**said)).state_dict()
    shapes = diffusers_names.text_encoder(config).their_shapes(part_shapes(config))
    # Version 5 of transformers leaves out the prefix that all published files have, and reads either.
    assert {key.removeprefix("text_model."): shape for key, shape in shapes.items()} == {
        key.removeprefix("text_model."): tuple(value.shape) for key, value in theirs.items()
    }


# The image tower


def test_the_image_tower_agrees():
    arguments = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 37}
    arguments |= {"image_size": 24, "patch_size": 8, "projection_dim": 12}
    theirs = shake(transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig(**arguments)))
    config = clip.VisionConfig(side=24, patch=8, width=32, layers=2, heads=4, mlp=37, projection=12)
    x = np.random.default_rng(0).normal(size=(2, 24, 24, 3)).astype(np.float32)
    shapes = jax.eval_shape(clip.VisionEncoder(config).init, jax.random.key(0), x)["params"]
    names, state = diffusers_names.vision_encoder(config), arrays(theirs)
    params = import_tree(names, shapes, state, "vision")
    ours = jax.jit(clip.VisionEncoder(config).apply)({"params": params}, x)
    close(ours, theirs(torch.tensor(np.moveaxis(x, -1, 1).copy())).image_embeds)
    back = export_tree(names, params)
    assert back.keys() == state.keys()
    for key, value in state.items():
        np.testing.assert_array_equal(back[key], value, err_msg=key)


@pytest.mark.parametrize("size", [(32, 32), (512, 512), (300, 224), (224, 341)])
def test_pixels_are_prepared_as_there(size):
    """Theirs are rounded to bytes once between resizing and the rest."""
    smooth = np.random.default_rng(0).integers(0, 256, (size[0] // 8 + 1, size[1] // 8 + 1, 3))
    pixels = np.kron(smooth, np.ones((8, 8, 1)))[: size[0], : size[1]].astype(np.uint8)
    expected = CLIPImageProcessorPil()(pixels, return_tensors="np")["pixel_values"][0]
    ours = clip.clip_pixels(pixels[None].astype(np.float32) / 127.5 - 1.0, 224)[0]
    assert np.abs(np.moveaxis(expected, 0, -1) - ours).max() < 1.5 / 255 / 0.26


# The tokenizer


@pytest.fixture(scope="module")
def words():
    """The published vocabulary, made from its merges as the published code makes it."""
    folder = pathlib.Path(importlib.util.find_spec("clip").submodule_search_locations[0])
    lines = gzip.open(folder / "bpe_simple_vocab_16e6.txt.gz").read().decode().split("\n")
    merges = lines[1 : 49152 - 256 - 2 + 1]
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    letters = [chr(c) for c in printable] + [chr(256 + n) for n in range(256 - len(printable))]
    every = letters + [f"{c}</w>" for c in letters] + ["".join(merge.split()) for merge in merges] + [START, END]
    return {word: number for number, word in enumerate(every)}, merges


SCRIPTS = {
    "latin": (0x20, 0x24F),
    "combining": (0x41, 0x7A, 0x300, 0x36F),
    "greek and cyrillic": (0x370, 0x52F),
    "armenian, hebrew, arabic": (0x531, 0x6FF),
    "indic": (0x900, 0xDFF),
    "thai, lao, tibetan": (0xE00, 0xFFF),
    "georgian, hangul, ethiopic": (0x10A0, 0x13FF),
    "punctuation and symbols": (0x2000, 0x2BFF),
    "kana": (0x3000, 0x30FF),
    "han": (0x4E00, 0x9FFF),
    "hangul syllables": (0xAC00, 0xD7A3),
    "forms": (0xF900, 0xFDFF, 0xFE30, 0xFFEF),
    "mathematics": (0x1D400, 0x1D7FF),
    "emoji": (0x1F300, 0x1FAFF, 0x200D, 0x200D, 0xFE0F, 0xFE0F),
    "ascii": (0x20, 0x7E),
    "controls": (0x00, 0x20, 0x7F, 0xA0, 0x61, 0x7A),
}
PHRASES = ["It's a dog's life, I'LL say we've 3.14 reasons!!", "  two\t\nlines  ", "", f"a {END} b {START}", "don't!?"]


def strings():
    """1,005 strings: words of one script, with spaces, in upper and lower case, some mixed with ASCII."""
    rng, found = np.random.default_rng(0), list(PHRASES)
    for number in range(1000):
        bounds = list(SCRIPTS.values())[number % len(SCRIPTS)]
        points = np.concatenate([np.arange(a, b + 1) for a, b in zip(bounds[::2], bounds[1::2], strict=True)])
        drawn = [chr(c) for c in rng.choice(points, rng.integers(1, 40))]
        places = rng.random(len(drawn))
        text = "".join(" " if p < 0.15 else chr(rng.integers(0x20, 0x7F)) if p < 0.2 else c
                       for c, p in zip(drawn, places, strict=True))  # fmt: skip
        found.append(text)
    return found


@pytest.mark.parametrize("pad", [END, "!"], ids=["sd1", "sd2"])
def test_tokens_are_identical_on_a_thousand_strings(words, pad, tmp_path):
    vocabulary, merges = words
    assert len(vocabulary) == 49_408
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": pad}
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(special))
    # As published: what pads there is END in this file, of Stable Diffusion 2 too.
    config = special | {"pad_token": END, "model_max_length": 77, "tokenizer_class": "CLIPTokenizer"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    theirs = transformers.CLIPTokenizer.from_pretrained(tmp_path)
    arguments = {"padding": "max_length", "truncation": True, "max_length": 77, "return_tensors": "np"}
    given = strings()
    expected = theirs(given, **arguments)["input_ids"]
    ours = read_tokenizer(tmp_path).encode(given)
    wrong = [text for text, a, b in zip(given, ours, expected, strict=True) if a.tolist() != b.tolist()]
    assert len(given) == 1005 and wrong == []
    theirs.save_pretrained(tmp_path / "again")
    np.testing.assert_array_equal(read_tokenizer(tmp_path / "again").encode(given), expected)
