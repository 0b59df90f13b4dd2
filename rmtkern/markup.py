"""Text that is safe inside HTML and SVG, whatever it holds; it knows nothing about what the text means."""

import html

__all__ = ["clipped", "escape"]


def escape(value: object) -> str:
    """A value as text for element content and for attribute values in double quotes.

    Characters that show nothing or reorder their neighbours (control, format, surrogate and unassigned ones, spaces
    that are not U+0020) stand as Python escapes, so that what is read is what is there.

    Args:
        value: anything; its `str` is used.

    Returns:
        Text without `<`, `>`, `&` and quotes of its own, which encodes as UTF-8.
    """
    text = str(value)
    if not text.isprintable():
        text = "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)
    return html.escape(text)


def clipped(text: str, most: int = 120) -> str:
    """The text, its middle replaced by an ellipsis where it is longer than `most` characters."""
    if len(text) <= most:
        return text
    head = (most - 1) // 2
    return f"{text[:head]}…{text[-(most - 1 - head) :]}"
