"""Which model classes the library handles, as a table: weights found, pruned and packed, saved and loaded, compiled.

    python -m benchmarks.coverage [NAME ...]

Models are of the libraries' own classes, narrow and shallow, with random weights; no kernel is timed, every linear that
has a bitmask kernel is packed in it. docs/coverage.md holds the table; tests/test_coverage.py runs every row.
"""

import argparse
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
import transformers
from torch import Tensor, nn

import rmtkern
from rmtkern.models import prunable_weights
from rmtkern.pruning.calibrate import tensors_of
from rmtkern.tables import Table

__all__ = ["MODELS", "Covered", "cover", "table"]

Example = Tensor | dict[str, Tensor]
SPARSITY = 0.6
TOLERANCE = 2e-4
"""Of an output, relative to its largest entry: float32 sums in another order through a few blocks."""
COUNTS = 0.8
"""Share of the linear weights that must be packed for a model to count."""


def _timm(name: str, size: int, **options: Any) -> Callable[[], tuple[nn.Module, Example]]:
    def build() -> tuple[nn.Module, Example]:
        return timm.create_model(name, num_classes=7, **options), torch.randn(2, 3, size, size)

    return build


def _vit(name: str, size: int = 64, **options: Any) -> Callable[[], tuple[nn.Module, Example]]:
    return _timm(name, size, img_size=size, **{"depth": 2, "embed_dim": 64, "num_heads": 2, **options})


def _transformers(
    kind: str, config: str, example: Example | None = None, **options: Any
) -> Callable[[], tuple[nn.Module, Example]]:
    def build() -> tuple[nn.Module, Example]:
        sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}
        chosen = getattr(transformers, config)(**{**sizes, "image_size": 64, "patch_size": 16, **options})
        images = torch.randn(2, 3, 64, 64) if example is None else example
        return getattr(transformers, kind)(chosen), {"pixel_values": images} if isinstance(images, Tensor) else images

    return build


def _text() -> Example:
    ids = torch.randint(0, 100, (2, 12), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _masked() -> Example:
    generator = torch.Generator().manual_seed(0)  # without noise it masks other patches in every call
    return {
        "pixel_values": torch.randn(2, 3, 64, 64, generator=generator),
        "noise": torch.rand(2, 16, generator=generator),
    }


def _swin() -> tuple[nn.Module, Example]:
    config = transformers.SwinConfig(image_size=64, patch_size=4, embed_dim=32, depths=[1, 1], num_heads=[2, 2],
                                     window_size=4)  # fmt: skip
    return transformers.SwinModel(config), {"pixel_values": torch.randn(2, 3, 64, 64)}


def _vision_transformer() -> tuple[nn.Module, Example]:
    return torchvision.models.VisionTransformer(64, 16, 2, 2, 64, 128, num_classes=7), torch.randn(2, 3, 64, 64)


def _swin_transformer() -> tuple[nn.Module, Example]:
    model = torchvision.models.swin_transformer.SwinTransformer([4, 4], 32, [1, 1], [2, 2], [4, 4], num_classes=7)
    return model, torch.randn(2, 3, 64, 64)


MODELS: dict[str, Callable[[], tuple[nn.Module, Example]]] = {
    "timm ViT": _vit("vit_tiny_patch16_224"),
    "timm ViT, qk-norm": _vit("vit_tiny_patch16_224", qk_norm=True),
    "timm ViT, parallel blocks": _vit("vit_small_patch16_18x2_224"),
    "timm ViT, registers, average pool": _vit("vit_medium_patch16_reg4_gap_256"),
    "timm DeiT, distilled": _vit("deit_tiny_distilled_patch16_224"),
    "timm DeiT-III": _vit("deit3_small_patch16_224"),
    "timm BEiT": _vit("beit_base_patch16_224"),
    "timm BEiTv2": _vit("beitv2_base_patch16_224"),
    "timm EVA": _vit("eva_large_patch14_196", 56),
    "timm EVA-02": _vit("eva02_tiny_patch14_224", 56),
    "timm DINOv2, registers": _vit("vit_small_patch14_reg4_dinov2", 56),
    "timm SigLIP": _vit("vit_base_patch16_siglip_224"),
    "timm CLIP": _vit("vit_base_patch16_clip_224"),
    "timm CaiT": _vit("cait_xxs24_224"),
    "timm XCiT": _vit("xcit_nano_12_p16_224"),
    "timm Swin": _timm("swin_tiny_patch4_window7_224", 56, img_size=56, depths=(1, 1), num_heads=(2, 2), embed_dim=32),
    "timm SwinV2": _timm("swinv2_tiny_window8_256", 64, img_size=64, depths=(1, 1), num_heads=(2, 2), embed_dim=32),
    "timm Hiera": _timm("hiera_tiny_224", 64, img_size=(64, 64), stages=(1, 1, 1, 1), embed_dim=32),
    "timm MaxViT": _timm("maxvit_nano_rw_256", 64, img_size=64, depths=(1, 1), embed_dim=(32, 64)),
    "timm ConvNeXt": _timm("convnext_tiny", 64, depths=(1, 1, 1, 1), dims=(32, 32, 64, 64)),
    "timm ConvNeXtV2": _timm("convnextv2_tiny", 64, depths=(1, 1, 1, 1), dims=(32, 32, 64, 64)),
    "transformers ViT": _transformers("ViTModel", "ViTConfig"),
    "transformers DeiT": _transformers("DeiTModel", "DeiTConfig"),
    "transformers BEiT": _transformers("BeitModel", "BeitConfig"),
    "transformers DINOv2": _transformers("Dinov2Model", "Dinov2Config", mlp_ratio=2),
    "transformers DINOv2, SwiGLU": _transformers("Dinov2Model", "Dinov2Config", use_swiglu_ffn=True),
    "transformers CLIP vision": _transformers("CLIPVisionModel", "CLIPVisionConfig"),
    "transformers SigLIP vision": _transformers("SiglipVisionModel", "SiglipVisionConfig"),
    "transformers Swin": _swin,
    "transformers ViT-MAE": _transformers("ViTMAEModel", "ViTMAEConfig", _masked(), mask_ratio=0.5),
    "transformers BERT": _transformers("BertModel", "BertConfig", _text(), vocab_size=100),
    "torchvision ViT": _vision_transformer,
    "torchvision Swin": _swin_transformer,
}
"""Name -> function that makes a small model and what it is called with."""


@dataclass(frozen=True)
class Covered:
    """What was done with one model.

    Args:
        model: its name in MODELS.
        found: weights that can be pruned.
        pruned: those that prune_ selects by default.
        linears: nn.Linears that pack_ saw.
        packed: those that a sparse kernel runs.
        share: of the linear weights in `packed`, [0, 1].
        error: largest relative error of the packed model against the masked dense one.
        loaded: whether a saved model came back with the same bits, and the same outputs.
        compiled: whether torch.compile, with graph breaks allowed, gave the same outputs.
        left: reasons of the linears that stay dense.
    """

    model: str
    found: int
    pruned: int
    linears: int
    packed: int
    share: float
    error: float
    loaded: bool
    compiled: bool
    left: tuple[str, ...]

    @property
    def counts(self) -> bool:
        """Whether the library handles the model."""
        return self.share >= COUNTS and self.error <= TOLERANCE and self.loaded and self.compiled


def _bitmask_first(calls: Mapping[str, Callable[[], object]], budget_ms: float) -> dict[str, float]:
    """A timer for pack_ that times nothing and prefers bitmask kernels."""
    cost = {"packed": 1.0, "dense": 2.0, "original": 3.0}
    return {name: cost.get(name, 1.0 if "bitmask" in name else 2.0) for name in calls}


def _run(model: nn.Module, example: Example) -> list[Tensor]:
    with torch.no_grad():
        return tensors_of(model(example) if isinstance(example, Tensor) else model(**example))


def _error(got: Sequence[Tensor], want: Sequence[Tensor]) -> float:
    pairs = [(a.double(), b.double()) for a, b in zip(got, want, strict=True) if b.numel()]
    return max(float((a - b).abs().max() / b.abs().max().clamp_min(1e-30)) for a, b in pairs)


def _same(one: nn.Module, other: nn.Module) -> bool:
    """Whether two models hold the same bits; convolutions may still round otherwise, by where these lie in memory."""
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def cover(name: str, backend: str = "aot_eager") -> Covered:
    """Prune, pack, save, load and compile one model of MODELS.

    Args:
        name: a key of MODELS.
        backend: of torch.compile; "inductor" makes code, which takes minutes.

    Raises:
        Exception: whatever the library raises; nothing is caught.
    """
    torch.manual_seed(0)
    model, example = MODELS[name]()
    model.eval()
    found = len(prunable_weights(model, "all"))
    plan = rmtkern.prune_(model, SPARSITY, "uniform", show_progress=False)
    masked = _run(model, example)
    report = rmtkern.pack_(model, example, timer=_bitmask_first, layouts=["bitmask"], show_progress=False)
    packed = _run(model, example)
    with tempfile.TemporaryDirectory() as folder:
        rmtkern.save(model, Path(folder) / "model.safetensors")
        again = rmtkern.load(Path(folder) / "model.safetensors", MODELS[name]()[0])
    torch._dynamo.reset()
    compiled = _run(torch.compile(model, backend=backend), example)
    return Covered(
        name,
        found,
        len(plan.layers),
        len(report.layers),
        report.packed_layers,
        report.packed_share,
        _error(packed, masked),
        _same(again, model) and _error(_run(again, example), packed) <= TOLERANCE,
        _error(compiled, packed) <= TOLERANCE,
        tuple(dict.fromkeys(layer.reason for layer in report.layers if not layer.packed)),
    )


COLUMNS = ("model", "weights found", "pruned", "linears", "packed", "of linear weights", "counts", "what stays dense")


def table(rows: Sequence[Covered]) -> Table:
    """The rows as docs/coverage.md shows them."""
    return Table(
        COLUMNS,
        [
            (row.model, row.found, row.pruned, row.linears, row.packed, f"{100 * row.share:.0f} %",
             "yes" if row.counts else "no", "; ".join(reason for reason in row.left if "sparsity 0.000" not in reason))
            for row in rows
        ],
    )  # fmt: skip


def main() -> None:
    """Cover the models that are named, or all, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", help="parts of names; default: all")
    args = parser.parse_args()
    chosen = [name for name in MODELS if not args.models or any(part.lower() in name.lower() for part in args.models)]
    print(table([cover(name) for name in chosen]).to_markdown())


if __name__ == "__main__":
    main()
