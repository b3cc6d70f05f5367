"""A workdir as a finished run leaves it, with figures that a formula makes: what the tests of the report read."""

import json

import numpy as np

from guided_distill import pictures

STEPS, STRENGTHS = (1, 2, 4, 8), (0.0, 1.0, 4.0)
STAGES = ("00_teacher", "01_stage1", "02_stage2_det_0002", "03_stage2_det_0001")


def frechet(w, worse=1.0):
    """Worse with guidance, and by that factor."""
    return (3.0 + 8.0 * w) * worse


def make_row(model, num_steps, w, worse=1.0, stage=None, sampler="deterministic", network="classifier"):
    """A row; `worse` is how many times the Fréchet distance of the reference teacher its own is."""
    is_teacher = model == "teacher"
    default = "teacher" if is_teacher else f"stage2_det_{num_steps:04d}"
    return {
        "stage": stage or default,
        "model": model,
        "sampler": sampler,
        "num_steps": num_steps,
        "nfe": num_steps * (1 + is_teacher),
        "w": w,
        "seconds_per_image": 3e-4 * num_steps * (1 + is_teacher),
        "metrics": {
            f"frechet_{network}": frechet(w, worse),
            f"score_{network}": 9.0 + 0.3 * np.log1p(w) - 0.02 * worse,
            f"precision_{network}": 0.7 + 0.05 * w - 0.05 * (worse - 1),
            f"recall_{network}": 0.6 - 0.1 * w - 0.05 * (worse - 1),
            "label_agreement": 0.97,
            "diversity": 60.0 / (1 + 0.2 * w) / worse**0.1,
            "distance_to_reference": 0.01 * (worse - 1),
        },
        "intervals": {f"frechet_{network}": [0.9 * frechet(w, worse), 1.03 * frechet(w, worse)]},
        "num_samples": 1000,
        "feature_network": f"{network} (64 features) trained on digits",
        "weights_hash": "ab" * 32,
        "resize": "none",
        "seed": 0,
        "reference": "digits/train (1500 images)",
        "reference_hash": "cd" * 32,
        "checkpoint": f"0_{stage or default}",
    }


def make_rows():
    """The reference teacher of 32 steps, its few steps, and stage-one and stage-two students, which are better."""
    rows = [make_row("teacher", 32, w) for w in STRENGTHS]
    rows += [make_row("teacher", n, w, 1 + 8 / n**1.3) for n in STEPS for w in STRENGTHS]
    rows += [make_row("student", n, w, 1 + 1.5 / n, stage="stage1") for n in STEPS for w in STRENGTHS]
    rows += [make_row("student", n, w, 1 + (0.04 + 0.1 * (w > 1)) / n) for n in STEPS for w in STRENGTHS]
    return rows


def make_summary(rows=None, **more):
    """A summary with everything the report knows of."""
    w_curve = [[0.0, 0.02], [1.0, 0.05], [4.0, 0.11]]
    rounds = {
        name: {
            "gap_by_t": [[t, scale * (0.1 + t)] for t in (0.1, 0.3, 0.5, 0.7, 0.9)],
            "gap_by_w": [[w, scale * (1 + w)] for w, _ in w_curve],
            "clipped": [[w, share * scale] for w, share in w_curve],
            "colour_drift": [[w, share * scale / 9] for w, share in w_curve],
            "smoothness_over_w": 0.1 * scale,
        }
        for name, scale in (("stage2_det_0002", 1.0), ("stage2_det_0001", 2.5))
    }
    rounds["stage2_det_0001"]["warning"] = "the gap at w = 4 is 2.5 times that of the round before"
    return {
        "rows": make_rows() if rows is None else rows,
        "noise_floor": 3.6,
        "classifier_test_accuracy": 0.99,
        "evaluate": {"num_samples": 1000, "w": list(STRENGTHS), "num_steps": list(STEPS), "baselines": [], "seed": 0},
        "environment": {"jax": "0.10.2", "python": "3.11.7", "devices": "1 x cpu", "host_cores": 2},
        "diagnostics": rounds,
        **more,
    }


def make_strip(row, num=10, side=8):
    """Samples [num,side,side,1], paler the further they are from the reference and brighter with w, as a strip."""
    axis = np.linspace(-1, 1, side)
    phase = np.arange(num)[:, None, None]
    rings = np.cos(3 * np.hypot(axis[:, None] - 0.2 * np.sin(phase), axis) * (1 + phase / num))
    x = np.clip(rings / (1 + 10 * row["metrics"]["distance_to_reference"]) + 0.1 * row["w"], -1, 1)
    return pictures.image_grid(x[..., None], columns=num)[pictures.GAP : -pictures.GAP, pictures.GAP : -pictures.GAP]


def make_run(workdir, summary=None, *, with_pictures=True):
    """Writes config.json, summary.json, the stages' losses and the pictures; returns the summary."""
    summary = make_summary() if summary is None else summary
    (workdir / "evaluation").mkdir(parents=True)
    for k, row in enumerate(summary["rows"] if with_pictures else []):
        row["picture"] = f"evaluation/{k:03d}.png"
        pictures.save_png(workdir / row["picture"], make_strip(row))
    for k, stage in enumerate(STAGES):
        (workdir / stage).mkdir()
        losses = [{"step": 20 * n, "loss": (0.5 + 0.1 * np.sin(n)) / (k + 1) / n**0.5} for n in range(1, 60)]
        (workdir / stage / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in losses))
    (workdir / "config.json").write_text(json.dumps({"data": {"name": "digits"}}))
    (workdir / "summary.json").write_text(json.dumps(summary))
    return summary
