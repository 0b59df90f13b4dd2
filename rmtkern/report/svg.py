"""SVG by hand: a plot area with axes, and the marks in it. It knows numbers and text, and not what they mean.

Colours and line styles are classes of the page's style sheet, so that a drawing follows the reader's theme.
"""

import math
from collections.abc import Callable, Iterable, Sequence

from rmtkern.markup import escape

__all__ = ["Plot", "ticks"]

LEFT, RIGHT, TOP, BOTTOM = 44, 10, 8, 34
"""Room around the plot area [user units, about pixels]."""


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) from `low` to `high`, at most about `most` of them."""
    if not 0 < high - low < math.inf:
        return [low]
    raw = (high - low) / max(1, most - 1)
    unit = 10.0 ** math.floor(math.log10(raw))
    step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= raw * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [index * step for index in range(first, last + 1)]


def _number(value: float) -> str:
    """A coordinate with one decimal, without a trailing zero."""
    text = f"{value:.1f}"
    return text[:-2] if text.endswith(".0") else text


def _label(value: float) -> str:
    return f"{value:.6g}"


class Plot:
    """A drawing with an x and a y axis; marks are added in data coordinates, what lies outside is cut at the frame.

    Args:
        key: what its ids begin with, unique in the page: letters, digits and "-".
        title: its name, for those who do not see it.
        description: what it shows, in a sentence or two.
        x: (low, high) of the x axis.
        y: (low, high) of the y axis.
        x_label: what the x axis is, with its unit.
        y_label: what the y axis is, with its unit.
        size: width and height [user units].
    """

    def __init__(
        self,
        key: str,
        title: str,
        description: str,
        x: tuple[float, float],
        y: tuple[float, float],
        x_label: str,
        y_label: str,
        size: tuple[int, int] = (360, 220),
    ) -> None:
        self._key, self._title, self._description = key, title, description
        self._size, self._marks = size, list[str]()
        self._x, self._y = _scale(x, LEFT, size[0] - RIGHT), _scale(y, size[1] - BOTTOM, TOP)
        self._axes(x, y, x_label, y_label)

    def _axes(self, x: tuple[float, float], y: tuple[float, float], x_label: str, y_label: str) -> None:
        width, height = self._size
        floor, wall = height - BOTTOM, LEFT
        grid, texts = [], []
        for value in ticks(*x, most=8):
            across = _number(self._x(value))
            texts.append(f'<text x="{across}" y="{floor + 13}" class="middle">{_label(value)}</text>')
        for value in ticks(*y, most=7):
            at = self._y(value)
            grid.append(f"M{wall} {_number(at)}H{width - RIGHT}")
            texts.append(f'<text x="{wall - 5}" y="{_number(at + 3.5)}" class="end">{_label(value)}</text>')
        middle = (wall + width - RIGHT) / 2
        texts.append(f'<text x="{_number(middle)}" y="{height - 5}" class="middle">{escape(x_label)}</text>')
        turn = _number((TOP + floor) / 2)
        texts.append(
            f'<text x="11" y="{turn}" class="middle" transform="rotate(-90 11 {turn})">{escape(y_label)}</text>'
        )
        self._marks.append(f'<path class="grid" d="{"".join(grid)}"/>{"".join(texts)}')
        self._marks.append(f'<path class="axis" d="M{wall} {TOP}V{floor}H{width - RIGHT}"/>')

    def bars(self, bounds: Sequence[float], heights: Sequence[float], css: str) -> None:
        """Filled columns between neighbouring bounds, as one path."""
        floor = _number(self._y(0))
        parts = [f"M{_number(self._x(bounds[0]))} {floor}"]
        for right, height in zip(bounds[1:], heights, strict=True):
            parts.append(f"V{_number(self._y(height))}H{_number(self._x(right))}")
        self._marks.append(f'<path class="{css}" d="{"".join(parts)}V{floor}z"/>')

    def line(self, x: Iterable[float], y: Iterable[float], css: str) -> None:
        """A line through points."""
        points = [f"{_number(self._x(a))} {_number(self._y(b))}" for a, b in zip(x, y, strict=True)]
        self._marks.append(f'<path class="{css}" d="M{"L".join(points)}"/>')

    def vertical(self, x: float, css: str) -> None:
        """A line from the bottom to the top."""
        self._marks.append(f'<path class="{css}" d="M{_number(self._x(x))} {self._size[1] - BOTTOM}V{TOP}"/>')

    def stems(self, x: Iterable[float], css: str, height: int = 12) -> None:
        """Short strokes up from the x axis; those on the same tenth of a unit are one."""
        floor = self._size[1] - BOTTOM
        at = dict.fromkeys(_number(self._x(value)) for value in x)
        if at:
            strokes = "".join(f"M{value} {floor}v-{height}" for value in at)
            self._marks.append(f'<path class="{css}" d="{strokes}"/>')

    def points(self, points: Iterable[tuple[float, float, str]], css: str, shape: int) -> None:
        """Marks (x, y, what the pointer is told); `shape` picks one of SHAPES, again and again."""
        draw = SHAPES[shape % len(SHAPES)]
        for x, y, text in points:
            mark = draw(self._x(x), self._y(y))
            self._marks.append(f'<path class="{css}" d="{mark}"><title>{escape(text)}</title></path>')

    def to_svg(self) -> str:
        """The drawing as an element to stand in an HTML page."""
        width, height = self._size
        title, description = f"{self._key}-title", f"{self._key}-desc"
        return (
            f'<svg viewBox="0 0 {width} {height}" role="img" aria-labelledby="{title} {description}">'
            f'<title id="{title}">{escape(self._title)}</title><desc id="{description}">{escape(self._description)}'
            f"</desc>{''.join(self._marks)}</svg>"
        )


def _scale(data: tuple[float, float], start: float, end: float) -> Callable[[float], float]:
    """A linear map of an interval to another one; what lies outside is moved to the nearer end."""
    low, high = data
    span = high - low if high > low else 1.0

    def at(value: float) -> float:
        return start + (end - start) * min(1.0, max(0.0, (value - low) / span))

    return at


def _polygon(*corners: tuple[float, float]) -> Callable[[float, float], str]:
    def draw(x: float, y: float) -> str:
        return f"M{'L'.join(f'{_number(x + dx)} {_number(y + dy)}' for dx, dy in corners)}z"

    return draw


SHAPES: tuple[Callable[[float, float], str], ...] = (
    _polygon((-2.5, -2.5), (2.5, -2.5), (2.5, 2.5), (-2.5, 2.5)),
    _polygon((0, -3.6), (3.4, 2.6), (-3.4, 2.6)),
    _polygon((0, -3.8), (3.8, 0), (0, 3.8), (-3.8, 0)),
    _polygon((0, 3.6), (3.4, -2.6), (-3.4, -2.6)),
    _polygon((-3, -1), (-1, -3), (1, -3), (3, -1), (3, 1), (1, 3), (-1, 3), (-3, 1)),
)
"""Outlines of marks, told apart without colour."""
