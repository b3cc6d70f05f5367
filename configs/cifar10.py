"""CIFAR-10, class-conditional, with the published network (arXiv 2202.00512, table 2; arXiv 2210.03142, section 5)."""

from configs import common


def get_config():
    """Batch 128 fits one GPU. The number of teacher updates is not published: this one is our choice."""
    config = common.get_config()
    config.data.update(name="cifar10", image_size=32, channels=3, num_classes=10, flip=True)
    config.model.update(
        channels=256,
        emb_channels=1024,
        multipliers=(1, 1, 1),
        num_blocks=3,
        attention_resolutions=(8, 16),
        dropout=0.2,
        dtype="bfloat16",
    )
    config.teacher.update(updates=800_000, batch_size=128, learning_rate=2e-4, weight_decay=0.001)
    config.stage1.update(batch_size=128, learning_rate=2e-4)
    config.stage2.update(batch_size=128, learning_rate=5e-5)
    config.stage2.series = ("det", "sto")
    config.evaluate.update(batch_size=512, features=("efficientnet_lite0",))
    return config
