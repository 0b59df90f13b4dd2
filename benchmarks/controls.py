"""Negative controls: what a trained model loses when the bulk of its spectra is taken for noise and removed.

    python -m benchmarks.controls --path DIR --model module:function --images module:function

DIR, --model and --images as in benchmarks.accuracy. Every attention and MLP weight is replaced in turn by what a
denoiser leaves of it, without any training. "stored" is the share of the numbers that the result needs, as two factors
of its rank where these are smaller; beside each control that shrinks it stands magnitude pruning to as many numbers. A
row is written as soon as it is known, and one that the file has is not run again.
"""

import argparse
import copy
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.accuracy import against, hits, hits_of, load, pack_hits, score_dense
from benchmarks.record import has_row, read_rows, stamped, write_rows
from rmtkern.api import prune_
from rmtkern.models import prunable_weights
from rmtkern.pruning.cycles import matrices
from rmtkern.spectrum.decompose import singular_values
from rmtkern.spectrum.denoise import shrink, truncate
from rmtkern.spectrum.fit import SpectralFit, fit_spectra

KEYS = ("model", "split", "images", "control")
"""Columns that identify a row."""


def _spikes(matrix: Tensor, fit: SpectralFit, bulk: float) -> Tensor:
    """The singular values above the Marchenko-Pastur edge, and a share of those below, the largest."""
    short = min(matrix.shape)
    below = round((fit.gamma or 0.0) * short)
    return truncate(matrix, short - below + round(bulk * below))


CONTROLS: dict[str, Callable[[Tensor, SpectralFit], Tensor]] = {
    "half of the bulk removed": lambda matrix, fit: _spikes(matrix, fit, 0.5),
    "whole bulk removed": lambda matrix, fit: _spikes(matrix, fit, 0.0),
    "Gavish-Donoho threshold": lambda matrix, fit: shrink(matrix, fit.sigma2 or 0.0, "hard"),
    "optimal shrinker (Frobenius)": lambda matrix, fit: shrink(matrix, fit.sigma2 or 0.0, "frobenius"),
}
"""Name -> function(matrix [N, K], its fit) -> what is left of it; docs/math.md (18)-(20)."""


@torch.no_grad()
def denoise_(model: nn.Module, control: str) -> dict[str, Any]:
    """Replace the weights of a model; returns how many singular values stay, and the share of the numbers stored.

    A matrix whose fit has no variance stays.
    """
    weights = prunable_weights(model)
    fits = fit_spectra(matrices(weights), show_progress=False)
    kept = values = stored = total = 0
    for weight in weights:
        matrix = weight.as_matrix().clone()
        for label, rows in weight.blocks().items():
            fit, block = fits[label], matrix[rows]
            after = CONTROLS[control](block, fit) if fit.sigma2 else block
            s = singular_values([after.double()])[0]
            rank = int((s > 1e-6 * s[0]).sum()) if float(s[0]) > 0 else 0
            kept, values = kept + rank, values + len(s)
            stored, total = stored + min(block.numel(), rank * sum(block.shape)), total + block.numel()
            matrix[rows] = after
        weight.parameter.copy_(weight.to_parameter(matrix))
    return {"kept_values": kept, "values": values, "stored": round(stored / total, 6)}


def main(argv: Sequence[str] | None = None) -> None:
    """Run every control and the magnitude pruning beside it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--path", default=".", help="folder put on the import path")
    parser.add_argument("--model", default="imagenette:load_model", help="module:function")
    parser.add_argument("--images", default="imagenette:load_images", help="module:function")
    parser.add_argument("--name", default="model", help="the model's name in the table")
    parser.add_argument("--split", default="val", choices=("train", "val"))
    parser.add_argument("--limit", type=int, default=500, help="images to evaluate on")
    parser.add_argument("--out", type=Path, help="CSV file; default: print only")
    args = parser.parse_args(argv)

    sys.path.insert(0, args.path)
    dense = load(args.model)().eval()
    images, labels = load(args.images)(args.split, args.limit)
    dense_hits = hits(score_dense(dense, images, labels), labels)

    def run(control: str, change: Callable[[nn.Module], dict[str, Any]]) -> None:
        row: dict[str, Any] = {"model": args.name, "split": args.split, "images": len(labels), "control": control}
        if args.out and has_row(args.out, row, KEYS):
            known = next(one for one in read_rows(args.out) if all(one[key] == str(row[key]) for key in KEYS))
            stored[control] = float(known["stored"])
            return
        model = copy.deepcopy(dense)
        row |= change(model)
        found = hits_of(model, images, labels)
        row |= {**against(dense_hits, found), "hits": pack_hits(found)}
        print(f"{control}: {row['stored']:.3f} stored, top-1 {row['top1']:.4f}, {100 * row['loss']:.1f} +- "
              f"{100 * row['loss_error']:.1f} points lost", flush=True)  # fmt: skip
        if args.out:
            write_rows(args.out, [stamped(row)], KEYS)
        stored[control] = row["stored"]

    def magnitude(share: float) -> Callable[[nn.Module], dict[str, Any]]:
        def change(model: nn.Module) -> dict[str, Any]:
            plan = prune_(model, 1 - share, "magnitude")
            return {"kept_values": None, "values": None, "stored": round(1 - plan.sparsity, 6)}

        return change

    stored: dict[str, float] = {}
    for control in CONTROLS:
        run(control, lambda model, control=control: denoise_(model, control))
        if 0 < stored.get(control, 1.0) < 1:
            run(f"magnitude, as many numbers as {control}", magnitude(stored[control]))


if __name__ == "__main__":
    main()
