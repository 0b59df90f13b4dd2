"""The pictures of a report as SVG elements: a spectrum under its law, and curves. Data in, element out."""

from collections.abc import Mapping, Sequence

from rmtkern.markup import clipped
from rmtkern.report.contents import Layer
from rmtkern.report.svg import Plot

__all__ = ["SERIES", "curves_svg", "spectrum_svg"]

SERIES = 6
"""Colours of lines in the style sheet; line styles and marks go round with other periods."""
CURVE_POINTS = 80

Curves = Mapping[str, Sequence[tuple[float, float]]]


def spectrum_svg(key: str, layer: Layer) -> str:
    """Bars of a layer's eigenvalues, the fitted law, its edge and the spikes; ValueError without a histogram."""
    shown, fit = layer.histogram, layer.fit
    if shown is None or fit is None:
        raise ValueError(f"{layer.name}: it has no histogram to draw ({layer.why})")
    beyond = f", {shown.beyond} of them beyond the axis" if shown.beyond else ""
    description = (
        f"{min(layer.shape)} eigenvalues in units of the noise variance. {shown.bulk:.1%} lie under the "
        f"Marchenko-Pastur law, whose edge is at {shown.edge:.3g}; {len(shown.spikes) + shown.beyond} lie above it"
        f"{beyond}. Fit error {fit.mu:.3f}."
    )
    top = 1.1 * float(shown.heights.max())
    plot = Plot(
        key, f"Spectrum of {clipped(layer.name)}", description, (0, shown.reach), (0, top), "eigenvalue / σ²", "density"
    )
    plot.bars(shown.bounds.tolist(), shown.heights.tolist(), "bars")
    x, y = shown.curve(CURVE_POINTS)
    plot.line(x.tolist(), y.tolist(), "law")
    plot.vertical(shown.edge, "edge")
    plot.stems(shown.spikes.tolist(), "spike")
    return plot.to_svg()


def series_class(index: int) -> str:
    """The style of the line with a number."""
    return f"series c{index % SERIES} d{index % 4}"


def curves_svg(key: str, title: str, curves: Curves, x_label: str, y_label: str, *, mark: float | None = None) -> str:
    """Lines with marks, one style each.

    Args:
        key: what the ids begin with.
        title: of the picture.
        curves: name -> points; at least one.
        x_label: what the x axis is, with its unit.
        y_label: what the y axis is, with its unit.
        mark: where a vertical line stands.
    """
    points = [point for line in curves.values() for point in line]
    x, y = zip(*points, strict=True)
    low, high = (min(x), max(x)) if mark is None else (min(*x, mark), max(*x, mark))
    description = f"{y_label} against {x_label}. " + " ".join(_sentence(name, line) for name, line in curves.items())
    plot = Plot(key, title, description, _wider(low, high), _wider(0, max(y)), x_label, y_label, (360, 250))
    if mark is not None:
        plot.vertical(mark, "reference")
    for index, (name, line) in enumerate(curves.items()):
        css = series_class(index)
        plot.line([a for a, _ in line], [b for _, b in line], css)
        told = [(a, b, f"{clipped(name)}: {a:.4g}, {b:.4g}") for a, b in line]
        plot.points(told, f"mark c{index % SERIES}", index)
    return plot.to_svg()


def _sentence(name: str, line: Sequence[tuple[float, float]]) -> str:
    (x0, y0), (x1, y1) = line[0], line[-1]
    return f"{clipped(name)}: from {y0:.4g} at {x0:.4g} to {y1:.4g} at {x1:.4g}."


def _wider(low: float, high: float) -> tuple[float, float]:
    """An interval with a twentieth of room above it, and below it unless it starts at 0; never empty."""
    room = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    return (low - room if low else 0.0), high + room
