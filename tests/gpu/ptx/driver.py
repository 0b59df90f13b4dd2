"""A Triton driver that executes what would be launched: kernel[grid](...) compiles as ever, and the PTX runs here.

Grid, constants and arguments are those of the code that launches; tensors are on the CPU and are changed in place.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from triton import knobs
from triton.runtime import driver
from triton.tools.tensor_descriptor import TensorDescriptor

from tests.gpu.ptx.findings import Report
from tests.gpu.ptx.launch import execute
from tests.gpu.ptx.tensor_map import TensorMap
from tests.gpu.stub_driver import StubDriver

__all__ = ["executing"]

Edit = Callable[[str], str]
HIDDEN = 4  # arguments of a launcher before the kernel's: two of metadata, two hooks


class ExecutingDriver(StubDriver):
    """Args: compute capability such as 80; schedule; what changes the PTX before it is executed."""

    def __init__(self, arch: int, schedule: str, edit: Edit | None) -> None:
        super().__init__(arch)
        self.schedule, self.edit = schedule, edit
        self.report = Report()
        self.text: dict[str, str] = {}  # hash of a compiled kernel -> PTX

    def get_current_device(self) -> int:
        """Triton keeps compiled kernels by device: one device for each architecture."""
        return self.arch

    def remember(self, module: Any, function: Any, name: str, files: dict[str, str], key: str) -> None:
        """What Triton calls when a kernel is loaded."""
        self.text[key] = next(Path(path).read_text() for file, path in files.items() if file.endswith(".ptx"))

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        """What Triton calls instead of a compiled launcher."""
        given = [name for name, kind in source.signature.items() if kind != "constexpr"]
        names = list(source.signature)

        def launch(x: int, y: int, z: int, stream: int, function: int, *arguments: Any) -> None:
            values = dict(zip(names, arguments[HIDDEN:], strict=True))
            active = driver.active
            assert isinstance(active, ExecutingDriver)  # the kernel may have been compiled under an earlier one
            ptx = self.text[metadata.hash]
            if active.edit is not None:
                ptx = active.edit(ptx)
            chosen = _expanded({name: values[name] for name in given}, getattr(metadata, "tensordesc_meta", None))
            execute(ptx, (x, y, z), chosen, metadata.shared, active.schedule, active.report)

        return launch


def _expanded(values: dict[str, Any], described: Sequence[Mapping[str, Any]] | None) -> dict[str, Any]:
    """Arguments as the kernel takes them: a tensor descriptor is a tensor map, the sizes and the strides."""
    kinds = iter(described or ())
    found: dict[str, Any] = {}
    for name, value in values.items():
        if not isinstance(value, TensorDescriptor):
            found[name] = value
            continue
        kind = next(kinds)
        rows, columns = kind["block_size"]
        found[name] = TensorMap(value.base, (rows, columns), kind["swizzle"])
        for what, numbers in (("shape", value.shape), ("stride", value.strides)):
            found |= {f"{name}.{what}{i}": number for i, number in enumerate(numbers)}
    return found


@contextmanager
def executing(arch: int, schedule: str = "forward", edit: Edit | None = None) -> Iterator[Report]:
    """Within it, Triton compiles for `arch` and launches are executed; gives the report that they add to.

    Args:
        arch: 80 or 90.
        schedule: "forward", "reverse" or "lockstep".
        edit: changes the PTX before it is executed, to see that a fault is found.
    """
    chosen = ExecutingDriver(arch, schedule, edit)
    before = driver._active
    driver.set_active(chosen)
    knobs.runtime.kernel_load_end_hook.add(chosen.remember)
    try:
        yield chosen.report
    finally:
        knobs.runtime.kernel_load_end_hook.remove(chosen.remember)
        driver.set_active(before)
