"""Class-conditional CIFAR-10 at a size to try things with: on one GPU, or at 16x16 on two cores (:cores).

python -m guided_distill.main --config=configs/cifar10_small.py:cores --mode=prepare_data --config.data.data_dir=data
python -m guided_distill.main --config=configs/cifar10_small.py:cores --config.data.data_dir=data
"""

from configs import common

SIZES = ("gpu", "cores")


def get_config(size="gpu"):
    """The whole chain, teacher and all: all of CIFAR-10 at 32x32, or a fifth of it at 16x16."""
    if size not in SIZES:
        raise ValueError(f"configs/cifar10_small.py:{size}: the sizes are {', '.join(SIZES)}")
    config = common.get_config()
    config.clip_targets = True
    (_on_a_gpu if size == "gpu" else _on_two_cores)(config)
    config.evaluate.features = ("efficientnet_lite0",)
    return config


def _on_a_gpu(config):
    """configs/cifar10.py's network at a quarter of its width; 5e16 operations, 21 minutes at 40 TFLOP/s."""
    config.data.update(name="cifar10", image_size=32, channels=3, num_classes=10, flip=True)
    config.model.update(
        channels=64,
        emb_channels=256,
        multipliers=(1, 1, 1),
        num_blocks=3,
        attention_resolutions=(8, 16),
        dropout=0.1,
        dtype="bfloat16",
    )
    config.teacher.update(updates=12_000, batch_size=256, learning_rate=5e-4, ema=0.999)
    config.stage1.update(updates=4000, batch_size=256, learning_rate=5e-4, decay="linear", ema=0.999, w_margin=0.1)
    config.stage2.update(series=("det", "sto"), updates=200, final_updates=600, batch_size=256, learning_rate=2e-4)
    config.evaluate.update(num_samples=10_000, batch_size=1000)
    config.log.update(sample_every=5000)
    config.checkpoint.update(every=1000)


def _on_two_cores(config):
    """Under an hour of two CPU cores, and as much again for the evaluation.

    More updates of stage one changed little, and more of the rounds did: results/cifar10.
    """
    config.data.update(
        name="cifar10_16", image_size=16, channels=3, num_classes=10, train_split="train[:10000]", flip=True
    )
    config.model.update(
        channels=32, emb_channels=128, multipliers=(1, 2), num_blocks=1, attention_resolutions=(8,), norm_groups=8
    )
    config.teacher.update(updates=3000, batch_size=32, learning_rate=1e-3, warmup=100, decay="linear", ema=0.999)
    config.stage1.update(
        updates=2000, batch_size=32, learning_rate=1e-3, warmup=100, decay="linear", ema=0.99, w_margin=0.1
    )
    config.stage2.update(
        series=("det", "sto"), teacher_steps=32, updates=400, final_updates=600, batch_size=32, learning_rate=6e-4
    )
    config.evaluate.update(num_samples=500, batch_size=250)
    config.log.update(every=20, sample_every=1000)
    config.checkpoint.update(every=250)
