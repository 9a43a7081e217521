"""The experiments behind docs/results.md: ``python -m benchmarks.experiments NAME``."""
