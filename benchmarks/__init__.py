"""Benchmarks: every figure that the project quotes comes from here."""
