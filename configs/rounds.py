"""Ways through stage two on the digits, from the teacher and the stage one of a finished configs/digits.py.

python -m guided_distill.main --config=configs/rounds.py:quarters

`python -m benchmarks.rounds` runs them all and compares what they cost and what they reach.
"""

from configs import digits

# Halving with 300 updates a round is what `fixed` does; every other way is cheaper, or plans the same cost otherwise.
WAYS = {
    "fixed": {},
    "short": {"stage2.updates": 150, "stage2.final_updates": 150},
    "quarters": {"stage2.num_steps": (8, 2, 1), "stage2.updates": 195, "stage2.final_updates": 195},
    # A quarter of the batch and four times the updates.
    "small_batches": {
        "stage2.num_steps": (8, 2, 1),
        "stage2.batch_size": 16,
        "stage2.updates": 780,
        "stage2.final_updates": 780,
    },
    "tract": {"stage2.series": ("tract",), "stage2.num_steps": (1,), "stage2.final_updates": 750},
    "gate": {"rounds.gate_every": 50, "rounds.gate_least_fall": 0.1},
    "auto": {"rounds.plan": "auto", "rounds.gap_samples": 256},
}


def get_config(way="fixed"):
    """The digits' stage two, another way; evaluated at one step."""
    if way not in WAYS:
        raise ValueError(f"configs/rounds.py:{way}: the ways are {', '.join(WAYS)}")
    config = digits.get_config()
    config.teacher.checkpoint = config.stage1.checkpoint = "runs/digits"
    config.evaluate.update(num_steps=(1,), num_samples=500)
    config.log.sample_every = 0
    config.update_from_flattened_dict(WAYS[way])
    return config
