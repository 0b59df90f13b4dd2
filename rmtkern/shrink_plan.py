"""What was removed from each block of a model, as data, JSON and a table; and the same cut for another copy of it."""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Self

import torch
from torch import Tensor, nn

from rmtkern.blocks import Block, cut_all_, find_blocks
from rmtkern.tables import Table, Tabulated

__all__ = ["BlockPlan", "ShrinkPlan"]


@dataclass(frozen=True)
class BlockPlan:
    """What was removed from one block.

    Args:
        name: of the module.
        kind: "mlp" or "heads".
        units: hidden features or heads before, >= 2.
        removed: those that went, ascending, fewer than `units`.
        loss: mean square of what the output of the block's last weight changed on the calibration images, as a share
            of that output's; None without images.
    """

    name: str
    kind: str
    units: int
    removed: tuple[int, ...]
    loss: float | None = None

    def __post_init__(self) -> None:
        whole = all(type(unit) is int for unit in (self.units, *self.removed))
        if not whole or not isinstance(self.name, str) or self.kind not in ("mlp", "heads"):
            raise TypeError(f"expected a name, 'mlp' or 'heads', and integers, got {asdict(self)}"[:200])
        inside = all(0 <= unit < self.units for unit in self.removed)
        if not inside or list(self.removed) != sorted(set(self.removed)) or len(self.removed) >= self.units:
            raise ValueError(f"{self.name}: expected ascending units below {self.units}, not all, got {self.removed}")


@dataclass(frozen=True)
class ShrinkPlan(Tabulated):
    """What was removed from a model; prints as a table.

    Args:
        mlp: share of hidden features that was asked for, [0, 1).
        heads: share of attention heads that was asked for, [0, 1).
        blocks: every block that was cut, or could have been, in the order of the model.
        left: name -> why a block stayed whole.
        parameters: of the model before and after.
        calibration_images: images that chose the units; 0 for norms.
    """

    mlp: float
    heads: float
    blocks: tuple[BlockPlan, ...]
    left: Mapping[str, str] = field(default_factory=dict)
    parameters: tuple[int, int] = (0, 0)
    calibration_images: int = 0

    def apply_(self, model: nn.Module) -> Callable[[], None]:
        """Make another copy of the model as small, so that its checkpoints load; its values are not repaired.

        Args:
            model: the architecture before, changed in place; it may be on the meta device. A block that is as small
                already is left as it is.

        Returns:
            What takes it back.

        Raises:
            TypeError, PackedModelError: as find_blocks raises them.
            ValueError: a block is missing, cannot be cut or has another number of units; nothing was changed.
        """
        found, left = find_blocks(model)
        known: dict[tuple[str, str], Block] = {(block.name, block.kind): block for block in found}
        chosen = [(plan, known.get((plan.name, plan.kind))) for plan in self.blocks if plan.removed]
        cutting: list[tuple[Block, Tensor]] = []
        for plan, block in chosen:
            if block is not None and block.units == plan.units:
                stays = torch.ones(plan.units, dtype=torch.bool)
                stays[list(plan.removed)] = False
                cutting.append((block, stays.nonzero().flatten()))
            elif block is None or block.units != plan.units - len(plan.removed):
                have = f"{block.units} units" if block else left.get(f"{plan.name} ({plan.kind})", "no such block")
                raise ValueError(
                    f"{plan.name} ({plan.kind}): expected {plan.units} units to remove {len(plan.removed)} of, got "
                    f"{have}; give the architecture as it was before rmtkern.shrink_"
                )
        return cut_all_(model, cutting)

    def table(self) -> Table:
        """One row per block, then totals and what was left whole as notes."""
        rows = [(plan.name, plan.kind, plan.units, plan.units - len(plan.removed),
                 None if plan.loss is None else 100 * plan.loss) for plan in self.blocks]  # fmt: skip
        before, after = self.parameters
        how = f"{self.calibration_images} calibration images" if self.calibration_images else "norms"
        notes = [
            f"asked: {self.mlp:g} of the hidden features, {self.heads:g} of the heads; chosen by {how}",
            f"parameters: {before:,} before, {after:,} after ({100 * (1 - after / max(before, 1)):.2f} % fewer)",
            *(f"left whole: {name}: {reason}" for name, reason in self.left.items()),
        ]
        return Table(("block", "kind", "units", "kept", "loss %"), rows, notes)

    def to_json(self) -> str:
        """Everything, as a JSON object."""
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The inverse of `to_json`.

        Raises:
            ValueError: not the JSON of such a plan.
        """
        try:
            data: dict[str, Any] = json.loads(text)
            blocks = tuple(BlockPlan(**{**block, "removed": tuple(block["removed"])}) for block in data["blocks"])
            before, after = data["parameters"]
            return cls(**{**data, "blocks": blocks, "parameters": (int(before), int(after))})
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"not the JSON of a ShrinkPlan ({error!r}); expected what to_json wrote") from error
