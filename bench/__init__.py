"""Benchmarks: `python -m bench run --suite NAME`, `python -m bench table`."""
