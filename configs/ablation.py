"""The paper's ablation on the digits, in one run: w-conditioned, single-w and two-student, and both samplers.

For another data set, copy the last lines onto its config.
"""

from configs import digits


def get_config():
    """Every student gets the updates of configs/digits.py."""
    config = digits.get_config()
    config.stage1.single_w = (0.0, 1.0, 4.0)
    config.stage2.series = ("det", "sto", "two")
    config.evaluate.num_samples = 500
    return config
