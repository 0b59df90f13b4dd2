"""Where an execution is: which instruction, since how many barriers; and how its findings are worded."""

from dataclasses import dataclass

from tests.gpu.ptx.findings import Report
from tests.gpu.ptx.text import Kernel

__all__ = ["Moment"]


@dataclass
class Moment:
    """Args: what runs; where findings go; the instruction that executes; barriers passed; instructions executed."""

    kernel: Kernel
    report: Report
    instruction: int = 0
    interval: int = 0
    clock: int = 0

    def text(self, instruction: int | None = None) -> str:
        """An instruction and its source line; by default the one that executes."""
        number = self.instruction if instruction is None else instruction
        return str(self.kernel.instructions[number])

    def find(self, kind: str, what: str) -> None:
        """Note a finding at the instruction that executes."""
        self.report.add(kind, f"{what}: {self.text()} in {self.kernel.name}")

    def find_pair(self, kind: str, what: str, first: int, second: int) -> None:
        """Note a finding about two instructions."""
        self.report.add(kind, f"{what}: {self.text(first)} and {self.text(second)} in {self.kernel.name}")
