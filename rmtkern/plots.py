"""Pictures as matplotlib figures: a spectrum under its fitted law, accuracy against sparsity or speed.

Data in, figure out. matplotlib is an extra (`rmtkern[report]`) and is imported only here, only when a function is
called.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from rmtkern.spectrum import law
from rmtkern.spectrum.fit import SpectralFit

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["accuracy_figure", "demo_figure", "draw_accuracy", "draw_spectrum", "draw_speed", "speed_figure"]

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
    if not fit.sigma2 or fit.lambda_plus is None:
        raise ValueError(f"{name}: the fit has no bulk ({', '.join(fit.flags)}); nothing to draw")
    p, n = min(fit.shape), max(fit.shape)
    unit = fit.sigma2
    values = np.asarray(singular_values, dtype=np.float64) ** 2 / n / unit
    edge = fit.lambda_plus / unit
    reach = min(float(values.max()), 2.2 * edge) * 1.05
    bins = np.linspace(0, reach, 45)
    shown = values[values <= reach]
    weights = np.full(len(shown), 1 / (p * (bins[1] - bins[0])))
    axes.hist(shown, bins=list(bins), weights=weights, color=BLUE, alpha=0.45, label="eigenvalues of $WW^T/n$")
    bulk = float((values <= edge).mean())
    grid = np.linspace(1e-6, edge, 600)
    curve = bulk * law.density(grid, p / n)
    axes.plot(grid, curve, color=ORANGE, lw=2, label=f"Marchenko-Pastur ({bulk:.0%} of values)")
    axes.axvline(edge, color=RED, ls="--", lw=1.5, label=r"noise edge $\lambda_+$")
    spikes = values[values > edge]
    inside = spikes[spikes <= reach]
    axes.plot(inside, np.zeros_like(inside), "|", color=RED, ms=14, mew=1.2, clip_on=False, label="above the edge")
    beyond = len(spikes) - len(inside)
    title = f"{name}  ({fit.shape[0]}x{fit.shape[1]})\nfit error {fit.mu:.3f}, {fit.n_spikes} spikes"
    axes.set_title(title + (f", {beyond} beyond the axis" if beyond else ""), fontsize=10)
    axes.set_xlabel(r"eigenvalue / $\sigma^2$")
    axes.set_ylabel("density")
    axes.set_xlim(0, reach)
    axes.set_ylim(0, 1.15 * float(np.histogram(shown, bins=bins, weights=weights)[0].max()))
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


def _draw_curves(axes: "Axes", curves: Mapping[str, Sequence[tuple[float, float]]], images: int) -> None:
    """Top-1 in [0, 1] against anything, one line per method."""
    styles = [(BLUE, "o-"), (ORANGE, "s--"), (GREEN, "^-."), (RED, "d:"), (GREY, "v-"), (PURPLE, "x--"), (SKY, "*-.")]
    for index, (name, points) in enumerate(curves.items()):
        color, style = styles[index % len(styles)]
        x, y = zip(*points, strict=True)
        axes.plot(np.array(x), 100 * np.array(y), style, color=color, label=name, ms=5)
    axes.set_ylabel(f"top-1 on {images:,} test images [%]")
    axes.grid(color=GREY, alpha=0.25)
    axes.legend(fontsize=8, frameon=False)


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
