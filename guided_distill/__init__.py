"""Distillation of guided diffusion models into students of 1 to 16 network calls (Meng et al., arXiv 2210.03142)."""

__version__ = "0.1.0"
