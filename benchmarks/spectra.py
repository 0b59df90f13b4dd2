"""Fitting the spectra of all 50 matrices of ViT-B/16: this library against the published way and weightwatcher.

    python -m benchmarks.spectra [--rounds 3] [--weightwatcher-rounds 1]

CPU seconds of one thread, interleaved, medians. Unset OPENBLAS_CORETYPE and OPENBLAS_L2_SIZE if set: they slow NumPy.
The SVD baseline is timed on one matrix of each shape and multiplied by their count (the `timed` column says so).
"""

import argparse
import importlib.metadata
import importlib.util
import itertools
import os
import statistics
import sys
import time
from collections.abc import Callable

for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[_name] = "1"  # read when NumPy and torch load, hence before them

import numpy as np  # noqa: E402
import torch  # noqa: E402

from benchmarks.record import results_file, stamped, write_rows  # noqa: E402
from rmtkern.spectrum import decompose  # noqa: E402
from rmtkern.spectrum.fit import fit_singular_values, fit_spectra  # noqa: E402

SHAPES = {  # timm vit_base_patch16_224: shape -> how many of them
    "attn.qkv": ((2304, 768), 12),
    "attn.proj": ((768, 768), 12),
    "mlp.fc1": ((3072, 768), 12),
    "mlp.fc2": ((768, 3072), 12),
    "patch_embed": ((768, 768), 1),
    "head": ((1000, 768), 1),
}


def weights(seed: int = 0) -> dict[str, np.ndarray]:
    """The 50 matrices: float32 noise of sd 0.02 plus 60 planted values between 1.05 and 8 times the edge."""
    rng = np.random.default_rng(seed)
    found = {}
    for role, (shape, count) in SHAPES.items():
        for index in range(count):
            u, v = (np.linalg.qr(rng.standard_normal((side, 60)))[0] for side in shape)
            planted = 0.02 * (shape[0] ** 0.5 + shape[1] ** 0.5) * np.geomspace(8.0, 1.05, 60)
            matrix = 0.02 * rng.standard_normal(shape) + (u * planted) @ v.T
            found[f"{role}.{index}"] = matrix.astype(np.float32)
    return found


def cpu_seconds(call: Callable[[], object]) -> float:
    """CPU time of this process for one call."""
    start = time.process_time()
    call()
    return time.process_time() - start


def largest_edge_error(matrices: dict[str, np.ndarray]) -> float:
    """Largest relative difference of sigma_plus from a float64 SVD of every matrix."""
    fits = fit_spectra(matrices, show_progress=False)
    errors = []
    for name, matrix in matrices.items():
        exact = fit_singular_values(np.linalg.svd(matrix.astype(np.float64), compute_uv=False), fits[name].shape)
        if exact.sigma_plus is None or fits[name].sigma_plus is None:
            raise RuntimeError(f"{name} was not fitted")
        errors.append(abs(fits[name].sigma_plus / exact.sigma_plus - 1))
        if fits[name].n_spikes != exact.n_spikes:
            raise RuntimeError(f"{name}: {fits[name].n_spikes} spikes, exact {exact.n_spikes}")
    return max(errors)


def published_way(matrices: dict[str, np.ndarray]) -> float:
    """CPU seconds of numpy.linalg.svd(full_matrices=True) for all 50, from one matrix of each shape."""
    return sum(
        count * cpu_seconds(lambda m=matrices[f"{role}.0"]: np.linalg.svd(m, full_matrices=True))
        for role, (_, count) in SHAPES.items()
    )


def watcher(matrices: dict[str, np.ndarray]) -> Callable[[], object] | None:
    """Call analyze(mp_fit=True) of weightwatcher on a model of 50 nn.Linear with these weights, or None without it."""
    if importlib.util.find_spec("weightwatcher") is None:
        return None
    import weightwatcher

    model = torch.nn.Sequential()
    for matrix in matrices.values():
        layer = torch.nn.Linear(matrix.shape[1], matrix.shape[0], bias=False)
        layer.weight.data.copy_(torch.from_numpy(matrix))
        model.append(layer)

    def call() -> object:
        details = weightwatcher.WeightWatcher(model=model).analyze(mp_fit=True)
        if len(details) != len(matrices):
            raise RuntimeError(f"weightwatcher analysed {len(details)} of {len(matrices)} layers")
        return details

    return call


def versions() -> dict[str, str]:
    """Columns beside the environment: what else the numbers depend on."""
    found = {}
    for package in ("scipy", "weightwatcher"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = ""
    blas = np.show_config(mode="dicts")["Build Dependencies"]["blas"]
    return {**found, "numpy_blas": f"{blas['name']} {blas['version']}"}


def main() -> int:
    """Time, print and store; exit 1 where an edge is off or a target is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--weightwatcher-rounds", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(1)
    matrices = weights()
    error = largest_edge_error(matrices)
    if error > 1e-6:
        print(f"edges differ from float64 by {error:.1e}, more than 1e-6")
        return 1
    peer = watcher(matrices) if args.weightwatcher_rounds else None
    installed = decompose._numpy_solver()
    solvers = {"scipy evr": installed, "numpy": np.linalg.eigvalsh}
    if installed is np.linalg.eigvalsh:
        del solvers["scipy evr"]
    ours: dict[str, list[float]] = {name: [] for name in solvers}
    svd: list[float] = []
    watched: list[float] = []

    def time_ours() -> None:
        for name, solver in solvers.items():
            decompose._numpy_solver = lambda chosen=solver: chosen
            ours[name].append(cpu_seconds(lambda: fit_spectra(matrices, show_progress=False)))

    for index in range(args.rounds):
        time_ours()
        svd.append(published_way(matrices))
        time_ours()
        if peer is not None and index < args.weightwatcher_rounds:
            watched.append(cpu_seconds(peer))
    baselines = [("numpy.linalg.svd(full_matrices=True)", svd, "one matrix of each shape x count", 25.0)]
    if watched:
        baselines.append(("weightwatcher analyze(mp_fit=True)", watched, "all 50 layers", 10.0))
    rows = []
    for (baseline, times, timed, target), (solver, own_times) in itertools.product(baselines, ours.items()):
        base, own = statistics.median(times), statistics.median(own_times)
        row = {"case": "ViT-B/16, 50 matrices, float32", "baseline": baseline, "timed": timed, "runs": len(times)}
        row |= {"baseline_ms": round(base * 1e3), "eigensolver": solver, "fit_spectra_ms": round(own * 1e3)}
        row |= {"fit_spectra_runs": len(own_times), "fit_spectra_min_ms": round(min(own_times) * 1e3)}
        row |= {"ratio": round(base / own, 1), "target": target, "max_edge_error": f"{error:.1e}"}
        rows.append(stamped(row, **versions()))
        print(f"{baseline} {base:.2f} s, fit_spectra ({solver}) {own:.2f} s: {base / own:.1f}x, target {target:g}x")
    print(f"edges within {error:.1e} of float64")
    write_rows(results_file("spectra"), rows)
    return int(any(row["ratio"] < row["target"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
