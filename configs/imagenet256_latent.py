"""ImageNet 256x256 in the latent space of VQ-f4: the class-conditional LDM of arXiv 2112.10752, distilled.

The teacher is a checkpoint of that model: import it, encode ImageNet once, and name both (see README, "Latents").
"""

from configs import common


def get_config():
    """512 DDIM steps of the teacher, w in [0, 14], batch 512, as in section 5.3 of arXiv 2210.03142 (recalled).

    How many updates stages one and two make is not published: these are our choice.
    """
    config = common.get_config()
    config.data.update(
        name="latents:data/imagenet256_latents", shape=(64, 64, 3), num_classes=1000, data_range=None, flip=True
    )
    config.data.test_split = "validation"
    common.use_sd_unet(
        config,
        channels=192,
        multipliers=(1, 2, 3, 5),
        attention=(False, True, True, True),
        heads=(1, 1, 1, 1),
        context_dim=512,
        out_channels=3,
        betas=(0.0015, 0.0195),
    )
    config.latent_model = config.teacher.checkpoint = "models/ldm_imagenet256"
    config.teacher.update(batch_size=512, learning_rate=5e-5)
    config.to_v.update(updates=1000, batch_size=512, learning_rate=5e-5)
    config.stage1.update(updates=100_000, batch_size=512, learning_rate=5e-5, w_max=14.0)
    config.stage2.update(teacher_steps=512, updates=50_000, final_updates=50_000, batch_size=512)
    config.evaluate.update(w=(0.0, 1.0, 2.0, 4.0), num_steps=(1, 2, 4, 8, 16))
    config.evaluate.update(features=("inception_v3",), batch_size=64)
    return config
