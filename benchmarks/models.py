"""Whole-model benchmark: ViT-B/16 (timm, random weights), magnitude-pruned, as pack_ runs it.

python -m benchmarks.models [--batches 8 1] [--sparsities 0 0.7] [--threads 1] [--model vit_base_patch16_224]

Three models are timed in interleaved rounds by pack_: the original (PyTorch fp32), every linear in its strongest dense
form, and packed. The outputs are checked equal first. Rows go to benchmarks/results/models-<cpu>.csv.
"""

import argparse
import gc
import time

import timm
import torch

from benchmarks.record import results_file, stamped, write_rows
from rmtkern.api import prune_
from rmtkern.layouts.cpu import isas
from rmtkern.packing import pack_
from rmtkern.packing_report import PackReport
from rmtkern.tables import Table

SPARSITIES = (0.0, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95)


def mlp_share(report: PackReport) -> float:
    """Fraction of the MLP weights that a sparse layout runs."""
    sizes = [(layer.shape[0] * layer.shape[1], layer.packed) for layer in report.layers if ".mlp." in layer.name]
    return sum(size for size, packed in sizes if packed) / max(1, sum(size for size, _ in sizes))


def measure(name: str, sparsity: float, batch: int) -> tuple[dict[str, object], PackReport]:
    """One row: prune a fresh model, pack it, and take the guard's interleaved times."""
    torch.manual_seed(0)
    model = timm.create_model(name).eval()
    prune_(model, sparsity, "uniform")
    images = torch.randn(batch, 3, 224, 224)
    start = time.perf_counter()
    report = pack_(model, images)
    times = report.end_to_end[0]
    row = {
        "model": name,
        "batch": batch,
        "threads": torch.get_num_threads(),
        "sparsity": sparsity,
        "original_ms": times.original_ms,
        "strongest_dense_ms": times.dense_ms,
        "packed_ms": times.packed_ms,
        "vs_original": times.original_ms / times.packed_ms,
        "vs_strongest_dense": times.speedup,
        "mlp_share_packed": mlp_share(report),
        "share_packed": report.packed_share,
        "mib_before": report.nbytes_before / 2**20,
        "mib_after": report.nbytes_after / 2**20,
        "pack_seconds": time.perf_counter() - start,
        "guard": "; ".join(report.notes),
    }
    return row, report


def main() -> None:
    """Run, print the table and append the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_base_patch16_224", help="a timm name; its weights are random")
    parser.add_argument("--batches", type=int, nargs="+", default=[8, 1])
    parser.add_argument("--sparsities", type=float, nargs="+", default=list(SPARSITIES))
    parser.add_argument("--threads", type=int, default=1, help="1 takes CPU time, more takes wall time")
    parser.add_argument("--layers", action="store_true", help="print each model's layers as well")
    parser.add_argument("--no-csv", action="store_true", help="do not write the rows")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = []
    for batch in args.batches:
        for sparsity in args.sparsities:
            row, report = measure(args.model, sparsity, batch)
            rows.append(row)
            print(Table(list(row), [list(row.values())]).to_text() if len(rows) == 1 else _last(row), flush=True)
            if args.layers:
                print(report)
            if not args.no_csv:
                done = stamped(row, isa=(isas() or ["none"])[0], timm=timm.__version__)
                write_rows(results_file("models"), [done], keys=("model", "batch", "threads", "sparsity"))
            gc.collect()
    shown = [key for key in rows[0] if key != "guard"]
    print(Table(shown, [[row[key] for key in shown] for row in rows]).to_text())


def _last(row: dict[str, object]) -> str:
    return Table(list(row), [list(row.values())]).to_text().splitlines()[-1]


if __name__ == "__main__":
    main()
