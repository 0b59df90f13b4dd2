"""The tables of benchmarks.tables about accuracy: the papers' methods and ours, one-shot and fine-tuned, errors too."""

from collections.abc import Callable, Iterable, Sequence
from statistics import fmean

import numpy as np

from benchmarks.accuracy import unpack_hits
from benchmarks.paper.fully_connected import differences
from benchmarks.paper.ordering import decide
from benchmarks.record import rows
from rmtkern.tables import Table

__all__ = ["TABLES", "lost_points"]


def accuracy() -> Table:
    """Top-1 of the presets on a real ViT-S/14 without fine-tuning."""
    found = rows("accuracy-vits14-imagenette.csv")
    levels = sorted({round(float(row["sparsity"]), 2) for row in found})
    methods = list(dict.fromkeys(row["method"] for row in found))
    top1 = {(row["method"], round(float(row["sparsity"]), 2)): f"{100 * float(row['top1']):.1f}" for row in found}
    cells = [[method, *(top1.get((method, level)) for level in levels)] for method in methods]
    first = found[0]
    dense = 100 * float(first["dense_top1"])
    note = (
        f"Top-1 in %, dense {dense:.1f}, {first['images']} validation photographs of Imagenette "
        "(standard error about 1.5), ViT-S/14 (DINOv2). One-shot, no fine-tuning; wanda uses 128 training images."
    )
    return Table(["method", *(f"{level:.0%}" for level in levels)], cells, [note])


def calibrated() -> Table:
    """Points of top-1 that the calibrated methods lose on a real ViT-S/14 without fine-tuning, by pattern."""
    return lost_points("accuracy-vits14-imagenette-calibrated.csv", "One-shot, no fine-tuning.")


def edge_budgets() -> Table:
    """What the Marchenko-Pastur edge adds: budgets with and without it, the same score and repair."""
    note = 'One-shot; each budget with score "admm" and repair "obs", and 512 calibration images.'
    return lost_points("accuracy-vits14-imagenette-edge.csv", note, against="sensitivity")


def cycles() -> Table:
    """Classical RMT with and without its soft threshold and its published thresholds on singular vectors."""
    return lost_points("accuracy-vits14-imagenette-cycles.csv", "One-shot, without data.", against="rmt")


def spectral() -> Table:
    """Spikes as low rank plus a sparse rest against plain patterns at equal measured time, layer by layer."""
    found = rows("spectral-vits14-imagenette.csv")
    spectral = [row for row in found if row["form"] == "spectral"]
    cells = []
    for row in spectral:
        loss, plain = float(row["loss"]), row["plain_loss"]
        other = "none as fast" if plain == "" else "dense" if float(plain) == 0 else f"{float(plain):.4f}"
        ratio = f"{loss / float(plain):.2f}" if plain and float(plain) > 0 else None
        cells.append([row["layer"].removesuffix(".weight"), f"{row['rank']} of {row['spikes']}",
                      f"{float(row['sparsity']):.0%}", f"{float(row['ms']):.3f}",
                      f"{float(row['dense_ms']) / float(row['ms']):.2f}", f"{loss:.4f}", other, ratio])  # fmt: skip
    fair = [float(cell[-1]) for cell in cells if cell[-1] is not None]
    names = ", ".join(dict.fromkeys(row["form"] for row in found if row["form"] != "spectral"))
    first = found[0]
    said = f"geometric mean {np.exp(np.mean(np.log(fair))):.2f}, " if fair else ""
    note = (
        f"ViT-S/14 (DINOv2), {first['calibration_images']} calibration images; loss: tr (V - W) H (V - W)ᵀ over "
        f"tr W H Wᵀ; plain: the least loss of {names} in the same time (dense: the dense layer is as fast). Spectral "
        f"over plain: {said}below 1 in {sum(one < 1 for one in fair)} of {len(fair)}. {first['dtype']}, "
        f"{first['tokens']} tokens, {first['threads']} thread(s), {first['cpu']}."
    )
    heads = ["layer", "rank of spikes", "zeros of the rest", "ms", "x dense", "loss", "plain loss", "over plain"]
    return Table(heads, cells, [note])


def mixed() -> Table:
    """A pattern for each layer by measured times and losses, against one pattern for all."""
    found = rows("accuracy-vits14-imagenette-mixed.csv")
    cells = [
        [row["method"], row["pattern"].replace("+", ", "), f"{float(row['sparsity']):.0%}", row["linear_speedup"][:4],
         _lost([row]), f"{float(row['kl']):.3f} ± {float(row['kl_error']):.3f}", row["images"], row["split"]]
        for row in sorted(found, key=lambda row: float(row["kl"]))
    ]  # fmt: skip
    note = (
        f"One-shot, {found[0]['calibration_images']} calibration images, ViT-S/14 (DINOv2) on Imagenette; images of"
        ' "train" are held-out ones. Linears: all of them by the times of each layer, {dtype}, one thread, over their'
        " fastest dense forms; KL divergence from the dense model."
    )
    heads = ["method", "patterns", "zeros", "linears x dense", "points lost", "KL", "images", "split"]
    return Table(heads, cells, [note.format(dtype=found[0]["dtype"])])


def lost_points(name: str, how: str, against: str = "") -> Table:
    """Points of top-1 lost, method by method and pattern by pattern; of the rows on most validation images.

    Args:
        name: of a file that benchmarks.accuracy wrote.
        how: what the note says of all rows.
        against: method to compare the others with image by image; "": none.
    """
    found = [row for row in rows(name) if row["split"] == "val"]
    groups: dict[tuple[str, ...], list[dict[str, str]]] = {}
    for row in sorted(found, key=lambda row: int(row["images"]), reverse=True):
        group = groups.setdefault((row["method"], row["calibration_images"], row["pattern"], row["asked"]), [])
        if not group or group[0]["images"] == row["images"]:
            group.append(row)
    cases = sorted({(row["pattern"] != "unstructured", row["pattern"], row["asked"]) for row in found})
    methods = list(dict.fromkeys((row["method"], row["calibration_images"]) for row in found))
    base = {key[2:]: group for key, group in groups.items() if key[0] == against}
    cells = [
        [*method,
         *(_lost(groups.get((*method, *case[1:]))) for case in cases),
         *(_more_lost(groups.get((*method, *case[1:])), base.get(case[1:])) for case in cases if against)]
        for method in methods
    ]  # fmt: skip
    dense = sorted({f"{100 * float(row['dense_top1']):.1f}" for group in groups.values() for row in group})
    images = sorted({row["images"] for group in groups.values() for row in group}, key=int)
    note = (
        f"Points of top-1 lost against dense ({', '.join(dense)}), paired standard error, {', '.join(images)}"
        f" validation photographs of Imagenette, ViT-S/14 (DINOv2). {how}"
        f"{_about_seeds(groups.values(), 'sets of calibration images')}"
    )
    heads = [f"{pattern} {float(asked):.0%}" for _, pattern, asked in cases]
    more = [f"{head}, more than {against}" for head in heads if against]
    return Table(["method", "calibration images", *heads, *more], cells, [note])


def _lost(group: Sequence[dict[str, str]] | None) -> str | None:
    """Points of top-1 lost in the mean over seeds, the standard error over images, and the range over seeds."""
    if not group:
        return None
    losses = [100 * float(row["loss"]) for row in group]
    errors = [100 * float(row["loss_error"]) for row in group if row["loss_error"]]
    error = f" ± {fmean(errors):.1f}" if errors else ""
    span = f" ({min(losses):.1f} to {max(losses):.1f})" if len(losses) > 1 else ""
    return f"{fmean(losses):.1f}{error}{span}"


def _more_lost(group: Sequence[dict[str, str]] | None, base: Sequence[dict[str, str]] | None) -> str | None:
    """By how many points more than others, with the standard error of that difference image by image."""
    if not group or not base or group is base:
        return None
    means = []
    for rows_ in (base, group):
        images = int(rows_[0].get("images") or rows_[0]["val_images"])
        known = [unpack_hits(row["hits"], images) for row in rows_ if row["hits"]]
        if not known:
            return None
        means.append(np.mean(known, 0))
    more = 100 * (means[0] - means[1])
    return f"{more.mean():+.1f} ± {more.std(ddof=1) / len(more) ** 0.5:.1f}"


def _groups(found: Sequence[dict[str, str]], keys: Sequence[str]) -> dict[tuple[str, ...], list[dict[str, str]]]:
    """Rows by their values of some columns."""
    groups: dict[tuple[str, ...], list[dict[str, str]]] = {}
    for row in found:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    return groups


def _about_seeds(groups: Iterable[Sequence[dict[str, str]]], what: str) -> str:
    return f" In brackets the range over {what}." if any(len(group) > 1 for group in groups) else ""


def finetuned() -> Table:
    """Top-1 of a pruned ViT-S/14 before and after fine-tuning; seeds of one request together."""
    found = rows("finetune-vits14-imagenette.csv")
    request = ("method", "calibration_images", "pattern", "asked_sparsity", "epochs", "train_images", "val_images")
    groups = _groups(found, request)

    def top1(group: Sequence[dict[str, str]], column: str) -> str | None:
        known = [100 * float(row[column]) for row in group if row[column]]
        return f"{fmean(known):.1f}" if known else None

    cells = [
        [method, images, pattern, f"{float(sparsity):.0%}", f"{epochs} x {train}",
         " ".join(sorted(row["seed"] for row in group)), val,
         *(top1(group, column) for column in ("dense_top1", "pruned_top1", "top1")), _lost(group)]
        for (method, images, pattern, sparsity, epochs, train, val), group in groups.items()
    ]  # fmt: skip
    columns = ["method", "calibration images", "pattern", "sparsity", "epochs x images", "seeds", "val images"]
    note = (
        "Top-1 in %, mean over the seeds, and points lost against dense with their paired standard error where it was"
        " kept; ViT-S/14 (DINOv2) on Imagenette: AdamW, distillation from the dense model, bfloat16 autocast, 1 thread;"
        f" at most {max(float(row['train_cpu_s']) for row in found):.0f} s of CPU time."
        f"{_about_seeds(groups.values(), 'seeds')}"
    )
    return Table([*columns, "dense", "pruned", "fine-tuned", "lost"], cells, [note])


def same_protocol() -> Table:
    """The papers' methods and magnitude, pruned and fine-tuned alike: at once, or in steps from a first sparsity on."""
    found = rows("protocol-vits14-imagenette.csv")
    levels = sorted({row["asked_sparsity"] for row in found}, key=float)
    cells = []
    for first in ["", *sorted({row["steps"].split()[0] for row in found if row["steps"]}, key=float)]:
        groups: dict[tuple[str, str], list[dict[str, str]]] = {}
        for row in found:
            if row["steps"].split()[:1] == ([first] if first else []):
                groups.setdefault((row["method"], row["asked_sparsity"]), []).append(row)
            elif not row["steps"] and row["asked_sparsity"] == first:  # a first step is what at once is too
                groups.setdefault((row["method"], first), []).append(row)
        for method in dict.fromkeys(row["method"] for row in found):
            mine = [groups.get((method, level)) for level in levels]
            if len([group for group in mine if group]) > bool(first):
                base = [groups.get(("magnitude", level)) for level in levels]
                cells.append([method, f"from {float(first):.0%}" if first else "at once", *map(_lost, mine),
                              *map(_more_lost, mine, base)])  # fmt: skip
    heads = [f"{float(level):.0%}" for level in levels]
    one = found[0]
    note = (
        f"Points of top-1 lost against dense ({100 * float(one['dense_top1']):.1f}) after fine-tuning, paired standard"
        f" error, {one['val_images']} validation photographs of Imagenette, ViT-S/14 (DINOv2). Every method alike:"
        f" {one['epochs']} epoch(s) over {one['train_images']} images after each pruning, learning rate {one['lr']},"
        f" distillation {one['distill']}, the same seed; methods with images see"
        f" {max(int(row['calibration_images']) for row in found)} of them before. At once: pruned from dense; from 20 %"
        " and so on: in steps, each fine-tuned."
    )
    return Table(["method", "pruned", *heads, *(f"{head}, more than magnitude" for head in heads)], cells, [note])


def controls() -> Table:
    """Negative controls: the bulk removed, without training."""
    found = rows("controls-vits14-imagenette.csv")
    cells = [
        [row["control"], f"{row['kept_values']} of {row['values']}" if row["values"] else None,
         f"{float(row['stored']):.0%}", f"{100 * float(row['top1']):.1f}", _lost([row])]
        for row in found
    ]  # fmt: skip
    note = (
        f"All attention and MLP weights of ViT-S/14 (DINOv2), no training; top-1 in %, dense"
        f" {100 * float(found[0]['dense_top1']):.1f}, {found[0]['images']} validation photographs of Imagenette, paired"
        " standard error. stored: numbers needed, as two factors where these are fewer."
    )
    return Table(["what is done to every weight", "singular values left", "stored", "top-1", "lost"], cells, [note])


def paper() -> Table:
    """The papers' synthetic, regression and theory experiments: what was found against what should be."""
    groups = _groups(rows("paper.csv"), ("experiment", "quantity", "setting"))

    def number(value: str) -> str:
        return f"{float(value):.4g}" if value else ""

    cells = []
    for key, group in groups.items():
        found = [float(row["measured"]) for row in group]
        low, high = (number(group[0][side]) for side in ("low", "high"))
        holds = sum(row["holds"] == "True" for row in group)
        cells.append([*key, f"{fmean(found):.4g}", f"{min(found):.4g} to {max(found):.4g}",
                      f"{low or '-'} to {high or '-'}", number(group[0]["published"]) or None,
                      f"{holds} of {len(group)}"])  # fmt: skip
    columns = ["experiment", "what", "setting", "mean", "range over seeds", "expected", "published", "holds"]
    note = "`python -m benchmarks.paper`; a seed is another random draw. Published: one draw, or read from a figure."
    return Table(columns, cells, [note])


def _mean(group: Sequence[dict[str, str]], column: str) -> float:
    return fmean(float(row[column]) for row in group)


def _seeds(group: Sequence[dict[str, str]]) -> str:
    return " ".join(sorted(row["seed"] for row in group))


FULLY_CONNECTED = "amd-epyc-family-25-model-17"
SETTING = ("network", "width", "epochs", "train_images")


def fully_connected() -> Table:
    """Fashion-MNIST by fully connected networks, with and without Marchenko-Pastur pruning and regularisation."""
    found = rows(f"fully-connected-{FULLY_CONNECTED}.csv")
    noise = [column for column in found[0] if column.startswith("noise_") and column.endswith("_test_top1")]
    cells = []
    for (net, width, epochs, images, training), group in _groups(found, (*SETTING, "training")).items():
        span = f" ({min(group, key=_top1)['test_top1']} to {max(group, key=_top1)['test_top1']})" if group[1:] else ""
        cells.append([
            net, width, f"{epochs} x {images}", training, _seeds(group), f"{_mean(group, 'train_top1'):.2f}",
            f"{_mean(group, 'test_top1'):.2f}{span}", " ".join(row["classes"] for row in group),
            *(f"{_mean(group, column):.1f}" for column in noise), group[0]["published_test_top1"],
        ])  # fmt: skip
    columns = ["network", "width", "epochs x images", "training", "seeds", "train top-1", "test top-1", "classes",
               *(f"noise {column.split('_')[1]}" for column in noise), "published test top-1"]  # fmt: skip
    note = (
        "`python -m benchmarks.paper.fully_connected`. Top-1 in %, mean and range over seeds; classes: how many the"
        " network ever says, for each seed (the first one also where no output is above zero);"
        " noise: test top-1 with normal noise of that deviation on every weight but"
        f" the last layer's (C5). {found[0]['test_images']} test images. L1 and L2 are stronger than the paper's by as"
        " much as the training is shorter. Published: width 3000, 100 epochs, an initialisation that is not named."
    )
    return Table(columns, cells, [note])


def _top1(row: dict[str, str]) -> float:
    return float(row["test_top1"])


def fully_connected_order() -> Table:
    """The papers' ordering of these trainings, tested."""
    found = rows(f"fully-connected-{FULLY_CONNECTED}.csv")
    cells = []
    for (net, width, epochs, images), group in _groups(found, SETTING).items():
        claims = differences(group)
        verdicts = decide(list(claims.values()))
        cells += [
            [net, width, f"{epochs} x {images}", f"{low} < {high}", one.seeds, f"{one.points:+.2f}",
             f"{one.low:+.2f} to {one.high:+.2f}", f"{one.p:.2g}", verdict]
            for ((low, high), one), verdict in zip(claims.items(), verdicts, strict=True)
        ]  # fmt: skip
    columns = ["network", "width", "epochs x images", "claim", "seeds", "points", "95 % interval", "p", "verdict"]
    note = (
        "Points of test top-1 between the two trainings, paired over images and seeds; the interval is about other"
        " images and other seeds, and with one seed about these two networks alone. Verdict: the claims of one setting"
        " together at 5 % (Holm); reversed: the other one is better."
    )
    return Table(columns, cells, [note])


def fully_connected_small() -> Table:
    """How few numbers these networks need without a loss that held-out images would show."""
    found = rows(f"fully-connected-small-{FULLY_CONNECTED}.csv")
    cells = []
    for key, group in _groups(found, (*SETTING, "training", "recipe")).items():
        net, width, epochs, images, training, recipe = key
        before, after = _mean(group, "numbers"), _mean(group, "small_numbers")
        top1 = [f"{_mean(group, f'{name}_top1'):.2f}" for name in ("trained", "tuned", "small")]
        lost = [_interval(group, name) for name in ("trained", "tuned")]
        cells.append([
            net, width, f"{epochs} x {images}", training, recipe, _seeds(group), f"{before:,.0f}", f"{after:,.0f}",
            f"{1 - after / before:.1%}", round(_mean(group, "factors")), *top1,
            *(_without_loss(points, half) if after < before else None for points, half in lost),
        ])  # fmt: skip
    columns = ["network", "width", "epochs x images", "training", "recipe", "seeds", "numbers", "small numbers",
               "fewer", "factored", "as trained", "tuned", "small", "lost against as trained",
               "lost against tuned"]  # fmt: skip
    one = found[0]
    note = (
        "Numbers: weights and biases that are not zero, without the bits or indices that say where they are. Each step"
        " leaves fewer weights and is fine-tuned for an epoch with its mask; the last counts whose top-1 on"
        f" {one['held_out']} held-out training images is at most {100 * float(one['max_drop']):g} points below that of"
        " the tuned network (0.0 %: not even the first). Tuned: the dense network after one such epoch. Magnitude:"
        " globally smallest entries go."
        " Calibrated: prune_'s sensitivity. Factored: matrices that became two without their bulk, where that was free"
        " and smaller. Test points lost, with paired 95 % intervals over"
        f" {one['test_images']} images; none: at most 0.2 points, and the interval reaches zero."
    )
    return Table(columns, cells, [note])


def _without_loss(points: float, half: float) -> str:
    """Points lost and their interval, and whether that is none."""
    return f"{points:.2f} ± {half:.2f}" + (": none" if points <= 0.2 and points - half <= 0 else "")


def _interval(group: Sequence[dict[str, str]], name: str) -> tuple[float, float]:
    """Points lost in the mean over seeds, and half the width of their 95 % interval over images."""
    errors = [float(row[f"{name}_loss_error"]) for row in group]
    return _mean(group, f"{name}_loss"), 1.96 * sum(error**2 for error in errors) ** 0.5 / len(errors)


TABLES: dict[str, Callable[[], Table]] = {
    "accuracy": accuracy,
    "calibrated": calibrated,
    "edge-budgets": edge_budgets,
    "mixed": mixed,
    "cycles": cycles,
    "spectral": spectral,
    "finetuned": finetuned,
    "same-protocol": same_protocol,
    "controls": controls,
    "paper": paper,
    "fully-connected": fully_connected,
    "fully-connected-order": fully_connected_order,
    "fully-connected-small": fully_connected_small,
}
"""Name in a document -> table."""
