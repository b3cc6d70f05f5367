"""Samples that are no images go through the same chain: points with an exact teacher, and signals."""

import json

import numpy as np
import pytest

from configs import mixture2d, signal1d
from guided_distill import pipeline
from guided_distill.data import load_dataset
from guided_distill.errors import UserError
from guided_distill.experiment import from_config


def tiny(module, **values):
    config = module.get_config()
    config.model.update(features=8, num_layers=1, emb_channels=8)
    for stage in (config.teacher, config.stage1, config.stage2):
        stage.update(updates=3, batch_size=16)
    config.stage2.update(teacher_steps=4, final_updates=3)
    config.evaluate.update(num_samples=64, batch_size=64, w=(0.0, 4.0), num_steps=(1, 2), classifier_updates=3)
    config.checkpoint.every = 3
    config.log.update(every=1, sample_every=2)
    config.update_from_flattened_dict(values)
    return config.to_dict()


@pytest.mark.slow
def test_the_whole_chain_of_points(tmp_path):
    """test_processes has that of signals."""
    pipeline.run(tiny(mixture2d), tmp_path)
    stages = ["01_stage1", "02_stage2_det_0002", "03_stage2_det_0001"]  # the teacher is given
    assert sorted(path.name for path in tmp_path.glob("[0-9]*")) == stages
    for stage in stages:
        assert len(list((tmp_path / stage / "samples").glob("*.png"))) == 2
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert len(summary["rows"]) == 2 * (3 + 2 + 2) and (tmp_path / "comparison.png").stat().st_size > 1000
    assert all(np.isfinite(list(row["metrics"].values())).all() for row in summary["rows"])


def test_samples_are_taken_as_they_are():
    dataset = load_dataset(from_config(tiny(signal1d)).data)
    made = signal1d.make_data()
    np.testing.assert_array_equal(dataset.train.images, made["train"][0])
    np.testing.assert_array_equal(dataset.test.labels, made["test"][1])
    assert np.abs(made["train"][0]).max() <= 1.0 and set(made["train"][1]) == {0, 1, 2, 3}


def only_train():
    return {"train": (np.zeros((4, 64, 1)), np.zeros(4))}


def too_many_classes():
    return {split: (np.zeros((4, 64, 1)), np.full(4, 7)) for split in ("train", "test")}


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"data.name": f"{__name__}:only_train"}, "returned something else .'test'.; a function for data.name returns"),
        ({"data.name": f"{__name__}:too_many_classes"}, "are not all within 0..3"),
        ({"data.shape": (32, 1)}, "data.shape: samples of .* are 64x1, the config says 32x1"),
        ({"data.flip": True}, "config.data.flip is True; only images are flipped"),
    ],
)
def test_what_is_wrong_with_the_data_is_named(values, says):
    with pytest.raises(UserError, match=says):
        load_dataset(from_config(tiny(signal1d, **values)).data)
