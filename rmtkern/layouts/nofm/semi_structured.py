"""2:4 as sparse tensor cores take it: CUTLASS's metadata, and the call of PyTorch's kernels. It knows no layout class.

PyTorch has two families. That of CUTLASS runs on compute capability 8.x and reads kept entries and metadata in a known
order, which is made here and which sparse_product.cu reads too. cuSPARSELt's (8.0 and later) reads an opaque array that
only its own call on a device makes.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

__all__ = ["fits", "metadata", "runs", "transposed_product"]

_GROUPS = 4  # groups of 4 columns in a 16-bit word
_TOKENS = 8  # their count must be a multiple: 16 bytes of a row of the result


def _codes() -> NDArray[np.uint16]:
    """Mask of a group -> the columns c0 < c1 of its two bits, as c0 + 4 c1; other masks -> columns 0 and 1."""
    table = np.full(16, 4, np.uint16)
    for first in range(4):
        for second in range(first + 1, 4):
            table[1 << first | 1 << second] = first + 4 * second
    return table


def fits(shape: tuple[int, int], dtype: torch.dtype) -> bool:
    """Whether PyTorch's kernels take a weight [N, K]: 16-bit, N a multiple of 32 and K of 64."""
    return dtype in (torch.float16, torch.bfloat16) and shape[0] % 32 == 0 and shape[1] % 64 == 0


def metadata(masks: Tensor) -> Tensor:
    """Which entries were kept, in the order of CUTLASS's sparse product for 16-bit elements.

    A word tells of 16 columns of a row, 4 bits for each group. The rows of each 32 are dealt out by eights (row 8 i + j
    becomes 4 j + i), each 2 x 2 block of words is transposed, and words lie two columns wide, column by column
    (`ColumnMajorInterleaved<2>`).

    Args:
        masks: [N, C] int64, bit j of [n, c] set where column 64 c + j is kept, two in each group of 4 that there is.

    Returns:
        [32 ceil(N / 32), 4 C] int16, on the device of `masks`; groups that there are not keep columns 0 and 1.

    Source: CUTLASS, tools/util/include/cutlass/util/host_reorder.h, reorder_meta; PTX ISA, mma.sp.
    """
    bits = np.pad(masks.cpu().numpy().view(np.uint8), ((0, -len(masks) % 32), (0, 0)))  # two groups in a byte
    codes = _codes()[np.stack([bits & 15, bits >> 4], axis=2)].reshape(len(bits), -1, _GROUPS)
    words = np.bitwise_or.reduce(codes << np.arange(0, 4 * _GROUPS, 4, dtype=np.uint16), axis=2)
    rows, columns = words.shape
    dealt = words.reshape(rows // 32, 4, 8, columns).transpose(0, 2, 1, 3).reshape(rows // 2, 2, columns // 2, 2)
    interleaved = dealt.transpose(0, 3, 2, 1).reshape(rows, columns // 2, 2).transpose(1, 0, 2)
    ordered = np.ascontiguousarray(interleaved).reshape(rows, columns).view(np.int16)
    return torch.from_numpy(ordered).to(masks.device)


def runs(device: torch.device) -> bool:
    """Whether PyTorch has the kernels of CUTLASS for this device: NVIDIA's compute capability 8.x."""
    if device.type != "cuda" or torch.version.hip is not None or not hasattr(torch, "_sparse_semi_structured_addmm"):
        return False
    return torch.cuda.get_device_capability(device)[0] == 8


def transposed_product(x: Tensor, kept: Tensor, meta: Tensor, bias: Tensor | None) -> Tensor:
    """W xᵀ + bias on sparse tensor cores, rounded to the dtype of x.

    Args:
        x: [T, K] float16 or bfloat16, contiguous.
        kept: [N, K / 2], the kept entries by column; dtype and device of `x`, as all others.
        meta: [N, K / 16] int16 as `metadata` returns it.
        bias: [N] or None.

    Returns:
        [N, T'] contiguous, T' = T filled up to a multiple of 8; the columns from T on are of no meaning.
    """
    padded = F.pad(x, (0, 0, 0, -len(x) % _TOKENS)) if len(x) % _TOKENS else x
    if bias is None:
        return torch._sparse_semi_structured_mm(kept, meta, padded.t())
    return torch._sparse_semi_structured_addmm(bias, kept, meta, padded.t())
