"""Distillation of guided diffusion models into students of 1 to 16 network calls (Meng et al., arXiv 2210.03142)."""

__version__ = "0.1.0"


def load(directory):
    """The `export.bundle.Bundle` that --mode=export wrote into a directory: its `sample` draws images.

    Raises UserError for what is missing, damaged, foreign or too new.
    """
    # Imported here: the package itself is to load at once, and without JAX.
    from guided_distill.export import bundle

    return bundle.load(directory)
