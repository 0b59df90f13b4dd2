"""Integer and floating-point arithmetic, comparison and selection.

Floats are rounded to nearest. fma is summed in float64 and rounded to the type; ex2, rcp and the like, which the
hardware approximates, are rounded from the exact value.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.gpu.ptx.findings import Unsupported
from tests.gpu.ptx.instructions.table import instruction
from tests.gpu.ptx.machine import Machine, Step
from tests.gpu.ptx.registers import Lanes, parts
from tests.gpu.ptx.text import Instruction
from tests.gpu.ptx.types import TYPES, Type, flush

Array = NDArray[Any]
WIDE = {"u16": "u32", "s16": "s32", "u32": "u64", "s32": "s64"}


def elementwise(machine: Machine, what: Instruction, function: Callable[..., Array], kind: Type, result: Type) -> Step:
    """The step: result operand = function of the other operands, all read as `kind`; .ftz flushes both."""
    sources = [machine.registers.numbers(operand, kind) for operand in what.operands[1:]]
    store = machine.registers.store(what.operands[0], result)
    if "ftz" in what.parts and kind.dtype is np.float32:
        function = _flushed(function)
    if len(sources) == 1:
        (only,) = sources
        return lambda lanes: store(lanes, function(only(lanes)))
    if len(sources) == 2:
        left, right = sources
        return lambda lanes: store(lanes, function(left(lanes), right(lanes)))
    return lambda lanes: store(lanes, function(*(source(lanes) for source in sources)))


def _flushed(function: Callable[..., Array]) -> Callable[..., Array]:
    return lambda *operands: flush(function(*map(flush, operands)))


def _saturated(function: Callable[..., Array]) -> Callable[..., Array]:
    return lambda *operands: np.nan_to_num(np.clip(function(*operands), 0, 1), nan=0.0)


@instruction("add", "sub", words="rn ftz sat")
def _add(machine: Machine, what: Instruction) -> Step:
    kind = machine.type_of(what)
    function: Callable[..., Array] = np.add if what.parts[0] == "add" else np.subtract
    if "sat" in what.parts:
        if not kind.is_float:
            raise Unsupported(f"the instruction {what}")
        function = _saturated(function)
    return elementwise(machine, what, function, kind, kind)


def _high(kind: Type) -> Callable[[Array, Array], Array]:
    """The upper half of a product."""
    if kind.size == 8:
        python = object  # 128 bits
        return lambda a, b: ((a.astype(python) * b.astype(python)) >> 64).astype(kind.dtype)
    wide = TYPES[WIDE[kind.name]].dtype
    return lambda a, b: (a.astype(wide) * b.astype(wide) >> wide(8 * kind.size)).astype(kind.dtype)


@instruction("mul", words="lo hi wide rn ftz sat")
def _mul(machine: Machine, what: Instruction) -> Step:
    kind = machine.type_of(what)
    if "wide" in what.parts:
        result = TYPES[WIDE[kind.name]]
        wide = result.dtype
        return elementwise(machine, what, lambda a, b: a.astype(wide) * b.astype(wide), kind, result)
    function = _high(kind) if "hi" in what.parts else np.multiply
    return elementwise(machine, what, _saturated(function) if "sat" in what.parts else function, kind, kind)


@instruction("mad", words="lo hi wide")
def _mad(machine: Machine, what: Instruction) -> Step:
    kind = machine.type_of(what)
    if "wide" not in what.parts:
        product = _high(kind) if "hi" in what.parts else np.multiply
        return elementwise(machine, what, lambda a, b, c: product(a, b) + c, kind, kind)
    result = TYPES[WIDE[kind.name]]
    wide, registers = result.dtype, machine.registers
    a, b = (registers.numbers(operand, kind) for operand in what.operands[1:3])
    c, store = registers.numbers(what.operands[3], result), registers.store(what.operands[0], result)
    return lambda lanes: store(lanes, a(lanes).astype(wide) * b(lanes).astype(wide) + c(lanes))


@instruction("fma", words="rn ftz sat relu")
def _fma(machine: Machine, what: Instruction) -> Step:
    kind = machine.type_of(what)

    def fma(a: Array, b: Array, c: Array) -> Array:
        total = (a.astype(np.float64) * b + c).astype(kind.dtype)
        return np.where(total > 0, total, np.where(np.isnan(total), total, 0)) if "relu" in what.parts else total

    return elementwise(machine, what, _saturated(fma) if "sat" in what.parts else fma, kind, kind)


def _quotient(a: Array, b: Array) -> Array:
    """Integer division towards zero; by zero, all bits set as the hardware gives."""
    zero = b == 0
    safe = np.where(zero, b.dtype.type(1), b)
    quotient = a // safe
    if a.dtype.kind == "i":
        quotient += (a % safe != 0) & ((a < 0) != (safe < 0))
    return np.where(zero, np.invert(np.zeros_like(a)), quotient)


@instruction("div", words="rn ftz full approx")
def _div(machine: Machine, what: Instruction) -> Step:
    kind = machine.type_of(what)
    return elementwise(machine, what, np.divide if kind.is_float else _quotient, kind, kind)


@instruction("rem")
def _rem(machine: Machine, what: Instruction) -> Step:
    kind = machine.type_of(what)
    return elementwise(machine, what, lambda a, b: a - _quotient(a, b) * b, kind, kind)


@instruction("min", "max", words="ftz NaN")
def _min_max(machine: Machine, what: Instruction) -> Step:
    kind = machine.type_of(what)
    keeps_nan = not kind.is_float or "NaN" in what.parts
    functions = {"min": (np.fmin, np.minimum), "max": (np.fmax, np.maximum)}
    return elementwise(machine, what, functions[what.parts[0]][keeps_nan], kind, kind)


@instruction("neg", "abs", words="ftz")
def _sign(machine: Machine, what: Instruction) -> Step:
    kind = machine.type_of(what)
    return elementwise(machine, what, np.negative if what.parts[0] == "neg" else np.abs, kind, kind)


_FUNCTIONS: dict[str, Callable[[Array], Array]] = {
    "ex2": np.exp2,
    "lg2": np.log2,
    "rcp": lambda x: 1 / x,
    "sqrt": np.sqrt,
    "rsqrt": lambda x: 1 / np.sqrt(x),
    "sin": np.sin,
    "cos": np.cos,
    "tanh": np.tanh,
}


@instruction(*_FUNCTIONS, words="approx rn ftz")
def _function(machine: Machine, what: Instruction) -> Step:
    kind, function = machine.type_of(what), _FUNCTIONS[what.parts[0]]
    return elementwise(machine, what, lambda x: function(x.astype(np.float64)).astype(kind.dtype), kind, kind)


def _is_nan(a: Array, b: Array) -> Array:
    return np.isnan(a) | np.isnan(b)


_ORDERED: dict[str, Callable[[Array, Array], Array]] = {
    "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal, "eq": np.equal,
    "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal,
}  # fmt: skip


def _or_nan(compare: Callable[[Array, Array], Array]) -> Callable[[Array, Array], Array]:
    return lambda a, b: compare(a, b) | _is_nan(a, b)


_COMPARE: dict[str, Callable[[Array, Array], Array]] = {
    **_ORDERED,
    **{f"{name}u": _or_nan(function) for name, function in _ORDERED.items()},
    "ne": lambda a, b: (a != b) & ~_is_nan(a, b) if a.dtype.kind == "f" else a != b,
    "neu": lambda a, b: (a != b) | _is_nan(a, b),
    "num": lambda a, b: ~_is_nan(a, b),
    "nan": _is_nan,
}
_COMBINE: dict[str, Callable[[Array, Array], Array]] = {
    "and": np.logical_and,
    "or": np.logical_or,
    "xor": np.logical_xor,
}


@instruction("setp", words=" ".join([*_COMPARE, *_COMBINE, "ftz"]))
def _setp(machine: Machine, what: Instruction) -> Step:
    kind, registers, pred = machine.type_of(what), machine.registers, TYPES["pred"]
    compare = _COMPARE[what.parts[1]]
    a, b = (registers.numbers(operand, kind) for operand in what.operands[1:3])
    targets = [registers.write(part, pred) for part in parts(what.operands[0])]
    combine = _COMBINE.get(what.parts[2])
    other = registers.read(what.operands[3], pred) if combine else None
    ftz = "ftz" in what.parts

    def step(lanes: Lanes) -> None:
        left, right = a(lanes), b(lanes)
        found = compare(flush(left), flush(right)) if ftz else compare(left, right)
        values = (found[:, 0], found[:, 1]) if kind.is_pair else (found, ~found)
        for target, value in zip(targets, values, strict=False):
            target(lanes, value if combine is None or other is None else combine(value, other(lanes)))

    return step


@instruction("selp")
def _selp(machine: Machine, what: Instruction) -> Step:
    kind, registers = machine.type_of(what), machine.registers
    a, b = (registers.read(operand, kind) for operand in what.operands[1:3])
    choose, write = registers.read(what.operands[3], TYPES["pred"]), registers.write(what.operands[0], kind)
    return lambda lanes: write(lanes, np.where(choose(lanes), a(lanes), b(lanes)))


@instruction("copysign")
def _copysign(machine: Machine, what: Instruction) -> Step:
    kind = machine.type_of(what)
    return elementwise(machine, what, lambda sign, value: np.copysign(value, sign), kind, kind)
