"""A small real Vision Transformer on real images, shipped with the package: from analysis to a faster model."""

import gzip
from importlib.resources import files
from typing import cast

import numpy as np
import torch
from safetensors.torch import load
from torch import Tensor

from rmtkern.demo.model import DemoViT

__all__ = ["DemoViT", "load_demo_model", "load_test_images"]

_ASSETS = files("rmtkern.demo").joinpath("assets")


def load_demo_model() -> DemoViT:
    """The trained ViT in eval mode, float32 (stored as float16); about 90 % top-1 on Fashion-MNIST."""
    state = load(_ASSETS.joinpath("demo_vit.safetensors").read_bytes())
    model = DemoViT()
    model.load_state_dict({name: tensor.float() for name, tensor in state.items()})
    return cast(DemoViT, model.eval())


def load_test_images(limit: int | None = None) -> tuple[Tensor, Tensor]:
    """Fashion-MNIST's test images x [10000, 1, 28, 28] float32 in [0, 1] and labels y [10000] int64.

    Source: Xiao, Rasul & Vollgraf (2017), MIT licence (assets/FASHION_MNIST_LICENSE).
    """
    from rmtkern.demo.train import parse_idx

    images, labels = (
        parse_idx(gzip.decompress(_ASSETS.joinpath(f"t10k-{part}-ubyte.gz").read_bytes()), part)
        for part in ("images-idx3", "labels-idx1")
    )
    x = torch.from_numpy(images[:limit].copy())[:, None].float() / 255
    return x, torch.from_numpy(labels[:limit].astype(np.int64))
