"""Time and memory of prune_ on whole models with random weights: calibrated ViT-B/16 and global selection in ViT-L/16.

    python -m benchmarks.pruning [--only calibrated|calibrated-large|global] [--threads 2] [--images 256] [--depth 2]

`calibrated-large` is there for its memory. Fewer images shorten the passes and not the masks, whose matrices of 4096
x 4096 are decomposed in every block; `--images 32 --method obs` is a short run, `--images 64` by the default (which
also holds the costs of all entries while the budget is shared) a long one. The row says the method and the images.

Memory is the peak of the resident set beyond what the process holds with the model and the images before the call.
Random images and weights: what is computed does not depend on their values, but for the number of repair steps.
"""

import argparse
import time
from pathlib import Path

import timm
import torch

from benchmarks.memory import status_mib
from benchmarks.record import results_file, stamped, write_rows
from rmtkern.api import prune_
from rmtkern.tables import Table

KEYS = ("case", "model", "threads", "images")
CASES = {
    "calibrated": ("vit_base_patch16_224", "auto"),
    "global": ("vit_large_patch16_224", "magnitude"),
    "calibrated-large": ("vit_large_patch16_224", "auto"),
}
"""Case -> timm model, method; "auto" gets images."""

DEFAULT = ("calibrated", "global")


def measure(case: str, threads: int, images: int, depth: int | None = None, by: str | None = None) -> dict[str, object]:
    """One row.

    Args:
        case: key of CASES.
        threads: of torch.
        images: to calibrate on.
        depth: blocks of the model; None: as many as it has.
        by: a method instead of the case's "auto".
    """
    torch.manual_seed(0)
    torch.set_num_threads(threads)
    name, method = CASES[case]
    calibrated, method = method == "auto", by or method
    model = timm.create_model(name, **({} if depth is None else {"depth": depth})).eval()
    weights_mib = sum(p.nbytes for p in model.parameters()) / 2**20
    calibration = torch.randn(images, *model.default_cfg["input_size"]) if calibrated else None
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts at what is held now
    before, wall, cpu = status_mib("VmRSS"), time.perf_counter(), time.process_time()
    plan = prune_(model, 0.5, method, calibration=calibration)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    extra = status_mib("VmHWM") - before
    plan.verify(model)
    row = {"case": case, "model": name, "threads": threads, "images": images if calibration is not None else 0}
    row |= {"method": plan.config.method, "sparsity": plan.sparsity, "weights": plan.prunable.total}
    row |= {"wall_s": round(wall, 1)}
    return row | {"cpu_s": round(cpu, 1), "model_mib": weights_mib, "extra_mib": extra, "extra": extra / weights_mib}


def main() -> None:
    """Measure, print and store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=sorted(CASES), help=f"default: {' and '.join(DEFAULT)}")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--images", type=int, default=256, help="to calibrate on")
    parser.add_argument("--method", help="of the calibrated cases; default: auto")
    parser.add_argument("--depth", type=int, help="of the model, to estimate what the whole takes; stores nothing")
    parser.add_argument("--dry", action="store_true", help="store nothing")
    args = parser.parse_args()
    cases = [args.only] if args.only else DEFAULT
    if args.method is not None and "global" in cases:
        parser.error("--method is for the calibrated cases: give --only one of them")
    rows = [measure(case, args.threads, args.images, args.depth, args.method) for case in cases]
    if not args.dry and args.depth is None:
        write_rows(results_file("pruning"), [stamped(row, timm=timm.__version__) for row in rows], KEYS)
    print(Table(list(rows[0]), [list(row.values()) for row in rows]).to_text())


if __name__ == "__main__":
    main()
