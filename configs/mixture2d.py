"""A mixture of Gaussians in the plane, whose guided teacher is a closed form: the method without a trained teacher.

Distilled on two cores in minutes; `python -m benchmarks.mixture2d` then draws it beside the exact answer.
"""

from configs import common


def get_config():
    """256 steps of the exact guided teacher down to one, by a small MLP."""
    config = common.get_config()
    config.data.update(name="guided_distill.analytic:make_mixture2d_data", shape=(2,), num_classes=3, data_range=None)
    common.use_mlp(config, features=128, num_layers=3, emb_channels=64)
    config.teacher.factory = "guided_distill.analytic:make_mixture2d"
    config.stage1.w_margin = 0.1
    config.stage1.update(updates=4000, batch_size=512, learning_rate=2e-3, decay="linear", ema=0.99)
    config.stage2.update(teacher_steps=256, updates=600, final_updates=1200, batch_size=512, learning_rate=1e-3)
    config.evaluate.update(num_samples=2000, batch_size=1000, num_steps=(1, 2, 4, 8), classifier_updates=500)
    config.log.update(every=200, sample_every=0)
    config.checkpoint.update(every=1000)
    return config
