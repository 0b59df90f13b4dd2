"""Speed and exactness of the spectral fits of a whole ViT-B/16, against the ways that others take.

    env -u OPENBLAS_CORETYPE -u OPENBLAS_L2_SIZE python -m benchmarks.spectra

Baselines: numpy.linalg.svd(full_matrices=True) of every layer, the published code's way, and
weightwatcher.WeightWatcher(model).analyze(mp_fit=True). CPU time of one process on one thread; the baselines are timed on every
matrix, unless --sample N asks for N matrices of each shape, which are then scaled by count (the CSV says so).
"""

import argparse
import collections
import csv
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np
import torch
from torch import nn

from benchmarks.environment import environment, results_file
from rmtkern.api import analyze
from rmtkern.models import prunable_weights
from rmtkern.spectrum.fit import fit_singular_values


def spiked_vit() -> nn.Module:
    """timm's ViT-B/16 with random weights and 60 planted spikes in each matrix, up to ten times the edge."""
    import timm

    torch.manual_seed(0)
    model = timm.create_model("vit_base_patch16_224", pretrained=False).eval()
    with torch.no_grad():
        for weight in prunable_weights(model, "all"):
            rows, columns = weight.shape
            rank = min(60, rows, columns)
            edge = 0.02 * (rows**0.5 + columns**0.5)
            u, v = (torch.linalg.qr(torch.randn(size, rank)).Q for size in (rows, columns))
            planted = (u * (edge * torch.logspace(0.02, 1, rank))) @ v.T
            weight.parameter.copy_((0.02 * torch.randn(rows, columns) + planted).reshape(weight.parameter.shape))
    return model


def cpu_seconds(call: Callable[[], Any], repeats: int) -> float:
    """Median CPU time [s] of this process."""
    times = []
    for _ in range(repeats):
        start = time.process_time()
        call()
        times.append(time.process_time() - start)
    return statistics.median(times)


def full_svd_seconds(matrices: list[np.ndarray], sample: int | None) -> tuple[float, int]:
    """CPU time [s] of numpy.linalg.svd(full_matrices=True) over all matrices, and how many were really timed."""
    by_shape: dict[tuple[int, ...], list[np.ndarray]] = collections.defaultdict(list)
    for matrix in matrices:
        by_shape[matrix.shape].append(matrix)
    total, timed = 0.0, 0
    for group in by_shape.values():
        chosen = group[:sample]
        start = time.process_time()
        for matrix in chosen:
            np.linalg.svd(matrix, full_matrices=True)
        total += (time.process_time() - start) * len(group) / len(chosen)
        timed += len(chosen)
    return total, timed


def main() -> None:
    """Measure and write the CSV."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sample", type=int, help="matrices of each shape in the SVD baseline; default all")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    model = spiked_vit()
    matrices = {w.name: w.as_matrix().numpy() for w in prunable_weights(model, "all")}
    fits = analyze(model, show_progress=False)
    worst = 0.0
    for name, matrix in matrices.items():
        exact = np.linalg.svd(matrix.astype(np.float64), compute_uv=False)
        edge = fit_singular_values(exact, matrix.shape).sigma_plus
        worst = max(worst, abs(fits[name].sigma_plus / edge - 1))
    if worst > 1e-6:
        raise SystemExit(f"edges differ from float64 by {worst:.2g}; nothing is timed")
    ours = cpu_seconds(lambda: analyze(model, show_progress=False), args.repeats)
    print(f"{len(matrices)} matrices, edges within {worst:.1e} of float64, analyze {ours:.2f} s")
    baseline, timed = full_svd_seconds(list(matrices.values()), args.sample)
    again = cpu_seconds(lambda: analyze(model, show_progress=False), args.repeats)
    ours = statistics.median([ours, again])
    rows = [("numpy.linalg.svd(full_matrices=True)", metadata_version("numpy"), baseline, timed)]
    try:
        import weightwatcher
    except ModuleNotFoundError:
        print("weightwatcher is not installed (rmtkern[bench]); that row is left out")
    else:
        seconds = cpu_seconds(lambda: weightwatcher.WeightWatcher(model=model).analyze(mp_fit=True), 1)
        rows.append(("weightwatcher analyze(mp_fit=True)", metadata_version("weightwatcher"), seconds, len(matrices)))
    records = [
        {
            "case": "ViT-B/16, all matrices",
            "matrices": len(matrices),
            "baseline": name,
            "baseline_version": version,
            "baseline_matrices_timed": timed,
            "baseline_cpu_s": round(seconds, 3),
            "rmtkern_cpu_s": round(ours, 3),
            "ratio": round(seconds / ours, 1),
            "max_rel_edge_error": f"{worst:.1e}",
            **environment(),
        }
        for name, version, seconds, timed in rows
    ]
    with results_file("spectra").open("w", newline="") as file:
        writer = csv.DictWriter(file, records[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(records)
    for record in records:
        print(f"{record['baseline']}: {record['baseline_cpu_s']} s, rmtkern {record['rmtkern_cpu_s']} s, {record['ratio']}x")


def metadata_version(name: str) -> str:
    """Installed version of a distribution."""
    from importlib import metadata

    return metadata.version(name)


if __name__ == "__main__":
    main()
