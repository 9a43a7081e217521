"""Benchmarks: pytest-benchmark suites and the demo."""
