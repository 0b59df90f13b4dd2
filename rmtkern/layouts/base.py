"""PackedWeight: what every storage layout of a weight must offer. It knows no kernel and no model."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, Self

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from rmtkern.storage import LINE

__all__ = ["CPU_DTYPES", "INTEGERS", "PackedWeight", "as_integers", "check_dense"]

CPU_DTYPES = (torch.float32, torch.bfloat16)
"""What the CPU kernels compute; layouts may store more."""

INTEGERS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}
"""The integers as which entries travel through NumPy, which lacks bfloat16."""


class PackedWeight(nn.Module):
    """A weight [N, K] (out, in features) in one storage layout; the parts are buffers, so `.to()` and state_dict work.

    A layout is a subclass that sets the class variables and writes `pack` and `unpack` (and `reason_against`, if not
    every weight fits; and `gpu_form`, if its GPU kernels read another order, which is not part of state_dict). The
    law, tested for all layouts: `pack(W).unpack()` equals W bit for bit at the packed dtype, except that -0.0 becomes
    0.0 (`lowrank` and `spectral`, whose weights are products, say what they keep instead).

    Args:
        shape: (N, K).
        params: the layout's own integers, such as {"n": 2, "m": 4}.
        parts: one contiguous tensor for each name in the class's `parts`, in that order.
    """

    layout: ClassVar[str]
    parts: ClassVar[tuple[str, ...]]
    streamed: ClassVar[tuple[str, ...]] = ()
    """Parts that CPU kernels read from any place on, so that they may begin anywhere, such as in a mapped file."""
    dtypes: ClassVar[tuple[torch.dtype, ...]] = (torch.float32,)
    gpu_stored: ClassVar[tuple[str, ...]] = ()
    gpu_parts: ClassVar[tuple[str, ...]] = ()
    wanted: torch.dtype | None = None
    """What `.to()` asked for last, if the layout does not hold weights in it; the weight is then as it was."""

    def __init__(self, shape: tuple[int, int], params: Mapping[str, int], parts: tuple[Tensor, ...]) -> None:
        super().__init__()
        self.shape = shape
        self.params = dict(params)
        for name, tensor in zip(self.parts, parts, strict=True):
            self.register_buffer(name, tensor if name in self.streamed else _aligned(tensor))
        for name in self.gpu_parts:
            self.register_buffer(name, None, persistent=False)
        self._arrive()

    @classmethod
    def reason_against(cls, dense: Tensor, **params: int) -> str | None:
        """Why this weight [N, K] cannot be stored in this layout, or None if it can."""
        return None

    @classmethod
    def variants(cls, dense: Tensor) -> Iterable[dict[str, int]]:
        """The params worth timing for this weight [N, K], each of which `pack` takes; empty if none fits."""
        return ({},) if cls.reason_against(dense) is None else ()

    @classmethod
    def pack(cls, dense: Tensor, **params: int) -> Self:
        """Store a dense weight [N, K]; ValueError with `reason_against` if it cannot be stored."""
        raise NotImplementedError

    def unpack(self) -> Tensor:
        """The dense weight [N, K] in the packed dtype, bit-exact (-0.0 becomes 0.0)."""
        raise NotImplementedError

    def damage(self) -> str | None:
        """What of parts that came from a file no `pack` would write although kernels run it, or None.

        Called after a kernel has found that shapes fit and that nothing leads it astray.
        """
        return None

    def gpu_form(self) -> tuple[Tensor | None, ...]:
        """What GPU kernels read besides the parts, made from them: for each name in `gpu_parts` a tensor.

        None for one that the kernel of these params does not take.
        """
        return ()

    def gpu_tensors(self) -> tuple[Tensor, ...]:
        """What GPU kernels take: the parts in `gpu_stored`, and `gpu_form`.

        That is made once when the weight arrives on a GPU; elsewhere it is made on the spot.
        """
        held = tuple(getattr(self, name) for name in self.gpu_parts)
        form = self.gpu_form() if all(tensor is None for tensor in held) else held
        stored = dict(zip(self.parts, self.tensors(), strict=True))
        return (*(stored[name] for name in self.gpu_stored), *(tensor for tensor in form if tensor is not None))

    def _arrive(self) -> None:
        """Make or drop the GPU form, as the device of the parts asks."""
        if self.gpu_parts:
            on_gpu = self.tensors()[0].device.type == "cuda"
            form = self.gpu_form() if on_gpu else (None,) * len(self.gpu_parts)
            for name, tensor in zip(self.gpu_parts, form, strict=True):
                setattr(self, name, tensor)

    def in_dtype(self, dtype: torch.dtype) -> Self:
        """The weight in another dtype, rounded, in this layout with these params; how parts lie depends on the dtype.

        Raises:
            ValueError: this layout, or these params, do not hold the weight in it.
        """
        return type(self).pack(self.unpack().to(dtype), **self.params)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        for name in self.gpu_parts:
            setattr(self, name, None)
        asked: list[torch.dtype] = []

        def moved(part: Tensor) -> Tensor:
            new = fn(part)
            if new.dtype == part.dtype:
                return new
            asked.append(new.dtype)
            return part.to(new.device)

        super()._apply(moved, recurse)
        if asked:
            self._cast(asked[0])
        self._arrive()
        return self

    def _cast(self, dtype: torch.dtype) -> None:
        """Become the weight in another dtype: as it is packed in that, or else with its parts as they lie.

        CPU kernels take the first alone; the second unpacks to the rounded weight, and GPU kernels make their form of
        it. In a dtype that the layout does not hold, the weight stays, and its module casts what it unpacks.
        """
        self.wanted = None
        if dtype == self.dtype:
            return
        if dtype not in self.dtypes:
            self.wanted = dtype
            return
        try:
            parts = self.in_dtype(dtype).tensors()
        except ValueError:  # these params are not written in it
            parts = tuple(part.to(dtype) if part.is_floating_point() else part for part in self.tensors())
        for name, part in zip(self.parts, parts, strict=True):
            setattr(self, name, part)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._arrive()

    def tensors(self) -> tuple[Tensor, ...]:
        """The parts, in the order of the class's `parts`."""
        buffers: dict[str, Any] = self._buffers  # not by getattr, which is slow on a module
        return tuple(buffers[name] for name in self.parts)

    def cpu_tensors(self) -> tuple[Tensor, ...] | None:
        """What the kernels of csrc take; None where another library computes this form."""
        return self.tensors()

    @property
    def dtype(self) -> torch.dtype:
        """Of the values, which is that of the weight."""
        return self._values().dtype

    @property
    def device(self) -> torch.device:
        """Where the parts are."""
        return self._values().device

    def _values(self) -> Tensor:
        """A part that holds entries of the weight."""
        return next(tensor for tensor in self.tensors() if tensor.is_floating_point())

    @property
    def label(self) -> str:
        """What a report calls this layout with these params, such as "bitmask" or "nofm(n=2,m=4)"."""
        params = ",".join(f"{name}={value}" for name, value in self.params.items())
        return f"{self.layout}({params})" if params else self.layout

    @property
    def nbytes(self) -> int:
        """Bytes of all parts, and of the GPU form where it is held."""
        held = [tensor for name in self.gpu_parts if (tensor := getattr(self, name)) is not None]
        return sum(tensor.numel() * tensor.element_size() for tensor in (*self.tensors(), *held))

    def extra_repr(self) -> str:
        """Shape, params and bytes."""
        return f"shape={self.shape}, params={self.params}, nbytes={self.nbytes}"


def _aligned(part: Tensor) -> Tensor:
    """The part if it begins at a cache line, else a copy, which does: a vector load across two lines costs two."""
    return part if part.device.type != "cpu" or part.data_ptr() % LINE == 0 else part.clone()


def check_dense(dense: Tensor, dtypes: tuple[torch.dtype, ...], layout: str) -> None:
    """Refuse what no layout can store: wrong rank, dtype or device, NaN or Inf."""
    if not isinstance(dense, Tensor):
        raise TypeError(f"{layout}: expected a torch.Tensor [N, K], got {type(dense).__name__}")
    if dense.ndim != 2 or 0 in dense.shape:
        raise ValueError(f"{layout}: expected a weight [N, K] with N, K >= 1, got shape {tuple(dense.shape)}")
    if dense.dtype not in dtypes:
        wanted = ", ".join(str(dtype) for dtype in dtypes)
        raise ValueError(f"{layout}: expected dtype {wanted}, got {dense.dtype}; cast the weight first")
    if not bool(torch.isfinite(dense).all()):
        raise ValueError(f"{layout}: the weight has NaN or Inf entries; repair the checkpoint before packing")


def as_integers(dense: Tensor) -> NDArray[Any]:
    """The bit patterns of a weight [N, K] as INTEGERS of its dtype, -0.0 turned into 0.0; on the CPU."""
    return (dense.detach() + 0.0).cpu().contiguous().view(INTEGERS[dense.dtype]).numpy()
