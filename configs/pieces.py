"""The digits with one piece exchanged: another backbone, another kind of teacher, a teacher made of several.

python -m guided_distill.main --config=configs/pieces.py:dit

`dit`: a diffusion transformer. `eps`, `flow`, `discrete`: teachers that predict noise, on straight paths, and of 1,000
discrete times, each turned into v before it is distilled. `ensemble`, `autoguidance`, `interval`: made of the teachers
of earlier runs,

    python -m guided_distill.main --config=configs/digits.py
    python -m guided_distill.main --config=configs/digits.py --config.seed=1 --workdir=runs/digits_seed1
    python -m guided_distill.main --config=configs/digits.py --config.teacher.updates=200 --workdir=runs/digits_weak
"""

import math

import ml_collections

from configs import digits

DIT = {"name": "dit", "hidden": 96, "depth": 4, "heads": 3, "patch": 2, "dtype": "float32"}
PIECES = {
    "dit": {"model": DIT},
    "eps": {"parameterisation": "eps"},
    "flow": {"parameterisation": "flow", "schedule": {"name": "rectified_flow"}},
    "discrete": {"parameterisation": "eps", "schedule": {"name": "discrete_betas"}, "teacher.num_times": 1000},
    "ensemble": {"teacher.factory": "configs.pieces:make_ensemble"},
    "autoguidance": {"teacher.factory": "configs.pieces:make_autoguidance"},
    "interval": {"teacher.factory": "configs.pieces:make_interval"},
}


def get_config(piece="dit"):
    """configs/digits.py with one piece exchanged."""
    if piece not in PIECES:
        raise ValueError(f"configs/pieces.py:{piece}: the pieces are {', '.join(PIECES)}")
    config = digits.get_config()
    for key, value in PIECES[piece].items():
        if isinstance(value, dict):
            config[key] = ml_collections.ConfigDict(value)
        else:
            config.update_from_flattened_dict({key: value})
    if config.parameterisation != "v":
        config.to_v.update(updates=600, batch_size=64, learning_rate=5e-4, decay="linear", ema=0.99)
    return config


def make_ensemble():
    """The mean of two teachers that differ by their seed alone."""
    from guided_distill import guidance, teachers

    return guidance.ensemble([teachers.load_teacher(path) for path in ("runs/digits", "runs/digits_seed1")])


def make_autoguidance():
    """A teacher led away from one that was trained for a while only."""
    from guided_distill import guidance, teachers

    return guidance.autoguidance(*(teachers.load_teacher(path) for path in ("runs/digits", "runs/digits_weak")))


def make_interval():
    """A teacher that guides at sigma / alpha from .3 to 5 alone."""
    from guided_distill import guidance, teachers

    return guidance.interval(teachers.load_teacher("runs/digits"), -2 * math.log(5.0), -2 * math.log(0.3))
