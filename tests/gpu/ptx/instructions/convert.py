"""cvt: between integers and floats of every width."""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.gpu.ptx.findings import Unsupported
from tests.gpu.ptx.instructions.table import instruction
from tests.gpu.ptx.machine import Machine, Step
from tests.gpu.ptx.registers import Lanes
from tests.gpu.ptx.text import Instruction
from tests.gpu.ptx.types import TYPES, Type, flush
from tests.gpu.rounding import round_to_tf32

Array = NDArray[Any]
_TO_INTEGER: dict[str, Callable[[Array], Array]] = {
    "rni": np.rint,
    "rzi": np.trunc,
    "rmi": np.floor,
    "rpi": np.ceil,
}


@instruction("cvt", words="rn rna rz rni rzi rmi rpi ftz sat satfinite relu")
def _cvt(machine: Machine, what: Instruction) -> Step:
    if "satfinite" in what.parts or "relu" in what.parts:
        raise Unsupported(f"the instruction {what}")
    to, source = (TYPES[word] for word in what.parts[-2:])
    registers = machine.registers
    if to.is_pair:  # the first source is the upper half
        upper, lower = (registers.numbers(operand, source) for operand in what.operands[1:3])
        store = registers.store(what.operands[0], to)
        return lambda lanes: store(lanes, np.stack([lower(lanes), upper(lanes)], 1))
    read = registers.numbers(what.operands[1], source, wider=True)
    if to.name == "tf32":
        if "rna" not in what.parts:
            raise Unsupported(f"the instruction {what}")
        write = registers.write(what.operands[0], TYPES["b32"])
        return lambda lanes: write(lanes, round_to_tf32(read(lanes)).view(np.uint32))
    convert, store = _conversion(what, to, source), registers.store(what.operands[0], to)

    def step(lanes: Lanes) -> None:
        store(lanes, convert(read(lanes)))

    return step


def _conversion(what: Instruction, to: Type, source: Type) -> Callable[[Array], Array]:
    rounding = next((word for word in what.parts if word in _TO_INTEGER), None)
    ftz, saturate = "ftz" in what.parts, "sat" in what.parts
    if "rz" in what.parts and to.is_float:
        raise Unsupported(f"the instruction {what}")  # only rounding to nearest is done
    if source.is_float and not to.is_float:
        if rounding is None:
            raise Unsupported(f"the instruction {what}")
        towards, limits = _TO_INTEGER[rounding], np.iinfo(to.dtype)

        def to_integer(x: Array) -> Array:  # out of range saturates, NaN is 0 (for 64 bits: the lowest)
            whole = towards(x.astype(np.float64))
            inside = np.where(np.isnan(whole), 0.0, np.clip(whole, float(limits.min), float(limits.max)))
            exact = (inside >= float(limits.max)) if limits.max > 2**53 else np.zeros(len(x), bool)
            return np.where(exact, to.dtype(limits.max), np.where(exact, 0.0, inside).astype(to.dtype))

        return to_integer

    def convert(x: Array) -> Array:
        if ftz and x.dtype == np.float32:
            x = flush(x)
        if rounding is not None:
            x = _TO_INTEGER[rounding](x)
        if saturate and to.is_float:
            x = np.nan_to_num(np.clip(x, 0, 1), nan=0.0)
        elif saturate:
            x = np.clip(x, np.iinfo(to.dtype).min, np.iinfo(to.dtype).max)
        return x.astype(to.dtype)

    return convert
