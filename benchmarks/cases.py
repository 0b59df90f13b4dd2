"""Every case that is benchmarked: shapes, token counts, layouts, patterns, sparsities, dtypes and threads, once.

It only names them. contenders.py makes the weights; kernel.py, mlp.py, normed.py, attention.py, growth.py and model.py
measure, gpu_kernel.py and gpu_model.py on a GPU; run.py selects.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

__all__ = [
    "DTYPES",
    "LAYERS",
    "AttentionCase",
    "Case",
    "KernelCase",
    "ModelCase",
    "Pruned",
    "attention_cases",
    "gpu_kernel_cases",
    "gpu_model_cases",
    "growth_cases",
    "kernel_cases",
    "mlp_cases",
    "model_cases",
    "normed_cases",
    "only",
]

DTYPES = ("float32", "bfloat16")

WIDTHS = {"vit_t": 192, "vit_s": 384, "vit_b": 768, "vit_l": 1024, "demo": 256}
"""Width of DeiT-T / ViT-T, ViT-S, ViT-B, ViT-L and of the model of rmtkern.demo."""

LAYERS: dict[str, tuple[int, int]] = {
    f"{model}.{role}": (n * width, k * width)
    for model, width in WIDTHS.items()
    for role, (n, k) in {"qkv": (3, 1), "proj": (1, 1), "fc1": (4, 1), "fc2": (1, 4)}.items()
}
"""Name -> (N, K), out and in features."""

TARGET = "vit_b.fc1"
IMAGE = 197  # tokens of one image, 224 x 224 in patches of 16
BATCH = 8 * IMAGE


@dataclass(frozen=True)
class KernelCase:
    """One interleaved run of one layer: its dense forms and the contenders.

    Args:
        layer: a name in LAYERS, or of the MLP level a width's name and ".mlp": its fc1 and fc2.
        tokens: T.
        contenders: names as contenders.py reads them, such as "block 4x1 0.7".
        dtype: of activations and weight, a name in DTYPES.
        activation: absorbed after the linear, or None.
        threads: of torch; 0 on a GPU.
        sweep: what the growth table varies in the series that this case belongs to; "" outside of that table.
        quick: whether `--quick` runs it.
    """

    layer: str
    tokens: int
    contenders: tuple[str, ...]
    dtype: str = "float32"
    activation: str | None = None
    threads: int = 1
    sweep: str = ""
    quick: bool = False

    @property
    def name(self) -> str:
        """Such as "vit_b.fc1 T=197 float32 gelu 2t"."""
        threads = f"{self.threads}t" if self.threads else ""
        parts = [self.sweep, self.layer, f"T={self.tokens}", self.dtype, self.activation, threads]
        return " ".join(part for part in parts if part)


@dataclass(frozen=True)
class AttentionCase:
    """One interleaved run of attention within images: PyTorch's backends and our kernel.

    Args:
        heads: H.
        head_dim: d.
        batch: B, images.
        tokens: T of an image.
        dtype: of q, k and v, a name in DTYPES.
        threads: of torch.
        contenders: "no mask", and "bias" for an additive one for each head.
        quick: whether `--quick` runs it.
    """

    heads: int
    head_dim: int
    batch: int
    tokens: int
    dtype: str = "float32"
    threads: int = 1
    contenders: tuple[str, ...] = ("no mask", "bias")
    quick: bool = False

    @property
    def name(self) -> str:
        """Such as "12x64 B=8 T=197 float32 1t"."""
        return f"{self.heads}x{self.head_dim} B={self.batch} T={self.tokens} {self.dtype} {self.threads}t"


@dataclass(frozen=True)
class Pruned:
    """A whole model pruned to a pattern and packed.

    Args:
        dtype: that pack_ is asked for, a name in DTYPES.
        pattern: of prune_, or "dense" for a model that is not pruned.
        sparsity: of prune_.
    """

    dtype: str
    pattern: str = "dense"
    sparsity: float = 0.0

    @property
    def name(self) -> str:
        """Such as "float32 unstructured 0.5", "bfloat16 2:4" or "float32 dense"."""
        fixed = self.pattern == "dense" or ":" in self.pattern
        return f"{self.dtype} {self.pattern}" + ("" if fixed else f" {self.sparsity:g}")


@dataclass(frozen=True)
class ModelCase:
    """One interleaved run of one model: the peers, and the packed models.

    Args:
        model: a timm name; its weights are random.
        batch: images.
        contenders: what is packed, all of one dtype.
        threads: of every contestant; 0 on a GPU.
        quick: whether `--quick` runs it.
    """

    model: str
    batch: int
    contenders: tuple[Pruned, ...]
    threads: int = 1
    quick: bool = False

    @property
    def name(self) -> str:
        """Such as "vit_base_patch16_224 B=8 1t"."""
        return f"{self.model} B={self.batch}" + (f" {self.threads}t" if self.threads else "")


Case = KernelCase | AttentionCase | ModelCase

SPARSITIES = (0.5, 0.7, 0.9)


def _at(layouts: Sequence[str], sparsities: Sequence[float] = SPARSITIES) -> tuple[str, ...]:
    return tuple(f"{layout} {sparsity:g}" for layout in layouts for sparsity in sparsities)


TARGETS = {
    "float32": ("dense own", *_at(["bitmask", "block 2x1", "block 4x1", "block 8x1"]), "nofm 2:4"),
    "bfloat16": (
        "dense own",
        *_at(["bitmask", "block 1x2 unstructured", "block 1x2", "block 4x2"]),
        "nofm 2:4",
        "nofm 2:4x4",
    ),
}
MORE = _at(["bitmask"], (0.0, 0.8, 0.95))
FACTORED = ("lowrank 64", "lowrank 128", "lowrank 256", "spectral 64+0.9", "spectral 128+0.8")
SHORT = {
    "float32": (*_at(["bitmask", "block 4x1"]), "nofm 2:4"),
    "bfloat16": (*_at(["bitmask", "block 1x2 unstructured", "block 1x2", "block 4x2"]), "nofm 2:4", "nofm 2:4x4"),
}


def kernel_cases() -> Iterator[KernelCase]:
    """The kernel level: the target's layer in everything, the other layers in what matters most."""
    for dtype in DTYPES:
        full = (*TARGETS[dtype], *FACTORED)
        yield KernelCase(TARGET, BATCH, (*full, *MORE), dtype, quick=True)
        yield KernelCase(TARGET, BATCH, TARGETS[dtype], dtype, activation="gelu")
        for tokens in (1, 16, IMAGE):
            yield KernelCase(TARGET, tokens, full, dtype)
        for tokens in (IMAGE, BATCH):
            yield KernelCase(TARGET, tokens, full, dtype, threads=2)
        for layer in LAYERS:
            if layer.startswith("demo."):
                continue
            for tokens in (IMAGE, BATCH):
                if layer != TARGET:
                    yield KernelCase(layer, tokens, SHORT[dtype], dtype)
        for layer in ("demo.fc1", "demo.fc2"):
            yield KernelCase(layer, 64 * 49, SHORT[dtype], dtype)


MLP_FORMS = {
    "float32": ("dense own", *_at(["bitmask"], (0.5, 0.9)), "nofm 2:4"),
    "bfloat16": (
        "dense own",
        *_at(["bitmask", "block 1x2"], (0.5, 0.9)),
        "block 4x2 0.5",
        "nofm 2:4",
        "nofm 2:4x4",
    ),
}


def mlp_cases() -> Iterator[KernelCase]:
    """The MLP level: DeiT-T, ViT-S and ViT-B, one image and a batch of 8."""
    for model in ("vit_b", "vit_s", "vit_t"):
        for dtype in DTYPES:
            for tokens in (IMAGE, BATCH):
                quick = model == "vit_b" and tokens == IMAGE
                yield KernelCase(f"{model}.mlp", tokens, MLP_FORMS[dtype], dtype, activation="gelu", quick=quick)


NORMED_FORMS = {
    "float32": ("dense own", *_at(["bitmask"], (0.5, 0.9)), "nofm 2:4"),
    "bfloat16": ("dense own", *_at(["bitmask", "block 1x2"], (0.5, 0.9)), "block 4x2 0.5", "nofm 2:4"),
}


def normed_cases() -> Iterator[KernelCase]:
    """The normed level: the linears of ViT-B, ViT-S and DeiT-T that follow a LayerNorm, an image and a batch of 8."""
    for threads in (1, 2):
        for model in ("vit_b", "vit_s", "vit_t"):
            for role, activation in (("qkv", None), ("fc1", "gelu")):
                for dtype, forms in NORMED_FORMS.items():
                    for tokens in (IMAGE, BATCH):
                        quick = model == "vit_b" and tokens == IMAGE and threads == 1
                        yield KernelCase(f"{model}.{role}", tokens, forms, dtype, activation, threads, quick=quick)


ATTENTION_SHAPES = (
    *((heads, 64, batch, IMAGE) for heads in (12, 6, 3) for batch in (1, 8)),
    *((12, head_dim, batch, IMAGE) for head_dim in (32, 80, 96, 128) for batch in (1, 8)),
    (12, 64, 1, 577),
)
"""(H, d, B, T): ViT-B, ViT-S and DeiT-T; the other head dims that vision models have; ViT-B at 384 x 384."""


def attention_cases() -> Iterator[AttentionCase]:
    """The attention level: every shape in both dtypes, 1 and 2 threads."""
    for threads in (1, 2):
        for shape in ATTENTION_SHAPES:
            for dtype in DTYPES:
                yield AttentionCase(*shape, dtype, threads, quick=shape[:2] == (12, 64) and threads == 1)


GROWTH_TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, IMAGE, 2 * IMAGE, 4 * IMAGE, BATCH, 16 * IMAGE, 32 * IMAGE, 64 * IMAGE)
GROWTH_SPARSITIES = (0.0, 0.1, 0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
GROWTH_LAYERS = ("vit_t.fc1", "vit_s.fc1", "vit_b.fc1", "vit_l.fc1")
GROWTH = {
    "float32": ("bitmask", "block 4x1"),
    "bfloat16": ("bitmask", "block 1x2 unstructured", "block 1x2", "block 4x2"),
}


def growth_cases() -> Iterator[KernelCase]:
    """The growth table: one thing varies at a time (tokens, sparsity, layer), from the target's shape."""
    for dtype, layouts in GROWTH.items():
        for threads in (1, 2):
            for tokens in GROWTH_TOKENS:
                forms = (*_at(layouts, (0.5, 0.9)), "nofm 2:4")
                quick = threads == 1 and tokens in (1, 16, IMAGE)
                yield KernelCase(TARGET, tokens, forms, dtype, threads=threads, sweep="tokens", quick=quick)
            for tokens in (IMAGE, BATCH):
                forms = _at(layouts, GROWTH_SPARSITIES)
                yield KernelCase(TARGET, tokens, forms, dtype, threads=threads, sweep="sparsity")
            for layer in GROWTH_LAYERS:
                forms = (*_at(layouts, (0.5, 0.9)), "nofm 2:4")
                yield KernelCase(layer, BATCH, forms, dtype, threads=threads, sweep="layer")


PACKED = {
    "float32": ("unstructured", "4x1"),
    "bfloat16": ("unstructured", "1x2", "4x2"),
}
"""Patterns of the model level that come at each sparsity."""


def _packed(dtype: str) -> tuple[Pruned, ...]:
    free = [Pruned(dtype, pattern, sparsity) for pattern in PACKED[dtype] for sparsity in SPARSITIES]
    return (Pruned(dtype), *free, Pruned(dtype, "2:4", 0.5), Pruned(dtype, "2:4x4", 0.5))


def model_cases() -> Iterator[ModelCase]:
    """The model level: ViT-B/16, ViT-S/16 and DeiT-T, a batch of 8 and single images, 1 and 2 threads."""
    for model in ("vit_base_patch16_224", "vit_small_patch16_224", "deit_tiny_patch16_224"):
        for batch in (8, 1):
            for threads in (1, 2):
                for dtype in DTYPES:
                    quick = model.startswith("vit_base") and batch == 8 and threads == 1
                    yield ModelCase(model, batch, _packed(dtype), threads, quick)


GPU_BATCHES = (1, 8, 64, 256)
GPU_FORMS = (
    "dense own",
    *_at(["bitmask", "block 32x32"], (0.5, 0.9)),
    "nofm 2:4",
    "lowrank 128",
    "spectral 64+0.9",
)
GPU_PACKED = (
    Pruned("bfloat16"),
    Pruned("bfloat16", "2:4", 0.5),
    Pruned("bfloat16", "unstructured", 0.9),
    *(Pruned("bfloat16", "32x32", sparsity) for sparsity in (0.5, 0.9)),
)


def gpu_kernel_cases() -> Iterator[KernelCase]:
    """The kernel level on a GPU, what matters most first: the layers of ViT-B, then the largest of ViT-L and ViT-S."""
    for layer in ("vit_b.fc1", "vit_b.qkv", "vit_b.fc2", "vit_b.proj", "vit_l.fc1", "vit_s.fc1"):
        activation = "gelu" if layer.endswith("fc1") else None
        for batch in GPU_BATCHES:
            quick = layer == TARGET and batch <= 8
            yield KernelCase(layer, batch * IMAGE, GPU_FORMS, "bfloat16", activation, threads=0, quick=quick)


def gpu_model_cases() -> Iterator[ModelCase]:
    """The model level on a GPU, what matters most first."""
    for model in ("vit_base_patch16_224", "deit_tiny_patch16_224", "vit_small_patch16_224"):
        for batch in GPU_BATCHES:
            yield ModelCase(model, batch, GPU_PACKED, 0, quick=model.startswith("vit_base") and batch == 1)


def only(case: Case, wanted: Sequence[str]) -> Case | None:
    """The case with those contenders whose "<case name> <contender name>" contains one of `wanted`; None if none does.

    An empty `wanted` leaves the case as it is.
    """

    def fits(contender: str | Pruned) -> bool:
        name = contender if isinstance(contender, str) else contender.name
        return any(part.lower() in f"{case.name} {name}".lower() for part in wanted or [""])

    kept = tuple(contender for contender in case.contenders if fits(contender))
    return replace(case, contenders=kept) if kept else None
