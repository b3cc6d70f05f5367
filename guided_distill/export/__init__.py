"""Students for others: a bundle that this package loads, StableHLO that needs jax alone, and the proof of both."""
