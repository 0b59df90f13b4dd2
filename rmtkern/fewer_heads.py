"""Multi-head attention whose heads do not fill its width: what nn.MultiheadAttention becomes when it loses heads.

PyTorch's class insists on heads times head size = width; this one does the same with plain linears.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["FewerHeads"]


class FewerHeads(nn.Module):
    """Some heads of an nn.MultiheadAttention, behind its interface.

    Its parameters are `in_proj.weight` [3 H d, D], `in_proj.bias`, `out_proj.weight` [D, H d] and `out_proj.bias`.

    Args:
        source: with one in_proj_weight, without bias_k and add_zero_attn; it gives up out_proj, the rest is copied.
        heads: indices of the heads that stay, ascending, at least one; int64 [H].

    Raises:
        ValueError: another kind of nn.MultiheadAttention.
    """

    _qkv_same_embed_dim = False  # read by nn.TransformerEncoderLayer: no fast path that would bypass this module

    def __init__(self, source: nn.MultiheadAttention, heads: Tensor) -> None:
        super().__init__()
        weight, bias = source.in_proj_weight, source.in_proj_bias
        if weight is None or source.bias_k is not None or source.add_zero_attn:
            raise ValueError("expected an nn.MultiheadAttention with one in_proj_weight, no bias_k, no add_zero_attn")
        self.embed_dim, self.num_heads, self.head_dim = source.embed_dim, len(heads), source.head_dim
        self.dropout, self.batch_first = source.dropout, source.batch_first
        rows = (torch.arange(3 * source.embed_dim).reshape(3, source.num_heads, -1)[:, heads.cpu()]).flatten()
        rows = rows.to(weight.device)
        self.in_proj = nn.Linear(self.embed_dim, len(rows), bias=bias is not None, device="meta")
        self.in_proj.weight = nn.Parameter(weight.detach()[rows], weight.requires_grad)
        if bias is not None:
            self.in_proj.bias = nn.Parameter(bias.detach()[rows], bias.requires_grad)
        columns = torch.arange(source.embed_dim).reshape(source.num_heads, -1)[heads.cpu()].flatten().to(weight.device)
        out = source.out_proj
        self.out_proj = nn.Linear(len(columns), self.embed_dim, bias=out.bias is not None, device="meta")
        self.out_proj.weight = nn.Parameter(out.weight.detach()[:, columns], out.weight.requires_grad)
        if out.bias is not None:
            self.out_proj.bias = nn.Parameter(out.bias.detach().clone(), out.bias.requires_grad)
        self.train(source.training)

    @property
    def in_proj_weight(self) -> Tensor:
        """[3 H d, D]."""
        return self.in_proj.weight

    @property
    def in_proj_bias(self) -> Tensor | None:
        """[3 H d] or None."""
        return self.in_proj.bias

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
        """As nn.MultiheadAttention: the output, and the attention weights if they are wanted."""
        batched = query.ndim == 3
        if not batched:
            query, key, value = (x.unsqueeze(0 if self.batch_first else 1) for x in (query, key, value))
        same = query is key and key is value
        if not self.batch_first:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        if same:
            parts = self.in_proj(query).chunk(3, -1)
        else:
            biases = (None,) * 3 if self.in_proj.bias is None else self.in_proj.bias.chunk(3)
            weights = self.in_proj.weight.chunk(3)
            parts = tuple(F.linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases, strict=True))
        q, k, v = (part.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2) for part in parts)
        mask = self._mask(q, k, attn_mask, key_padding_mask)
        dropout, weights_out = self.dropout if self.training else 0.0, None
        if need_weights:
            scores = q @ k.transpose(-2, -1) * self.head_dim**-0.5
            attended = (scores if mask is None else scores + mask).softmax(-1)
            attended = F.dropout(attended, dropout, self.training)
            heads = attended @ v
            weights_out = attended.mean(1) if average_attn_weights else attended
            weights_out = weights_out if batched else weights_out[0]
        else:
            heads = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
        y = self.out_proj(heads.transpose(1, 2).flatten(2))
        y = y if self.batch_first else y.transpose(0, 1)
        return (y if batched else y.squeeze(0 if self.batch_first else 1)), weights_out

    def _mask(self, q: Tensor, k: Tensor, mask: Tensor | None, padding: Tensor | None) -> Tensor | None:
        """What is added to the scores [B, H, Tq, Tk]; true in PyTorch's masks means "not allowed"."""

        def added(given: Tensor) -> Tensor:
            if given.dtype != torch.bool:
                return given.to(q.dtype)
            return torch.zeros(given.shape, dtype=q.dtype, device=q.device).masked_fill(given, float("-inf"))

        found = None
        if mask is not None:
            if mask.ndim == 3:
                raise ValueError(
                    "attn_mask: expected [Tq, Tk], got one for each head; its heads are not those that are left"
                )
            found = added(mask).expand(len(q), 1, q.shape[2], k.shape[2])
        if padding is not None:
            more = added(padding if padding.ndim == 2 else padding[None])[:, None, None, :]
            found = more if found is None else found + more
        return found
