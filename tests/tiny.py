"""The smallest experiment that is still the whole chain."""

from configs import common, digits


def tiny_config(**updates):
    """digits with a U-Net of a few thousand weights and a few updates a stage; N = 2 -> 1."""
    config = digits.get_config()
    config.model.update(channels=8, emb_channels=16, multipliers=(1,), norm_groups=4, attention_resolutions=())
    return _of_few_updates(config, updates)


def quick_config(**updates):
    """The same with an MLP, which compiles in a second where the U-Net takes ten: for what no network changes."""
    config = digits.get_config()
    common.use_mlp(config, features=16, num_layers=1, emb_channels=16)
    return _of_few_updates(config, updates)


def _of_few_updates(config, updates):
    config.teacher.update(updates=6, batch_size=8, warmup=2)
    config.stage1.update(updates=4, batch_size=8, learning_rate=5e-4)
    config.stage2.update(teacher_steps=4, updates=4, final_updates=4, final_num_steps=(1,), batch_size=8)
    config.evaluate.update(num_samples=16, batch_size=16, w=(0.0, 4.0), num_steps=(1, 2), classifier_updates=5)
    config.log.update(every=1, sample_every=0)
    config.checkpoint.update(every=2, keep=3)
    config.update_from_flattened_dict(updates)
    return config.to_dict()
