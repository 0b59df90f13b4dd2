"""PackReport: what pack_ measured and chose, layer by layer and end to end. Pure data; it times and packs nothing."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from typing import Any, Self, TypeVar

from rmtkern.errors import short
from rmtkern.packing.decisions import Decisions
from rmtkern.tables import Table, Tabulated

__all__ = ["EndToEnd", "GatedReport", "LayerReport", "PackReport", "SiteReport", "is_dense"]


@dataclass(frozen=True, slots=True)
class LayerReport:
    """One nn.Linear of the model.

    Args:
        name: module name.
        shape: (N, K).
        tokens: the different token counts T that the examples gave it, ascending; empty if it was not measured.
        sparsity: fraction of zeros of the weight, [0, 1].
        form: what runs now: a layout's label, "dense/onednn", or "nn.Linear" (untouched); several, if they differ by
            token count; "gated:" and a label in a gate-up pair that runs in one kernel.
        packed: whether a sparse layout runs for at least one token count.
        activation: the activation that was absorbed into the kernel, or None.
        ms: token count -> candidate -> ms; with the activation, if one follows the layer.
        speedup: strongest dense form over the chosen form, the smallest of all token counts; None if not measured. In a
            gate-up pair: the strongest dense forms of its linears over the pair's kernel.
        measured_on: the layer whose measurement decided (equal shapes and similar sparsity share one).
        nbytes_before: of the dense weight.
        nbytes_after: of all forms that are held.
        reason: why this form, in words.
    """

    name: str
    shape: tuple[int, int]
    tokens: tuple[int, ...]
    sparsity: float
    form: str
    packed: bool
    activation: str | None
    ms: Mapping[int, Mapping[str, float]]
    speedup: float | None
    measured_on: str | None
    nbytes_before: int
    nbytes_after: int
    reason: str


@dataclass(frozen=True, slots=True)
class SiteReport:
    """One module that may use a kernel of ours: for attention, LayerNorm, LayerNorm and a linear, or two linears (MLP).

    Args:
        name: module name.
        shapes: of the inputs of its calls on the examples: q and k [B, H, T, d] for attention, [..., K] for LayerNorm,
            [T, K] for the last two.
        torch_ms: the time without the kernel of one of its calls, the largest of all shapes: PyTorch's, with the
            projections of an nn.MultiheadAttention, or of the modules by themselves in the forms chosen for them; None
            if not measured.
        kernel_ms: the same of our kernel.
        used: whether the kernel runs now.
        reason: why, in words.
    """

    name: str
    shapes: tuple[tuple[tuple[int, ...], ...], ...]
    torch_ms: float | None
    kernel_ms: float | None
    used: bool
    reason: str


@dataclass(frozen=True, slots=True)
class GatedReport:
    """One gate-up pair, activation(gate(x)) * up(x).

    Args:
        name: of the module that holds it.
        linears: names of the gate and the up linear, or of the one linear that computes both.
        activation: of the gate, or None.
        ms: token count -> "separate" or the pair's form -> ms; "separate" is each linear in the form chosen for it,
            with activation and product. Empty if it was not measured.
        form: what runs now: the label of the pair's form, or None if the linears stay separate.
        reason: why, in words.
    """

    name: str
    linears: tuple[str, ...]
    activation: str | None
    ms: Mapping[int, Mapping[str, float]]
    form: str | None
    reason: str


@dataclass(frozen=True, slots=True)
class EndToEnd:
    """Whole-model times on one example [ms].

    Args:
        example: index of the example.
        original_ms: the model as it came.
        dense_ms: every linear in its fastest dense form (the strongest dense baseline).
        packed_ms: as pack_ left it.
        kernels_ms: the dense forms with the attention and LayerNorm kernels of the packed model, which is what its
            sparse layers have to gain on; None where that is one of the others.
    """

    example: int
    original_ms: float
    dense_ms: float
    packed_ms: float
    kernels_ms: float | None = None

    @property
    def speedup(self) -> float:
        """The faster of the two dense models over the packed one."""
        return min(self.original_ms, self.dense_ms) / self.packed_ms


@dataclass(frozen=True, slots=True)
class PackReport(Tabulated):
    """What pack_ did; prints as a table.

    Args:
        layers: one entry per nn.Linear, in the model's order.
        end_to_end: one entry per example; empty if nothing could be measured.
        threads: of torch during the measurement.
        notes: what the end-to-end guard did, in words.
        attention: one entry per module that calls scaled_dot_product_attention.
        decisions: what was measured, for `pack_(..., decisions=)`; without what was reused.
        groups_measured: how many groups of alike layers were timed.
        groups_reused: how many took their times from earlier decisions; None if none were given.
        gated: one entry per gate-up pair that was found.
        norms: one entry per LayerNorm module that ran.
        mlps: one entry per module that runs two packed linears one after the other.
        normed: one entry per LayerNorm whose result a packed linear alone reads.
    """

    layers: tuple[LayerReport, ...]
    end_to_end: tuple[EndToEnd, ...]
    threads: int
    notes: tuple[str, ...] = ()
    attention: tuple[SiteReport, ...] = ()
    decisions: Decisions = field(default_factory=Decisions)
    groups_measured: int = 0
    groups_reused: int | None = None
    gated: tuple[GatedReport, ...] = ()
    norms: tuple[SiteReport, ...] = ()
    mlps: tuple[SiteReport, ...] = ()
    normed: tuple[SiteReport, ...] = ()

    @property
    def packed_layers(self) -> int:
        """Number of layers that a sparse layout runs."""
        return sum(layer.packed for layer in self.layers)

    @property
    def packed_share(self) -> float:
        """Weights of the layers that a sparse layout runs, as a fraction of all linear weights, [0, 1]."""
        sizes = [(layer.shape[0] * layer.shape[1], layer.packed) for layer in self.layers]
        return sum(size for size, packed in sizes if packed) / sum(size for size, _ in sizes)

    @property
    def sites(self) -> dict[str, tuple[SiteReport, ...]]:
        """The modules that may use a kernel of ours beside the linears', by kernel."""
        return {
            "attention": self.attention,
            "LayerNorm": self.norms,
            "MLP": self.mlps,
            "normed linear": self.normed,
        }

    @property
    def nbytes_before(self) -> int:
        """Bytes of all linear weights before."""
        return sum(layer.nbytes_before for layer in self.layers)

    @property
    def nbytes_after(self) -> int:
        """Bytes of all linear weights after."""
        return sum(layer.nbytes_after for layer in self.layers)

    def table(self) -> Table:
        """One row per layer, totals as notes."""
        rows = []
        for layer in self.layers:
            dense = [min(ms for label, ms in times.items() if is_dense(label)) for times in layer.ms.values()]
            rows.append(
                (
                    layer.name,
                    f"{layer.shape[0]}x{layer.shape[1]}",
                    "/".join(map(str, layer.tokens)) or None,
                    round(layer.sparsity, 3),
                    layer.form + (f" + {layer.activation}" if layer.activation else ""),
                    "/".join(f"{ms:.3g}" for ms in dense) or None,
                    layer.speedup,
                    layer.reason,
                )
            )
        columns = ("layer", "shape", "T", "sparsity", "form", "dense ms", "speed-up", "why")
        return Table(columns, rows, self._totals())

    def _totals(self) -> list[str]:
        before, after = self.nbytes_before / 2**20, self.nbytes_after / 2**20
        lines = [
            f"{self.packed_layers} of {len(self.layers)} layers packed, {100 * self.packed_share:.1f} % of the linear"
            f" weights; {before:.1f} -> {after:.1f} MiB; {self.threads} thread(s)"
        ]
        if self.groups_reused is not None:
            lines.append(
                f"times of {self.groups_reused} groups of alike layers reused from saved decisions,"
                f" {self.groups_measured} measured"
            )
        for kernel, sites in self.sites.items():
            if sites:
                used = sum(site.used for site in sites)
                why = "; ".join(dict.fromkeys(site.reason for site in sites))
                lines.append(f"{kernel} kernel in {used} of {len(sites)} modules: {why}")
        if self.gated:
            used = sum(pair.form is not None for pair in self.gated)
            why = "; ".join(dict.fromkeys(pair.reason for pair in self.gated))
            lines.append(f"gate and up in one kernel in {used} of {len(self.gated)} pairs: {why}")
        for times in self.end_to_end:
            lines.append(
                f"example {times.example}: original {times.original_ms:.4g} ms, strongest dense (each linear in its"
                f" fastest dense form) {times.dense_ms:.4g} ms, packed {times.packed_ms:.4g} ms:"
                f" {times.speedup:.2f}x"
            )
        return [*lines, *self.notes]

    def to_markdown(self) -> str:
        """The table in Markdown."""
        return self.table().to_markdown()

    def to_csv(self) -> str:
        """The table as CSV, without the totals."""
        return self.table().to_csv()

    def to_json(self) -> str:
        """Everything as one JSON object."""
        record = asdict(self)
        record["decisions"] = self.decisions.records()
        record["packed_layers"], record["packed_share"] = self.packed_layers, self.packed_share
        record["nbytes_before"], record["nbytes_after"] = self.nbytes_before, self.nbytes_after
        return json.dumps(record, indent=1)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The inverse of `to_json`; what `rmtkern bench --json` prints is such an object with further keys.

        Raises:
            ValueError: not the JSON of such a report; says what is wrong.
        """
        try:
            record = json.loads(text)
            if not isinstance(record, dict):
                raise ValueError(f"expected an object, got {short(record)}")
            return cls(
                layers=_all(record["layers"], LayerReport, shape=_matrix, tokens=_sizes, ms=_times),
                end_to_end=_all(record["end_to_end"], EndToEnd),
                threads=_checked("threads", record["threads"], int),
                notes=_names(record["notes"]),
                attention=_all(record["attention"], SiteReport, shapes=_shapes),
                decisions=Decisions.from_records(record["decisions"]),
                groups_measured=_checked("groups_measured", record["groups_measured"], int),
                groups_reused=_checked("groups_reused", record["groups_reused"], int, None),
                gated=_all(record["gated"], GatedReport, linears=_names, ms=_times),
                norms=_all(record["norms"], SiteReport, shapes=_shapes),
                mlps=_all(record.get("mlps", []), SiteReport, shapes=_shapes),  # younger than some files, as the next
                normed=_all(record.get("normed", []), SiteReport, shapes=_shapes),
            )
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"not the JSON of a PackReport ({error}); expected what to_json wrote") from error


def is_dense(label: str) -> bool:
    """Whether the label of a form names a dense one."""
    return label.startswith("dense/")


Row = TypeVar("Row")
_KINDS: dict[str, tuple[type | None, ...]] = {
    "str": (str,), "str | None": (str, None), "bool": (bool,), "int": (int,), "float": (float,),
    "float | None": (float, None),
}  # fmt: skip


def _checked(name: str, value: Any, *kinds: type | None) -> Any:
    """A value of JSON of one of some kinds; an int is a float too, NaN and infinities are none."""
    for kind in kinds:
        if kind is None and value is None:
            return None
        if kind is float and type(value) in (int, float) and math.isfinite(value):
            return float(value)
        if kind is not float and kind is not None and type(value) is kind:
            return value
    wanted = " or ".join("null" if kind is None else kind.__name__ for kind in kinds)
    raise ValueError(f"{name}: expected {wanted}, got {short(value)}")


def _all(records: Any, kind: type[Row], **convert: Callable[[Any], Any]) -> tuple[Row, ...]:
    """Rows of a dataclass from JSON; its plain fields by their annotation, the others by a function."""
    rows = []
    for record in _list(kind.__name__, records):
        found = {}
        for item in fields(kind):  # type: ignore[arg-type]
            if isinstance(record, dict) and item.name not in record and item.default is not MISSING:
                continue  # younger than the file
            if not isinstance(record, dict) or item.name not in record:
                raise ValueError(f"{kind.__name__}: expected an object with {item.name}, got {short(record)}")
            value = record[item.name]
            if item.name in convert:
                found[item.name] = convert[item.name](value)
            else:
                found[item.name] = _checked(item.name, value, *_KINDS[_annotation(item.type)])
        rows.append(kind(**found))
    return tuple(rows)


def _annotation(kind: Any) -> str:
    return str(getattr(kind, "__name__", kind)) if isinstance(kind, type) else str(kind)


def _list(name: str, value: Any) -> Sequence[Any]:
    if not isinstance(value, list):
        raise ValueError(f"{name}: expected a list, got {short(value)}")
    return value


def _sizes(value: Any) -> tuple[int, ...]:
    return tuple(_checked("size", item, int) for item in _list("sizes", value))


def _matrix(value: Any) -> tuple[int, ...]:
    if len(sizes := _sizes(value)) != 2 or min(sizes) < 1:
        raise ValueError(f"shape: expected [N, K], got {short(value)}")
    return sizes


def _shapes(value: Any) -> tuple[tuple[tuple[int, ...], ...], ...]:
    return tuple(tuple(_sizes(shape) for shape in _list("shapes", call)) for call in _list("shapes", value))


def _names(value: Any) -> tuple[str, ...]:
    return tuple(_checked("name", item, str) for item in _list("names", value))


def _times(value: Any) -> dict[int, dict[str, float]]:
    if not isinstance(value, dict) or not all(isinstance(times, dict) for times in value.values()):
        raise ValueError(f"ms: expected times by token count and candidate, got {short(value)}")
    return {
        int(tokens): {label: _checked(f"ms of {label}", ms, float) for label, ms in times.items()}
        for tokens, times in value.items()
    }
