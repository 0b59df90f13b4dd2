"""Pictures as matplotlib figures: a spectrum under its law, accuracy or latency over sparsity, sparsity as a map.

Data in, figure out. matplotlib is an extra (`rmtkern[report]`) and is imported only here, only when a function is
called.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from rmtkern.arrays import Array
from rmtkern.models import ROLES
from rmtkern.pruning.plan import sparsity_grid
from rmtkern.spectrum.fit import SpectralFit, fit_singular_values, spectra_of
from rmtkern.spectrum.histogram import spectral_histogram

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "accuracy_figure",
    "demo_figure",
    "draw_accuracy",
    "draw_latency",
    "draw_sparsity",
    "draw_spectrum",
    "draw_speed",
    "latency_figure",
    "sparsity_figure",
    "spectrum_figure",
    "speed_figure",
]

# Okabe & Ito's colours: told apart with any colour vision
BLUE, ORANGE, GREEN, RED, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#666666"
PURPLE, SKY = "#CC79A7", "#56B4E9"


def _figure_class() -> Any:
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError:
        raise ModuleNotFoundError("plots need matplotlib: pip install 'rmtkern[report]'") from None
    from matplotlib.figure import Figure

    return Figure


def draw_spectrum(axes: "Axes", singular_values: np.ndarray, fit: SpectralFit, name: str) -> None:
    """Histogram of the eigenvalues s^2 / n under the fitted Marchenko-Pastur density, with edge and spikes.

    Args:
        axes: matplotlib axes to draw on.
        singular_values: all min(N, K) of them [weight].
        fit: of the same matrix, with a bulk (sigma2 > 0).
        name: of the layer.

    Raises:
        ValueError: the fit has no bulk to draw.
    """
    shown = spectral_histogram(singular_values, fit, name)
    label = "eigenvalues of $WW^T/n$"
    axes.stairs(shown.heights, shown.bounds, fill=True, color=BLUE, alpha=0.45, label=label)
    curve = f"Marchenko-Pastur ({shown.bulk:.0%} of values)"
    axes.plot(*shown.curve(600), color=ORANGE, lw=2, label=curve)
    axes.axvline(shown.edge, color=RED, ls="--", lw=1.5, label=r"noise edge $\lambda_+$")
    level = np.zeros_like(shown.spikes)
    axes.plot(shown.spikes, level, "|", color=RED, ms=14, mew=1.2, clip_on=False, label="above the edge")
    title = f"{name}  ({fit.shape[0]}x{fit.shape[1]})\nfit error {fit.mu:.3f}, {fit.n_spikes} spikes"
    axes.set_title(title + (f", {shown.beyond} beyond the axis" if shown.beyond else ""), fontsize=10)
    axes.set_xlabel(r"eigenvalue / $\sigma^2$")
    axes.set_ylabel("density")
    axes.set_xlim(0, shown.reach)
    axes.set_ylim(0, 1.15 * float(shown.heights.max()))
    axes.legend(fontsize=8, framealpha=0.9, edgecolor="none")


def draw_accuracy(axes: "Axes", curves: Mapping[str, Sequence[tuple[float, float]]], images: int) -> None:
    """Top-1 accuracy against sparsity, one line per method.

    Args:
        axes: matplotlib axes to draw on.
        curves: method -> points (sparsity in [0, 1), top-1 in [0, 1]).
        images: number of images behind each point, for the axis label.
    """
    _draw_curves(axes, {name: [(100 * x, y) for x, y in points] for name, points in curves.items()}, images)
    axes.set_title("One-shot pruning, no fine-tuning", fontsize=10)
    axes.set_xlabel("sparsity of the attention and MLP weights [%]")


def draw_speed(axes: "Axes", curves: Mapping[str, Sequence[tuple[float, float]]], images: int, how: str) -> None:
    """Top-1 accuracy of packed models against their measured speed-up, one line per method.

    Args:
        axes: matplotlib axes to draw on.
        curves: method -> points (times as fast as the strongest dense model, top-1 in [0, 1]).
        images: number of images behind each point, for the axis label.
        how: dtype, input and machine of the measurement, for the axis label.
    """
    _draw_curves(axes, curves, images)
    axes.axvline(1, color=GREY, lw=1)
    axes.set_title("One-shot pruning, no fine-tuning, packed", fontsize=10)
    axes.set_xlabel(f"times as fast as the strongest dense form\n{how}")


def draw_latency(axes: "Axes", curves: Mapping[str, Sequence[tuple[float, float]]], how: str) -> None:
    """Time of one call of packed models against sparsity, one line per method.

    Args:
        axes: matplotlib axes to draw on.
        curves: method -> points (sparsity in [0, 1), ms), as `Sweep.latency_curves` has them.
        how: dtype, input and machine of the measurement, for the axis label.
    """
    _draw_lines(axes, {name: [(100 * x, y) for x, y in points] for name, points in curves.items()})
    axes.set_ylim(bottom=0)
    axes.set_title("Latency, packed", fontsize=10)
    axes.set_xlabel(f"sparsity of the attention and MLP weights [%]\n{how}")
    axes.set_ylabel("latency [ms]")


def draw_sparsity(axes: "Axes", layers: Iterable[Any]) -> None:
    """A map of sparsity by block and layer type, with the percentages.

    Args:
        axes: matplotlib axes to draw on.
        layers: those of a plan, as pruning.plan.sparsity_grid takes them.

    Raises:
        ValueError: no layers.
    """
    grid = sparsity_grid(layers)
    if not grid:
        raise ValueError("no layers to draw; pass those of a plan: plan.layers")
    roles = [role for role in ROLES if any(role in row for row in grid.values())]
    values = np.array([[row[role].sparsity if role in row else np.nan for role in roles] for row in grid.values()])
    axes.imshow(values, vmin=0, vmax=1, cmap="Blues", aspect="auto")
    for (y, x), value in np.ndenumerate(values):
        if np.isfinite(value):
            color = "white" if value > 0.5 else "black"
            axes.text(x, y, f"{100 * value:.1f}", ha="center", va="center", fontsize=8, color=color)
    axes.set_xticks(range(len(roles)), roles)
    axes.set_yticks(range(len(grid)), list(grid))
    axes.set_title("Zeros [%]", fontsize=10)


def _draw_curves(axes: "Axes", curves: Mapping[str, Sequence[tuple[float, float]]], images: int) -> None:
    """Top-1 in [0, 1] against anything, one line per method."""
    _draw_lines(axes, {name: [(x, 100 * y) for x, y in points] for name, points in curves.items()})
    axes.set_ylabel(f"top-1 on {images:,} test images [%]")


def _draw_lines(axes: "Axes", curves: Mapping[str, Sequence[tuple[float, float]]]) -> None:
    """Anything against anything, one line per method."""
    styles = [(BLUE, "o-"), (ORANGE, "s--"), (GREEN, "^-."), (RED, "d:"), (GREY, "v-"), (PURPLE, "x--"), (SKY, "*-.")]
    for index, (name, points) in enumerate(curves.items()):
        color, style = styles[index % len(styles)]
        x, y = zip(*points, strict=True)
        axes.plot(np.array(x), np.array(y), style, color=color, label=name, ms=5)
    axes.grid(color=GREY, alpha=0.25)
    axes.legend(fontsize=8, frameon=False)


def spectrum_figure(weight: Array, name: str = "W") -> "Figure":
    """`draw_spectrum` alone, of a matrix that is decomposed and fitted here.

    Args:
        weight: [N, K] floating point; NumPy, torch or CuPy.
        name: of the layer.

    Raises:
        ValueError: no matrix, NaN or Inf, or a fit without a bulk.
    """
    figure = _figure_class()(figsize=(6, 4.2), layout="constrained")
    (values,) = spectra_of({name: weight}, show_progress=False).values()
    rows, columns = weight.shape
    draw_spectrum(figure.subplots(), values, fit_singular_values(values, (int(rows), int(columns))), name)
    return figure


def sparsity_figure(layers: Iterable[Any]) -> "Figure":
    """`draw_sparsity` alone, as high as the model has blocks; arguments as its own."""
    layers = list(layers)
    figure = _figure_class()(figsize=(6, 1.2 + 0.3 * len(sparsity_grid(layers))), layout="constrained")
    draw_sparsity(figure.subplots(), layers)
    return figure


def latency_figure(curves: Mapping[str, Sequence[tuple[float, float]]], how: str) -> "Figure":
    """`draw_latency` alone; arguments as its own."""
    figure = _figure_class()(figsize=(6, 4.2), layout="constrained")
    draw_latency(figure.subplots(), curves, how)
    return figure


def accuracy_figure(curves: Mapping[str, Sequence[tuple[float, float]]], images: int) -> "Figure":
    """`draw_accuracy` alone; arguments as its own."""
    figure = _figure_class()(figsize=(6, 4.2), layout="constrained")
    draw_accuracy(figure.subplots(), curves, images)
    return figure


def speed_figure(curves: Mapping[str, Sequence[tuple[float, float]]], images: int, how: str) -> "Figure":
    """`draw_speed` alone; arguments as its own."""
    figure = _figure_class()(figsize=(6, 4.2), layout="constrained")
    draw_speed(figure.subplots(), curves, images, how)
    return figure


def demo_figure(
    singular_values: np.ndarray,
    fit: SpectralFit,
    name: str,
    curves: Mapping[str, Sequence[tuple[float, float]]],
    images: int,
) -> "Figure":
    """The demo's picture: `draw_spectrum` beside `draw_accuracy`; arguments as theirs."""
    figure = _figure_class()(figsize=(11, 4.2), layout="constrained")  # without pyplot: no window, no global state
    left, right = figure.subplots(1, 2)
    draw_spectrum(left, singular_values, fit, name)
    draw_accuracy(right, curves, images)
    return figure
