"""merge_tokens_ and unmerge_tokens_: every block of a Vision Transformer merges its most similar tokens before its MLP.

Blocks get a subclass of their class, as parametrizations do, so that parameters, names and modules stay what they are.
What a block computes is understood by trying a copy with random numbers. It knows no weights and no kernels.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rmtkern.errors import PackedModelError
from rmtkern.models import HEAD_COUNTS, prunable_weights
from rmtkern.testing import random_copy

__all__ = ["TokenMerging", "bipartite_merge", "merge_tokens_", "merging_of", "unmerge_tokens_"]


class _Names(NamedTuple):
    """Names of a block's children; those in tuples may be missing."""

    norm1: str
    attention: str
    after_attention: tuple[str, ...]
    norm2: str
    mlp: str
    after_mlp: tuple[str, ...]


_TIMM = _Names("norm1", "attn", ("ls1", "drop_path1"), "norm2", "mlp", ("ls2", "drop_path2"))
_TRANSFORMERS = _Names("layernorm_before", "attention", ("dropout",), "layernorm_after", "mlp", ("dropout",))
_CARRIED = "_rmtkern_merged"
"""Attribute under which a block's output carries what was merged to the next block."""


@dataclass(frozen=True, slots=True)
class TokenMerging:
    """How a model merges tokens.

    Args:
        r: tokens that each block merges away, >= 0; at most half of those that are not protected.
        protected: tokens at the front that are never merged (class and register tokens), >= 0.
        restore: whether the last block puts each token's value back in all the places that were merged into it.
        blocks: names of the blocks, in order.
    """

    r: int
    protected: int
    restore: bool
    blocks: tuple[str, ...]

    def __str__(self) -> str:
        end = ", then back in every place" if self.restore else ""
        return f"{len(self.blocks)} blocks merge {self.r} tokens each, not the first {self.protected}{end}"


@dataclass(frozen=True, slots=True)
class _Rule:
    """What one block does."""

    names: _Names
    r: int
    protected: int
    restore: bool
    first: bool
    last: bool


class _Merged(NamedTuple):
    """What became of the tokens so far."""

    size: Tensor  # [B, T], of how many tokens each consists
    place: Tensor  # [B, T0] int64, where each token of the first block is now


def bipartite_merge(
    x: Tensor, size: Tensor | None, keys: Tensor, r: int, protected: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Merge the r tokens of even index that are most similar to one of odd index into it.

    Similar is the cosine of the keys. The result holds the protected tokens, then what is left of the even ones, then
    the odd ones, each in their order. Gradients flow through the values, not through the choice.

    Args:
        x: [B, T, D].
        size: [B, T], of how many tokens each consists already; None: one each.
        keys: [B, T, d], one for each token.
        r: how many go, 1 <= r <= (T - protected) / 2.
        protected: tokens at the front that are not merged, >= 0.

    Returns:
        [B, T - r, D] in the dtype of `x`, means weighted by size (summed in float32 at least); [B, T - r] the sizes,
        whose sum is that of `size`; [B, T] int64, where each token went.

    Source: Bolya et al. 2023 (ToMe), section 3; docs/math.md (27).
    """
    batch, tokens, width = x.shape
    dtype = torch.promote_types(x.dtype, torch.float32)
    with torch.no_grad():
        place = _places(F.normalize(keys.detach().to(dtype), dim=-1), r, protected)
        left = tokens - r
        flat = (place + left * torch.arange(batch, device=x.device)[:, None]).flatten()
        before = torch.ones(batch, tokens, dtype=dtype, device=x.device) if size is None else size
        after = before.new_zeros(batch, left).scatter_add(1, place, before)
    weighted = (x.to(dtype) * before[..., None]).reshape(batch * tokens, width)
    total = weighted.new_zeros(batch * left, width).index_add(0, flat, weighted).reshape(batch, left, width)
    return (total / after[..., None]).to(x.dtype), after, place


def _places(metric: Tensor, r: int, protected: int) -> Tensor:
    """Where each token goes, [B, T] int64, for unit vectors [B, T, d]."""
    batch, tokens, _ = metric.shape
    even, odd = (tokens + 1) // 2, tokens // 2
    even_protected, odd_protected = (protected + 1) // 2, protected // 2
    scores = metric[:, ::2] @ metric[:, 1::2].transpose(1, 2)
    scores[:, :even_protected] = -torch.inf
    scores[:, :, :odd_protected] = -torch.inf
    best, match = scores.max(-1)
    order = torch.sort(best, dim=-1, descending=True, stable=True).indices
    gone, kept = order[:, :r], order[:, r:].sort(-1).values
    # the order of the result: protected tokens as they were, the other even ones, the odd ones
    front = [index // 2 if index % 2 == 0 else even - r + index // 2 for index in range(protected)]
    rest = [*range(even_protected, even - r), *range(even - r + odd_protected, even - r + odd)]
    where = {token: place for place, token in enumerate((*front, *rest))}
    index = torch.tensor([where[token] for token in range(tokens - r)], device=metric.device)
    odd_place = index[even - r :].expand(batch, -1)
    even_place = torch.empty_like(match)
    even_place = even_place.scatter(1, kept, index[: even - r].expand(batch, -1))
    even_place = even_place.scatter(1, gone, odd_place.gather(1, match.gather(1, gone)))
    place = torch.empty(batch, tokens, dtype=torch.int64, device=metric.device)
    place[:, ::2], place[:, 1::2] = even_place, odd_place
    return place


def _through(module: nn.Module, names: tuple[str, ...], x: Tensor) -> Tensor:
    """`x` through those of the children that there are."""
    for name in names:
        part = getattr(module, name, None)
        x = x if part is None else part(x)
    return x


class _Merging(nn.Module):
    """What the subclasses have in common; `base` is the class before."""

    base: ClassVar[type[nn.Module]]

    def __reduce_ex__(self, protocol: Any) -> Any:
        """The subclass is made anew, so that copying and pickling need no name of it."""
        kind = next(kind for kind in (_MergingAttention, _MergingBlock) if isinstance(self, kind))
        return (_empty, (kind, self.base), *super().__reduce_ex__(protocol)[2:])


class _MergingAttention(_Merging):
    def forward(self, x: Tensor, *args: Any, size: Tensor | None = None, merging: bool = False, **kwargs: Any) -> Any:
        """As before; with `merging` and log(size) added: the result, None, and the mean of the keys over heads."""
        if not merging:
            return super().forward(x, *args, **kwargs)
        batch, tokens, _ = x.shape
        heads = _heads(self)
        if hasattr(self, "qkv"):
            q, k, v = self.qkv(x).reshape(batch, tokens, 3, heads, -1).permute(2, 0, 3, 1, 4).unbind(0)  # type: ignore[operator]
        else:
            parts = (_through(self, (name,), x) for name in ("q_proj", "k_proj", "v_proj"))
            q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in parts)
        q, k = _through(self, ("q_norm",), q), _through(self, ("k_norm",), k)
        drop = getattr(self, "attn_drop", None)
        rate = drop.p if isinstance(drop, nn.Dropout) else getattr(self, "attention_dropout", 0.0)
        rate = rate if self.training else 0.0
        mask = None if size is None else size.log().to(q.dtype)[:, None, None, :]
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=rate)
        y = _through(self, ("norm",), y.transpose(1, 2).reshape(batch, tokens, -1))
        gate = getattr(self, "gate", None)
        if gate is not None:
            y = y * gate(x).sigmoid()
        return _through(self, ("proj", "o_proj", "proj_drop"), y), None, k.mean(1)


def _heads(attention: nn.Module) -> int | None:
    """The number of heads, or None if the module does not say it."""
    found = (getattr(attention, name, None) for name in HEAD_COUNTS)
    return next((count for count in found if isinstance(count, int)), None)


class _MergingBlock(_Merging):
    rule: _Rule

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Attention, merging, MLP.

        Raises:
            ValueError: a mask or another tensor besides `x`, or an input that is not the block's before.
        """
        rule, names = self.rule, self.rule.names
        if kwargs.get("is_causal") or any(isinstance(value, Tensor) for value in (*args, *kwargs.values())):
            raise ValueError("a block that merges tokens takes no mask; call rmtkern.unmerge_tokens_(model) first")
        if not rule.first and not hasattr(x, _CARRIED):
            raise ValueError(
                "a block that merges tokens got an input that is not the output of the block before it, so the sizes "
                "of its tokens are unknown; call rmtkern.unmerge_tokens_(model) first"
            )
        merged: _Merged | None = None if rule.first else getattr(x, _CARRIED)
        size = None if merged is None else merged.size
        y, _, keys = getattr(self, names.attention)(getattr(self, names.norm1)(x), size=size, merging=True)
        x = x + _through(self, names.after_attention, y)
        r = min(rule.r, (x.shape[1] - rule.protected) // 2)
        if r > 0:
            x, size, place = bipartite_merge(x, size, keys, r, rule.protected)
            merged = _Merged(size, place if merged is None else place.gather(1, merged.place))
        x = x + _through(self, (names.norm2, names.mlp, *names.after_mlp), x)
        if not rule.last:
            setattr(x, _CARRIED, merged)
        elif rule.restore and merged is not None:
            x = x.gather(1, merged.place[..., None].expand(-1, -1, x.shape[-1]))
        return x


_SUBCLASSES: dict[tuple[type, type], type] = {}


def _subclass(kind: type[_Merging], base: type[nn.Module]) -> type:
    """A class that merges, for one that does not; always the same one."""
    if (kind, base) not in _SUBCLASSES:
        name = f"Merging{base.__name__}"
        _SUBCLASSES[kind, base] = type(name, (kind, base), {"base": base, "__module__": base.__module__})
    return _SUBCLASSES[kind, base]


def _empty(kind: type[_Merging], base: type[nn.Module]) -> nn.Module:
    module: nn.Module = object.__new__(_subclass(kind, base))
    return module


def merging_of(model: nn.Module) -> TokenMerging | None:
    """How a model merges tokens, or None if it does not."""
    blocks = {name: module for name, module in model.named_modules() if isinstance(module, _MergingBlock)}
    if not blocks:
        return None
    rules = [block.rule for block in blocks.values()]
    return TokenMerging(rules[0].r, rules[0].protected, rules[0].restore, tuple(blocks))


def merge_tokens_(
    model: nn.Module, r: int, *, protected: int | None = None, restore: bool | None = None
) -> TokenMerging:
    """Let every block merge its r most similar tokens between attention and MLP; in place, without any training.

    In each block the tokens of even and odd index form two sets; the r of the first that are most similar to one of the
    second (cosine of the keys, mean over heads) become part of it, as a mean weighted by size. Later attentions add
    log(size) to their logits, so that a token counts as what it consists of. The model stays trainable and keeps its
    parameters under their names. `prune_`, `finetune_` and `shrink_(mlp=)` may come before or after; `shrink_(heads=)`
    before, for the keys of all heads choose; and `pack_` after, for it measures the token counts that are left. A file
    of `save` says how the model merges and `load` sets that up; a state dict does not.

    Args:
        model: with blocks as in timm's VisionTransformer or transformers' ViT, one after the other.
        r: tokens that go in each block, >= 0, capped at half of those that are not protected. With 0 the model computes
            what it did.
        protected: tokens at the front that stay by themselves, >= 0. None: as the model says (`num_prefix_tokens`).
        restore: whether the last block gives each place of the input its token's value again, as whatever reads more
            than the class token needs: a mean over tokens is then weighted by size. None: not in a model that says that
            it reads the class token only (`global_pool` is "token").

    Returns:
        What was set up.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: r or protected is negative, the model merges tokens already, or has no blocks that it can; the
            message says why.
        PackedModelError: the model is packed.

    Source: Bolya et al. 2023 (ToMe); docs/math.md (27), (28).
    """
    for name, value, needed in (("r", r, True), ("protected", protected, False)):
        if value is None and not needed:
            continue
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name}: expected an integer, got {type(value).__name__}")
        if value < 0:
            raise ValueError(f"{name}: expected at least 0, got {value}")
    _refuse_packed(model)
    if merging_of(model) is not None:
        raise ValueError("the model merges tokens already; call rmtkern.unmerge_tokens_(model) first")
    blocks = _find(model)
    owner = model.get_submodule(next(iter(blocks)).rpartition(".")[0].rpartition(".")[0])
    protected = getattr(owner, "num_prefix_tokens", None) if protected is None else protected
    if protected is None:
        raise ValueError(
            "protected: the model does not say (num_prefix_tokens) how many of its tokens are no patches; pass "
            "protected=1 for a class token at the front, protected=0 for none"
        )
    restore = getattr(owner, "global_pool", None) != "token" if restore is None else restore
    names = tuple(blocks)
    for name, block in blocks.items():
        _turn(block, _Rule(_names(block) or _TIMM, r, protected, restore, name == names[0], name == names[-1]))
    return TokenMerging(r, protected, restore, names)


def unmerge_tokens_(model: nn.Module) -> int:
    """Take `merge_tokens_` back: the blocks compute what they did, with the parameters that they have now.

    Args:
        model: what `merge_tokens_` changed, or a copy of it; changed in place.

    Returns:
        How many blocks merged tokens; 0 if none did.

    Raises:
        TypeError: `model` is not a module.
        PackedModelError: the model is packed.
    """
    _refuse_packed(model)
    found = [module for module in model.modules() if isinstance(module, _Merging)]
    count = sum(isinstance(module, _MergingBlock) for module in found)
    for module in found:
        module.__class__ = module.base  # type: ignore[assignment]
        vars(module).pop("rule", None)
    return count


def _refuse_packed(model: nn.Module) -> None:
    try:
        prunable_weights(model, "all")
    except PackedModelError as error:
        raise PackedModelError(
            "the model is packed for the tokens that it has now; call rmtkern.unpack_(model) first, then merge tokens "
            "(or stop merging), then rmtkern.pack_ again"
        ) from error


def _names(block: nn.Module) -> _Names | None:
    """How the children of a block are called, or None if it is none."""
    children = dict(block.named_children())
    return next(
        (names for names in (_TIMM, _TRANSFORMERS)
         if {names.norm1, names.attention, names.norm2, names.mlp} <= children.keys()), None
    )  # fmt: skip


def _turn(block: nn.Module, rule: _Rule) -> None:
    attention = block.get_submodule(rule.names.attention)
    attention.__class__ = _subclass(_MergingAttention, type(attention))
    block.__class__ = _subclass(_MergingBlock, type(block))
    vars(block)["rule"] = rule


def _find(model: nn.Module) -> Mapping[str, nn.Module]:
    """The blocks, in order, each tried or like one that was."""
    found = {name: (module, _names(module)) for name, module in model.named_modules() if name}
    named = {name: (module, names) for name, (module, names) in found.items() if names is not None}
    if not named:
        raise ValueError(
            f"model: {type(model).__name__} has no blocks of norm1, attn, norm2 and mlp, as timm's VisionTransformer "
            "has them, or of layernorm_before, attention, layernorm_after and mlp, as transformers' ViT has them, so "
            "its tokens cannot be merged"
        )
    blocks = {name: module for name, (module, _) in named.items()}
    tried: dict[tuple[Any, ...], str | None] = {}
    for name, (block, names) in named.items():
        attention = block.get_submodule(names.attention)
        numbers = sorted(item for item in vars(attention).items() if isinstance(item[1], bool | int | float))
        kind = (type(block), type(attention), repr(block), *numbers)
        if kind not in tried:
            tried[kind] = _reason(block, names)
        reason = tried[kind]
        if reason is not None:
            raise ValueError(f"{name} ({type(block).__name__}) cannot merge tokens: {reason}")
    first = next(iter(blocks))
    path = first.rpartition(".")[0]
    if [module for module in model.get_submodule(path).children()] != list(blocks.values()):
        raise ValueError(
            f"the blocks of {type(model).__name__} do not follow each other in one list, so the sizes of tokens cannot "
            "be passed on"
        )
    return blocks


def _reason(block: nn.Module, names: _Names) -> str | None:
    """Why a block does not compute what merging takes it to compute, or None: tried without merging."""
    if any("forward" in vars(module) for module in block.modules()):
        return "a module in it has a replaced forward"
    attention = block.get_submodule(names.attention)
    first = getattr(attention, "qkv", None) or getattr(attention, "q_proj", None)
    if not isinstance(first, nn.Linear) or _heads(attention) is None:
        return "its attention has no linear qkv, or q_proj, and number of heads"
    generator = torch.Generator().manual_seed(0)
    try:
        trial = random_copy(block, generator).eval()
        x = torch.randn(2, 5, first.in_features, dtype=torch.float64, generator=generator)
        with torch.no_grad():
            before = trial(x)
            _turn(trial, _Rule(names, 0, 0, False, True, True))
            after = trial(x)
    except Exception as error:  # it wants another input, or computes something else
        return f"trying a copy failed ({type(error).__name__}: {' '.join(str(error).split())[:80]})"
    same = isinstance(before, Tensor) and before.shape == after.shape and torch.allclose(before, after, rtol=1e-9)
    return None if same else "it computes something else than x + attn(norm1(x)), then x + mlp(norm2(x))"
