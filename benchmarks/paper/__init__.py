"""The papers' experiments that a CPU can run, with what they should give; `python -m benchmarks.paper` runs them."""
