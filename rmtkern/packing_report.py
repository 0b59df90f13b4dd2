"""PackReport: what pack_ measured and chose, layer by layer and end to end. Pure data; it times and packs nothing."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

from rmtkern.packing_decisions import Decisions
from rmtkern.tables import Table

__all__ = ["EndToEnd", "GatedReport", "LayerReport", "PackReport", "SiteReport"]


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
    """One module that calls a function of PyTorch for which we have a kernel: attention or LayerNorm.

    Args:
        name: module name.
        shapes: of the inputs of its calls on the examples: q and k [B, H, T, d] for attention, [..., K] for LayerNorm.
        torch_ms: PyTorch's time for one of its calls, the largest of all shapes, with its projections if it is an
            nn.MultiheadAttention; None if not measured.
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
class PackReport:
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
            dense = [min(ms for label, ms in times.items() if _is_dense(label)) for times in layer.ms.values()]
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
        for kernel, sites in (("attention", self.attention), ("LayerNorm", self.norms)):
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

    def __str__(self) -> str:
        return self.table().to_text()

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


def _is_dense(label: str) -> bool:
    return label.startswith("dense/")
