"""1,911 captioned emoji, 32x32: text guidance end to end, the text encoder trained with the teacher."""

import ml_collections

from configs import common


def get_config():
    """Every tenth caption is held out. The set is a TFDS set of `image` and `text`; see --mode=prepare_data."""
    config = common.get_config()
    config.data.update(
        name="emoji64_32", image_size=32, num_classes=10, holdout=10, text_length=12, vocabulary=4096, flip=False
    )
    config.model.update(
        channels=48,
        emb_channels=192,
        multipliers=(1, 2),
        num_blocks=1,
        attention_resolutions=(8,),
        norm_groups=8,
        patch=2,
        text=ml_collections.ConfigDict({"width": 8, "layers": 1, "heads": 2, "mlp": 32, "activation": "gelu"}),
    )
    config.clip_targets = True
    config.teacher.update(updates=1400, batch_size=32, learning_rate=1e-3, warmup=100, decay="linear", ema=0.999)
    config.teacher.cond_dropout = 0.3
    config.stage1.update(
        updates=4000, batch_size=32, learning_rate=1e-3, warmup=100, decay="linear", ema=0.99, w_max=8.0, w_margin=0.1
    )
    config.stage2.update(
        teacher_steps=16, updates=250, final_num_steps=(1, 2, 4), final_updates=300, batch_size=32, learning_rate=6e-4
    )
    config.evaluate.update(
        num_samples=576,
        batch_size=192,
        w=(0.0, 2.0, 4.0, 8.0),
        num_steps=(1, 2, 4, 8),
        features=("efficientnet_lite0",),
    )
    config.log.update(every=20, sample_every=1000)
    config.checkpoint.update(every=250)
    return config
