"""The attention level: our fused kernel against the strongest of PyTorch's scaled_dot_product_attention on the CPU.

It measures one case of cases.py and returns its rows; run.py writes them.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.cases import AttentionCase
from benchmarks.contenders import Unavailable
from benchmarks.fused import Call, Contest
from rmtkern.attention import attention, reason_against

__all__ = ["KEYS", "SHOWN", "measure"]

KEYS = ("heads", "head_dim", "batch", "T", "dtype", "form", "threads", "isa")
"""Columns that identify a row."""
SHOWN = ("form", "p50_ms", "torch_ms", "vs_torch", "torch_by", "gflops", "max_rel_err")
"""Columns that run.py prints."""


def _backends(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> dict[str, Call]:
    """What PyTorch has for a call: its own choice, and each of its two backends on the CPU by itself.

    These are called as operators, since the context manager that chooses among them would be timed too.
    """
    aten = torch.ops.aten
    flash, math = aten._scaled_dot_product_flash_attention_for_cpu, aten._scaled_dot_product_attention_math
    return {
        "torch": lambda: _merged(F.scaled_dot_product_attention(q, k, v, attn_mask=mask)),
        "torch flash": lambda: _merged(flash(q, k, v, attn_mask=mask)[0]),
        "torch math": lambda: _merged(math(q, k, v, attn_mask=mask)[0]),
    }


def _merged(y: Tensor) -> Tensor:
    """[B, H, T, d] as the projection after it takes it, [B, T, H d]; a view or a copy, as y lies."""
    return y.transpose(1, 2).flatten(2)


class _Attention(Contest):
    """The kernel without a mask, and with an additive bias for each head, against PyTorch's backends on the same.

    q, k and v are views of one fused projection [B, T, 3, H, d], as the attention of timm makes them.
    """

    def __init__(self, case: AttentionCase, say: Callable[[str], None]) -> None:
        tokens, flops = case.tokens, 4.0 * case.batch * case.heads * case.tokens**2 * case.head_dim
        head = {"heads": case.heads, "head_dim": case.head_dim, "batch": case.batch, "T": tokens, "dtype": case.dtype}
        super().__init__(case, flops, head, say)
        qkv = self.random(case.batch, tokens, 3, case.heads, case.head_dim)
        self.qkv = qkv.permute(2, 0, 3, 1, 4).unbind()
        self.masks = {"no mask": None, "bias": self.random(1, case.heads, tokens, tokens)}
        self.contend(self._contend)

    def _contend(self, name: str) -> None:
        (q, k, v), mask = self.qkv, self.masks[name]
        if reason := reason_against(q, k, v, mask):
            raise Unavailable(f"attention, {name}: {reason}")

        def one() -> Tensor:
            return _merged(attention(q, k, v, mask=mask))

        some = [None if t is None else t[:, :, self.sample] for t in (q, mask)]
        wide = [None if t is None else t.double() for t in (some[0], k, v, some[1])]
        exact = _merged(F.scaled_dot_product_attention(*wide))  # type: ignore[arg-type]
        rivals = _backends(q, k, v, mask)
        self.add(name, one, one()[:, self.sample], rivals["torch"]()[:, self.sample], exact)
        self.against("torch", name, {f"{rival}, {name}": call for rival, call in rivals.items()})


def measure(case: AttentionCase, rounds: int, say: Callable[[str], None] = print) -> list[dict[str, Any]]:
    """Check, time and describe one case: a row for each kind of mask; empty if there is no kernel."""
    contest = _Attention(case, say)
    return [{**row, "gflops": contest.flops / row["p50_ms"] / 1e6} for row in contest.rows(rounds)]
