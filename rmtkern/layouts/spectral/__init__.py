"""spectral: two thin factors plus a sparse remainder in the storage of bitmask."""

from rmtkern.layouts.spectral.weight import SpectralWeight

__all__ = ["SpectralWeight"]
