"""Layout `dense`: the weight as it is, for the fastest dense linear that PyTorch has here."""
