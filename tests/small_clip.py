"""A CLIP model of a few thousand random weights, as transformers writes one."""

import dataclasses
import json

import jax
import numpy as np
import safetensors.numpy
from latent_run import TEXT, write_tokenizer

from guided_distill.interop import diffusers_names
from guided_distill.interop.diffusers_configs import write_text_encoder
from guided_distill.interop.tensors import export_tree
from guided_distill.models.clip import VisionConfig
from guided_distill.models.latent_models import part_shapes

VISION = VisionConfig(side=16, patch=8, width=8, layers=1, heads=2, mlp=16, projection=6)


def write_clip(folder):
    """A CLIP model as transformers writes it, with the tokenizer of the latent model."""
    text = dataclasses.replace(TEXT, projection=VISION.projection)
    rng, state = np.random.default_rng(10), {"logit_scale": np.ones(())}
    for config, names in ((text, diffusers_names.text_encoder), (VISION, diffusers_names.vision_encoder)):
        tree = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), part_shapes(config))
        state |= export_tree(names(config), tree)
    write_tokenizer(folder)
    vision = {"image_size": 16, "patch_size": 8, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
              "intermediate_size": 16}  # fmt: skip
    said = {"text_config": write_text_encoder(text), "vision_config": vision, "projection_dim": VISION.projection}
    (folder / "config.json").write_text(json.dumps(said))
    (folder / "model.safetensors").write_bytes(safetensors.numpy.save(state))
    return folder
