"""configs/digits.py with an MLP, which compiles in a second: a config file as users have their own."""

from configs import common, digits


def get_config():
    config = digits.get_config()
    common.use_mlp(config, features=16, num_layers=1, emb_channels=16)
    return config
