"""The exceptions of rmtkern that are not plain ValueError or TypeError, and how a message shows what came."""

__all__ = ["KernelUnavailable", "NoGradientsError", "PackedModelError", "short"]


class KernelUnavailable(RuntimeError):
    """No kernel can run this call here; the message gives each backend's reason and what to do."""


class PackedModelError(RuntimeError):
    """A packed model was asked for something only the unpacked model can do, such as training."""


class NoGradientsError(ValueError):
    """A model's outputs have no gradients, so that what its weights cost them cannot be measured."""


def short(value: object) -> str:
    """A value as a message shows it: its repr, of which at most 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else text[:60] + "..."
