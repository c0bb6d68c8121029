"""Benchmarks; `python -m benchmarks --help` says what the harness measures."""
