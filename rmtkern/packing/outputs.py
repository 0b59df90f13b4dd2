"""What a model computes on its examples, and whether two models compute the same. It knows no packed module."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rmtkern.examples import Example

__all__ = ["OUTPUT_TOLERANCE", "deviation_of", "outputs_on", "run_model", "tolerance_of"]

OUTPUT_TOLERANCE = {torch.float32: 1e-4, torch.float16: 0.0125, torch.bfloat16: 0.1}
"""Largest change of the model's output, relative to its largest magnitude. Two dense fp32 libraries differ by 1e-6 to
1e-5 after 12 blocks, two bf16 ones by 1e-2 (float16 rounds to an eighth of that); a wrong activation or a lost weight
shows at 1e-2 and above. Every layer in a form of ours is held to the accuracy rule by itself before, which is what
counts in bf16."""


def _tensors(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, Mapping):
        output = list(output.values())
    return [found for item in output for found in _tensors(item)] if isinstance(output, list | tuple) else []


def run_model(model: nn.Module, example: Example) -> list[Tensor]:
    """All tensors in the model's output, in order, without gradients."""
    args, kwargs = example
    with torch.no_grad():
        return _tensors(model(*args, **kwargs))


def outputs_on(
    model: nn.Module, examples: Sequence[Example], after: Callable[[], None] = lambda: None
) -> list[list[Tensor]]:
    """The outputs on all examples, as `run_model` gives them; `after` is called after each.

    Raises:
        ValueError: the model cannot run an example, or gives NaN.
        TypeError: an output holds no tensor.
    """
    found = []
    for index, example in enumerate(examples):
        try:
            output = run_model(model, example)
        except Exception as error:
            raise ValueError(
                f"the model cannot run example {index}: {error}; pass what you would call the model with"
            ) from error
        if not output:
            raise TypeError(f"the model's output on example {index} holds no tensor, so it cannot be checked")
        if any(bool(tensor.isnan().any()) for tensor in output):
            raise ValueError(
                f"the model's output on example {index} has NaN entries, so nothing can be compared with it; repair the"
                " model, or pass an example that it computes numbers for"
            )
        found.append(output)
        after()
    return found


def tolerance_of(*parts: nn.Module) -> float:
    """OUTPUT_TOLERANCE of the coarsest dtype among the parameters of some modules; float32's if they have none."""
    held = {parameter.dtype for part in parts for parameter in part.parameters()}
    return max(
        (OUTPUT_TOLERANCE[dtype] for dtype in held & OUTPUT_TOLERANCE.keys()), default=OUTPUT_TOLERANCE[torch.float32]
    )


def deviation_of(
    outputs: Iterable[Sequence[Tensor]], expected: Sequence[Sequence[Tensor]], tolerance: float
) -> str | None:
    """Where the outputs on the examples are not what is expected, in words; None if they are.

    Args:
        outputs: of each example, the tensors; those of whole numbers do not count.
        expected: the same, of the model that came.
        tolerance: largest error relative to the largest finite magnitude of the expected tensor; a NaN is beyond any,
            and what is infinite, as masked logits are, must be so too.
    """
    for index, (output, wanted) in enumerate(zip(outputs, expected, strict=True)):
        for got, want in zip(output, wanted, strict=True):
            if not (want.is_floating_point() or want.is_complex()) or not want.numel():
                continue
            size = want.abs()
            scale = float(size.where(size.isfinite(), 0).max())
            error = float((got - want).abs().where(got != want, 0).max())
            if not error <= tolerance * scale:
                return f"on example {index} differs by {error:.3g} where its scale is {scale:.3g}"
    return None
