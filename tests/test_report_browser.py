"""The report in a real browser: it fits, sorts, filters and reads, at desktop and phone width, light and dark."""

import pytest
import torch

import rmtkern
from rmtkern.sweep import Sweep
from tests import chromium
from tests.test_report import contrast, fast, net, row

PROGRAM = chromium.find()
pytestmark = pytest.mark.skipif(PROGRAM is None, reason="needs Chromium: apt-get install chromium")
SIZES = {"desktop": (1280, 900), "phone": (360, 740)}
TAB, ENTER = 9, 13


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """A page with everything on it."""
    model, example = net(), torch.randn(4, 48, generator=torch.Generator().manual_seed(0))
    model.add_module("<img src=x onerror=alert(1)>", torch.nn.Linear(48, 48))
    plan = rmtkern.prune_(model, 0.75, "uniform", targets="*mlp*", show_progress=False)
    packed = net()
    packed.load_state_dict(model.state_dict(), strict=False)
    report = rmtkern.pack_(packed, example, timer=fast, show_progress=False)
    rows = [
        row("dense", 0.0, 0.9, 8.0, "float32"),
        row("row", 0.5, 0.8, 4.0, "float32"),
        row("seb", 0.5, 0.7, 5.0, "float32"),
    ]
    path = tmp_path_factory.mktemp("browser") / "report.html"
    scores = {"pruned": rmtkern.Evaluation(0.8, 0.9, 0.5, 50)}
    rmtkern.write_report(model, path, plan, packing=report, sweeps=Sweep(tuple(rows), 3), scores=scores)
    return path


@pytest.fixture(scope="module")
def browser():
    with chromium.Chromium(PROGRAM) as found:
        yield found


@pytest.fixture(autouse=True)
def silence(browser):
    browser.errors.clear()
    browser.requests.clear()
    yield
    assert browser.errors == []
    assert [url for url in browser.requests if not url.startswith(("file:", "about:"))] == []


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_it_fits_and_can_be_read(page, browser, size, dark, tmp_path):
    width, height = SIZES[size]
    browser.open(page, width, height, dark=dark, phone=size == "phone")
    assert browser.run("document.documentElement.scrollWidth") <= width
    assert browser.run("window.matchMedia('(prefers-color-scheme: dark)').matches") is dark
    boxes = browser.run(
        "[...document.querySelectorAll('section > *, dl.cards > div, figure, svg[role=img]')]"
        ".filter((e) => e.offsetParent !== null || e.ownerSVGElement === null)"
        ".map((e) => e.getBoundingClientRect()).map((r) => [r.left, r.right])"
    )
    assert len(boxes) > 20 and all(left >= -0.5 and right <= width + 0.5 for left, right in boxes if right > left)
    browser.picture(tmp_path / "page.png")
    assert (tmp_path / "page.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_text_stands_out_from_what_is_behind_it(page, browser, dark):
    browser.open(page, *SIZES["desktop"], dark=dark)
    pairs = browser.run(
        """(() => {
        const hex = (c) => '#' + c.match(/\\d+/g).slice(0, 3).map((n) => (+n).toString(16).padStart(2, '0')).join('');
        const behind = (e) => {
            for (let at = e; at; at = at.parentElement) {
                const c = getComputedStyle(at).backgroundColor;
                if (!c.endsWith(', 0)')) return hex(c);
            }
            return '#ffffff';
        };
        const found = new Set();
        for (const e of document.querySelectorAll('body *')) {
            const own = [...e.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim());
            if (!own || e.matches('script, style, svg title, svg desc, [hidden] *')) continue;
            const style = getComputedStyle(e);
            found.add([hex(e.ownerSVGElement ? style.fill : style.color), behind(e), e.tagName].join(' '));
        }
        return [...found];
        })()"""
    )
    assert len(pairs) > 10
    for pair in pairs:
        colour, back, tag = pair.split()
        assert contrast(colour, back) >= 4.5, (tag, colour, back)


COLUMN = (
    "[...document.querySelectorAll('#layer-table tbody tr')].filter((r) => !r.hidden).map((r) => r.cells[{}].innerText)"
)


def test_headers_sort_by_keyboard(page, browser):
    browser.open(page, *SIZES["desktop"])
    first = browser.run(COLUMN.format(0))
    browser.run("document.querySelector('#layer-table thead th:nth-child(4) button').focus()")
    states = []
    for _ in range(2):
        browser.press("Enter", ENTER, "\r")
        states.append(browser.run("document.querySelector('#layer-table thead th:nth-child(4)').ariaSort"))
        counts = [int(text.replace(",", "")) for text in browser.run(COLUMN.format(3))]
        assert counts == sorted(counts, reverse=len(states) == 2)
    assert states == ["ascending", "descending"]
    assert browser.run("document.querySelectorAll('#layer-table th[aria-sort=none]').length") == 14
    browser.run("document.querySelector('#layer-table thead th:nth-child(7) button').click()")
    assert browser.run(COLUMN.format(6))[-1] == "-"  # what has no fit is last in both directions
    browser.run("document.querySelector('#layer-table thead th:nth-child(7) button').click()")
    assert browser.run(COLUMN.format(6))[-1] == "-"
    assert sorted(browser.run(COLUMN.format(0))) == sorted(first)


def test_the_filter_hides_rows_and_their_spectra(page, browser):
    browser.open(page, *SIZES["phone"], phone=True)
    shown = "[...document.querySelectorAll('#spectra figure')].filter((f) => !f.hidden).length"
    everything = browser.run(shown)
    browser.run("document.getElementById('layer-words').focus()")
    browser.write("blocks.1 MLP")
    assert browser.run(COLUMN.format(0)) == ["blocks.1.mlp.0.weight", "blocks.1.mlp.2.weight"]
    assert browser.run(shown) == 2 < everything
    assert browser.run("document.getElementById('layer-count').innerText") == "2 of 6 layers"
    browser.run(
        "(() => { const s = document.getElementById('layer-role'); s.value = 'mlp_out';"
        "s.dispatchEvent(new Event('change')); })()"
    )
    assert browser.run(COLUMN.format(0)) == ["blocks.1.mlp.2.weight"]


def test_the_tab_key_reaches_everything_and_shows_where_it_is(page, browser):
    browser.open(page, *SIZES["desktop"])
    wanted = browser.run(
        "[...document.querySelectorAll('a, button, input, select, summary, [tabindex=\"0\"]')]"
        ".filter((e) => e.checkVisibility()).length"
    )
    seen = 0
    for _ in range(wanted):
        browser.press("Tab", TAB)
        outline = browser.run("getComputedStyle(document.activeElement).outlineStyle")
        assert outline != "none", browser.run("document.activeElement.outerHTML.slice(0, 200)")
        seen += browser.run("document.activeElement !== document.body")
    assert seen == wanted


def test_a_screen_reader_gets_names(page, browser):
    browser.open(page, *SIZES["desktop"])
    names = browser.names()
    assert ("heading", "Spectra") in names and ("main", "") in names and ("navigation", "Sections") in names
    pictures = [name for role, name in names if role in ("image", "img") and name]
    assert len([name for name in pictures if name.startswith("Spectrum of blocks.0.mlp.0.weight")]) == 1
    assert len(pictures) >= 8 and ("searchbox", "Layer name contains") in names
    assert ("combobox", "Layer type") in names and ("columnheader", "zeros %") in names
    assert [role for role, name in names if role in ("button", "link", "region") and not name] == []


def test_hostile_names_run_nothing(page, browser):
    browser.open(page, *SIZES["desktop"])
    assert browser.run("document.images.length") == 0 and browser.run("document.scripts.length") == 1
    assert "<img src=x onerror=alert(1)>.weight" in browser.run(COLUMN.format(0))
