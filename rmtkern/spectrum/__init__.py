"""What a matrix's spectrum says: the laws, decompositions, fits and denoisers. Knows no models and no kernels."""
