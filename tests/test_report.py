"""write_report: what the page says is what the weights and the measurements say, and nothing on it can run or call."""

import base64
import hashlib
import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

import rmtkern
from rmtkern import shards
from rmtkern.certificates import Certificate
from rmtkern.cli import main
from rmtkern.evaluation import Evaluation
from rmtkern.packing import pack_
from rmtkern.packing.decisions import Decisions
from rmtkern.packing.report import EndToEnd, PackReport
from rmtkern.pruning.plan import Count, sparsity_grid
from rmtkern.report import write_report
from rmtkern.report.contents import Contents, Layer, layers_of, timings
from rmtkern.report.page import HEAT_STEPS, heat_colour, to_html
from rmtkern.report.source import load_checkpoint
from rmtkern.report.svg import Plot, ticks
from rmtkern.spectrum import law
from rmtkern.spectrum.fit import fit_singular_values
from rmtkern.spectrum.histogram import spectral_histogram
from rmtkern.sweep import Sweep, SweepRow

VOID = {"meta", "input", "br", "link", "img", "wbr"}


class Page(HTMLParser):
    """A page as a list of elements (tag, attributes, text within), with what must hold of any page checked."""

    def __init__(self, text):
        super().__init__()
        self.elements, self._open = [], []
        self.feed(text)
        self.close()
        assert self._open == []
        ids = [attrs["id"] for _, attrs, _ in self.elements if "id" in attrs]
        assert len(ids) == len(set(ids))
        for _, attrs, _ in self.elements:
            for name in ("aria-labelledby", "for"):
                assert set(attrs.get(name, "").split()) <= set(ids)
            assert attrs.get("href", "#summary")[0] == "#" and attrs.get("href", "#summary")[1:] in ids
            assert not {"src", "srcset", "style", "action", "data"} & set(attrs)
            assert not any(name.startswith("on") for name in attrs)

    def handle_starttag(self, tag, attrs):
        element = (tag, dict(attrs), [])
        self.elements.append(element)
        if tag not in VOID:
            self._open.append(element)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs), []))

    def handle_endtag(self, tag):
        assert self._open.pop()[0] == tag

    def handle_data(self, data):
        for _, _, texts in self._open:
            texts.append(data)

    def all(self, tag, **wanted):
        return [
            (attrs, "".join(texts))
            for name, attrs, texts in self.elements
            if name == tag and all(attrs.get(key) == value for key, value in wanted.items())
        ]

    def table(self, key):
        """Rows of texts of the table with an id, header first."""
        start = next(i for i, (_, attrs, _) in enumerate(self.elements) if attrs.get("id") == key)
        rows = []
        for tag, _, texts in self.elements[start + 1 :]:
            if tag == "table":
                break
            if tag == "tr":
                rows.append([])
            elif tag in ("th", "td"):
                rows[-1].append("".join(texts))
        return rows


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(48, 96), nn.GELU(), nn.Linear(96, 48))

    def forward(self, x):
        return x + self.mlp(x)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(48, 5)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def net():
    torch.manual_seed(0)
    return Net().eval()


def fast(calls, budget_ms):
    """A timer that lets sparse forms win."""
    for call in calls.values():
        call()
    if "original" in calls:
        return {name: {"original": 8.0, "dense": 6.0, "packed": 3.0}[name] for name in calls}
    return {name: 4.0 + index if name.startswith("dense/") else 2.0 for index, name in enumerate(calls)}


@pytest.fixture
def pruned():
    model = net()
    return model, rmtkern.prune_(model, 0.75, "uniform", show_progress=False)


@pytest.fixture
def out(tmp_path):
    return tmp_path / "report.html"


def read(path):
    return Page(path.read_text("utf-8"))


def test_layers_say_what_the_weights_say(pruned, out):
    model, plan = pruned
    written = write_report(model, out, plan)
    page = read(out)
    rows = page.table("layer-table")
    assert rows[0][:6] == ["layer", "type", "out x in", "weights", "zeros %", "KiB dense"]
    names = [name for name, value in model.named_parameters() if value.ndim == 2]
    assert [row[0] for row in rows[1:]] == names and written.layers == len(names)
    for row in rows[1:]:
        weight = model.get_parameter(row[0]).detach()
        fit = rmtkern.fit_spectrum(weight)
        assert float(row[4]) == pytest.approx(100 * float((weight == 0).float().mean()), abs=0.01)
        assert row[2] == f"{weight.shape[0]} x {weight.shape[1]}" and row[3] == f"{weight.numel():,}"
        assert row[7] == ("-" if fit.sigma_plus is None else f"{fit.sigma_plus:.4g}")
        assert row[8] == ("-" if fit.n_spikes is None else str(fit.n_spikes))
    text = out.read_text()
    assert "method uniform (budget uniform, score magnitude, repair none), pattern unstructured" in text
    assert "The zeros of all 4 pruned weights are exactly those of the plan." in text
    assert text.count("not measured") == 2 and out.stat().st_size == written.nbytes


def test_the_plan_is_compared_with_the_zeros(pruned, out):
    model, plan = pruned
    with torch.no_grad():
        model.blocks[1].mlp[2].weight[0] = 1.0
    write_report(model, out, plan)
    assert "The zeros of 1 of 4 pruned weights are not those of the plan: blocks.1.mlp.2.weight." in out.read_text()


def test_every_picture_has_a_name_a_description_and_the_spectrum_of_its_layer(pruned, out):
    model, plan = pruned
    write_report(model, out, plan)
    page = read(out)
    pictures = page.all("svg", role="img")
    rows = page.table("layer-table")[1:]
    drawn = [row[0] for row in rows if row[6] != "-"]
    assert len(pictures) == len(drawn) == 4  # the head has five outputs: too few to fit
    assert (
        "1 layers without a picture" in out.read_text()
        and "head.weight: no law was fitted: too_small" in out.read_text()
    )
    for (attrs, _), name in zip(pictures, drawn, strict=True):
        title, description = attrs["aria-labelledby"].split()
        assert page.all("title", id=title)[0][1] == f"Spectrum of {name}"
        said = page.all("desc", id=description)[0][1]
        values = np.linalg.svd(model.get_parameter(name).detach().double().numpy(), compute_uv=False)
        fit = rmtkern.fit_spectrum(model.get_parameter(name).detach())
        inside = float((values**2 / max(fit.shape) <= fit.lambda_plus).mean())
        assert f"{len(values)} eigenvalues" in said and f"{inside:.1%} lie under" in said
    assert all("aria-hidden" in attrs for attrs, _ in page.all("svg") if attrs.get("role") != "img")


def test_the_map_is_the_grid(pruned, out):
    model, plan = pruned
    write_report(model, out, plan)
    rows = read(out).table("sparsity-map")
    assert rows[0] == ["block", "mlp_in", "mlp_out", "head"]
    assert rows[1:] == [
        ["blocks.0", "75.0", "75.0", "none"], ["blocks.1", "75.0", "75.0", "none"],
        ["outside the blocks", "none", "none", "0.0"]]  # fmt: skip
    grid = sparsity_grid(layers_of(rmtkern.models.prunable_weights(model, "all"), False))
    assert grid["blocks.0"]["mlp_in"] == Count(3456, 4608) and list(grid)[-1] == "outside the blocks"


def test_headers_are_buttons_that_say_how_they_sort(pruned, out):
    write_report(*pruned[:1], out, packing=pack_(net(), torch.randn(4, 48), timer=fast, show_progress=False))
    page = read(out)
    tables = page.all("table", **{"class": "sortable wide"})
    headers = page.all("th", **{"aria-sort": "none"})
    assert len(tables) == 3 and len(headers) == len(page.all("button", type="button"))
    assert {attrs["tabindex"] for attrs, _ in page.all("div", role="region")} == {"0"}
    assert all(attrs["aria-label"] for attrs, _ in page.all("div", role="region"))
    assert page.all("html")[0][0]["lang"] == "en" and len(page.all("main")) == 1 and len(page.all("h1")) == 1
    assert page.all("output")[0][0]["aria-live"] == "polite"
    labels = page.all("label")
    assert len(labels) == 2 and all(text for _, text in labels)


def test_what_was_measured_is_on_the_page(pruned, out, tmp_path):
    model, plan = pruned
    packed = net()
    packed.load_state_dict(model.state_dict())
    report = pack_(packed, torch.randn(4, 48), timer=fast, show_progress=False)
    report.decisions.save(tmp_path / "decisions.json")
    rows = [row("dense", 0.0, 0.9), row("row", 0.5, 0.8), row("row", 0.3, 0.85), row("seb", 0.5, 0.7)]
    scores = {"dense": Evaluation(0.9, 1.0, 0.3, 50), "pruned": Evaluation(0.8, 0.9, 0.5, 50)}
    write_report(
        packed, out, plan, packing=report, decisions=tmp_path / "decisions.json", sweeps=Sweep(tuple(rows), 4),
        scores=scores, title="Mine",
    )  # fmt: skip
    page, text = read(out), out.read_text()
    assert page.all("h1")[0][1] == "Mine" and page.all("title")[0][1] == "Mine"
    cards = dict(zip((t for _, t in page.all("dt")), (t for _, t in page.all("dd", **{"class": "value"})), strict=True))
    assert cards["Top-1, dense"] == "90.00%" and cards["Top-1, pruned"] == "80.00%"
    assert cards["Latency, packed"] == "3 ms" and "2.67 times as fast as the strongest dense form (8 ms)" in text
    assert cards["Sparsity, attention and MLP"] == "75.0 %" and "Bytes, packed" in cards
    layers = {cells[0]: cells for cells in page.table("layer-table")[1:]}
    for layer in report.layers:
        assert layers[f"{layer.name}.weight"][-2] == layer.form
    decided = page.table("decisions")
    assert [cells[0] for cells in decided[1:]] == [layer.name for layer in report.layers]
    timed = timings(report, report.decisions)
    assert len(page.table("timings")) == len(timed) + 1
    assert sum(time.chosen is True for time in timed) == len({layer.measured_on for layer in report.layers} - {None})
    first = next(time for time in timed if time.form.startswith("dense/"))
    assert first.gain == 1.0 and first.ms == 4.0
    pictures = [page.all("title", id=f"curve-0-{kind}-title") for kind in ("a", "l", "s")]
    assert [len(found) for found in pictures] == [1, 0, 0]
    assert "row: from 90 at 0 to 80 at 50." in page.all("desc", id="curve-0-a-desc")[0][1]


def test_a_certificate_is_on_the_page_with_its_slack(pruned, out):
    model, plan = pruned
    x = torch.randn(6, 48, generator=torch.Generator().manual_seed(0))
    found = rmtkern.certify(model, net(), (x, net()(x).argmax(1)), show_progress=False)
    again = Certificate.from_json(found.to_json())
    assert again.to_json() == found.to_json() and again.steps == found.steps
    write_report(model, out, plan, certificate=found)
    page, text = read(out), out.read_text()
    assert [cells[0] for cells in page.table("bounds")[1:]] == [bound.name for bound in found.bounds]
    columns = page.table("bounds")[0]
    assert "slack" in columns and "labels certified %" in columns
    assert [cells[0] for cells in page.table("steps")[1:]] == [step.name for step in found.steps]
    cards = dict(zip((t for _, t in page.all("dt")), (t for _, t in page.all("dd", **{"class": "value"})), strict=True))
    proofs = [bound.certified for bound in found.bounds if bound.holds != "estimate, no proof"]
    assert cards["Labels certified to stay"] == f"{max(proofs):.2%}"
    assert "estimate, no proof: the local estimate" in text
    write_report(model, out, plan)
    assert "Labels certified" not in out.read_text()
    with pytest.raises(TypeError, match="certificate: expected a Certificate, got dict"):
        write_report(model, out, plan, certificate={})
    with pytest.raises(ValueError, match="not the JSON of a Certificate"):
        Certificate.from_json("{}")


def test_of_several_forms_the_fastest_at_a_token_count_runs_there(pruned):
    times = {1: {"bitmask": 1.0, "block 4x1": 2.0, "dense/torch": 3.0}, 64: {"bitmask": 9.0, "block 4x1": 5.0}}
    report = pack_(pruned[0], torch.randn(4, 48), timer=fast, show_progress=False)
    layer = replace(report.layers[0], ms=times, form="bitmask | block 4x1", measured_on=report.layers[0].name)
    found = timings(replace(report, layers=(layer,), decisions=Decisions()), None)
    assert [(time.tokens, time.form, time.gain, time.chosen) for time in found] == [
        (1, "bitmask", 3.0, True), (1, "block 4x1", 1.5, False), (1, "dense/torch", 1.0, False),
        (64, "block 4x1", None, True), (64, "bitmask", None, False)]  # fmt: skip


def row(method, sparsity, top1, packed_ms=None, pack=""):
    times = (9.0, 8.0, packed_ms, top1) if pack else (None, None, None, None)
    where = (pack, "8x48", 1, "some cpu") if pack else ("", "", None, "")
    pattern = "" if method == "dense" else "unstructured"
    return SweepRow("w" * 16, "images", "", method, pattern, sparsity, top1, 1.0, 0.1, 50, *where, *times)


def test_a_sweep_with_times_has_all_three_curves(out):
    rows = [row("dense", 0.0, 0.9, 8.0, "float32"), row("row", 0.5, 0.8, 4.0, "float32")]
    write_report(net(), out, sweeps=[Sweep(tuple(rows), 2)])
    page = read(out)
    said = {kind: page.all("desc", id=f"curve-{kind}-desc") for kind in ("0-a", "1-l", "1-s")}
    assert "row: from 8 at 0 to 4 at 50." in said["1-l"][0][1]
    assert "row: from 90 at 1 to 80 at 2." in said["1-s"][0][1] and said["0-a"]
    assert "packed in float32, input 8x48, 1 thread(s), some cpu" in out.read_text()


HOSTILE = [
    "<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "</style><svg onload=alert(1)>",
    "a\u202eb\x00c\ud800", "javascript:alert(1)", "http://example.com/x", "' onclick='alert(1)", "</title><!-- ",
    "]]>&lt;", "a" * 5000,
]  # fmt: skip


def test_hostile_layer_names_stay_text(out):
    model = nn.Module()
    for index, name in enumerate(HOSTILE):
        path = nn.Module()
        path.add_module("0", nn.Linear(20, 30))
        model.add_module(name.replace(".", "_") + str(index), path)
    write_report(model, out, title="</title><script>alert(2)</script>")
    page = read(out)
    assert len(page.all("script")) == 1 and page.all("img") == [] and len(page.all("style")) == 1
    assert "alert" not in page.all("script")[0][1]
    shown = [cells[0] for cells in page.table("layer-table")[1:]]
    assert shown[0] == "<script>alert(1)</script>0.0.weight" and all(len(name) <= 120 for name in shown)
    assert len(shown) == len(HOSTILE) and r"a\u202eb\x00c\ud8003.0.weight" in shown


@given(st.lists(st.text(max_size=30), min_size=1, max_size=3, unique=True), st.text(max_size=30))
@settings(max_examples=40, deadline=None)
def test_any_name_and_title_make_a_sound_page(names, title):
    values = np.sqrt(law.quantile((np.arange(30) + 0.5) / 30, 0.5) * 60)
    fit = fit_singular_values(values, (30, 60))
    shown = spectral_histogram(values, fit, "w")
    layers = tuple(Layer(name, "qkv", (30, 60), 9, 7200, fit, shown) for name in names)
    page = Page(to_html(Contents(title, title, layers, 1800, 7200, "float32", notes=(title,)), "0"))
    tags = [tag for tag, _, _ in page.elements]
    assert tags.count("script") == 1 and tags.count("figure") == len(names) and tags.count("section") == 4
    if all(name.isprintable() for name in names):
        assert [cells[0] for cells in page.table("layer-table")[1:]] == names


def test_a_hostile_checkpoint_stays_text(tmp_path, out):
    names = [name for name in HOSTILE if "\ud800" not in name and len(name) < 100]
    save_file({f"{name}.weight": torch.randn(20, 30) for name in names}, tmp_path / "<b>.safetensors")
    write_report(tmp_path / "<b>.safetensors", out)
    page = read(out)
    assert page.all("h1")[0][1] == "<b>.safetensors" and page.all("b") == []
    assert sorted(cells[0] for cells in page.table("layer-table")[1:]) == sorted(f"{name}.weight" for name in names)


def test_the_page_allows_its_own_style_and_script_and_nothing_else(pruned, out):
    write_report(*pruned[:1], out)
    page, text = read(out), out.read_text()
    policy = page.all("meta", **{"http-equiv": "Content-Security-Policy"})[0][0]["content"]
    style, script = (page.all(tag)[0][1] for tag in ("style", "script"))
    digests = [base64.b64encode(hashlib.sha256(part.encode()).digest()).decode() for part in (style, script)]
    assert policy == (
        f"default-src 'none'; style-src 'sha256-{digests[0]}'; script-src 'sha256-{digests[1]}'; base-uri 'none'; "
        "form-action 'none'"
    )
    assert "://" not in text and "@import" not in style and "url(" not in style
    assert not re.search(r"fetch|XMLHttp|eval|innerHTML|document\.write", script)


def luminance(colour):
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(a, b):
    """The ratio of WCAG 2, 1 to 21."""
    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_colours_can_be_told_from_what_is_behind_them(theme, pruned, out):
    write_report(*pruned[:1], out)
    style = read(out).all("style")[0][1]
    blocks = re.findall(r":root \{(.*?)\}", style, re.DOTALL)
    colour = dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", blocks[theme == "dark"]))
    for name in ("ink", "soft", "link"):
        for back in ("page", "panel", "head"):
            assert contrast(colour[name], colour[back]) >= 4.5, (name, back)
    for name in ("law", "edge", "axis", *(f"c{i}" for i in range(6))):
        assert contrast(colour[name], colour["panel"]) >= 3, name
    assert contrast(colour["bars"], colour["law"]) >= 1.5 and contrast(colour["bars"], colour["panel"]) >= 1.5
    for step in range(HEAT_STEPS + 1):
        assert contrast(*heat_colour(step)) >= 4.5, step


def test_a_vit_base_is_under_three_megabytes():
    rng = np.random.default_rng(0)
    layers = []
    for index in range(50):
        shape = [(2304, 768), (768, 768), (3072, 768), (768, 3072)][index % 4]
        squares = law.quantile((np.arange(768) + 0.5) / 768, 768 / max(shape)) * max(shape)
        values = np.sqrt(squares)
        values[-100:] *= 1 + rng.random(100)
        fit = fit_singular_values(values, shape)
        shown = spectral_histogram(values, fit, "w")
        name = f"blocks.{index // 4}.attn.a_rather_long_name_{index}.weight"
        layers.append(Layer(name, "qkv", shape, 1000, 4 * shape[0] * shape[1], fit, shown))
    text = to_html(Contents("ViT-B", "", tuple(layers), 86_000_000, 344_000_000, "float32"), "0")
    assert len(text.encode()) < 1_000_000
    assert len(Page(text).all("figure")) == 50


def test_the_page_depends_on_nothing_but_its_contents(pruned, tmp_path):
    pages = [tmp_path / name for name in ("a.html", "b.html")]
    for path in pages:
        write_report(*pruned[:1], path, pruned[1])
    assert pages[0].read_bytes() == pages[1].read_bytes()


def test_a_packed_model_shows_its_dense_weights_and_stays_packed(pruned, tmp_path):
    model, plan = pruned
    write_report(model, tmp_path / "dense.html", plan)
    pack_(model, torch.randn(4, 48), timer=fast, show_progress=False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    write_report(model, tmp_path / "packed.html", plan)
    assert {name: value.shape for name, value in model.state_dict().items()} == {n: v.shape for n, v in before.items()}
    dense, packed = (read(tmp_path / name).table("layer-table") for name in ("dense.html", "packed.html"))
    assert dense == packed
    size = sum(value.nbytes for value in before.values())
    assert f"{size / 2**10:.1f} KiB" in (tmp_path / "packed.html").read_text()


def test_shards_and_folders(out, tmp_path, pruned):
    model, plan = pruned
    folder = tmp_path / "vit-0.75"
    folder.mkdir()
    state, metadata = model.state_dict(), {"rmtkern": plan.to_json()}
    shards.write(state, folder / "model.safetensors", metadata, 20_000)
    index = folder / "model.safetensors.index.json"
    held = [index, *folder.glob("*.safetensors")]
    assert len(held) > 2
    written = write_report(folder, out)
    size = sum(file.stat().st_size for file in held)
    assert shards.nbytes_of(folder) == size
    text = out.read_text()
    assert "The zeros of all 4 pruned weights are exactly those of the plan." in text
    assert "<title>vit-0.75" in text and f"the file has {size / 2**10:.1f} KiB" in text
    whole = tmp_path / "whole.safetensors"
    shards.write(state, whole, metadata)
    assert shards.nbytes_of(whole) == whole.stat().st_size
    for path in (index, whole):
        assert write_report(path, tmp_path / "other.html").facts[0] == written.facts[0]
        assert read(tmp_path / "other.html").table("layer-table") == read(out).table("layer-table")
    assert main(["report", str(folder), "-o", str(out)]) == 0
    held[1].unlink()
    with pytest.raises(ValueError, match=r"index\.json: shard .* is missing"):
        write_report(folder, out)


def test_a_packed_folder_needs_its_model(out, tmp_path):
    model = net()
    plan = rmtkern.prune_(model, 0.75, "uniform", show_progress=False)
    pack_(model, torch.randn(8, 48), timer=fast, show_progress=False)
    rmtkern.save(model, tmp_path / "packed", plan, max_shard_size=20_000)
    with pytest.raises(ValueError, match=r"packed: it holds a packed model, whose weights need their model"):
        write_report(tmp_path / "packed", out)
    loaded = load_checkpoint(f"{__name__}:net", tmp_path / "packed")
    write_report(loaded, out, checkpoint=tmp_path / "packed")
    assert "The zeros of all 4 pruned weights are exactly those of the plan." in out.read_text()


def test_errors(out, tmp_path, pruned):
    model, _ = pruned
    out.write_text("old")
    for error, message, call in (
        (TypeError, r"model: expected an nn.Module or the path of a checkpoint, got int", lambda: write_report(3, out)),
        (ValueError, r"nothing to report on: no Linear", lambda: write_report(nn.ReLU(), out)),
        (ValueError, r"gone.safetensors: no such file", lambda: write_report(tmp_path / "gone.safetensors", out)),
        (TypeError, r"plan: expected a PrunePlan, got dict", lambda: write_report(model, out, {})),
        (TypeError, r"packing: expected a PackReport, got str", lambda: write_report(model, out, packing="x")),
        (TypeError, r"scores: expected a Mapping, got float", lambda: write_report(model, out, scores=0.5)),
        (TypeError, r"scores\['a'\]: expected a Evaluation", lambda: write_report(model, out, scores={"a": 1})),
        (TypeError, r"sweeps: expected what sweep returned, or", lambda: write_report(model, out, sweeps=[3])),
        (ValueError, r"gone.csv: no such file; give the CSV", lambda: write_report(model, out, sweeps="gone.csv")),
        (ValueError, r"gone.json: no such file of decisions", lambda: write_report(model, out, decisions="gone.json")),
    ):
        with pytest.raises(error, match=message):
            call()
    with torch.no_grad():
        model.head.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"head.weight has NaN or Inf"):
        write_report(model, out)
    assert out.read_text() == "old" and [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_ticks_are_round_numbers():
    assert ticks(0, 100) == [0, 20, 40, 60, 80, 100] and ticks(0.13, 0.42) == pytest.approx([0.2, 0.3, 0.4])
    assert ticks(2, 2) == [2] and ticks(0, float("inf")) == [0]
    assert ticks(0, 3.7, 5) == [0, 1, 2, 3]


def test_marks_stay_inside_the_frame():
    plot = Plot("k", "t", "d", (0, 1), (0, 1), "x", "y", (100, 80))
    plot.line([-5, 0.5, 5], [-5, 0.5, 5], "line")
    path = re.search(r'class="line" d="M(.*?)"', plot.to_svg()).group(1)
    points = [tuple(map(float, point.split())) for point in path.split("L")]
    assert points == [(44, 46), (67, 27), (90, 8)]


# on the command line

TOYS = """
import torch
from torch import nn
def toy():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32), nn.Linear(32, 3))
"""


@pytest.fixture
def work(tmp_path, monkeypatch):
    import sys

    (tmp_path / "reporttoys.py").write_text(TOYS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    yield tmp_path
    sys.modules.pop("reporttoys", None)


def test_a_dense_checkpoint_on_the_command_line(work, capsys):
    assert main(["prune", "reporttoys:toy", "--targets", "0", "-o", "p.safetensors"]) == 0
    capsys.readouterr()
    assert main(["report", "p.safetensors", "-o", "r.html", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert (
        printed["path"] == "r.html"
        and printed["layers"] == 3
        and printed["nbytes"] == len((work / "r.html").read_bytes())
    )
    assert "The zeros of all 1 pruned weights are exactly those of the plan." in (work / "r.html").read_text()
    assert main(["report", "p.safetensors", "-o", "m.html", "--model", "reporttoys:toy", "--title", "T"]) == 0
    assert "wrote m.html: 3 layers" in capsys.readouterr().out
    assert read(work / "m.html").table("layer-table") == read(work / "r.html").table("layer-table")
    import reporttoys

    dense = reporttoys.toy().eval()
    found = rmtkern.certify(load_checkpoint("reporttoys:toy", work / "p.safetensors"), dense, torch.randn(4, 32))
    (work / "c.json").write_text(found.to_json())
    assert main(["report", "p.safetensors", "-o", "c.html", "--certificate", "c.json"]) == 0
    assert len(read(work / "c.html").table("bounds")) == len(found.bounds) + 1


def test_a_packed_checkpoint_and_its_report(work, capsys, monkeypatch):
    import reporttoys

    model = reporttoys.toy().eval()
    rmtkern.prune_(model, 0.75, targets=["0", "2"], show_progress=False)
    report = pack_(model, torch.randn(4, 32), timer=fast, show_progress=False)
    rmtkern.save(model, work / "packed.safetensors")
    (work / "pack.json").write_text(json.dumps({"environment": {}, **json.loads(report.to_json())}))
    argv = ["report", "packed.safetensors", "-o", "r.html", "--packing", "pack.json"]
    assert main(argv) == 2
    assert "it holds a packed model, whose weights need their model" in capsys.readouterr().err
    assert main([*argv, "--model", "reporttoys:toy"]) == 0
    page = read(work / "r.html")
    assert [cells[-2] for cells in page.table("layer-table")[1:]] == [layer.form for layer in report.layers]
    assert float(page.table("layer-table")[1][4]) == 75.0


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--evaluate", "images"], "--evaluate needs a model to run: give --model NAME too"),
        (["--packing", "gone.json"], "gone.json: no such file; expected what rmtkern bench --json printed"),
        (["--packing", "bad.json"], "bad.json: not the JSON of a PackReport"),
        (["--certificate", "bad.json"], "bad.json: not the JSON of a Certificate"),
        (["--sweep", "bad.json"], "bad.json: expected a CSV with the columns"),
        (["-o", "no/r.html"], "no: no such folder"),
    ],
)
def test_command_line_errors(work, capsys, extra, message):
    save_file({"a.weight": torch.randn(9, 9)}, work / "a.safetensors")
    (work / "bad.json").write_text("{}")
    assert main(["report", "a.safetensors", "-o", "r.html", *extra]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and message in err
    assert not (work / "r.html").exists()


def test_pack_reports_come_back_from_json(pruned):
    report = pack_(pruned[0], torch.randn(4, 48), timer=fast, show_progress=False)
    assert PackReport.from_json(report.to_json()) == report
    record = json.loads(report.to_json())
    for change, message in (
        ({"layers": 3}, "LayerReport: expected a list, got 3"),
        ({"layers": [{}]}, "LayerReport: expected an object with name"),
        ({"layers": [{**record["layers"][0], "shape": [3]}]}, r"shape: expected \[N, K\], got \[3\]"),
        ({"layers": [{**record["layers"][0], "sparsity": "0"}]}, "sparsity: expected float, got '0'"),
        ({"layers": [{**record["layers"][0], "speedup": float("nan")}]}, "speedup: expected float or null, got nan"),
        ({"threads": True}, "threads: expected int, got True"),
        ({"decisions": [3]}, "entry 0: expected an object with key and ms"),
        ({"notes": [3]}, "name: expected str, got 3"),
    ):
        with pytest.raises(ValueError, match=rf"not the JSON of a PackReport \({message}"):
            PackReport.from_json(json.dumps({**record, **change}))
    old = {**record, "end_to_end": [{"example": 0, "original_ms": 3, "dense_ms": 2.0, "packed_ms": 1.0}]}
    assert PackReport.from_json(json.dumps(old)).end_to_end == (EndToEnd(0, 3.0, 2.0, 1.0),)
    for text in ("[]", "x", "{}", "[" * 100_000):
        with pytest.raises(ValueError, match="not the JSON of a PackReport"):
            PackReport.from_json(text)
