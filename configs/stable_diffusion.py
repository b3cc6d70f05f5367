"""Stable Diffusion at 512x512, w in [2, 14]: text to image in 2, 4 or 8 calls (section 5.4 of arXiv 2210.03142).

The teacher is a checkpoint of Stable Diffusion 1: import it, encode pictures with captions once, and name both (see
README, "Latents").
"""

from configs import common


def get_config():
    """3,000 updates of stage one, 2,000 a round and 20,000 for 4, 2 and 1 steps, batch 512, as the paper (recalled)."""
    config = common.get_config()
    config.data.update(
        name="latents:data/stable_diffusion_latents",
        shape=(64, 64, 4),
        num_classes=1,
        data_range=None,
        text_length=77,
        flip=True,
    )
    common.use_sd_unet(config)
    config.latent_model = config.teacher.checkpoint = "models/stable_diffusion"
    config.teacher.update(batch_size=512, learning_rate=1e-5)
    config.to_v.update(updates=1000, batch_size=512, learning_rate=1e-5)
    config.stage1.update(updates=3000, batch_size=512, learning_rate=1e-5, w_min=2.0, w_max=14.0)
    config.stage2.update(
        teacher_steps=512,
        updates=2000,
        final_num_steps=(1, 2, 4),
        final_updates=20_000,
        batch_size=512,
        learning_rate=1e-5,
    )
    config.evaluate.update(
        num_samples=5000, batch_size=64, w=(2.0, 6.5, 14.0), num_steps=(1, 2, 4, 8), features=("inception_v3",)
    )
    config.log.sample_every = 500
    config.checkpoint.every = 500
    return config
