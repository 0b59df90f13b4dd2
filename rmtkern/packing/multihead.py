"""Takes nn.MultiheadAttention apart into two linears, which can be packed, and puts it together again.

It says which modules allow that and computes their calls; pack.py decides which of the linears are packed.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from rmtkern.nn import PackedLinear, check_inference, refuse_gradient
from rmtkern.packing.lent import LendingLinear, LentWeight
from rmtkern.packing.watch import is_altered

__all__ = [
    "PackedMultihead",
    "Split",
    "find_multiheads",
    "in_projection",
    "linears_of",
    "reason_to_keep",
    "watch_calls",
]

_SEPARATE = ("q_proj_weight", "k_proj_weight", "v_proj_weight")


def _sharing(kind: type[nn.Linear], weight: nn.Parameter, bias: nn.Parameter | None, training: bool) -> nn.Linear:
    """A linear that holds these very parameters."""
    linear = kind(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = weight
    if bias is not None:
        linear.bias = bias
    return linear.train(training)


def _plain(linear: nn.Linear | PackedLinear) -> nn.Linear:
    return linear.unpack() if isinstance(linear, PackedLinear) else linear


def in_projection(whole: nn.MultiheadAttention) -> nn.Linear:
    """The linear [3 E, E] that computes q, k and v; its parameters are the module's own.

    Args:
        whole: with one weight for the three.
    """
    return _sharing(nn.Linear, whole.in_proj_weight, whole.in_proj_bias, whole.training)


def reason_to_keep(module: nn.Module) -> str | None:
    """Why a module cannot be taken apart, or None; how it is called is not looked at.

    Args:
        module: any.
    """
    if not isinstance(module, nn.MultiheadAttention):
        return f"it is a {type(module).__name__}, not an nn.MultiheadAttention"
    if type(module) is not nn.MultiheadAttention:
        return f"it is a {type(module).__name__}, whose forward may differ from nn.MultiheadAttention's"
    if module.in_proj_weight is None or module.bias_k is not None or module.add_zero_attn:
        return "nn.MultiheadAttention has separate projections, bias_k or add_zero_attn"
    known = {"in_proj_weight", "in_proj_bias", *_SEPARATE} >= set(module._parameters)
    if not known or module._buffers or set(module._modules) != {"out_proj"}:
        return "nn.MultiheadAttention has parameters, buffers or children of its own"
    if type(module.out_proj) is not NonDynamicallyQuantizableLinear:
        return f"out_proj is a {type(module.out_proj).__name__}, whose forward may differ from nn.Linear's"
    if is_altered(module) or is_altered(module.out_proj):
        return "nn.MultiheadAttention has hooks or a replaced forward, which a swap would lose"
    return None


def _mask_fits(mask: Tensor | None, *shapes: tuple[int, ...]) -> bool:
    return mask is None or (mask.shape in shapes and (mask.dtype == torch.bool or mask.is_floating_point()))


def _reason_against(
    heads: int,
    batch_first: bool,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> str | None:
    """Why a call, as PyTorch's signature has it, is not computed by the two linears, or None.

    `heads` and `batch_first` are the module's.
    """
    if query is not key or key is not value:
        return "nn.MultiheadAttention gets q, k and v that are not one tensor"
    if query.is_nested or query.ndim != 3:
        return "nn.MultiheadAttention gets an input that is not a batch of sequences"
    batch, tokens = query.shape[:2] if batch_first else query.shape[1::-1]
    square = (tokens, tokens)
    if not _mask_fits(attn_mask, square, (batch * heads, *square)) or not _mask_fits(key_padding_mask, (batch, tokens)):
        return f"nn.MultiheadAttention gets a mask that is not {list(square)} for it, or [{batch}, {tokens}] for keys"
    if is_causal and attn_mask is None:
        return "nn.MultiheadAttention is told that a mask is causal, and gets none"
    return None


def _added(attn_mask: Tensor | None, key_padding_mask: Tensor | None, batch: int, dtype: torch.dtype) -> Tensor | None:
    """What PyTorch's two masks add to the scores [B, H, T, T], in a shape that broadcasts to them; None for nothing."""
    added = None
    for mask, keys in ((attn_mask, False), (key_padding_mask, True)):
        if mask is None:
            continue
        if mask.dtype == torch.bool:  # True: takes no part
            mask = torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, float("-inf"))
        mask = mask.to(dtype)
        mask = mask[:, None, None] if keys else mask if mask.ndim == 2 else mask.unflatten(0, (batch, -1))
        added = mask if added is None else added + mask
    return added


class PackedMultihead(nn.Module):
    """nn.MultiheadAttention with its projections as two linears, of which one at least is packed, for inference.

    It has the module's signature, public attributes and results. Self-attention, masked or not, runs the linears as
    they are; any other call unpacks them and lets PyTorch compute it, which is right and slow.

    state_dict keys: those of the linears `in_proj` [3 E, E] and `out_proj` [E, E].

    Args:
        whole: a module that `reason_to_keep` allows; its parameters are shared.
    """

    in_proj: nn.Linear | PackedLinear
    out_proj: nn.Linear | PackedLinear
    embed_dim: int
    num_heads: int
    head_dim: int
    dropout: float
    batch_first: bool
    merge_masks = nn.MultiheadAttention.merge_masks  # nn.TransformerEncoderLayer calls it

    def __init__(self, whole: nn.MultiheadAttention) -> None:
        super().__init__()
        own = {key: value for key, value in vars(whole).items() if key not in vars(self)}
        vars(self).update(own)
        self._own = tuple(own)
        self.in_proj = in_projection(whole)
        self.out_proj = _sharing(nn.Linear, whole.out_proj.weight, whole.out_proj.bias, whole.training)  # type: ignore[arg-type]
        self.training = whole.training

    @property
    def in_proj_weight(self) -> Tensor | LentWeight:
        """[3 E, E]: what stands for it, if `pack_` saw that other code reads it, else unpacked."""
        return self.in_proj.weight if isinstance(self.in_proj, LendingLinear) else _plain(self.in_proj).weight

    @property
    def in_proj_bias(self) -> Tensor | None:
        """[3 E] or None."""
        return self.in_proj.bias

    def whole(self) -> nn.MultiheadAttention:
        """The nn.MultiheadAttention; weights as `PackedLinear.unpack` gives them, those of plain linears shared."""
        # not as attributes: while pack_ watches who reads them, those are no parameters
        inner, outer = _plain(self.in_proj)._parameters, _plain(self.out_proj)._parameters
        whole = nn.MultiheadAttention(self.embed_dim, self.num_heads, bias=inner["bias"] is not None, device="meta")
        vars(whole).update({key: vars(self)[key] for key in self._own})
        whole.in_proj_weight, whole.in_proj_bias = inner["weight"], inner["bias"]  # type: ignore[assignment]
        whole.out_proj = _sharing(NonDynamicallyQuantizableLinear, outer["weight"], outer["bias"], self.training)  # type: ignore[assignment,arg-type]
        return whole.train(self.training)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As nn.MultiheadAttention's.

        Raises:
            PackedModelError: the module is in train mode; a backward through the result raises it as well.
        """
        check_inference(self)
        options = (key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal)
        if _reason_against(self.num_heads, self.batch_first, query, key, value, *options) is not None:
            return self._unpacked(query, key, value, *options)
        batch, tokens = (0, 1) if self.batch_first else (1, 0)
        qkv = self.in_proj(query).unflatten(-1, (3, self.num_heads, self.head_dim))
        q, k, v = qkv.permute(2, batch, 3, tokens, 4)  # [B, H, T, d]
        mask = _added(attn_mask, key_padding_mask, q.shape[0], q.dtype)
        weights = None
        if need_weights:
            scores = (q * self.head_dim**-0.5) @ k.transpose(-2, -1)
            weights = torch.softmax(scores if mask is None else scores + mask, -1)
            y = weights @ v
            weights = weights.mean(1) if average_attn_weights else weights
        else:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        y = y.permute(0, 2, 1, 3) if self.batch_first else y.permute(2, 0, 1, 3)
        return self.out_proj(y.flatten(2)), weights

    def _unpacked(
        self, query: Tensor, key: Tensor, value: Tensor, *options: Tensor | bool | None
    ) -> tuple[Tensor, Tensor | None]:
        whole = self.whole()
        with torch.no_grad():
            y, weights = whole(query, key, value, *options)
        if torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value, *whole.parameters())):
            y, weights = refuse_gradient(y), None if weights is None else refuse_gradient(weights)
        return y, weights


@dataclass
class Split:
    """The nn.MultiheadAttention modules of a model, by name.

    Args:
        whole: those that may be taken apart, as they came.
        apart: the same, taken apart.
        left: why each of the others stays whole.
    """

    whole: dict[str, nn.MultiheadAttention] = field(default_factory=dict)
    apart: dict[str, PackedMultihead] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)

    def leave(self, name: str, reason: str) -> dict[str, nn.Module]:
        """Keep one whole after all; what belongs in its place."""
        del self.apart[name]
        self.left[name] = reason
        return {name: self.whole.pop(name)}

    def stands_apart(self, name: str, slots: Mapping[str, nn.Module]) -> bool:
        """Whether one of its two linears is another module than the plain one."""
        return any(type(slots[child]) is not nn.Linear for child in linears_of(name))

    def arranged(self, slots: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
        """What stands where, if these linears do: a module whose both linears are plain stands there whole."""
        apart = {name for name in self.apart if self.stands_apart(name, slots)}
        hidden = {child for name in self.apart if name not in apart for child in linears_of(name)}
        placed = {name: self.apart[name] if name in apart else self.whole[name] for name in self.apart}
        return {**placed, **{name: module for name, module in slots.items() if name not in hidden}}


def linears_of(name: str) -> tuple[str, str]:
    """Names in the model of a module's two linears."""
    return f"{name}.in_proj", f"{name}.out_proj"


def find_multiheads(model: nn.Module) -> Split:
    """The nn.MultiheadAttention modules of a model; nothing is changed.

    Args:
        model: in eval mode.
    """
    split = Split()
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, nn.MultiheadAttention):
            names.setdefault(module, []).append(name)
    for module, found in names.items():
        reason = reason_to_keep(module)
        if found == [""]:
            reason = "a lone nn.MultiheadAttention cannot be swapped in place; wrap it in nn.Sequential"
        elif len(found) > 1:
            reason = f"the module is shared under the names {', '.join(found)}"
        if reason is not None:
            split.left |= dict.fromkeys(found, reason)
        elif isinstance(module, nn.MultiheadAttention):
            split.whole[found[0]] = module
            split.apart[found[0]] = PackedMultihead(module)
    return split


@contextmanager
def watch_calls(apart: Mapping[str, PackedMultihead]) -> Iterator[dict[str, str]]:
    """Which of these get calls, inside the block, that their linears do not compute, and why.

    Args:
        apart: name -> module; while it lasts, each has a subclass of its class.
    """
    reasons: dict[str, str] = {}

    def watched(base: type, name: str) -> type:
        def forward(self: nn.Module, *args: Tensor, **kwargs: Tensor) -> tuple[Tensor, Tensor | None]:
            reason = _reason_against(self.num_heads, self.batch_first, *args, **kwargs)  # type: ignore[arg-type]
            if reason is not None:
                reasons[name] = reason
            return base.forward(self, *args, **kwargs)  # type: ignore[attr-defined]

        return type(base.__name__, (base,), {"forward": forward})

    try:
        for name, module in apart.items():
            module.__class__ = watched(PackedMultihead, name)
        yield reasons
    finally:
        for module in apart.values():
            module.__class__ = PackedMultihead
