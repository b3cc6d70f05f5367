"""CLIP: published sizes, what causal attention and the end of text mean, the picture's preparation, the tokenizer."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from guided_distill.errors import UserError
from guided_distill.interop.clip_tokenizer import END, START, read_tokenizer
from guided_distill.models import clip

TEXT = clip.TextConfig(vocabulary=20, positions=6, width=8, layers=2, heads=2, mlp=12, projection=5)
VISION = clip.VisionConfig(side=8, patch=4, width=8, layers=1, heads=2, mlp=12, projection=5)
TOKENS = np.array([[18, 3, 7, 19, 19, 19], [18, 5, 3, 2, 11, 19]])


def size(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def trained(module, x):
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(module.init, jax.random.key(0), x)["params"]
    return {"params": jax.tree.map(lambda leaf: 0.4 * rng.normal(size=leaf.shape).astype(np.float32), shapes)}


@pytest.mark.parametrize("name, count", [("sd1", 123_060_480), ("sd2", 340_387_840)])
def test_published_number_of_parameters_of_text_encoders(name, count):
    module = clip.TextEncoder(clip.TEXT_ENCODERS[name])
    assert size(jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 77), int))["params"]) == count


def test_vit_l14_has_its_published_number_of_parameters():
    text = clip.TextEncoder(dataclasses.replace(clip.TEXT_ENCODERS["sd1"], projection=768))
    image = clip.VisionEncoder(clip.VISION_ENCODERS["vit_l14"])
    counts = [
        size(jax.eval_shape(module.init, jax.random.key(0), x)["params"])
        for module, x in ((text, jnp.zeros((1, 77), int)), (image, jnp.zeros((1, 224, 224, 3))))
    ]
    assert sum(counts) + 1 == 427_616_513  # and one temperature


def test_a_word_changes_states_from_its_place_on_and_nothing_behind_the_end_changes_the_embedding():
    module = clip.TextEncoder(TEXT)
    params, run = trained(module, TOKENS), jax.jit(module.apply)
    states, embedding = run(params, TOKENS)
    assert states.shape == (2, 6, 8) and embedding.shape == (2, 5)
    other, _ = run(params, np.where(np.arange(6) == 3, 9, TOKENS))
    np.testing.assert_allclose(other[:, :3], states[:, :3], atol=1e-6)
    assert np.abs(other[:, 3:] - states[:, 3:]).max((0, 2)).min() > 1e-2
    behind = TOKENS.copy()
    behind[0, 4:] = 0  # the padding of Stable Diffusion 2
    np.testing.assert_allclose(run(params, behind)[1], embedding, atol=1e-6)
    kernel = np.asarray(params["params"]["project"]["kernel"])
    np.testing.assert_allclose(embedding[0], states[0, 3] @ kernel, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(embedding[1], states[1, 5] @ kernel, rtol=1e-4, atol=1e-5)


def test_bfloat16_is_near_and_comes_out_as_float32():
    module, half = clip.TextEncoder(TEXT), clip.TextEncoder(dataclasses.replace(TEXT, dtype="bfloat16"))
    params = trained(module, TOKENS)
    assert {leaf.dtype for leaf in jax.tree.leaves(trained(half, TOKENS))} == {np.dtype("float32")}
    for expected, got in zip(module.apply(params, TOKENS), half.apply(params, TOKENS), strict=True):
        assert got.dtype == jnp.float32
        assert 0.0 < float(jnp.abs(got - expected).max() / jnp.abs(expected).max()) < 0.05


def test_the_image_tower_sees_every_patch_and_where_it_is():
    module, x = clip.VisionEncoder(VISION), np.random.default_rng(1).normal(size=(2, 8, 8, 3)).astype(np.float32)
    params, run = trained(module, x), jax.jit(module.apply)
    before = run(params, x)
    assert before.shape == (2, 5)
    for row, column in ((0, 0), (5, 2), (7, 7)):
        moved = x.copy()
        moved[0, row, column] += 1.0
        after = run(params, moved)
        assert np.abs(after[0] - before[0]).max() > 1e-3
        np.testing.assert_array_equal(after[1], before[1])
    assert np.abs(run(params, np.roll(x, 4, axis=1)) - before).max() > 1e-2


def test_pixels_are_resized_cut_out_of_the_middle_and_standardised():
    images = np.zeros((1, 8, 16, 3), np.float32)
    images[:, :, :4] = 1.0  # cut away with the left quarter
    x = np.asarray(clip.clip_pixels(images, 8))
    assert x.shape == (1, 8, 8, 3)
    mean, std = np.array(clip._MEAN), np.array(clip._STD)
    np.testing.assert_allclose(x[0, 3, 4], (0.5 - mean) / std, rtol=1e-5)
    white = np.asarray(clip.clip_pixels(np.ones((1, 20, 30, 3), np.float32), 8))
    np.testing.assert_allclose(white, np.broadcast_to((1 - mean) / std, white.shape), rtol=1e-4)


def test_the_score_is_the_cosine_in_per_cent_and_never_below_zero():
    a, b = np.array([[3.0, 4.0], [1.0, 0.0], [1.0, 0.0]]), np.array([[6.0, 8.0], [1.0, 1.0], [-1.0, 0.0]])
    np.testing.assert_allclose(clip.clip_score(jnp.asarray(a), jnp.asarray(b)), [100.0, 100 / 2**0.5, 0.0], rtol=1e-5)


# The tokenizer


def vocabulary():
    """Letters, letters that end a word, and three merges: the layout of the published vocabulary."""
    letters = [chr(c) for c in range(33, 127)]
    words = letters + [f"{letter}</w>" for letter in letters] + ["ca", "cat</w>", "do", START, END]
    return {word: number for number, word in enumerate(words)}, ["c a", "ca t</w>", "d o"]


def write(folder, **special):
    words, merges = vocabulary()
    (folder / "vocab.json").write_text(json.dumps(words))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 8} | special))
    return words


def test_captions_become_start_words_end_and_padding(tmp_path):
    words = write(tmp_path)
    got = read_tokenizer(tmp_path).encode(["A  CAT", "", "dog!"])
    first = [words[START], words["a</w>"], words["cat</w>"]]
    third = [words[START], words["do"], words["g</w>"], words["!</w>"]]
    expected = [row + [words[END]] * (8 - len(row)) for row in (first, [words[START]], third)]
    assert got.dtype == np.int32 and got.tolist() == expected


def test_a_padding_word_stands_behind_the_end_and_for_itself(tmp_path):
    words = write(tmp_path, pad_token={"content": "!"})
    expected = [words[START], words["cat</w>"], words["!"], words[END], *[words["!"]] * 4]
    assert read_tokenizer(tmp_path).encode(["cat!"])[0].tolist() == expected
    # The folders of Stable Diffusion 2 say so in one file and still <|endoftext|> in the other; newer ones list words.
    write(tmp_path, pad_token={"content": END})
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"pad_token": "!"}))
    assert read_tokenizer(tmp_path).encode(["cat!"])[0].tolist() == expected
    write(tmp_path, pad_token=END, added_tokens_decoder={})
    assert read_tokenizer(tmp_path).encode([""])[0].tolist() == [words[START], *[words[END]] * 7]


def test_a_long_caption_keeps_its_end_of_text_or_is_refused(tmp_path):
    words = write(tmp_path)
    tokenizer = read_tokenizer(tmp_path)
    row = tokenizer.encode(["cat " * 9])[0].tolist()
    assert row == [words[START], *[words["cat</w>"]] * 6, words[END]]
    assert tokenizer.encode(["cat " * 6], truncate=False)[0].tolist() == row
    with pytest.raises(UserError, match="has 9 tokens; the text encoder takes 6"):
        tokenizer.encode(["cat " * 9], truncate=False)


def test_a_file_of_all_in_one_says_the_same(tmp_path):
    words = write(tmp_path)
    expected = read_tokenizer(tmp_path).encode(["a cat, a dog"])
    model = {"model": {"vocab": words, "merges": [merge.split() for merge in vocabulary()[1]]}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(model))
    (tmp_path / "vocab.json").unlink()
    np.testing.assert_array_equal(read_tokenizer(tmp_path).encode(["a cat, a dog"]), expected)


def test_a_folder_without_a_vocabulary_is_refused(tmp_path):
    with pytest.raises(UserError, match="neither vocab.json"):
        read_tokenizer(tmp_path)
    write(tmp_path)
    (tmp_path / "vocab.json").write_text("{}")
    with pytest.raises(UserError, match=re.escape(f"lacks {START}, {END}")):
        read_tokenizer(tmp_path)
