"""1,911 captioned emoji, 32x32: text guidance end to end, the text encoder trained with the teacher."""

import ml_collections

from configs import common


def get_config():
    """Every tenth caption is held out. The set is a TFDS set of `image` and `text`; see --mode=prepare_data."""
    config = common.get_config()
    config.data.update(
        name="emoji64_32", image_size=32, num_classes=10, holdout=10, text_length=12, vocabulary=4096, flip=False
    )
    # A small network says more easily what the 48 numbers of a patch are than what their noise was: x_hat itself is
    # learnt (arXiv 2511.13720), up to stage one with weights that ask for pictures rather than for their grain.
    config.parameterisation, config.weighting = "x", "constant"
    config.model.update(
        channels=64,
        emb_channels=192,
        multipliers=(1, 2),
        num_blocks=1,
        attention_resolutions=(8,),
        norm_groups=8,
        patch=4,
        text=ml_collections.ConfigDict({"width": 8, "layers": 1, "heads": 2, "mlp": 32, "activation": "gelu"}),
    )
    config.clip_targets = True
    config.teacher.update(updates=3500, batch_size=16, learning_rate=1e-3, warmup=100, decay="linear", ema=0.999)
    config.teacher.cond_dropout = 0.3
    config.teacher.num_times = config.stage2.get_ref("teacher_steps")  # the times it is sampled at
    # The ends of the range are learnt worst: a wide margin draws half of all w there, in stage two as well.
    config.stage1.update(
        updates=12_000, batch_size=8, learning_rate=7e-4, warmup=100, decay="linear", ema=0.99, w_max=8.0, w_margin=0.5
    )
    # Straight to four steps, one round in place of two. "landing": no later call mends the errors of the last, and no
    # noise hides them.
    config.stage2.update(
        teacher_steps=16,
        num_steps=(4, 2, 1),
        updates=1200,
        final_num_steps=(4,),
        final_updates=11_000,
        batch_size=8,
        learning_rate=5e-4,
        weighting="landing",
    )
    config.evaluate.update(
        num_samples=576,
        batch_size=192,
        w=(0.0, 2.0, 4.0, 8.0),
        num_steps=(1, 2, 4),
        features=("efficientnet_lite0",),
    )
    config.log.update(every=50, sample_every=2000)
    config.checkpoint.update(every=1000)
    return config
