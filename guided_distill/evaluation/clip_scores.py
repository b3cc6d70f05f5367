"""CLIP scores: how well pictures go with their captions (arXiv 2104.08718), by a CLIP model given by its folder."""

import dataclasses
import functools
import pathlib

import jax
import numpy as np

from guided_distill import sharding
from guided_distill.errors import UserError
from guided_distill.interop.clip_folder import read_clip
from guided_distill.models.clip import TextEncoder, VisionEncoder, clip_pixels, clip_score

_AT_A_TIME = 16  # pictures of a device


@dataclasses.dataclass(frozen=True, eq=False)
class ClipScorer:
    """A CLIP model and the captions [C, D] as it embeds them."""

    vision: object  # VisionConfig
    params: dict
    captions: np.ndarray
    mesh: object

    def __call__(self, x, label):
        """Scores f32 [n], 0 ... 100, of pictures f32 [n, H, W, 3] in [-1, 1] and the captions of numbers `label`."""
        size, found = _AT_A_TIME * self.mesh.size, []
        embed = _embed_pictures(self.vision)
        for start in range(0, len(x), size):
            lot = x[start : start + size]
            whole = np.concatenate([lot, np.zeros((size - len(lot), *lot.shape[1:]), lot.dtype)])
            found.append(sharding.to_host(embed(self.params, sharding.spread(self.mesh, whole)))[: len(lot)])
        return np.asarray(clip_score(np.concatenate(found), self.captions[label]))


def make_scorer(folder, captions, mesh) -> ClipScorer:
    """A scorer for captions in words; one that CLIP finds too long loses its end, as scores are commonly taken.

    `folder` as `interop.clip_folder.read_clip` reads it. Raises UserError for what is missing there.
    """
    text, vision, params, tokenizer = read_clip(pathlib.Path(folder).expanduser())
    if not captions:
        raise UserError("config.evaluate.clip: the CLIP score is one of captions, and there are none")
    embed = jax.jit(lambda params, tokens: TextEncoder(text).apply({"params": params}, tokens)[1])
    tokens = tokenizer.encode(captions)
    lots = np.array_split(tokens, -(-len(tokens) // 256))
    embedded = np.concatenate([np.asarray(embed(params["text"], lot)) for lot in lots])
    return ClipScorer(vision, sharding.replicate(mesh, params["vision"]), embedded, mesh)


@functools.cache
def _embed_pictures(config):
    return jax.jit(lambda params, x: VisionEncoder(config).apply({"params": params}, clip_pixels(x, config.side)))
