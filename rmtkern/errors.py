"""The exceptions of rmtkern that are not plain ValueError or TypeError, and how a message shows what came."""

import sys

import torch

__all__ = ["KernelUnavailable", "NoGradientsError", "PackedModelError", "refuse_onnx", "short"]


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


def refuse_onnx() -> None:
    """Raise PackedModelError inside torch.onnx.export, which has no ONNX operator for a kernel of ours.

    For the fake form of a custom op, which every tracer runs.
    """
    if "onnxscript" in sys.modules and torch.onnx.is_in_onnx_export():  # asking imports it, and no export lacks it
        raise PackedModelError(
            "ONNX has no operator for packed weights; call rmtkern.export_onnx(model, path, example), which writes the"
            " dense weights with their zeros, or rmtkern.unpack_(model) before torch.onnx.export"
        )
