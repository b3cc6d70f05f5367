"""One-dimensional signals, f32 [64, 1]: only the network, the data and the pictures know that they are no images."""

import numpy as np

from configs import common


def get_config():
    """The whole chain by a small MLP, minutes on two cores."""
    config = common.get_config()
    config.data.update(name="configs.signal1d:make_data", shape=(64, 1), num_classes=4)
    common.use_mlp(config, features=256, num_layers=3, emb_channels=64)
    config.teacher.update(updates=4000, batch_size=256, learning_rate=1e-3, warmup=100, decay="linear", ema=0.999)
    config.stage1.update(updates=4000, batch_size=256, learning_rate=1e-3, decay="linear", ema=0.99)
    config.stage2.update(teacher_steps=32, updates=600, final_updates=1000, batch_size=256, learning_rate=5e-4)
    config.evaluate.update(num_samples=2000, batch_size=500, num_steps=(1, 2, 4, 8), classifier_updates=800)
    config.log.update(every=100, sample_every=2000)
    config.checkpoint.update(every=1000)
    return config


def make_data(num=4000, seed=0):
    """Sine, square, sawtooth and triangle waves of random phase, frequency and height, the first 3/4 to train on."""
    rng = np.random.default_rng(seed)
    label = np.arange(num) % 4
    phase, cycles, height = rng.uniform(0, 1, (num, 1)), rng.uniform(1, 3, (num, 1)), rng.uniform(0.4, 0.9, (num, 1))
    turn = (phase + cycles * np.linspace(0, 1, 64)) % 1.0
    shapes = [np.sin(2 * np.pi * turn), np.sign(0.5 - turn), 2 * turn - 1, 4 * np.abs(turn - 0.5) - 1]
    x = (height * np.choose(label[:, None], shapes))[..., None].astype(np.float32)
    return {"train": (x[: 3 * num // 4], label[: 3 * num // 4]), "test": (x[3 * num // 4 :], label[3 * num // 4 :])}
