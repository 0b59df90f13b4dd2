"""CPU kernels, compiled from csrc/ (optional: rmtkern works on its reference without it)."""

import numpy as np
from numpy.typing import NDArray

def isas() -> list[str]:
    """Names of the instruction sets that this CPU runs, best first, such as ["avx512", "avx2", "portable"]."""

def attention(
    q: NDArray[np.float32 | np.uint16],
    k: NDArray[np.float32 | np.uint16],
    v: NDArray[np.float32 | np.uint16],
    mask: NDArray[np.float32 | np.uint16] | None,
    y: NDArray[np.float32 | np.uint16],
    scale: float,
    threads: int,
    isa: str | None = None,
) -> None:
    """Write y = softmax(q kᵀ scale + mask) v, without the GIL.

    Args:
        q: [B, H, Tq, d] float32, or bfloat16 as uint16; the last dimension contiguous, any other strides. All arrays
            have its dtype.
        k: [B, H, Tk, d], as q.
        v: [B, H, Tk, d], as q.
        mask: [B, H, Tq, Tk] or None, as q; strides may be 0.
        y: [B, Tq, H, d], C-contiguous, written.
        scale: of the scores.
        threads: OpenMP threads, >= 1.
        isa: one of isas(); None takes the environment's RMTKERN_ISA, or else the best.

    Raises:
        ValueError: a wrong shape or name.
        TypeError: a wrong dtype, or strides that are not allowed.
    """

def layernorm(
    x: NDArray[np.float32 | np.uint16],
    weight: NDArray[np.float32 | np.uint16] | None,
    bias: NDArray[np.float32 | np.uint16] | None,
    y: NDArray[np.float32 | np.uint16],
    eps: float,
    threads: int,
    isa: str | None = None,
) -> None:
    """Write y = (x - mean) / sqrt(variance + eps) * weight + bias for each row, without the GIL.

    Args:
        x: [T, K] float32, or bfloat16 as uint16, C-contiguous (as every array here). All arrays have its dtype.
        weight: [K] or None for ones.
        bias: [K] or None for zeros.
        y: [T, K], written; may be `x` itself.
        eps: added to the variance.
        threads: OpenMP threads, >= 1.
        isa: one of isas(); None takes the environment's RMTKERN_ISA, or else the best.

    Raises:
        ValueError: a wrong shape or name.
        TypeError: a wrong dtype, or an array that is not C-contiguous.
    """

Rows = NDArray[np.float32 | np.uint16]
Norm = tuple[Rows | None, Rows | None, float]

def mlp(
    layouts: tuple[str, str],
    x: Rows,
    hidden: int,
    parts: tuple[list[NDArray[np.generic]], list[NDArray[np.generic]]],
    params: tuple[list[int], list[int]],
    biases: tuple[Rows | None, Rows | None],
    scale: Rows | None,
    residual: Rows | None,
    y: Rows,
    activation: str | None,
    threads: int,
    isa: str | None = None,
    norm: Norm | None = None,
) -> None:
    """Write y = (activation(norm(x) W1ᵀ + b1) W2ᵀ + b2) * scale + residual, without the GIL.

    Strips of tokens, so that the hidden features stay in the cache; in panels, if both layouts are walked weight by
    weight.

    Args:
        layouts: of W1 and W2, such as ("bitmask", "block").
        x: [T, K], as in `linear`.
        hidden: F, the rows of W1 and columns of W2.
        parts: of W1 [F, K] and of W2 [N, F], as in `linear`.
        params: likewise.
        biases: [F] and [N], or None.
        scale: [N] or None, multiplied after the second bias.
        residual: [T, N] or None, added last; may be `y` itself.
        y: [T, N], written; must not overlap `x`.
        activation: of the hidden features: None, "gelu", "gelu_tanh", "relu" or "silu".
        threads: OpenMP threads, >= 1.
        isa: one of isas(); None takes the environment's RMTKERN_ISA, or else the best.
        norm: as in `linear`.

    Raises:
        ValueError: a wrong shape or name, or parts that contradict each other.
        TypeError: a wrong dtype, or an array that is not C-contiguous.
    """

def linear(
    layout: str,
    x: NDArray[np.float32 | np.uint16],
    parts: list[NDArray[np.generic]],
    params: list[int],
    bias: NDArray[np.float32 | np.uint16] | None,
    scale: NDArray[np.float32 | np.uint16] | None,
    residual: NDArray[np.float32 | np.uint16] | None,
    y: NDArray[np.float32 | np.uint16],
    activation: str | None,
    threads: int,
    isa: str | None = None,
    gated: bool = False,
    norm: Norm | None = None,
) -> None:
    """Write y = activation(x Wᵀ + bias) * scale + residual, without the GIL.

    Gated: y [T, F] = activation(x Wgᵀ + bg) * (x Wuᵀ + bu) * scale [F] + residual [T, F], where the N = 2 ceil(F / 8) 8
    rows of W and bias are pairs as rmtkern/layouts/pairs.py defines them.

    Args:
        layout: such as "bitmask".
        x: [T, K] float32, or bfloat16 as uint16, C-contiguous (as every array here; nothing is ever copied). All
            arrays of activations have its dtype.
        parts: the layout's arrays, in its order.
        params: the layout's integers, in its order.
        bias: [N] or None.
        scale: [N] or None, multiplied after the activation.
        residual: [T, N] or None, added last; may be `y` itself.
        y: [T, N], written; must not overlap `x`.
        activation: None, "gelu", "gelu_tanh", "relu" or "silu".
        threads: OpenMP threads, >= 1.
        isa: one of isas(); None takes the environment's RMTKERN_ISA, or else the best.
        gated: whether W is a gate-up pair.
        norm: (weight [K] or None for ones, bias [K] or None for zeros, eps): the rows of x are first normalised, as by
            `layernorm`, on their way into the kernel.

    Raises:
        ValueError: a wrong shape or name, or parts that contradict each other.
        TypeError: a wrong dtype, or an array that is not C-contiguous.
    """
