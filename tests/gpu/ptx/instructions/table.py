"""The table of instructions: a word of PTX -> the function that makes a step of it for a machine.

A word of an opcode that a builder has not named is refused, so that nothing is executed as something else.
"""

from collections.abc import Callable

from tests.gpu.ptx.findings import Unsupported
from tests.gpu.ptx.machine import Machine, Step
from tests.gpu.ptx.text import Instruction
from tests.gpu.ptx.types import TYPES

__all__ = ["build", "instruction"]

Builder = Callable[[Machine, Instruction], Step]
_BUILDERS: dict[str, tuple[Builder, frozenset[str]]] = {}
LONGEST = 5  # words of a name in the table


def instruction(*names: str, words: str = "") -> Callable[[Builder], Builder]:
    """Enter a builder under some names, such as "add" or "cp.async.wait_group".

    Args:
        names: how the opcodes begin.
        words: what may follow besides types and cache hints ("L1::...", "L2::...").
    """

    def enter(builder: Builder) -> Builder:
        for name in names:
            _BUILDERS[name] = builder, frozenset(words.split())
        return builder

    return enter


def build(machine: Machine, what: Instruction) -> Step:
    """The step of an instruction.

    Raises:
        Unsupported: the instruction, or a word of it, is not known; the message has its text.
    """
    parts = what.parts
    for length in range(min(LONGEST, len(parts)), 0, -1):
        name = ".".join(parts[:length])
        if name in _BUILDERS:
            builder, words = _BUILDERS[name]
            for word in parts[length:]:
                if word not in words and word not in TYPES and not word.startswith(("L1::", "L2::")):
                    raise Unsupported(f".{word} of the instruction {what}")
            return builder(machine, what)
    raise Unsupported(f"the instruction {what}")
