"""The figures: what they draw, that they can be drawn, and that matplotlib stays optional."""

import sys

import numpy as np
import pytest

from rmtkern.plots import (
    accuracy_figure,
    demo_figure,
    draw_accuracy,
    draw_spectrum,
    latency_figure,
    sparsity_figure,
    spectrum_figure,
    speed_figure,
)
from rmtkern.pruning.plan import LayerPlan
from rmtkern.spectrum.fit import fit_spectrum

figure_module = pytest.importorskip("matplotlib.figure")


@pytest.fixture
def axes():
    return figure_module.Figure().subplots()


@pytest.fixture
def spiked(rng):
    """A 120 x 200 noise matrix with two strong directions."""
    matrix = rng.standard_normal((120, 200))
    for strength in (60.0, 40.0):
        left, right = rng.standard_normal(120), rng.standard_normal(200)
        matrix += strength * np.outer(left / np.linalg.norm(left), right / np.linalg.norm(right))
    return np.linalg.svd(matrix, compute_uv=False), fit_spectrum(matrix)


def test_spectrum(axes, spiked):
    values, fit = spiked
    draw_spectrum(axes, values, fit, "layer")
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert any("Marchenko-Pastur" in label for label in labels) and any("edge" in label for label in labels)
    assert axes.get_xlabel() and axes.get_ylabel()
    edge = next(line for line in axes.lines if "edge" in line.get_label() and line.get_linestyle() == "--")
    assert edge.get_xdata()[0] == pytest.approx(fit.lambda_plus / fit.sigma2)
    assert f"{fit.n_spikes} spikes" in axes.get_title()
    # all values under the histogram or named as beyond the axis
    beyond = int((values**2 / 200 / fit.sigma2 > axes.get_xlim()[1]).sum())
    assert (f"{beyond} beyond the axis" in axes.get_title()) == (beyond > 0) and beyond > 0
    heights, bounds, _ = axes.patches[0].get_data()
    area = float((heights * np.diff(bounds)).sum())
    assert area == pytest.approx(1 - beyond / 120)
    # the law's curve has the share of the bulk as its area (trapezoids of 600 points under a square root: 1 %)
    law = next(line for line in axes.lines if "Marchenko" in line.get_label())
    bulk = float((values**2 / 200 <= fit.lambda_plus).mean())
    assert np.trapezoid(law.get_ydata(), law.get_xdata()) == pytest.approx(bulk, rel=0.01)


def test_spectrum_without_a_bulk(axes):
    fit = fit_spectrum(np.zeros((30, 40)))
    with pytest.raises(ValueError, match=r"layer: the fit has no bulk \(.+\); nothing to draw"):
        draw_spectrum(axes, np.zeros(30), fit, "layer")


def test_accuracy(axes):
    draw_accuracy(axes, {"one": [(0.0, 0.9), (0.5, 0.8)], "two": [(0.0, 0.9), (0.5, 0.7)]}, 2_000)
    assert [line.get_label() for line in axes.lines] == ["one", "two"]
    assert axes.lines[1].get_xdata() == pytest.approx([0, 50]) and axes.lines[1].get_ydata() == pytest.approx([90, 70])
    assert "%" in axes.get_xlabel() and "2,000" in axes.get_ylabel()


def test_accuracy_figure_tells_seven_methods_apart():
    figure = accuracy_figure({str(i): [(0.0, 0.9), (0.5, i / 10)] for i in range(7)}, 100)
    looks = {(line.get_color(), line.get_linestyle(), line.get_marker()) for line in figure.axes[0].lines}
    assert len(looks) == 7


def test_speed_figure():
    curves = {"one": [(1.1, 0.9), (1.6, 0.8)], "two": [(1.1, 0.9), (1.5, 0.7)]}
    axes = speed_figure(curves, 2_000, "bfloat16, 8").axes[0]
    assert [line.get_label() for line in axes.lines[:2]] == ["one", "two"]
    assert axes.lines[1].get_xdata() == pytest.approx([1.1, 1.5])
    assert axes.lines[1].get_ydata() == pytest.approx([90, 70])
    assert "strongest dense form\nbfloat16, 8" in axes.get_xlabel() and "2,000" in axes.get_ylabel()
    assert [list(line.get_xdata()) for line in axes.lines[2:]] == [[1, 1]]  # as fast as dense


def test_spectrum_figure_fits_by_itself(rng):
    weight = rng.standard_normal((60, 90))
    axes = spectrum_figure(weight, "mine").axes[0]
    fit = fit_spectrum(weight)
    assert axes.get_title() == f"mine  (60x90)\nfit error {fit.mu:.3f}, {fit.n_spikes} spikes"


def test_latency_figure():
    axes = latency_figure({"one": [(0.0, 9.0), (0.5, 6.0)]}, "float32, 8").axes[0]
    assert axes.lines[0].get_xdata() == pytest.approx([0, 50]) and axes.lines[0].get_ydata() == pytest.approx([9, 6])
    assert axes.get_ylabel() == "latency [ms]" and axes.get_ylim()[0] == 0 and axes.get_xlabel().endswith("float32, 8")


def test_sparsity_figure():
    layers = [
        LayerPlan("patch_embed.proj.weight", "embed", (4, 8), 8, ""),
        LayerPlan("blocks.0.attn.qkv.weight", "qkv", (2, 5), 5, ""),
        LayerPlan("blocks.0.mlp.fc1.weight", "mlp_in", (2, 5), 9, ""),
        LayerPlan("blocks.1.mlp.fc1.weight", "mlp_in", (2, 5), 0, ""),
    ]
    axes = sparsity_figure(layers).axes[0]
    assert [text.get_text() for text in axes.get_xticklabels()] == ["qkv", "mlp_in", "embed"]
    assert [text.get_text() for text in axes.get_yticklabels()] == ["blocks.0", "blocks.1", "outside the blocks"]
    shown = axes.images[0].get_array().filled(np.nan)
    np.testing.assert_allclose(shown, [[0.5, 0.9, np.nan], [np.nan, 0.0, np.nan], [np.nan, np.nan, 0.25]])
    assert sorted(text.get_text() for text in axes.texts) == ["0.0", "25.0", "50.0", "90.0"]
    with pytest.raises(ValueError, match=r"no layers to draw; pass those of a plan: plan.layers"):
        sparsity_figure([])


def test_demo_figure_is_written(tmp_path, spiked):
    values, fit = spiked
    figure = demo_figure(values, fit, "layer", {"one": [(0.0, 0.9), (0.5, 0.8)]}, 100)
    figure.savefig(tmp_path / "figure.png")
    assert len(figure.axes) == 2
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib(spiked, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ModuleNotFoundError, match=r"plots need matplotlib: pip install 'rmtkern\[report\]'"):
        demo_figure(*spiked, "layer", {}, 1)
