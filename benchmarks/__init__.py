"""Benchmarks: pytest-benchmark suites and the demo."""

import thanos  # noqa: F401  # before PyTorch: it says how the demo's threads wait
