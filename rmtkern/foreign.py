"""State dicts that other pruning tools wrote, as plain dense weights under plain names. It reads no file.

torch.nn.utils.prune keeps `<weight>_orig` and `<weight>_mask`; compressed-tensors (SparseML, llm-compressor) kept the
non-zeros of a weight and a bit for each entry, in the formats "sparse-bitmask" and "sparse-24-bitmask".
"""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

__all__ = ["plain_state"]

_PARTS = ("compressed", "bitmask", "shape")
_OFFSETS = "row_offsets"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def plain_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Plain weights of what pruning tools write; other tensors as they are.

    Args:
        state: name -> tensor. `<name>_orig` and `<name>_mask` (torch.nn.utils.prune) become `<name>`, their product;
            `<module>.compressed`, `.bitmask` and `.shape`, and `.row_offsets` if it is there (compressed-tensors),
            become `<module>.weight`, or `<module>` if that ends in ".weight".

    Returns:
        Name -> tensor, in the order of `state`; the values of zeros are 0.0.

    Raises:
        ValueError: a part is missing or the parts do not fit together; it names the tensor.
    """
    found: dict[str, Tensor] = {}
    for name, tensor in state.items():
        stem, _, kind = name.rpartition(".")
        if kind == "compressed" and f"{stem}.bitmask" in state:
            _add(found, stem if stem.endswith("weight") else f"{stem}.weight", _from_bitmask(stem, state))
        elif kind in (*_PARTS[1:], _OFFSETS) and f"{stem}.compressed" in state:
            _need(stem, state)
        elif kind.endswith("_orig") and f"{name.removesuffix('_orig')}_mask" in state:
            _add(found, name.removesuffix("_orig"), _masked(name.removesuffix("_orig"), state))
        elif not (kind.endswith("_mask") and f"{name.removesuffix('_mask')}_orig" in state):
            _add(found, name, tensor)
    return found


def _add(found: dict[str, Tensor], name: str, tensor: Tensor) -> None:
    if name in found:
        raise ValueError(f"{name} is there twice, pruned and plain; keep one of them")
    found[name] = tensor


def _masked(name: str, state: Mapping[str, Tensor]) -> Tensor:
    values, mask = state[f"{name}_orig"], state[f"{name}_mask"]
    if values.shape != mask.shape or not bool(((mask == 0) | (mask == 1)).all()):
        raise ValueError(
            f"{name}_mask: expected 0 and 1 in the shape {list(values.shape)} of {name}_orig, got {list(mask.shape)}"
        )
    return torch.where(mask.bool(), values, torch.zeros((), dtype=values.dtype))


def _need(stem: str, state: Mapping[str, Tensor]) -> None:
    for part in _PARTS:
        if f"{stem}.{part}" not in state:
            raise ValueError(f"{stem}.{part} is missing beside {stem}.compressed; copy the checkpoint again")


def _from_bitmask(stem: str, state: Mapping[str, Tensor]) -> Tensor:
    """The dense weight of compressed-tensors' parts.

    compressed: the kept values, row by row, of any shape. bitmask: uint8, bit c % 8 of byte c // 8 of a row is set
    where column c is kept. shape: of the weight. row_offsets: where a row's values begin.
    """
    _need(stem, state)
    values, bitmask, sizes = (state[f"{stem}.{part}"].cpu() for part in _PARTS)
    if values.dtype not in _DTYPES:
        raise ValueError(
            f"{stem}.compressed has dtype {values.dtype}: it is quantised too, which rmtkern does not read; decompress"
            " it with the version of compressed-tensors that wrote it"
        )
    shape = sizes.flatten().tolist()
    whole = sizes.dtype == torch.int64 and 1 <= len(shape) <= 8 and all(size >= 1 for size in shape)
    rows, width = (int(np.prod(shape[:-1], dtype=object)), -(-shape[-1] // 8)) if whole else (0, 0)
    if not whole or bitmask.dtype != torch.uint8 or bitmask.numel() != rows * width:
        raise ValueError(
            f"{stem}: a bitmask {bitmask.dtype} {list(bitmask.shape)} does not fit the shape {shape}; copy the"
            " checkpoint again"
        )
    bits = np.unpackbits(bitmask.reshape(rows, width).numpy(), axis=1, count=shape[-1], bitorder="little")
    kept = torch.from_numpy(bits.astype(bool))
    counts = kept.sum(1)
    offsets = state.get(f"{stem}.{_OFFSETS}")
    begins = counts.cumsum(0) - counts
    if int(counts.sum()) != values.numel() or (
        offsets is not None and not torch.equal(offsets.flatten().cpu(), begins)
    ):
        raise ValueError(
            f"{stem}: {values.numel()} values and their row offsets do not fit the {int(counts.sum())} bits of the"
            " bitmask; copy the checkpoint again"
        )
    dense = torch.zeros(kept.shape, dtype=values.dtype)
    dense[kept] = values.flatten()
    return dense.view(shape)
