"""Tables in a terminal and in a notebook, and text that cannot leave its place in HTML."""

from html.parser import HTMLParser

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import rmtkern
from rmtkern.markup import clipped, escape
from rmtkern.tables import Table, Tabulated


class Cells(HTMLParser):
    """Tags, and the text of every element of a table."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.texts = [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.texts.append("")

    def handle_data(self, data):
        if self.texts:
            self.texts[-1] += data


def test_html_has_headers_escaped_cells_and_notes():
    found = Table(("name", "n", "x"), [("<b>&\"'", 3, None), ("b", 12, 0.51234)], ["1 < 2"]).to_html()
    cells = Cells(found)
    assert "b" not in cells.tags and cells.tags.count("th") == 5 and cells.tags.count("td") == 4
    assert [text.strip() for text in cells.texts if text.strip()] == [
        "name", "n", "x", "<b>&\"'", "3", "-", "b", "12", "0.5123", "1 < 2"]  # fmt: skip
    assert found.count('scope="col"') == 3 and found.count('scope="row"') == 2
    assert found.count("text-align:right") == 6  # numbers and None, and their headers


@given(st.text())
def test_escaped_text_is_one_text_node_and_one_attribute(text):
    safe = escape(text)
    safe.encode()
    assert not set(safe) & set("<>\"'") and safe.isprintable()

    class Found(HTMLParser):
        seen, data = (), ""

        def handle_starttag(self, tag, attrs):
            self.seen += ((tag, tuple(attrs)),)

        def handle_data(self, data):
            self.data += data

    parser = Found()
    parser.feed(f'<p title="{safe}">{safe}</p>')
    parser.close()
    assert len(parser.seen) == 1 and parser.seen[0][1] == (("title", parser.data),)
    if text.isprintable():
        assert parser.data == text


def test_what_does_not_show_is_spelled_out():
    assert escape("a\x00b\u202ec\ud800\n") == r"a\x00b\u202ec\ud800\n"


def test_clipped():
    assert clipped("a" * 120) == "a" * 120
    assert clipped("abcdefghij", 7) == "abc…hij" and len(clipped("x" * 999)) == 120


def test_every_public_report_shows_as_html():
    shown = [getattr(rmtkern, name) for name in rmtkern.__all__ if hasattr(getattr(rmtkern, name), "table")]
    assert len(shown) >= 11
    for kind in shown:
        assert issubclass(kind, Tabulated), kind.__name__


def test_a_notebook_sees_what_the_terminal_sees():
    fits = rmtkern.fit_spectra({"w<": np.random.default_rng(0).standard_normal((20, 30))}, show_progress=False)
    assert str(fits) == repr(fits) == fits.table().to_text()
    assert fits._repr_html_() == fits.table().to_html() and "w&lt;" in fits._repr_html_()


def test_something_tabulated_needs_a_table():
    with pytest.raises(NotImplementedError):
        str(Tabulated())
