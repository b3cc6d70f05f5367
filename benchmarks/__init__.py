"""Programs that print measured figures; run as `python -m benchmarks.<name>`."""
