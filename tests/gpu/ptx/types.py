"""PTX's types, how a register of 8 to 64 bits holds each, and how its numbers are computed with.

Registers hold bit patterns. `decode` turns the patterns of a type into an array to compute with, `encode` back:
bfloat16 is computed in float32, pairs such as f16x2 as arrays [threads, 2].
"""

import re
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.gpu.ptx.findings import Unsupported
from tests.gpu.ptx.text import Immediate
from tests.gpu.rounding import bfloat16_to_float32, float32_to_bfloat16

Array = NDArray[Any]

RAW: dict[int, Any] = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


@dataclass(frozen=True)
class Type:
    """A fundamental type.

    Args:
        name: such as "s32".
        size: bytes.
        dtype: of the array to compute with; of "bf16" float32.
    """

    name: str
    size: int
    dtype: Any

    @property
    def is_float(self) -> bool:
        """Whether it has a sign of zero, NaN and rounding."""
        return "f" in self.name

    @property
    def is_signed(self) -> bool:
        """Whether it is an integer that is widened by its sign."""
        return self.name[0] == "s"

    @property
    def is_pair(self) -> bool:
        """Whether a register of 32 bits holds two of them."""
        return self.name.endswith("x2")

    @property
    def raw(self) -> Any:
        """The unsigned type of its patterns."""
        return np.bool_ if self.name == "pred" else RAW[self.size]

    def decode(self, patterns: Array) -> Array:
        """Patterns [threads] of `raw` -> numbers."""
        if self.name == "bf16":
            return bfloat16_to_float32(patterns)
        if self.name == "bf16x2":
            return bfloat16_to_float32(np.ascontiguousarray(patterns).view(np.uint16)).reshape(-1, 2)
        if self.is_pair:
            return np.ascontiguousarray(patterns).view(self.dtype).reshape(-1, 2)
        return patterns.view(self.dtype)

    def encode(self, numbers: Array) -> Array:
        """Numbers -> patterns [threads] of `raw`; floats are rounded to nearest even."""
        if self.name in ("bf16", "bf16x2"):
            numbers = float32_to_bfloat16(numbers)
        else:
            numbers = np.ascontiguousarray(numbers, dtype=self.dtype)
        return numbers.view(self.raw)[:, 0] if self.is_pair else numbers.view(self.raw)

    def literal(self, operand: Immediate) -> Array:
        """The pattern of a literal, [1] of `raw`."""
        text = operand.text
        bits = {"0f": np.uint32, "0d": np.uint64}.get(text[:2].lower())
        if bits is not None:
            pattern = np.array([int(text[2:], 16)], bits)
            if self.is_float and self.size != pattern.itemsize:
                raise Unsupported(f"the literal {text} as {self.name}")
            return pattern.view(self.raw) if pattern.itemsize == self.size else pattern.astype(self.raw)
        if not re.fullmatch(r"-?(0[xX][0-9a-fA-F]+|0[bB][01]+|\d+)U?", text):
            raise Unsupported(f"the literal {text}")
        number = int(text.rstrip("U"), 0 if not re.fullmatch(r"-?0\d+U?", text) else 8)
        if self.name == "pred":
            return np.array([number != 0])
        return np.array([number % (1 << 8 * self.size)], self.raw)


TYPES: dict[str, Type] = {
    type_.name: type_
    for type_ in (
        Type("pred", 1, np.bool_),
        *(Type(f"b{8 * size}", size, raw) for size, raw in RAW.items()),
        *(Type(f"u{8 * size}", size, raw) for size, raw in RAW.items()),
        *(Type(f"s{8 * size}", size, np.dtype(f"i{size}").type) for size in RAW),
        Type("f16", 2, np.float16),
        Type("bf16", 2, np.float32),
        Type("s16x2", 4, np.int16),
        Type("u16x2", 4, np.uint16),
        Type("f16x2", 4, np.float16),
        Type("bf16x2", 4, np.float32),
        Type("tf32", 4, np.uint32),
        Type("f32", 4, np.float32),
        Type("f64", 8, np.float64),
    )
}


def flush(numbers: Array) -> Array:
    """Float32 with subnormal numbers replaced by zeros of their sign, as .ftz does."""
    return np.where(np.abs(numbers) < np.float32(2**-126), np.copysign(np.float32(0), numbers), numbers)
