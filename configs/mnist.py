"""5,000 MNIST digits, 28x28: the next size up."""

from configs import common


def get_config():
    """The network works on 14x14 patches of 2x2 pixels, which makes 28x28 affordable without a GPU."""
    config = common.get_config()
    config.data.update(name="mnist", image_size=28, channels=1)
    config.model.update(
        channels=24,
        emb_channels=96,
        multipliers=(1, 2),
        num_blocks=1,
        attention_resolutions=(7,),
        norm_groups=8,
        patch=2,
    )
    config.teacher.update(updates=2400, batch_size=64, learning_rate=1e-3, warmup=100, decay="linear", ema=0.999)
    config.stage1.update(updates=3000, batch_size=32, learning_rate=1e-3, decay="linear", ema=0.99)
    config.stage2.update(
        teacher_steps=32, updates=200, final_num_steps=(1, 2), final_updates=400, batch_size=64, learning_rate=3e-4
    )
    config.evaluate.update(
        num_samples=1000, batch_size=256, w=(0.0, 1.0, 4.0), num_steps=(1, 2, 4, 8), classifier_updates=800
    )
    config.log.update(every=20, sample_every=500)
    config.checkpoint.update(every=200)
    return config
