"""ImageNet 256's route, tiny: a set of TFDS with labels, a codebook in place of a posterior, a U-Net of classes."""

import dataclasses

import jax
import numpy as np
import pytest
from latent_run import FIRST, MODEL, UNET, latent_config, write_model
from shapes import FIXTURES, NUM_CLASSES

from guided_distill import data, pipeline, sample, sharding
from guided_distill.encode import encode
from guided_distill.experiment import from_config
from guided_distill.latent_space import open_space

CLASSES = dataclasses.replace(
    MODEL,
    unet=dataclasses.replace(UNET, num_classes=NUM_CLASSES, out_channels=3, attention=(False,)),
    autoencoder=dataclasses.replace(FIRST, latent_channels=3, num_codes=16, scale=1.0),
    text_encoder=None,
)


@pytest.mark.slow
def test_classes_of_a_tfds_set_are_encoded_trained_and_drawn(tmp_path, monkeypatch):
    make = sharding.make_mesh  # of one device, as in tests/parity/test_chain.py: its programs compile faster
    monkeypatch.setattr(sharding, "make_mesh", lambda devices=None, fsdp=1: make(jax.devices()[:1]))
    monkeypatch.setattr(pipeline, "_judge", lambda this, progress: None)  # it compiles as much again
    write_model(tmp_path / "model", CLASSES)
    updates = {
        "data.data_dir": str(FIXTURES), "data.shape": (4, 4, 3), "data.num_classes": NUM_CLASSES, "data.text_length": 0,
        "data.flip": True, "to_v.updates": 0, "stage1.updates": 1, "stage2.updates": 1, "stage2.final_updates": 1,
        "stage2.teacher_steps": 2, "evaluate.num_steps": (1,), "evaluate.features": ("classifier",),
        "checkpoint.every": 100,
    }  # fmt: skip
    config = latent_config(tmp_path, CLASSES, **updates)
    encode(config, "shapes")
    found, space = data.load_dataset(from_config(config).data), open_space(tmp_path / "model")
    theirs = data.load_dataset(data.DataConfig("shapes", 8, 3, NUM_CLASSES, data_dir=str(FIXTURES)))
    for split, count in (("train", 32), ("test", 8)):
        ours, pictures = (data.read_range(getattr(source, split), 0, count) for source in (found, theirs))
        np.testing.assert_array_equal(ours["label"], pictures["label"])
        np.testing.assert_allclose(ours["x"], space.encode(pictures["x"]), atol=5e-3)
    assert not found.train.posterior and ours.keys() == {"x", "label"}

    pipeline.run(config, tmp_path / "run")
    told = {"num_steps": 1, "series": None, "w": 2.0, "num": 6, "seed": 0, "out": str(tmp_path / "x.npz")}
    sample.sample(config, tmp_path / "run", labels=[0, 2], **told)
    drawn = np.load(tmp_path / "x.npz")
    assert drawn["x"].shape == (6, 8, 8, 3) and drawn["label"].tolist() == [0, 2] * 3
    assert np.abs(drawn["x"]).max() <= 1.0 and np.ptp(drawn["x"], axis=0).max() > 1e-3
