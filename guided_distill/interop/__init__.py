"""Weights of other projects: their names for ours, and files converted once."""
