"""DenseWeight: a weight stored as it is, or reordered once: into oneDNN's blocked format, or tiles of our own kernel.

It knows how the weight is stored for each dense library, not when that is fast (rmtkern.packing measures).
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Self

import torch
from torch import Tensor

from rmtkern.layouts.base import CPU_DTYPES, PackedWeight, check_dense
from rmtkern.layouts.tiles import pack_tiles, unpack_tiles

__all__ = ["FORMS", "NO_ONEDNN", "DenseWeight"]

FORMS = ("torch", "onednn", "onednn_prepacked", "own")
_PREPACKED, _OWN = FORMS.index("onednn_prepacked"), FORMS.index("own")


def _why_no_onednn() -> str | None:
    if not torch.backends.mkldnn.is_available():
        return "this PyTorch was built without oneDNN; use form 0 (torch)"
    if not all(hasattr(torch.ops.mkldnn, name) for name in ("_linear_pointwise", "_reorder_linear_weight")):
        return "this PyTorch has no mkldnn._linear_pointwise; use form 0 (torch)"
    return None


NO_ONEDNN = _why_no_onednn()
"""Why oneDNN's linear cannot be used in this PyTorch, or None; a constant, so that torch.compile can read it."""


class DenseWeight(PackedWeight):
    """A dense weight [N, K] float32, bfloat16 or float16 (the last on a GPU only).

    `params["form"]` is the index in `FORMS` of the library call that runs it: 0 `torch` (`F.linear`), 1 `onednn`
    (oneDNN's linear, which reorders the weight at every call), 2 `onednn_prepacked` (reordered once; the opaque tensor
    replaces the plain one, so it costs no memory), 3 `own` (our kernel, from the tiles of tiles.py, which replace the
    plain tensor likewise). `params["tokens"]` (default 1) is the row count that form 2 is reordered for; other counts
    stay correct. state_dict holds the plain weight under `dense` in every form.
    """

    layout = "dense"
    parts = ("dense",)
    gpu_stored = parts
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    dense: Tensor | None
    reordered: Tensor | None

    def __init__(self, shape: tuple[int, int], params: Mapping[str, int], parts: tuple[Tensor, ...]) -> None:
        super().__init__(shape, params, parts)
        self.reordered = None
        self._reorder()

    @classmethod
    def reason_against(cls, dense: Tensor, **params: int) -> str | None:
        """Why this form cannot run here: oneDNN is missing, or the form is unknown."""
        form = params.get("form", 0)
        if form not in range(len(FORMS)):
            return f"dense: form {form} is unknown; expected 0 to {len(FORMS) - 1}: {', '.join(FORMS)}"
        return NO_ONEDNN if FORMS[form].startswith("onednn") else None

    @classmethod
    def variants(cls, dense: Tensor) -> Iterator[dict[str, int]]:
        """Every form that this PyTorch has."""
        return ({"form": form} for form in range(len(FORMS)) if cls.reason_against(dense, form=form) is None)

    @classmethod
    def pack(cls, dense: Tensor, **params: int) -> Self:
        """Store a dense weight [N, K]; `form` and `tokens` as in the class."""
        check_dense(dense, cls.dtypes, cls.layout)
        if unknown := set(params) - {"form", "tokens"}:
            raise ValueError(f"dense: unknown parameter {', '.join(sorted(unknown))}; expected form, tokens")
        reason = cls.reason_against(dense, **params)
        if reason is not None:
            raise ValueError(reason)
        plain = dense.detach().contiguous() + 0.0  # -0.0 + 0.0 is 0.0
        return cls((dense.shape[0], dense.shape[1]), {"form": 0, "tokens": 1, **params}, (plain,))

    def unpack(self) -> Tensor:
        """The dense weight [N, K]."""
        return self.tensors()[0].clone()

    def tensors(self) -> tuple[Tensor, ...]:
        """The plain weight; converted back on each call in the reordered forms."""
        if self.reordered is None:
            return (self.stored,)
        own = self.params["form"] == _OWN
        return (unpack_tiles(self.reordered, self.shape) if own else self.reordered.to_dense(),)

    @property
    def stored(self) -> Tensor:
        """As it lies in memory: plain [N, K], oneDNN's opaque tensor in the prepacked form, tiles in our own."""
        return self.dense if self.reordered is None else self.reordered  # type: ignore[return-value]

    def cpu_tensors(self) -> tuple[Tensor, ...] | None:
        """The tiles of our own form; None in the libraries' forms."""
        return (self.stored,) if self.params["form"] == _OWN else None

    def _values(self) -> Tensor:
        return self.stored

    @property
    def label(self) -> str:
        """Such as "dense/onednn"."""
        return f"dense/{FORMS[self.params['form']]}"

    @property
    def nbytes(self) -> int:
        """Bytes of the weight, the same in every form (tiles fill up the last 32 outputs besides)."""
        return self.shape[0] * self.shape[1] * self.stored.element_size()

    # oneDNN's blocked tensor is opaque: it can be neither cast, copied nor saved, so all of these go through the
    # plain one.

    def _plain(self) -> None:
        if self.reordered is not None:
            (self.dense,) = self.tensors()
            self.reordered = None

    def _reorder(self) -> None:
        plain = self.stored
        if plain.device.type != "cpu" or plain.dtype not in CPU_DTYPES:
            return
        if self.params["form"] == _PREPACKED and NO_ONEDNN is None:
            self.reordered = torch.ops.mkldnn._reorder_linear_weight(plain, self.params["tokens"])
            self.dense = None
        elif self.params["form"] == _OWN:
            self.reordered = pack_tiles(plain)
            self.dense = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self._plain()
        super()._apply(fn, recurse)
        self._reorder()
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}dense"] = self.tensors()[0]

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._plain()
        super()._load_from_state_dict(*args, **kwargs)
        self._reorder()

    def __getstate__(self) -> dict[str, Any]:
        buffers = {**self._buffers, "dense": self.tensors()[0]}
        return {**self.__dict__, "_buffers": buffers, "reordered": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._reorder()
