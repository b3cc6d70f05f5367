"""scikit-learn's 1,797 handwritten digits, 8x8: the whole chain in a quarter of an hour on two cores."""

from configs import common


def get_config():
    """Run by `make demo`."""
    config = common.get_config()
    config.data.update(name="digits", image_size=8, channels=1)
    config.model.update(
        channels=24, emb_channels=96, multipliers=(1, 2), num_blocks=1, attention_resolutions=(4,), norm_groups=8
    )
    config.clip_targets = True
    config.teacher.update(updates=1500, batch_size=64, learning_rate=1e-3, warmup=100, decay="linear", ema=0.999)
    # Small batches and many updates: a student that has seen too little drifts towards stronger guidance at w = 0.
    config.stage1.update(updates=6000, batch_size=32, learning_rate=1e-3, decay="linear", ema=0.99, w_margin=0.1)
    config.stage2.update(teacher_steps=32, updates=300, final_updates=300, batch_size=64, learning_rate=1e-3)
    config.evaluate.update(
        num_samples=1000, batch_size=256, w=(0.0, 1.0, 4.0), num_steps=(1, 2, 4, 8), classifier_updates=400
    )
    config.log.update(every=20, sample_every=500)
    config.checkpoint.update(every=200)
    return config
