"""ImageNet 64x64, class-conditional, with the published network (arXiv 2202.00512; arXiv 2210.03142, section 5).

The data set is made once with --mode=prepare_data: centre crop, area resize.
"""

from configs import common


def get_config():
    """Batch 2048 wants a pod: rematerialised, bf16. The numbers of updates before stage two are our choice."""
    config = common.get_config()
    config.data.update(
        name="imagenet2012_64", image_size=64, channels=3, num_classes=1000, test_split="validation", flip=True
    )
    config.model.update(
        channels=192,
        emb_channels=768,
        multipliers=(1, 2, 3, 4),
        num_blocks=3,
        attention_resolutions=(8, 16, 32),
        head_dim=64,
        dropout=0.1,
        dtype="bfloat16",
        remat=True,
    )
    config.teacher.update(updates=500_000, batch_size=2048, learning_rate=3e-4)
    config.stage1.update(batch_size=2048, learning_rate=3e-4)
    config.stage2.update(batch_size=2048, learning_rate=1e-4)
    config.evaluate.update(batch_size=1024)
    return config
