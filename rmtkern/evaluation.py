"""Top-1, top-5 and loss of a classifier on a loader, a pair of tensors or an image folder.

Knows images and logits; not how the model was pruned or packed.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rmtkern.progress import progress

__all__ = ["Evaluation", "Preprocessing", "evaluate", "folder_batches", "logits_of", "preprocessing_of"]

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".ppm", ".tif", ".tiff"}


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What a model scored.

    Attributes:
        top1: share of images whose best class is right, [0, 1].
        top5: share whose five best classes hold the right one, [0, 1]; 1 by definition with five classes or fewer.
        loss: mean cross-entropy [nats].
        count: images seen.
    """

    top1: float
    top5: float
    loss: float
    count: int

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe dictionary."""
        return asdict(self)

    def __str__(self) -> str:
        return f"top-1 {self.top1:.2%}, top-5 {self.top5:.2%}, loss {self.loss:.4f} on {self.count} images"


@dataclass(frozen=True, slots=True)
class Preprocessing:
    """How an image becomes a model's input: shorter side to size / crop, centre crop, normalise."""

    size: tuple[int, int] = (224, 224)
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    crop: float = 0.875


def preprocessing_of(model: nn.Module) -> Preprocessing:
    """What the model declares, else ImageNet's 224 pixels, mean and deviation.

    Read are timm's `pretrained_cfg` (size, mean, std, crop) and the image size of transformers and torchvision; these
    two keep the mean and deviation elsewhere, so give `evaluate` a loader if a model was trained with others.
    """
    declared = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None)
    if isinstance(declared, dict) and declared.get("input_size"):
        size = getattr(getattr(model, "patch_embed", None), "img_size", None) or declared["input_size"][1:]
        return Preprocessing(
            size=(int(size[0]), int(size[1])),
            mean=tuple(declared.get("mean", IMAGENET_MEAN)),
            std=tuple(declared.get("std", IMAGENET_STD)),
            crop=float(declared.get("crop_pct") or 0.875),
        )
    config = getattr(model, "config", None)
    size = getattr(config, "image_size", None) or getattr(model, "image_size", None)
    size = (size, size) if isinstance(size, int) else size
    grey = getattr(config, "num_channels", 3) == 1
    return Preprocessing(
        size=(int(size[0]), int(size[1])) if isinstance(size, tuple | list) and len(size) == 2 else (224, 224),
        mean=(0.5,) if grey else IMAGENET_MEAN,
        std=(0.5,) if grey else IMAGENET_STD,
    )


def _load_image(path: Path, how: Preprocessing) -> Tensor:
    from PIL import Image

    try:
        with Image.open(path) as opened:
            image = opened.convert("L" if len(how.mean) == 1 else "RGB")
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:  # SyntaxError: of a damaged PNG
        raise ValueError(f"{path}: not a readable image ({error}); remove or repair it") from error
    height, width = how.size
    factor = max(height / how.crop / image.height, width / how.crop / image.width)
    resized = (max(width, round(image.width * factor)), max(height, round(image.height * factor)))
    image = image.resize(resized, Image.Resampling.BICUBIC)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    image = image.crop((left, top, left + width, top + height))
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).reshape(height, width, -1)
    tensor = pixels.permute(2, 0, 1).float() / 255
    return (tensor - torch.tensor(how.mean)[:, None, None]) / torch.tensor(how.std)[:, None, None]


def folder_batches(
    folder: str | Path,
    how: Preprocessing,
    *,
    batch_size: int = 32,
    classes: Sequence[str] | None = None,
    limit: int | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches (x [B, C, H, W], y [B]) of a folder with one sub-folder per class.

    Args:
        folder: its sub-folders are the classes.
        how: preprocessing.
        batch_size: images per batch, >= 1.
        classes: sub-folder names in the order of the model's classes; default, sorted by name.
        limit: at most so many images, spread evenly over the sorted files.

    Raises:
        ValueError: no such folder, no class sub-folder, a missing class, no image, an unreadable image, or limit < 1.
        ModuleNotFoundError: Pillow is not installed.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit: expected at least one image, got {limit}")
    root = Path(folder)
    if not root.is_dir():
        raise ValueError(f"{root}: no such folder; expected one with a sub-folder of images per class")
    names = list(classes) if classes is not None else sorted(entry.name for entry in root.iterdir() if entry.is_dir())
    missing = [name for name in names if not (root / name).is_dir()]
    if missing or not names:
        raise ValueError(
            f"{root}: expected one sub-folder of images per class, "
            f"{'missing ' + ', '.join(missing) if missing else 'found none'}"
        )
    files = [
        (path, label)
        for label, name in enumerate(names)
        for path in sorted((root / name).rglob("*"))
        if path.suffix.lower() in IMAGE_SUFFIXES
    ]
    if not files:
        raise ValueError(f"{root}: found no image ({', '.join(sorted(IMAGE_SUFFIXES))}) in its class sub-folders")
    try:
        import PIL  # noqa: F401
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "reading an image folder needs Pillow: pip install pillow (or rmtkern[models])"
        ) from None
    if limit is not None and limit < len(files):
        files = [files[i * len(files) // limit] for i in range(limit)]
    for start in range(0, len(files), batch_size):
        part = files[start : start + batch_size]
        yield torch.stack([_load_image(path, how) for path, _ in part]), torch.tensor([label for _, label in part])


def _batches(model: nn.Module, images: Any, batch_size: int, classes: Sequence[str] | None, limit: int | None) -> Any:
    if isinstance(images, str | Path):
        return folder_batches(images, preprocessing_of(model), batch_size=batch_size, classes=classes, limit=limit)
    if isinstance(images, tuple) and len(images) == 2 and all(isinstance(part, Tensor) for part in images):
        x, y = images
        if y.ndim != 1 or x.ndim < 2 or len(x) != len(y):
            raise ValueError(f"expected images [B, ...] and labels [B], got {tuple(x.shape)} and {tuple(y.shape)}")
        return zip(x.split(batch_size), y.split(batch_size), strict=True)
    if isinstance(images, Iterable) and not isinstance(images, Tensor):
        return images
    raise TypeError(
        f"images: expected a loader of (x, y), a pair of tensors or an image folder, got {type(images).__name__}"
    )


def logits_of(output: Any) -> Tensor:
    """The logits [B, classes] in what a timm, torchvision or transformers model returns.

    Raises:
        ValueError: there are none.
    """
    logits = getattr(output, "logits", output)
    if isinstance(logits, tuple | list) and logits:
        logits = logits[0]
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(f"expected the model to return logits [B, classes], got {shape}; evaluate a classifier")
    return logits


def _check_batch(batch: Any) -> tuple[Tensor, Tensor]:
    """The (x, y) of one batch of a loader, or an error that says what came instead."""
    if not isinstance(batch, tuple | list) or len(batch) != 2 or not all(isinstance(part, Tensor) for part in batch):
        raise TypeError(f"expected the loader to give pairs of tensors (x, y), got {type(batch).__name__}")
    x, y = batch
    if y.ndim != 1 or x.ndim < 2 or len(y) != len(x):
        raise ValueError(f"expected images [B, ...] and labels [B], got {tuple(x.shape)} and {tuple(y.shape)}")
    if y.is_floating_point() or y.is_complex() or y.dtype == torch.bool:
        raise TypeError(f"labels: expected integer class numbers, got {y.dtype}")
    return x, y


def _check_logits(logits: Tensor, y: Tensor) -> None:
    if len(logits) != len(y):
        raise ValueError(f"expected logits [{len(y)}, classes], one row per image, got {tuple(logits.shape)}")
    if int(y.min()) < 0 or int(y.max()) >= logits.shape[1]:
        raise ValueError(
            f"labels must lie in 0..{logits.shape[1] - 1}, got {int(y.min())}..{int(y.max())}; number the classes as "
            "the model does"
        )
    if not bool(torch.isfinite(logits).all()):
        raise ValueError("the model returned NaN or Inf logits; check its weights and its input's scale")


def evaluate(
    model: nn.Module,
    images: Any,
    *,
    batch_size: int = 64,
    classes: Sequence[str] | None = None,
    limit: int | None = None,
    show_progress: bool | None = None,
) -> Evaluation:
    """Score a classifier; its train or eval mode is restored afterwards.

    Args:
        model: maps images [B, C, H, W] to logits [B, classes] (or to an object with `.logits`).
        images: an iterable of (x, y) batches, a pair (x [B, C, H, W], y [B] int64), or the path of a folder with one
            sub-folder of images per class (needs Pillow; preprocessing as the model declares, see `preprocessing_of`).
        batch_size: for pairs and folders, >= 1.
        classes: for folders, the sub-folder names in the order of the model's classes; default, sorted by name.
        limit: at most so many images: of a folder, spread evenly over the classes; else the first ones.
        show_progress: True, False, or None for "only on a terminal".

    Returns:
        Evaluation.

    Raises:
        TypeError: model is not a module, images is none of the three, or labels are not integers.
        ValueError: no images, mismatched shapes, a label outside the classes, or logits that are not finite.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if batch_size < 1 or (limit is not None and limit < 1):
        raise ValueError(f"batch_size and limit must be at least 1, got {batch_size!r} and {limit!r}")
    batches = _batches(model, images, batch_size, classes, limit)
    device = next(model.parameters(), torch.zeros(1)).device
    hits = hits5 = count = 0
    loss = 0.0
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.inference_mode():
            for batch in progress(batches, "evaluate", show=show_progress):
                x, y = (part[: None if limit is None else limit - count].to(device) for part in _check_batch(batch))
                if len(y) == 0:
                    continue
                logits, y = logits_of(model(x)).float(), y.long()
                _check_logits(logits, y)
                best = logits.topk(min(5, logits.shape[1]), dim=1).indices == y[:, None]
                hits += int(best[:, 0].sum())
                hits5 += int(best.any(dim=1).sum())
                loss += float(F.cross_entropy(logits, y, reduction="sum"))
                count += len(y)
                if count == limit:
                    break
    finally:
        for module, mode in modes.items():
            module.training = mode
    if count == 0:
        raise ValueError("no images to evaluate: the loader or tensor pair is empty")
    return Evaluation(hits / count, hits5 / count, loss / count, count)
