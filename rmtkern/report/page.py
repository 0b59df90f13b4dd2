"""The HTML of a report: one page that carries its own style and script and asks nothing of a network.

It words and lays out what `contents` found; text from a checkpoint is escaped and never becomes an id, a class or code.
"""

import base64
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from rmtkern.markup import clipped, escape
from rmtkern.models import ROLES
from rmtkern.pruning.plan import Count, sparsity_grid
from rmtkern.report.contents import Contents, Layer, timings
from rmtkern.report.figures import curves_svg, series_class, spectrum_svg
from rmtkern.sweep import Sweep
from rmtkern.tables import Table, cell_text

__all__ = ["heat_colour", "summary", "to_html"]

HEAT_STEPS = 20
LIGHT, DARK = (0xF1, 0xF5, 0xF9), (0x08, 0x3A, 0x66)
"""Colours of a layer without zeros and of one with nothing but zeros."""


@dataclass(frozen=True)
class Fact:
    """One card of the summary: what it is, its value, and a detail in small print."""

    name: str
    value: str
    detail: str = ""


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def _bytes(count: int) -> str:
    return f"{count / 2**20:.1f} MiB" if count >= 2**20 else f"{count / 2**10:.1f} KiB"


def _zeros(count: Count) -> str:
    return f"{count.zeros:,} of {count.total:,} are zero"


def summary(contents: Contents) -> list[Fact]:
    """The cards, in their order; what was not measured says so."""
    every, projections = contents.zeros(), contents.zeros("attn", "mlp")
    facts = [
        Fact("Parameters", f"{contents.parameters:,}", f"{every.total:,} of them in {len(contents.layers)} layers")
    ]
    if projections.total:
        facts.append(Fact("Sparsity, attention and MLP", _percent(projections.sparsity), _zeros(projections)))
    facts.append(Fact("Sparsity, all layers", _percent(every.sparsity), _zeros(every)))
    facts.append(Fact("Bytes, dense", _bytes(contents.nbytes), _file(contents)))
    if contents.nbytes_packed is not None:
        ratio = contents.nbytes_packed / contents.nbytes
        facts.append(Fact("Bytes, packed", _bytes(contents.nbytes_packed), f"{ratio:.2f} of dense, all tensors"))
    elif contents.packing is not None:
        before, after = contents.packing.nbytes_before, contents.packing.nbytes_after
        facts.append(Fact("Bytes of linears, packed", _bytes(after), f"{_bytes(before)} before"))
    return facts + _accuracy(contents) + _certified(contents) + _latency(contents)


def _file(contents: Contents) -> str:
    size = "" if contents.nbytes_file is None else f"; the file has {_bytes(contents.nbytes_file)}"
    return contents.dtypes + size


def _accuracy(contents: Contents) -> list[Fact]:
    facts = []
    for name, score in contents.scores.items():
        detail = f"top-5 {score.top5:.2%}, loss {score.loss:.4f}, {score.count:,} images"
        facts.append(Fact(f"Top-1, {clipped(name)}", f"{score.top1:.2%}", detail))
    target = contents.plan.target if contents.plan is not None else None
    if target is not None and target.trials:
        kept = [trial for trial in target.trials if target.allows(trial.accuracy)]
        best = max(kept, key=lambda trial: trial.sparsity, default=None)
        if best is not None:
            detail = f"{target.accuracy:.2%} before, {target.images:,} images, while the sparsity was searched"
            facts.append(Fact("Top-1, held out", f"{best.accuracy:.2%}", detail))
    return facts or [Fact("Accuracy", "not measured", "give images to score, or a sweep")]


def _certified(contents: Contents) -> list[Fact]:
    """The most labels that a proof for the images keeps; nothing without a certificate."""
    found = contents.certificate
    if found is None:
        return []
    proofs = [bound for bound in found.bounds if bound.holds.startswith("proof")]
    best = max(proofs, key=lambda bound: bound.certified, default=None)
    if best is None:
        return []
    detail = f"{best.holds} ({best.name}); {found.measured.kept:.2%} did stay on {found.images:,} images"
    return [Fact("Labels certified to stay", f"{best.certified:.2%}", detail)]


def _latency(contents: Contents) -> list[Fact]:
    times = contents.packing.end_to_end if contents.packing is not None else ()
    threads = 0 if contents.packing is None else contents.packing.threads
    return [
        Fact(
            f"Latency, packed{f', example {time.example}' if len(times) > 1 else ''}",
            f"{time.packed_ms:.4g} ms",
            f"{time.speedup:.2f} times as fast as the strongest dense form ({min(time.original_ms, time.dense_ms):.4g} "
            f"ms), {threads} thread(s)",
        )
        for time in times
    ] or [Fact("Latency", "not measured", "give what pack_ reported")]


def heat_colour(step: int) -> tuple[str, str]:
    """Background and text colour of one of the HEAT_STEPS + 1 steps of sparsity."""
    share = step / HEAT_STEPS
    mixed = [round(a + (b - a) * share) for a, b in zip(LIGHT, DARK, strict=True)]
    linear = (((value / 255 + 0.055) / 1.055) ** 2.4 for value in mixed)  # sRGB; none of these is near black
    luminance = sum(weight * value for weight, value in zip((0.2126, 0.7152, 0.0722), linear, strict=True))
    return "#" + "".join(f"{value:02x}" for value in mixed), "#000000" if luminance > 0.179 else "#ffffff"


def _style() -> str:
    heat = "\n".join(
        f".h{step} {{ background: {back}; color: {text}; }}"
        for step, (back, text) in ((step, heat_colour(step)) for step in range(HEAT_STEPS + 1))
    )
    return f"{_asset('page.css')}{heat}\n"


def _asset(name: str) -> str:
    return files("rmtkern.report").joinpath(name).read_text("utf-8")


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def to_html(contents: Contents, version: str) -> str:
    """The whole page.

    Args:
        contents: what it says.
        version: of the package, for the footer.
    """
    style, script = _style(), _asset("page.js")
    policy = (
        f"default-src 'none'; style-src {_hash(style)}; script-src {_hash(script)}; base-uri 'none'; form-action 'none'"
    )
    sections = [
        ("summary", "Summary", _summary(contents)),
        ("map", "Sparsity by block and layer type", _map(contents.layers)),
        ("curves", "Accuracy and latency against sparsity", _curves(contents.sweeps)),
        ("certificate", "What pruning can have done to the outputs", _certificate(contents)),
        ("packing", "What runs each layer, and what was timed", _packing(contents)),
        ("layers", "Layers", _layers(contents)),
        ("spectra", "Spectra", _spectra(contents.layers)),
    ]
    shown = [(key, title, body) for key, title, body in sections if body]
    links = "".join(f'<li><a href="#{key}">{escape(title)}</a></li>' for key, title, _ in shown)
    body = "\n".join(
        f'<section id="{key}" aria-labelledby="{key}-heading"><h2 id="{key}-heading">{escape(title)}</h2>\n'
        f"{text}</section>"
        for key, title, text in shown
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{escape(clipped(contents.title))}</title>
<style>{style}</style>
</head>
<body>
<a class="skip" href="#summary">Skip to the summary</a>
<header>
<h1>{escape(clipped(contents.title))}</h1>
<p class="soft">{escape(contents.source)}</p>
<nav aria-label="Sections"><ul>{links}</ul></nav>
</header>
<main>
{body}
</main>
<footer><p>Made by rmtkern {escape(version)} from the weights and from what was measured; it holds all it needs and
asks nothing of a network.</p></footer>
<script>{script}</script>
</body>
</html>
"""


def _summary(contents: Contents) -> str:
    cards = "".join(
        f'<div><dt>{escape(fact.name)}</dt><dd class="value">{escape(fact.value)}</dd>'
        + (f'<dd class="detail">{escape(fact.detail)}</dd>' if fact.detail else "")
        + "</div>"
        for fact in summary(contents)
    )
    notes = [*contents.notes]
    if contents.plan is not None:
        notes = [contents.plan.table().notes[0], *notes]
    return f'<dl class="cards">{cards}</dl>\n{_paragraphs(notes)}'


def _paragraphs(lines: Iterable[str]) -> str:
    return "".join(f"<p>{escape(line)}</p>\n" for line in lines)


def _scroll(key: str, label: str, table: str, tall: bool = False) -> str:
    """A table in a box of its own that scrolls, also by keyboard."""
    css = "scroll tall" if tall else "scroll"
    return f'<div class="{css}" role="region" aria-label="{escape(label)}" tabindex="0" id="{key}">{table}</div>\n'


def _map(layers: Sequence[Layer]) -> str:
    grid = sparsity_grid(layers)
    roles = [role for role in ROLES if any(role in row for row in grid.values())]
    head = "".join(f'<th scope="col">{escape(role)}</th>' for role in roles)
    body = ""
    for block, row in grid.items():
        cells = "".join(_heat(row[role]) if role in row else '<td class="none">none</td>' for role in roles)
        body += f'<tr><th scope="row">{escape(clipped(block))}</th>{cells}</tr>\n'
    table = (
        '<table class="map" id="sparsity-map"><caption>Zeros in %, darker is sparser</caption>'
        f'<thead><tr><th scope="col">block</th>{head}</tr></thead>\n<tbody>\n{body}</tbody></table>'
    )
    return _scroll("map-scroll", "Sparsity by block and layer type", table)


def _heat(count: Count) -> str:
    return f'<td class="h{round(HEAT_STEPS * count.sparsity)}">{100 * count.sparsity:.1f}</td>'


def _curves(sweeps: Sequence[Sweep]) -> str:
    parts = []
    for index, found in enumerate(sweeps):
        first = found.rows[0]
        where = f"{first.data}, {first.images:,} images"
        if first.pack:
            where += f", packed in {first.pack}, input {first.example}, {first.threads} thread(s), {first.cpu}"
        pictures = []
        if not first.pack and found.curves:
            percent = {name: [(100 * x, 100 * y) for x, y in line] for name, line in found.curves.items()}
            title = "Top-1 against sparsity"
            pictures.append((title, curves_svg(f"curve-{index}-a", title, percent, "sparsity [%]", "top-1 [%]")))
        if found.latency_curves:
            percent = {name: [(100 * x, y) for x, y in line] for name, line in found.latency_curves.items()}
            title = "Latency of the packed model against sparsity"
            pictures.append((title, curves_svg(f"curve-{index}-l", title, percent, "sparsity [%]", "latency [ms]")))
        if found.speed_curves:
            percent = {name: [(x, 100 * y) for x, y in line] for name, line in found.speed_curves.items()}
            title = "Top-1 of the packed model against its speed-up"
            label = "times as fast as the strongest dense form"
            pictures.append((title, curves_svg(f"curve-{index}-s", title, percent, label, "top-1 [%]", mark=1.0)))
        drawn = "".join(f"<figure>{svg}<figcaption>{escape(title)}</figcaption></figure>" for title, svg in pictures)
        numbers = _static(found.table(), f"curve-{index}-numbers", "Numbers of the curves")
        parts.append(
            f"<h3>{escape(where)}</h3>\n{_legend(found.curves)}"
            f'<div class="figures large">{drawn}</div>\n<details><summary>The numbers</summary>{numbers}</details>\n'
        )
    return "".join(parts)


def _legend(curves: Mapping[str, Any]) -> str:
    items = "".join(
        f'<li><svg viewBox="0 0 36 14" aria-hidden="true"><path class="{series_class(index)}" d="M2 7H34"/></svg>'
        f"{escape(clipped(name))}</li>"
        for index, name in enumerate(curves)
    )
    return f'<ul class="legend">{items}</ul>\n'


def _static(table: Table, key: str, label: str) -> str:
    """A table as it is, in a box that scrolls."""
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in table.columns)
    body = "\n".join("<tr>" + "".join(_cells(row)) + "</tr>" for row in table.rows)
    return _scroll(key, label, f"<table><thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table>")


def _cells(row: Sequence[Any]) -> Iterable[str]:
    for index, value in enumerate(row):
        text = escape(clipped(_shown(value), 400))
        if index == 0:
            yield f'<th scope="row">{text}</th>'
        elif value is None or (isinstance(value, int | float) and not isinstance(value, bool)):
            number = "" if value is None else repr(value).replace("inf", "Infinity")  # as JavaScript reads it
            yield f'<td class="number" data-value="{number}">{text}</td>'
        else:
            long = ' class="long"' if len(text) > 40 else ""
            yield f"<td{long}>{text}</td>"


def _shown(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else cell_text(value)


def _sortable(table: Table, key: str, label: str, rows: Iterable[str] | None = None) -> str:
    """A table whose headers are buttons that sort it; `rows` replaces its plain rows."""
    sides = [' class="number"' if right else "" for right in table.numeric]
    head = "".join(
        f'<th scope="col" aria-sort="none"{side}><button type="button">{escape(name)}</button></th>'
        for name, side in zip(table.columns, sides, strict=True)
    )
    body = "\n".join(rows if rows is not None else ("<tr>" + "".join(_cells(row)) + "</tr>" for row in table.rows))
    return _scroll(
        f"{key}-scroll",
        label,
        f'<table class="sortable wide" id="{key}"><thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table>',
        tall=True,
    )


def _packing(contents: Contents) -> str:
    parts = ""
    if contents.packing is not None:
        table = contents.packing.table()
        parts += _paragraphs(table.notes) + _sortable(table, "decisions", "What runs each layer")
    timed = timings(contents.packing, contents.decisions)
    if timed:
        columns: tuple[str, ...] = ("layers", "T", "form", "ms", "x strongest dense", "runs now")
        rows: list[tuple[Any, ...]] = [
            (time.layers, time.tokens, time.form, time.ms, time.gain, RUNS[time.chosen]) for time in timed
        ]
        parts += "<h3>Times of every form</h3>\n" + _paragraphs(
            [
                "Alike layers are timed once, at the token counts T that the examples give them. x strongest dense: "
                "how many times as fast as the fastest dense form in the same run; below 1 is slower. Of a gate-up "
                "pair: as its linears one by one."
            ]
        )
        if contents.decisions:
            machines = dict.fromkeys(f"{key.cpu}, {key.isa}, torch {key.torch}" for key in contents.decisions)
            parts += _paragraphs([f"Measured on: {machine}" for machine in machines])
        if all(time.chosen is None for time in timed):
            rows, columns = [row[:-1] for row in rows], columns[:-1]
        parts += _sortable(Table(columns, rows), "timings", "Times of every form")
    return parts


def _certificate(contents: Contents) -> str:
    """The bounds with their slack, what each kind of number is worth, and the steps."""
    found = contents.certificate
    if found is None:
        return ""
    bounds, steps = found.table(), found.step_table()
    return (
        _paragraphs(bounds.notes)
        + _sortable(bounds, "bounds", "Bounds and their slack")
        + "<h3>Weight by weight, in the order in which the model uses them</h3>\n"
        + _paragraphs(steps.notes)
        + _sortable(steps, "steps", "Steps from dense to pruned")
    )


RUNS = {True: "yes", False: "no", None: "-"}
LAYER_COLUMNS = (
    "layer", "type", "out x in", "weights", "zeros %", "KiB dense", "fit error", "edge", "spikes", "bulk %",
    "tail exponent", "stable rank", "effective rank",
)  # fmt: skip


def _layers(contents: Contents) -> str:
    layers = contents.layers
    with_forms = contents.packing is not None
    columns = (*LAYER_COLUMNS, "runs as", "speed-up") if with_forms else LAYER_COLUMNS
    cells, rows = [], []
    for index, layer in enumerate(layers):
        row = _layer_cells(layer)
        if with_forms:
            packed = contents.packed(layer)
            row += [None, None] if packed is None else [packed.form, packed.speedup]
        cells.append(row)
        name, *others = _cells(row)
        figure = f"spectrum-{index}"
        if layer.histogram is not None:
            name = f'<th scope="row"><a href="#{figure}">{_breakable(layer.name)}</a></th>'
        rows.append(
            f'<tr data-name="{escape(layer.name)}" data-role="{escape(layer.role)}" data-figure="{figure}">'
            f"{name}{''.join(others)}</tr>"
        )
    options = "".join(
        f'<option value="{role}">{role}</option>' for role in ROLES if any(layer.role == role for layer in layers)
    )
    controls = (
        '<div class="controls" id="layer-controls" hidden>'
        '<label>Layer name contains <input type="search" id="layer-words" autocomplete="off" spellcheck="false">'
        "</label>"
        f'<label>Layer type <select id="layer-role"><option value="">all</option>{options}</select></label>'
        '<output id="layer-count" for="layer-words layer-role" aria-live="polite"></output></div>\n'
        "<noscript><p>Without JavaScript the table neither sorts nor filters; everything is in it.</p></noscript>\n"
    )
    meaning = _paragraphs(
        [
            "A header sorts by its column. The spectra below follow the filter. fit error: largest distance between "
            "the spectrum and the law, 0 to 1; edge: largest singular value that the fitted noise reaches; spikes: "
            "singular values above it at level 0.1; bulk: share of singular values below the edge."
        ]
    )
    return meaning + controls + _sortable(Table(columns, cells), "layer-table", "Layers", rows)


def _breakable(name: str) -> str:
    """A layer's name that may go on in the next line after a dot."""
    return escape(clipped(name)).replace(".", ".<wbr>")


def _layer_cells(layer: Layer) -> list[Any]:
    fit = layer.fit
    found: list[Any] = [None] * 7
    if fit is not None:
        bulk = None if fit.gamma is None else 100 * fit.gamma
        found = [fit.mu, fit.sigma_plus, fit.n_spikes, bulk, fit.hill_alpha, fit.stable_rank, fit.effective_rank]
    shape = f"{layer.shape[0]} x {layer.shape[1]}"
    count = layer.count
    return [layer.name, layer.role, shape, count.total, round(100 * count.sparsity, 2), layer.nbytes / 2**10, *found]


def _spectra(layers: Sequence[Layer]) -> str:
    drawn, left = [], []
    for index, layer in enumerate(layers):
        if layer.histogram is None or layer.fit is None:
            left.append(f"{clipped(layer.name)}: {layer.why}")
            continue
        beyond = f", {layer.histogram.beyond} beyond the axis" if layer.histogram.beyond else ""
        drawn.append(
            f'<figure id="spectrum-{index}">{spectrum_svg(f"spectrum-{index}", layer)}<figcaption>'
            f"<strong>{_breakable(layer.name)}</strong> {layer.shape[0]} x {layer.shape[1]}, fit error "
            f"{layer.fit.mu:.3f}, {layer.fit.n_spikes} spikes{beyond}</figcaption></figure>"
        )
    samples = (
        ("bars", "M2 12V4H12V2H22V6H34V12z", "eigenvalues of W Wᵀ / n, n the longer side"),
        ("law", "M2 12C8 0 20 2 34 12", "fitted Marchenko-Pastur law, scaled to its share of the values"),
        ("edge", "M18 14V0", "noise edge λ₊"),
        ("spike", "M8 14V3M18 14V3M28 14V3", "eigenvalues above the edge"),
    )
    legend = "".join(
        f'<li><svg viewBox="0 0 36 14" aria-hidden="true"><path class="{css}" d="{path}"/></svg>{escape(text)}</li>'
        for css, path, text in samples
    )
    rest = ""
    if left:
        rest = f"<details><summary>{len(left)} layers without a picture</summary>{_paragraphs(left)}</details>\n"
    return f'<ul class="legend">{legend}</ul>\n<div class="figures">\n{chr(10).join(drawn)}\n</div>\n{rest}'
