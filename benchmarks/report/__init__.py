"""docs/results.md from the JSON of the benchmarks: ``python -m benchmarks.report``."""
