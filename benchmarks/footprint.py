"""Peak memory of analyze, prune_, pack_, save and load on whole models, against what the docs promise.

    python -m benchmarks.footprint [--model vit_base_patch16_224 ...] [--call load ...]

Each call runs in a process of its own, on one thread, on a model with random weights. Memory is the peak of the
resident set beyond what the process held with the model before the call. Of `load`, whose model is on the meta
device, that is all of the packed model: pages of the file that it maps are in it, which processes share and the
system can drop.
"""

import argparse
import functools
import multiprocessing
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import timm
import torch
from torch import Tensor, nn

from benchmarks.memory import peak_beyond, weights_mib
from benchmarks.record import results_file, stamped, write_rows
from rmtkern import analyze, load, pack_, prune_, save
from rmtkern.tables import Table

__all__ = ["BOUNDS", "CALLS", "measure", "run"]

MODELS = ("vit_base_patch16_224", "vit_large_patch16_224")
SPARSITY = 0.7
BUDGET_MS = 20
"""Of each measurement of pack_: how long it times does not change what it holds."""
FILE = "packed.safetensors"
BOUNDS = {"analyze": 1.0, "prune_": 1.25, "prune_ global": 1.25, "pack_": 2.0, "save": 0.1, "load": 1.25}
"""What docs/benchmarks.md promises: times the dense weights of the model, or its file where it is loaded."""


def _bitmask_first(calls: Mapping[str, Callable[[], object]], budget_ms: float) -> dict[str, float]:
    """A timer for pack_ that times nothing and prefers bitmask kernels."""
    cost = {"packed": 1.0, "dense": 2.0, "original": 3.0}
    return {name: cost.get(name, 1.0 if "bitmask" in name else 2.0) for name in calls}


def _images(model: nn.Module) -> Tensor:
    return torch.randn(1, *model.pretrained_cfg["input_size"])


def _packing(model: nn.Module, **options: object) -> Callable[[], object]:
    prune_(model, SPARSITY, "uniform", show_progress=False)
    return functools.partial(pack_, model, _images(model), show_progress=False, **options)


def _saving(model: nn.Module, folder: Path) -> Callable[[], object]:
    _packing(model, timer=_bitmask_first, layouts=["bitmask"])()
    return functools.partial(save, model, folder / FILE)


def _loading(model: nn.Module, folder: Path) -> Callable[[], object]:
    return functools.partial(load, folder / FILE, model)


CALLS: dict[str, Callable[[nn.Module, Path], Callable[[], object]]] = {
    "analyze": lambda model, folder: functools.partial(analyze, model, show_progress=False),
    "prune_": lambda model, folder: functools.partial(prune_, model, SPARSITY, show_progress=False),
    "prune_ global": lambda model, folder: functools.partial(prune_, model, SPARSITY, "magnitude", show_progress=False),
    "pack_": lambda model, folder: _packing(model, budget_ms=BUDGET_MS),
    "save": _saving,
    "load": _loading,
}
"""Name -> what prepares it: (model, folder for files) -> the call. "load" needs the file that "save" wrote."""


def measure(call: str, model: str, folder: Path, options: Mapping[str, object] | None = None) -> dict[str, object]:
    """One row, measured in this process.

    Args:
        call: a key of CALLS.
        model: a timm name.
        folder: where "save" writes its file, and "load" finds it.
        options: of the model.
    """
    torch.manual_seed(0)
    torch.set_num_threads(1)
    with torch.device("meta" if call == "load" else "cpu"):
        made = timm.create_model(model, **(options or {})).eval()
    unit, nbytes = ("file", (folder / FILE).stat().st_size) if call == "load" else ("weights", 0)
    unit_mib = nbytes / 2**20 or weights_mib(made)
    extra = peak_beyond(CALLS[call](made, folder))[1]
    row = {"call": call, "model": model, "sparsity": 0.0 if call == "analyze" else SPARSITY, "unit": unit}
    return row | {"unit_mib": unit_mib, "extra_mib": extra, "extra": extra / unit_mib}


def run(call: str, model: str, folder: Path, options: Mapping[str, object] | None = None) -> dict[str, object]:
    """One row, as `measure` gives it, measured in a process of its own: a fork of this one, which must hold no model.

    Raises:
        Exception: what `measure` raises there.
    """
    with multiprocessing.get_context("fork").Pool(1) as pool:
        row: dict[str, object] = pool.apply(measure, (call, model, folder, options))
    return row


def main() -> int:
    """Measure, print and store; 1 if a call took more than is promised."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", help="timm names; default: " + ", ".join(MODELS))
    parser.add_argument("--call", action="append", choices=sorted(CALLS), help="default: all; load needs save")
    parser.add_argument("--dry", action="store_true", help="store nothing")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for model in args.model or MODELS:
        with tempfile.TemporaryDirectory() as folder:
            for call in (call for call in CALLS if args.call is None or call in args.call):
                rows.append(run(call, model, Path(folder)))
                print(Table(list(rows[-1]), [list(rows[-1].values())]).to_text(), flush=True)
                if not args.dry:
                    row = stamped(rows[-1], threads=1, timm=timm.__version__)
                    write_rows(results_file("footprint"), [row], ("call", "model"))
    return int(any(row["extra"] > BOUNDS[row["call"]] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
