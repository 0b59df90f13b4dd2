"""The exceptions of rmtkern that are not plain ValueError or TypeError."""

__all__ = ["KernelUnavailable", "PackedModelError"]


class KernelUnavailable(RuntimeError):
    """No kernel can run this call here; the message gives each backend's reason and what to do."""


class PackedModelError(RuntimeError):
    """A packed model was asked for something only the unpacked model can do, such as training."""
