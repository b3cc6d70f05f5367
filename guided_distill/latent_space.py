"""The frozen parts around a latent network: pictures <-> latents, captions -> what the U-Net attends to."""

import dataclasses
import functools
import hashlib
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from guided_distill import sharding
from guided_distill.errors import UserError
from guided_distill.interop.clip_tokenizer import read_tokenizer
from guided_distill.interop.latent_folder import read_latent, read_model
from guided_distill.models.autoencoder import Autoencoder, tiled_decode
from guided_distill.models.clip import TextEncoder
from guided_distill.models.latent_models import LatentModel

_PARTS = ("autoencoder", "text_encoder")
_AT_A_TIME = 8  # pictures of a device: at 512 x 512 an autoencoder needs half a GiB for each
_WHOLE = 64  # side of a latent that is decoded at once, whatever side the model was made for


@dataclasses.dataclass(frozen=True, eq=False)
class LatentSpace:
    """The autoencoder and text encoder of a folder that --mode=import wrote, on the devices of a mesh.

    Its methods take and give host arrays of any number of rows; pictures are f32 [B, H, W, 3] in [-1, 1].
    """

    model: LatentModel
    params: dict
    folder: pathlib.Path
    mesh: object

    @property
    def channels(self) -> int:
        """Of a latent."""
        return self.model.autoencoder.latent_channels

    @property
    def posterior(self) -> bool:
        """Whether a picture has a distribution of latents rather than one."""
        return not self.model.autoencoder.num_codes

    def picture_shape(self, latent_shape) -> tuple[int, int, int]:
        """Of the picture that a latent (h, w, C) is of."""
        factor = self.model.autoencoder.factor
        return latent_shape[0] * factor, latent_shape[1] * factor, self.model.autoencoder.image_channels

    def decode(self, z):
        """Scaled latents f32 [B, h, w, C] -> pictures, clipped to [-1, 1].

        Latents larger than those the model was made for, and than 64, are decoded tile by tile (see `tiled_decode`):
        the memory that it takes does not grow with the picture.
        """
        config, tile = self.model.autoencoder, max(_WHOLE, self.model.latent_side)

        def decode(params, z):
            whole = functools.partial(_decode(config), params)
            return (tiled_decode(whole, z, factor=config.factor, tile=tile, overlap=tile // 4),)

        return np.clip(self._by_parts(decode, self.params["autoencoder"], z)[0], -1.0, 1.0)

    def moments(self, x):
        """Pictures -> (mean, std) of their scaled latents, f32 [B, h, w, C]; std is 0 where there is no posterior."""
        return self._by_parts(_moments(self.model.autoencoder), self.params["autoencoder"], x)

    def encode(self, x):
        """Pictures -> the means of their scaled latents."""
        return self.moments(x)[0]

    def embed(self, captions, *, truncate=True):
        """Captions -> f32 [B, L, D]. Raises UserError where one is too long and may not lose its end."""
        if self.model.text_encoder is None:
            raise UserError(f"{self.folder} has no text encoder: its network takes classes")
        tokens = self._tokenizer.encode(list(captions), truncate=truncate)
        return self._by_parts(_embed(self.model.text_encoder), self.params["text_encoder"], tokens)[0]

    def too_long(self, captions) -> list[bool]:
        """Which captions lose their end in `embed`."""
        encodings = self._tokenizer.backend.encode_batch(list(captions))
        return [len(encoding.ids) > self._tokenizer.length for encoding in encodings]

    @functools.cached_property
    def _tokenizer(self):
        return read_tokenizer(self.folder / "tokenizer")

    def _by_parts(self, run, params, rows):
        """run(params, rows) over a few rows of each device at a time; the last lot is computed whole and cut."""
        size, found = _AT_A_TIME * self.mesh.size, []
        for start in range(0, len(rows), size):
            lot = np.asarray(rows[start : start + size])
            whole = np.concatenate([lot, np.zeros((size - len(lot), *lot.shape[1:]), lot.dtype)])
            results = run(params, jax.device_put(whole, sharding.batched(self.mesh)))
            found.append([np.asarray(result)[: len(lot)] for result in results])
        return [np.concatenate(results) for results in zip(*found, strict=True)]


def frozen_hash(folder) -> str:
    """SHA-256 of the weights of the frozen parts of a folder. Raises UserError where it is none."""
    folder, digest = pathlib.Path(folder).expanduser(), hashlib.sha256()
    for part in _PARTS:
        if part in read_model(folder).parts:
            with (folder / f"{part}.safetensors").open("rb") as file:
                while block := file.read(2**20):
                    digest.update(block)
    return digest.hexdigest()


def open_space(folder) -> LatentSpace:
    """The frozen parts of a folder, on this process's devices. Raises UserError for what is missing or damaged."""
    folder = pathlib.Path(folder).expanduser()
    mesh = sharding.make_mesh(jax.local_devices())
    model, _ = read_latent(folder, ())
    _, params = read_latent(folder, [part for part in _PARTS if part in model.parts])
    params = jax.device_put(params, sharding.replicated(mesh))
    return LatentSpace(model, params, folder, mesh)


@functools.cache
def _decode(config):
    @jax.jit
    def decode(params, z):
        return Autoencoder(config).apply({"params": params}, z, method="decode")

    return decode


@functools.cache
def _moments(config):
    @jax.jit
    def moments(params, x):
        found = Autoencoder(config).apply({"params": params}, x, method="moments")
        if config.num_codes:
            return config.scale * found, jnp.zeros_like(found)
        return config.scale * found.mean, config.scale * jnp.exp(0.5 * found.logvar)

    return moments


@functools.cache
def _embed(config):
    @jax.jit
    def embed(params, tokens):
        return (TextEncoder(config).apply({"params": params}, tokens)[0],)

    return embed
