"""write_report: the page of a model or a checkpoint as one file. It decides what goes on it; the others build it."""

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import nn

from rmtkern.certificates.report import Certificate
from rmtkern.evaluation import Evaluation
from rmtkern.packing.decisions import Decisions
from rmtkern.packing.report import PackReport
from rmtkern.pruning.plan import PrunePlan
from rmtkern.report.contents import Contents, layers_of, plan_note
from rmtkern.report.page import summary, to_html
from rmtkern.report.source import from_checkpoint, from_model, travelling_plan
from rmtkern.shards import nbytes_of
from rmtkern.storage import replacing
from rmtkern.sweep import Sweep, load_sweeps
from rmtkern.tables import Table, Tabulated

__all__ = ["PageReport", "write_report"]

PathLike = str | os.PathLike[str]


@dataclass(frozen=True)
class PageReport(Tabulated):
    """What `write_report` wrote; prints as the summary of the page.

    Args:
        path: of the page.
        nbytes: of the page.
        layers: how many are on it.
        facts: (name, value, detail) of the summary, as on the page.
    """

    path: str
    nbytes: int
    layers: int
    facts: tuple[tuple[str, str, str], ...]

    def table(self) -> Table:
        """One row per fact."""
        notes = [f"wrote {self.path}: {self.layers} layers, {self.nbytes / 2**20:.2f} MiB"]
        return Table(("what", "value", "detail"), self.facts, notes)

    def to_json(self) -> str:
        """Everything, as a JSON object."""
        return json.dumps(asdict(self), indent=1)


def write_report(
    model: nn.Module | PathLike,
    path: PathLike,
    plan: PrunePlan | None = None,
    *,
    checkpoint: PathLike | None = None,
    packing: PackReport | None = None,
    decisions: Decisions | PathLike | None = None,
    sweeps: Sweep | PathLike | Iterable[Sweep | PathLike] = (),
    scores: Mapping[str, Evaluation] | None = None,
    certificate: Certificate | None = None,
    title: str | None = None,
    show_progress: bool | None = None,
) -> PageReport:
    """Write one self-contained HTML page about a model: zeros, bytes, spectra, and what was measured of it.

    The page holds its own style, script and pictures, and loads nothing. It has a summary, a map of sparsity by block
    and layer type, a table of layers that sorts and filters, and each layer's spectrum under its fitted
    Marchenko-Pastur law; and, where they are given, accuracy, latency, curves of a sweep, what a certificate bounds,
    and the decisions of `pack_` with their timings. What is not given is named as not measured.

    Args:
        model: dense, pruned or packed, not changed (a packed one is copied and unpacked to see its weights); or a
            checkpoint in safetensors (a file, the index of shards, or the folder of either), whose layers are then told
            by the names of its tensors.
        path: of the page, such as "report.html"; written beside it first, then renamed.
        plan: of `prune_`; default, the one that travels with the checkpoint, if there is one.
        checkpoint: file or folder that the model's weights came from; its name and size, and its plan, go on the page.
        packing: what `pack_` returned for this model.
        decisions: times of layers that `pack_` kept, or the file of them.
        sweeps: what `sweep` returned, or its CSV; several too.
        scores: name of a state of the model, such as "dense" or "pruned" -> what `evaluate` returned.
        certificate: what `certify` returned for this model.
        title: of the page; default, the name of the checkpoint or the model's class.
        show_progress: progress bar; None: only on a terminal.

    Returns:
        Where it is, how large, and its summary.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: no weights to report on, NaN or Inf weights, a damaged file, or a packed checkpoint without its
            model (load it into the model first: `rmtkern.load(path, model)`).
        OSError: the page cannot be written; an old one is as it was.
    """
    from rmtkern import __version__  # not above: the package imports this file

    target, file = Path(path), None if checkpoint is None else Path(checkpoint)
    _check("packing", packing, PackReport)
    _check("plan", plan, PrunePlan)
    _check("certificate", certificate, Certificate)
    states = _checked_scores(scores)
    curves = _checked_sweeps(sweeps)
    times = decisions if decisions is None or isinstance(decisions, Decisions) else Decisions.load(decisions)
    if not isinstance(model, nn.Module | str | os.PathLike):
        raise TypeError(f"model: expected an nn.Module or the path of a checkpoint, got {type(model).__name__}")
    if not isinstance(model, nn.Module):
        file = Path(model)
    plan = travelling_plan(file) if plan is None and file is not None else plan
    source = from_model(model, file) if isinstance(model, nn.Module) else from_checkpoint(Path(model))
    if not source.weights:
        raise ValueError("nothing to report on: no Linear, Conv2d or attention weight was found; give another model")
    contents = Contents(
        title=source.name if title is None else title,
        source=source.words,
        layers=layers_of(source.weights, show_progress),
        parameters=source.parameters,
        nbytes=source.nbytes,
        dtypes=", ".join(dict.fromkeys(str(w.parameter.dtype).removeprefix("torch.") for w in source.weights)),
        nbytes_packed=source.nbytes_packed,
        nbytes_file=None if file is None else nbytes_of(file),
        plan=plan,
        packing=packing,
        decisions=times,
        sweeps=curves,
        scores=states,
        certificate=certificate,
        notes=() if plan is None else (plan_note(plan, source.weights),),
    )
    page = to_html(contents, __version__).encode()
    with replacing(target) as temporary:
        temporary.write_bytes(page)
    facts = tuple((fact.name, fact.value, fact.detail) for fact in summary(contents))
    return PageReport(str(target), len(page), len(contents.layers), facts)


def _check(name: str, value: object, kind: type) -> None:
    if value is not None and not isinstance(value, kind):
        raise TypeError(f"{name}: expected a {kind.__name__}, got {type(value).__name__}")


def _checked_scores(scores: Mapping[str, Evaluation] | None) -> dict[str, Evaluation]:
    _check("scores", scores, Mapping)
    for name, score in (scores or {}).items():
        _check(f"scores[{name!r}]", score, Evaluation)
    return {str(name): score for name, score in (scores or {}).items()}


def _checked_sweeps(sweeps: Sweep | PathLike | Iterable[Sweep | PathLike]) -> tuple[Sweep, ...]:
    """Each as it was scored and, where it was packed too, as it was packed."""
    if isinstance(sweeps, Sweep | str | os.PathLike):
        sweeps = (sweeps,)
    found: list[Sweep] = []
    for item in sweeps:
        if isinstance(item, Sweep):
            scored = Sweep(tuple(row.unpacked for row in item.rows), item.computed)
            found += [scored, item] if item.rows[0].pack else [item]
        elif isinstance(item, str | os.PathLike):
            found += load_sweeps(Path(item))
        else:
            raise TypeError(f"sweeps: expected what sweep returned, or the path of its CSV, got {type(item).__name__}")
    return tuple(found)
