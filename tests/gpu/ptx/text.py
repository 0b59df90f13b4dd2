"""Reads the text of a PTX module with one kernel into instructions. It knows no instruction and executes nothing.

Source: PTX ISA 8.8, chapters "Syntax" and "State Spaces, Types, and Variables".
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import PurePath

from tests.gpu.ptx.findings import Unsupported

SIZES = {"8": 1, "16": 2, "32": 4, "64": 8}


@dataclass(frozen=True)
class Register:
    """A register, or a predicate that is read negated."""

    name: str
    negated: bool = False


@dataclass(frozen=True)
class Symbol:
    """A parameter, a shared array, a label or a special register such as %tid.x."""

    name: str


@dataclass(frozen=True)
class Immediate:
    """A literal as it is written; its type is the instruction's."""

    text: str


@dataclass(frozen=True)
class Address:
    """[base + offset], and the coordinates of a tensor map: [base, {c0, c1}]."""

    base: "Register | Symbol | Immediate"
    offset: int = 0
    coordinates: "tuple[Operand, ...]" = ()


@dataclass(frozen=True)
class Group:
    """A vector {a, b}, or a pair of destinations a|b."""

    parts: "tuple[Operand, ...]"


Operand = Register | Symbol | Immediate | Address | Group


@dataclass(frozen=True)
class Instruction:
    """One instruction.

    Args:
        opcode: such as "ld.global.b32".
        operands: in the order of the text.
        guard: the predicate of @p or @!p, or None.
        text: as written, for messages.
        line: "file.py:12" of the Python source, or "".
    """

    opcode: str
    operands: tuple[Operand, ...]
    guard: Register | None
    text: str
    line: str

    @property
    def parts(self) -> tuple[str, ...]:
        """The opcode's words: ("ld", "global", "b32")."""
        return tuple(self.opcode.split("."))

    def __str__(self) -> str:
        short = self.text if len(self.text) <= 140 else self.text[:137] + "..."
        return f"`{short}`" + (f" ({self.line})" if self.line else "")


@dataclass(frozen=True)
class Kernel:
    """One kernel.

    Args:
        name: of the entry.
        params: (name, type such as "u64", or "map" for an opaque 128 bytes passed by value), in order.
        threads: of a block, (x, y, z).
        registers: name -> type.
        shared: name -> offset in shared memory.
        shared_bytes: of the arrays of known size; a dynamic one begins behind them.
        instructions: in order.
        labels: name -> index in `instructions`.
    """

    name: str
    params: tuple[tuple[str, str], ...]
    threads: tuple[int, int, int]
    registers: dict[str, str]
    shared: dict[str, int]
    shared_bytes: int
    instructions: tuple[Instruction, ...]
    labels: dict[str, int]


_TOKEN = re.compile(
    r"""\s*(?:
      \.loc\s+(?P<file>\d+)\s+(?P<line>\d+)[^\n]*
    | (?P<ignored>\.(?:pragma|section|file)[^\n]*)
    | (?P<label>[$\w]+):
    | (?P<open>\{)
    | (?P<close>\})
    | (?P<statement>[^;{}]+(?:\{[^{}]*\}[^;{}]*)*);
    )""",
    re.X,
)


def _split(text: str) -> Iterator[str]:
    """The parts between commas that are in no bracket."""
    depth, begin = 0, 0
    for i, letter in enumerate(text + ","):
        depth += (letter in "{[") - (letter in "}]")
        if letter == "," and not depth:
            if part := text[begin:i].strip():
                yield part
            begin = i + 1


def _threads(directives: str) -> tuple[int, int, int]:
    found = re.search(r"\.(?:req|max)ntid\s+(\d+)(?:\s*,\s*(\d+))?(?:\s*,\s*(\d+))?", directives)
    if found is None:
        raise Unsupported("a kernel without .reqntid; its block size would have to be guessed")
    x, y, z = (int(number or 1) for number in found.groups())
    return x, y, z


def _params(text: str) -> Iterator[tuple[str, str]]:
    for param in filter(None, (part.strip() for part in text.split(","))):
        found = re.fullmatch(r"\.param\s+(?:\.align\s+\d+\s+)?\.(\w+)\s.*?(\w+)(\[\d+\])?", param, re.S)
        if found is None:
            raise Unsupported(f"the parameter {param!r}")
        yield found.group(2), "map" if found.group(3) else found.group(1)


def _shared(text: str) -> tuple[dict[str, int], int]:
    """Where each array of shared memory begins, and how many bytes have a known size."""
    offsets: dict[str, int] = {}
    end = 0
    pattern = r"\.shared\s+\.align\s+(\d+)\s+\.[a-z](\d+)\s+([\w$]+)\[(\d*)\]"
    arrays = [(int(align), SIZES[bits], name, count) for align, bits, name, count in re.findall(pattern, text)]
    for align, size, name, count in sorted(arrays, key=lambda array: not array[3]):  # the dynamic one last
        end = -(-end // align) * align
        offsets[name] = end
        end += size * int(count or 0)
    return offsets, end


class _Scopes:
    """Names that are declared in inner braces, as inline assembly does, get a number of their own."""

    def __init__(self) -> None:
        self.open: list[dict[str, str]] = [{}]
        self.count = 0

    def declare(self, name: str) -> str:
        if len(self.open) == 1:
            return name
        self.count += 1
        self.open[-1][name] = f"{name}@{self.count}"
        return self.open[-1][name]

    def chain(self) -> tuple[dict[str, str], ...]:
        """The dictionaries of now; an inner label may be added to them after its use."""
        return tuple(reversed(self.open))


def _resolve(name: str, scopes: tuple[dict[str, str], ...]) -> str:
    return next((scope[name] for scope in scopes if name in scope), name)


class _Operands:
    """Reads operands; `scopes` and `registers` say what a name is."""

    def __init__(self, registers: dict[str, str], scopes: tuple[dict[str, str], ...]) -> None:
        self.registers = registers
        self.scopes = scopes

    def list(self, text: str) -> tuple[Operand, ...]:
        return tuple(map(self.one, _split(text)))

    def one(self, text: str) -> Operand:
        if text.startswith("{"):
            return Group(self.list(text[1:-1]))
        if text.startswith("["):
            return self._address(text[1:-1].strip())
        if "|" in text:
            return Group(tuple(self.one(part.strip()) for part in text.split("|")))
        return self._name(text)

    def _name(self, text: str) -> Register | Symbol | Immediate:
        negated, name = text.startswith("!"), text.lstrip("!")
        name = _resolve(name, self.scopes)
        if name in self.registers:
            return Register(name, negated)
        if re.match(r"-?\d", name):
            return Immediate(name)
        return Symbol(name)

    def _address(self, text: str) -> Address:
        base, _, coordinates = text.partition(",")
        name, plus, offset = base.partition("+")
        found = self._name(name.strip())
        rest = self.one(coordinates.strip()) if coordinates.strip() else Group(())
        return Address(found, int(offset, 0) if plus else 0, rest.parts if isinstance(rest, Group) else (rest,))


def _declare_registers(statement: str, scopes: _Scopes, registers: dict[str, str]) -> None:
    kind, names = statement.split(None, 2)[1:]
    for name in names.split(","):
        many = re.fullmatch(r"\s*(%?\w+)<(\d+)>\s*", name)
        declared = [f"{many.group(1)}{i}" for i in range(int(many.group(2)))] if many else [name.strip()]
        registers |= {scopes.declare(each): kind.lstrip(".") for each in declared}


def parse(ptx: str) -> Kernel:
    """Read a module that has one kernel.

    Raises:
        Unsupported: functions besides the kernel, or what this reader does not know.
    """
    files = {number: PurePath(path).name for number, path in re.findall(r'^\s*\.file\s+(\d+)\s+"([^"]*)"', ptx, re.M)}
    ptx = re.sub(r"//[^\n]*", "", re.sub(r"/\*.*?\*/", "", ptx, flags=re.S))
    entries = list(re.finditer(r"\.entry\s+([\w$]+)\s*\((.*?)\)([^{]*)\{", ptx, re.S))
    if len(entries) != 1 or re.search(r"^\s*(?:\.visible\s+)?\.func\b", ptx, re.M):
        raise Unsupported(f"a module of {len(entries)} kernels, or with functions; expected one kernel alone")
    entry = entries[0]
    shared, shared_bytes = _shared(ptx)
    registers: dict[str, str] = {}
    labels: dict[str, int] = {}
    raw: list[tuple[str, str, tuple[dict[str, str], ...]]] = []
    scopes, line, position = _Scopes(), "", entry.end()
    while True:
        token = _TOKEN.match(ptx, position)
        if token is None:
            raise Unsupported(f"the text {ptx[position : position + 80].strip()!r}")
        position = token.end()
        if token["file"]:
            line = f"{files.get(token['file'], '?')}:{token['line']}"
        elif token["label"]:
            labels[scopes.declare(token["label"]) if token["label"][0] != "$" else token["label"]] = len(raw)
        elif token["open"]:
            scopes.open.append({})
        elif token["close"]:
            scopes.open.pop()
            if not scopes.open:
                break
        elif token["statement"]:
            statement = " ".join(token["statement"].split())
            if statement.startswith(".reg"):
                _declare_registers(statement, scopes, registers)
            elif statement.startswith("."):
                if not statement.startswith(".shared"):
                    raise Unsupported(f"the directive {statement!r}")
            else:
                raw.append((statement, line, scopes.chain()))
    instructions = tuple(_instruction(text, where, registers, chain) for text, where, chain in raw)
    params, threads = tuple(_params(entry.group(2))), _threads(entry.group(3))
    return Kernel(entry.group(1), params, threads, registers, shared, shared_bytes, instructions, labels)


def _instruction(text: str, line: str, registers: dict[str, str], chain: tuple[dict[str, str], ...]) -> Instruction:
    operands = _Operands(registers, chain)
    found = re.fullmatch(r"(?:@(!?)([%\w]+)\s+)?(\S+)\s*(.*)", text, re.S)
    assert found is not None, text
    negated, guard, opcode, rest = found.groups()
    instruction = Instruction(opcode, operands.list(rest), None, text, line)
    if guard is None:
        return instruction
    return replace(instruction, guard=Register(_resolve(guard, chain), bool(negated)))
