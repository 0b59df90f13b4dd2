"""What the removed part R of one weight does to its inputs, image by image: ||R psi||_inf and the norms of psi.

It watches the calls that use the weight and computes in float64; it keeps one number per image and no activation.
"""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from rmtkern.certificates.lipschitz import named
from rmtkern.models import PrunableWeight

__all__ = ["Gains", "InputWatch", "gains_of"]

_ATTENTION = inspect.signature(F.multi_head_attention_forward)


@dataclass(frozen=True)
class Gains:
    """Norms of R [N, K] that hold for every input psi.

    Args:
        row_l1: ||R||_inf, so ||R psi||_inf <= row_l1 ||psi||_inf (V1).
        row_l2: the largest row norm, so ||R psi||_inf <= row_l2 ||psi||_2 (V2); never above V3.
        spectral: ||R||_2, so ||R psi||_inf <= spectral ||psi||_2 (V3).
    """

    row_l1: float
    row_l2: float
    spectral: float


def gains_of(removed: Tensor) -> Gains:
    """The three norms of R [N, K] in float64; the spectral one from the Gram matrix of the smaller side."""
    r = removed.double()
    gram = r @ r.T if r.shape[0] <= r.shape[1] else r.T @ r
    spectral = float(torch.linalg.eigvalsh(gram)[-1].clamp_min(0).sqrt())
    row_l2 = float(r.norm(dim=1).max())
    return Gains(float(r.abs().sum(1).max()), row_l2, max(spectral, row_l2))


class InputWatch(TorchFunctionMode):
    """Sees every product with one weight and notes, for each image, the largest values over tokens and calls.

    Args:
        weight: the weight as the running model uses it; linear, convolution, Conv1D or in MultiheadAttention.
        removed: R [N, K] float64.
        images: in the batch.

    Attributes:
        change: [B] float64, ||R psi||_inf; None while no call was seen. An input whose first dimension is no
            multiple of B counts for every image.
        sup: [B] ||psi||_inf.
        two: [B] largest ||psi||_2 of a token (of a patch, for a convolution).
    """

    def __init__(self, weight: PrunableWeight, removed: Tensor, images: int) -> None:
        super().__init__()
        self.weight, self.removed, self.images = weight, removed, images
        self.change: Tensor | None = None
        self.sup = self.two = torch.zeros(images, dtype=torch.float64)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.linear:
            x, matrix = named(("input", "weight"), args, kwargs)
            if matrix is self.weight.parameter:
                self._add(x, self.removed)
        elif func is torch.addmm:
            x, matrix = named(("input", "mat1", "mat2"), args, kwargs)[1:]
            if matrix is self.weight.parameter:
                self._add(x, self.removed)
        elif func is F.conv2d:
            call = named(("input", "weight", "bias", "stride", "padding", "dilation", "groups"), args, kwargs)
            if call[1] is self.weight.parameter:
                self._convolution(call[0], *call[3:])
        elif func is F.multi_head_attention_forward:
            self._attention(_ATTENTION.bind(*args, **kwargs).arguments)
        return func(*args, **kwargs)

    def _add(self, x: Tensor, removed: Tensor) -> None:
        """Take inputs [B * anything, ..., K] of a block of rows of R."""
        psi = x.detach().double().reshape(-1, x.shape[-1])
        tokens = [(psi @ removed.T).abs().amax(1), psi.abs().amax(1), psi.norm(dim=1)]
        if x.ndim > 1 and x.shape[0] % self.images == 0:
            seen = [value.reshape(self.images, -1).amax(1).cpu() for value in tokens]
        else:
            seen = [value.max().cpu().expand(self.images) for value in tokens]
        change, sup, two = seen
        self.change = change if self.change is None else torch.maximum(self.change, change)
        self.sup, self.two = torch.maximum(self.sup, sup), torch.maximum(self.two, two)

    def _convolution(self, x: Tensor, stride: Any, padding: Any, dilation: Any, groups: Any) -> None:
        kernel = self.weight.parameter.shape[2:]
        stride, dilation, groups = _pair(stride or 1), _pair(dilation or 1), groups or 1
        x = x.detach().double()
        if padding == "same":
            spare = [step * (size - 1) for step, size in zip(dilation, kernel, strict=True)]
            x = F.pad(x, [spare[1] // 2, spare[1] - spare[1] // 2, spare[0] // 2, spare[0] - spare[0] // 2])
        elif padding not in ("valid", None):
            down, right = _pair(padding)
            x = F.pad(x, [right, right, down, down])
        patches = F.unfold(x, tuple(kernel), dilation=dilation, stride=stride).transpose(1, 2)  # [B, places, C kh kw]
        for part, rows in zip(patches.chunk(groups, -1), self.removed.chunk(groups), strict=True):
            self._add(part, rows)

    def _attention(self, call: Mapping[str, Any]) -> None:
        """nn.MultiheadAttention multiplies out of sight; its inputs are [tokens, B, K]."""
        inputs = [call[name] for name in ("query", "key", "value")]
        mine = self.weight.parameter
        if call["in_proj_weight"] is mine and not call.get("use_separate_proj_weight"):
            for x, rows in zip(inputs, self.removed.chunk(3), strict=True):
                self._add(_image_first(x), rows)
        for name, x in zip("qkv", inputs, strict=True):
            if call.get(f"{name}_proj_weight") is mine:
                self._add(_image_first(x), self.removed)
        if call["out_proj_weight"] is mine:  # its input is what comes out with an identity in its place
            identity = torch.eye(mine.shape[1], dtype=mine.dtype, device=mine.device)
            plain = {**call, "out_proj_weight": identity, "out_proj_bias": None, "need_weights": False}
            self._add(_image_first(F.multi_head_attention_forward(**plain)[0]), self.removed)


def _image_first(x: Tensor) -> Tensor:
    return x.transpose(0, 1) if x.ndim == 3 else x


def _pair(value: Any) -> tuple[int, int]:
    if isinstance(value, int):
        return value, value
    return (value[0], value[0]) if len(value) == 1 else (value[0], value[1])
