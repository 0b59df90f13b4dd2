"""What one experiment found beside what it should find. It runs nothing."""

from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["Finding"]


@dataclass(frozen=True)
class Finding:
    """One measured number.

    Args:
        experiment: its id, such as "C1" or "T5".
        quantity: what was measured, in words.
        setting: the parameters, in words.
        measured: the number.
        low: smallest value that confirms the claim; None: no bound.
        high: largest one.
        published: what the paper or its figure says, for comparison; None if it gives no number.
    """

    experiment: str
    quantity: str
    setting: str
    measured: float
    low: float | None = None
    high: float | None = None
    published: float | None = None

    @property
    def holds(self) -> bool:
        """Whether the number confirms the claim; NaN does not."""
        above = self.low is None or self.measured >= self.low
        return above and (self.high is None or self.measured <= self.high) and self.measured == self.measured

    def row(self) -> dict[str, Any]:
        """For the CSV."""
        return {**asdict(self), "holds": self.holds}
