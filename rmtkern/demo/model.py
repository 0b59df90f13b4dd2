"""The small Vision Transformer of the demo: a plain pre-norm ViT for 28x28 grey images, written with timm's names.

It exists so that the demo needs no model hub and no extra package; nothing else in rmtkern knows it.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["DemoViT"]


class Attention(nn.Module):
    """Multi-head self-attention with one fused qkv projection."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Attend over tokens; x and result are [B, T, dim]."""
        batch, tokens, dim = x.shape
        q, k, v = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        x = F.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).reshape(batch, tokens, dim))


class Mlp(nn.Module):
    """Linear, GELU, linear."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the two layers; x and result are [B, T, dim]."""
        return self.fc2(self.act(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, mlp_ratio * dim)

    def forward(self, x: Tensor) -> Tensor:
        """Residual attention, then residual MLP; x and result are [B, T, dim]."""
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class DemoViT(nn.Module):
    """ViT for [B, 1, 28, 28] float32 images in [0, 1]: 49 overlapping 8x8 patches, mean pooling, 10 classes."""

    pretrained_cfg: ClassVar[dict[str, Any]] = {
        "input_size": (1, 28, 28),
        "mean": (0.0,),
        "std": (1.0,),
        "crop_pct": 1.0,
        "license": "MIT",
    }

    def __init__(self, dim: int = 256, depth: int = 3, num_heads: int = 4, mlp_ratio: int = 4) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(1, dim, kernel_size=8, stride=4, padding=2)
        self.pos_embed = nn.Parameter(torch.zeros(1, 49, dim))
        self.blocks = nn.Sequential(*(Block(dim, num_heads, mlp_ratio) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, 10)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)

    def embed(self, images: Tensor) -> Tensor:
        """Patch tokens with positions [B, 49, dim] of images [B, 1, 28, 28]."""
        return self.patch_embed((images - 0.286) / 0.353).flatten(2).transpose(1, 2) + self.pos_embed

    def classify(self, tokens: Tensor) -> Tensor:
        """Logits [B, 10] of any number of tokens [B, T, dim]."""
        return self.head(self.norm(self.blocks(tokens)).mean(1))

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, 10] of images [B, 1, 28, 28]."""
        return self.classify(self.embed(images))
