"""Distillation of guided diffusion models into students of 1 to 16 network calls (Meng et al., arXiv 2210.03142).

As a library: `import guided_distill as gd`, and what __all__ lists is there, loaded when it is first asked for. These
names stay; docs/extending.md and examples/own_denoiser.py show them at work.
"""

import importlib

__version__ = "0.1.0"

_MODULES = ("diffusion", "editing", "guidance", "models", "objectives", "samplers")
_NAMES = {
    "diffusion": ("Cosine", "DiscreteBetas", "Grid", "Prediction", "RectifiedFlow", "make_grid"),
    "editing": ("edit",),
    "errors": ("UserError",),
    "generate": ("sample_images",),
    "guidance": ("Teacher", "make_denoiser", "null_label"),
    "models": ("make_model_fn",),
    "objectives": (
        "Knobs", "make_denoise", "make_encode", "make_stage1", "make_stage2", "make_tract", "make_two_student",
        "within_range",
    ),
    "optim": ("OptimiserConfig",),
    "samplers": ("image_keys", "initial_noise"),
    "sharding": ("make_mesh", "place", "shard_batch"),
    "state": ("TrainState", "make_state", "student_params"),
    "teachers": ("load_teacher",),
    "train": ("make_train_step",),
}  # fmt: skip
_HOME = {name: module for module, names in _NAMES.items() for name in names}

__all__ = sorted([*_MODULES, *_HOME, "load"])


def load(directory):
    """The `export.bundle.Bundle` that --mode=export wrote into a directory: its `sample` draws images.

    Raises UserError for what is missing, damaged, foreign or too new.
    """
    # Imported here, as all below: the package itself is to load at once, and without JAX.
    from guided_distill.export import bundle

    return bundle.load(directory)


def __getattr__(name):
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    if name in _HOME:
        return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return sorted({*globals(), *__all__})
