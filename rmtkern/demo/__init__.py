"""A small real Vision Transformer on real images, from analysis to a faster model."""
