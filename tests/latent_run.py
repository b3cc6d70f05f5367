"""A latent model of a few thousand random weights, captioned pictures, and the smallest experiment on them."""

import dataclasses
import json
import tarfile

import jax
import numpy as np
from PIL import Image

from configs import common, digits
from guided_distill.interop.clip_tokenizer import END, START
from guided_distill.interop.latent_folder import write_latent
from guided_distill.models.autoencoder import AutoencoderConfig
from guided_distill.models.clip import TextConfig
from guided_distill.models.latent_models import LatentModel, part_shapes
from guided_distill.models.sd_unet import SDUNetConfig

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "white": (255, 255, 255)}
UNET = SDUNetConfig(
    channels=8, multipliers=(1,), num_blocks=1, attention=(True,), heads=(2,), context_dim=8, norm_groups=4
)
FIRST = AutoencoderConfig(channels=8, multipliers=(1, 2), num_blocks=1, norm_groups=4)
TEXT = TextConfig(vocabulary=54, positions=8, width=8, layers=1, heads=2, mlp=16)
MODEL = LatentModel(UNET, FIRST, TEXT, "eps", 4)
PAINTS_IN = dataclasses.replace(MODEL, unet=dataclasses.replace(UNET, extra_channels=5))


def random_params(model, seed=0):
    """{part: parameters} of a LatentModel, see `drawn_like`."""
    return {part: drawn_like(part_shapes(getattr(model, part)), seed) for part in model.parts}


def drawn_like(shapes, seed=0):
    """A tree of values that keep the size of what passes them, and no zeros."""
    rng = np.random.default_rng(seed)

    def draw(leaf):
        fan_in = np.prod(leaf.shape[:-1]) if leaf.ndim > 1 else 10
        return (rng.normal(size=leaf.shape) / fan_in**0.5).astype(np.float32)

    return jax.tree.map(draw, shapes)


def write_tokenizer(folder):
    """CLIP's files with a vocabulary of letters."""
    folder.mkdir(parents=True, exist_ok=True)
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = [*letters, *(f"{letter}</w>" for letter in letters), START, END]
    (folder / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({"model_max_length": TEXT.positions}))


def write_model(folder, model=MODEL, seed=0):
    """What --mode=import leaves; returns the parameters."""
    params = random_params(model, seed)
    write_tokenizer(folder / "words")
    write_latent(folder, model, params, folder / "words")
    return params


def write_pairs(folder, num=12, size=(12, 9)):
    """Pictures of a plain colour with its name as the caption."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(num):
        name, colour = list(COLOURS.items())[i % len(COLOURS)]
        Image.new("RGB", size, colour).save(folder / f"{i:03d}.png")
        (folder / f"{i:03d}.txt").write_text(name + "\n")
    return folder


def write_shards(folder, source, count=2):
    """The files of a folder as webdataset shards."""
    folder.mkdir(parents=True, exist_ok=True)
    files = sorted(source.iterdir())
    size = -(-len(files) // (2 * count)) * 2  # a pair stays together
    for k in range(count):
        with tarfile.open(folder / f"{k:03d}.tar", "w") as tar:
            for path in files[k * size : (k + 1) * size]:
                tar.add(path, path.name)
    return folder


def latent_config(folder, model=MODEL, **updates):
    """The whole chain on latents 4x4, a few updates a stage; data in folder/latents, the model in folder/model."""
    config = digits.get_config()
    config.data.update(
        name=f"latents:{folder / 'latents'}",
        shape=(4, 4, 4),
        channels=4,
        num_classes=4,
        data_range=None,
        text_length=TEXT.positions,
    )
    unet = {name: getattr(model.unet, name) for name in ("channels", "multipliers", "num_blocks", "attention", "heads",
            "context_dim", "norm_groups", "extra_channels")}  # fmt: skip
    common.use_sd_unet(config, **unet)
    config.model.update(dtype="float32", remat=False)
    config.teacher_dtype = "float32"
    config.clip_targets = False
    config.latent_model = config.teacher.checkpoint = str(folder / "model")
    config.teacher.batch_size = 8
    config.to_v.update(updates=3, batch_size=8, learning_rate=1e-4)
    config.stage1.update(updates=3, batch_size=8, learning_rate=1e-4, w_max=8.0)
    config.stage2.update(teacher_steps=4, updates=3, final_updates=3, final_num_steps=(1,), batch_size=8)
    config.evaluate.update(num_samples=8, batch_size=8, w=(0.0, 4.0), num_steps=(1, 2))
    config.evaluate.features = ("efficientnet_lite0",)
    config.log.update(every=1, sample_every=0)
    config.checkpoint.update(every=2, keep=3)
    config.update_from_flattened_dict(updates)
    return config.to_dict()
