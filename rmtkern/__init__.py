"""Prune Vision Transformers with random matrix theory and run the pruned model fast."""
