"""Every key that experiments have, with the values of arXiv 2202.00512 and 2210.03142 where these agree."""

import ml_collections
from ml_collections import config_dict


def get_config():
    """The paper's pixel-space recipe without a data set or a network."""
    config = ml_collections.ConfigDict()
    config.seed = 0

    config.data = ml_collections.ConfigDict()
    config.data.name = ""
    config.data.data_dir = config_dict.placeholder(str)
    config.data.image_size = 32
    config.data.channels = 3
    config.data.num_classes = 10
    config.data.shape = ()
    config.data.data_range = 1.0
    config.data.train_split = "train"
    config.data.test_split = "test"
    config.data.holdout = 0
    config.data.flip = False
    config.data.text_length = 0
    config.data.vocabulary = 4096

    config.model = ml_collections.ConfigDict()
    config.model.name = "unet"
    config.model.channels = 256
    config.model.emb_channels = 1024
    config.model.multipliers = (1, 1, 1)
    config.model.num_blocks = 3
    config.model.attention_resolutions = (8, 16)
    config.model.head_dim = config_dict.placeholder(int)
    config.model.norm_groups = 32
    config.model.dropout = 0.0
    config.model.patch = 1
    config.model.dtype = "float32"
    config.model.remat = False
    config.model.remat_policy = "nothing"

    config.schedule = ml_collections.ConfigDict({"name": "cosine"})
    config.parameterisation = "v"
    config.weighting = "snr_trunc"
    config.clip_targets = False
    config.latent_model = config_dict.placeholder(str)

    config.teacher = _training(updates=500_000, learning_rate=2e-4, warmup=1000, ema=0.9999)
    config.teacher.checkpoint = config_dict.placeholder(str)
    config.teacher.factory = config_dict.placeholder(str)
    config.teacher.cond_dropout = 0.1
    config.teacher.num_times = config_dict.placeholder(int)

    config.to_v = _training(updates=0, learning_rate=1e-4, ema=0.9999)

    config.stage1 = _training(updates=100_000, learning_rate=2e-4, warmup=0, ema=0.9999)
    config.stage1.w_min = 0.0
    config.stage1.w_max = 4.0
    config.stage1.w_margin = 0.0
    config.stage1.checkpoint = config_dict.placeholder(str)
    config.stage1.single_w = ()

    config.stage2 = _training(updates=50_000, learning_rate=5e-5, decay="linear")
    config.stage2.series = ("det",)
    config.stage2.teacher_steps = 1024
    config.stage2.num_steps = ()
    config.stage2.self_ema = 0.5
    config.stage2.final_num_steps = (1, 2, 4)
    config.stage2.final_updates = 100_000
    config.stage2.weighting = config_dict.placeholder(str)

    config.mesh = ml_collections.ConfigDict({"fsdp": 1})
    config.teacher_dtype = "float32"

    config.rounds = ml_collections.ConfigDict()
    config.rounds.plan = "fixed"
    config.rounds.probe_updates = 20
    config.rounds.probe_rates = (0.5, 1.0, 2.0)
    config.rounds.gate_every = 0
    config.rounds.gate_least_fall = 0.02
    config.rounds.gate_most_left = config_dict.placeholder(float)
    config.rounds.gap_samples = 512

    config.evaluate = ml_collections.ConfigDict()
    config.evaluate.num_samples = 50_000
    config.evaluate.batch_size = 256
    config.evaluate.w = (0.0, 0.3, 1.0, 2.0, 4.0)
    config.evaluate.num_steps = (1, 2, 4, 8, 16)
    config.evaluate.classifier_updates = 5000
    config.evaluate.baselines = ()
    config.evaluate.features = ("classifier",)
    config.evaluate.reference = config_dict.placeholder(str)
    config.evaluate.captions = config_dict.placeholder(str)
    config.evaluate.clip = config_dict.placeholder(str)
    config.evaluate.seed = 0

    config.log = ml_collections.ConfigDict({"every": 100, "sample_every": 10_000})
    config.checkpoint = ml_collections.ConfigDict({"every": 5000, "keep": 2})
    return config


def use_mlp(config, **values):
    """Replaces the network of a config by an MLP, for samples that are no images."""
    config.model = ml_collections.ConfigDict({"name": "mlp", "dtype": "float32", **values})


def use_sd_unet(config, **values):
    """Replaces the network of a config by the U-Net of latent diffusion, and its schedule by the betas it was made for.

    What is not named is Stable Diffusion 1's. The teacher predicts eps.
    """
    betas = values.get("betas", (0.00085, 0.012))
    config.model = ml_collections.ConfigDict(
        {"name": "sd_unet", "w_channels": 256, "dtype": "bfloat16", "remat": True, "remat_policy": "nothing", **values}
    )
    config.schedule = ml_collections.ConfigDict(
        {"name": "discrete_betas", "beta_start": betas[0], "beta_end": betas[1], "num_betas": 1000}
    )
    config.schedule.zero_terminal_snr = config.model.zero_terminal_snr = False
    config.parameterisation = "eps"
    config.teacher.num_times = 1000
    config.teacher_dtype = "bfloat16"


def _training(**values):
    defaults = {
        "updates": 0,
        "batch_size": 128,
        "learning_rate": 0.0,
        "warmup": 0,
        "decay": "constant",
        "weight_decay": 0.0,
        "clip_norm": 1.0,
        "ema": 0.0,
        "accumulate": 1,
    }
    return ml_collections.ConfigDict({**defaults, **values})
