"""What is wrong with a kernel: what stops its execution, and what is collected while it goes on."""

from collections import Counter
from dataclasses import dataclass, field

__all__ = ["Deadlock", "Finding", "Launch", "Misaligned", "OutOfBounds", "PtxError", "Report", "Traffic", "Unsupported"]


class PtxError(Exception):
    """The kernel cannot be executed further."""


class Unsupported(PtxError):
    """The executor does not know something of the text; the message names it."""

    def __init__(self, what: str) -> None:
        super().__init__(f"the PTX executor does not know {what}; add it under tests/gpu/ptx")


class OutOfBounds(PtxError):
    """An access outside every buffer, or outside shared memory."""


class Misaligned(PtxError):
    """An address that is no multiple of the access' size."""


class Deadlock(PtxError):
    """No thread can go on."""


@dataclass(frozen=True)
class Finding:
    """Something wrong that does not stop the execution.

    Args:
        kind: "race", "uninitialised", "unwaited copy", "unwaited product", "missing fence", "metadata".
        what: a sentence with the instructions.
    """

    kind: str
    what: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.what}"


@dataclass
class Traffic:
    """Bytes of a buffer.

    Args:
        read: asked for by the warps' loads; what several threads of a warp ask for in one instruction counts once.
        written: likewise by stores.
        distinct_read: different bytes that were read in a launch, which is what a perfect cache would leave.
        distinct_written: likewise.
    """

    read: int = 0
    written: int = 0
    distinct_read: int = 0
    distinct_written: int = 0

    @property
    def total(self) -> int:
        """Read and written, asked for by the warps."""
        return self.read + self.written

    @property
    def distinct(self) -> int:
        """Read and written, with a perfect cache."""
        return self.distinct_read + self.distinct_written


@dataclass
class Launch:
    """One kernel that was executed.

    Args:
        kernel: its name.
        grid: blocks in x, y, z.
        traffic: argument's name -> bytes. Arguments that share memory have one entry, "a=b".
        instructions: words before the first dot of an opcode -> how often warps executed it.
    """

    kernel: str
    grid: tuple[int, int, int]
    traffic: dict[str, Traffic] = field(default_factory=dict)
    instructions: Counter[str] = field(default_factory=Counter)


@dataclass
class Report:
    """What came of some launches.

    Args:
        findings: each once.
        launches: in order.
    """

    findings: list[Finding] = field(default_factory=list)
    launches: list[Launch] = field(default_factory=list)

    def add(self, kind: str, what: str) -> None:
        """Note something wrong, unless it is noted already."""
        finding = Finding(kind, what)
        if finding not in self.findings:
            self.findings.append(finding)

    def kinds(self) -> set[str]:
        """The kinds of the findings."""
        return {finding.kind for finding in self.findings}
