"""docs/api.md from the docstrings of the public names: `python -m docs.make_api`; a test checks that it is current."""

import importlib
import inspect
import re
from pathlib import Path
from typing import Any

import rmtkern

__all__ = ["API", "render"]

API = Path(__file__).with_name("api.md")
MODULES = {"rmtkern.sweep": "Sweeps", "rmtkern.plots": "Figures"}
"""Modules whose public names are not names of the package."""
WIDTH = 100
SECTION = re.compile(r"^(Args|Attributes|Returns|Raises|Yields|Source):\s*(.*)$")
ITEM = re.compile(r"^(\*{0,2}[\w, ]+):\s+(.*)$")
SHORTER = (
    ("torch.nn.modules.module.", "nn."), ("torch.nn.parameter.", "nn."), ("collections.abc.", ""), ("typing.", ""),
    ("torch.Tensor", "Tensor"), ("pathlib._local.", ""), ("pathlib.", ""), ("matplotlib.axes.", ""),
    ("matplotlib.figure.", ""), ("numpy.ndarray", "ndarray"),
)  # fmt: skip


def _signature(name: str, value: Any) -> str:
    """The call as Python code, on one line if it fits."""
    signature = inspect.signature(value)
    parameters = [p for p in signature.parameters.values() if p.name not in ("self", "cls")]
    words, star = [], False
    for parameter in parameters:
        if parameter.kind is parameter.KEYWORD_ONLY and not star:
            words.append("*")
        star = star or parameter.kind in (parameter.KEYWORD_ONLY, parameter.VAR_POSITIONAL)
        words.append(str(parameter))
    empty = signature.return_annotation in (signature.empty, None)
    end = "" if inspect.isclass(value) or empty else f" -> {inspect.formatannotation(signature.return_annotation)}"
    short = f"{name}({', '.join(words)}){end}"
    for long, replacement in SHORTER:
        short = short.replace(long, replacement)
        words = [word.replace(long, replacement) for word in words]
        end = end.replace(long, replacement)
    short = re.sub(r"rmtkern(\.\w+)+\.(\w+)", r"\2", short)
    if len(short) <= WIDTH:
        return short
    lines = ",\n    ".join(re.sub(r"rmtkern(\.\w+)+\.(\w+)", r"\2", word) for word in words)
    return f"{name}(\n    {lines},\n)" + re.sub(r"rmtkern(\.\w+)+\.(\w+)", r"\2", end)


def _docstring(value: Any) -> str:
    """A docstring in Markdown: paragraphs as they are, sections as lists."""
    out: list[str] = []
    section = ""
    for line in inspect.cleandoc(value.__doc__ or "").splitlines():
        head = SECTION.match(line)
        if head:
            section = head.group(1)
            out += ["", f"**{section}**" + (f": {head.group(2)}" if head.group(2) else ""), ""]
        elif section in ("Args", "Attributes", "Raises", "Yields", "Returns") and line.startswith("    "):
            text, deep = line.strip(), line.startswith("     ")
            item = None if deep or section in ("Returns", "Yields") else ITEM.match(text)
            if item:
                names = ", ".join(f"`{name.strip()}`" for name in item.group(1).split(","))
                out.append(f"- {names}: {item.group(2)}")
            else:
                out.append(f"  {text}" if section not in ("Returns", "Yields") else text)
        else:
            out.append(line)
    return re.sub(r"\n{3,}", "\n\n", "\n".join(out)).strip()


def _members(kind: type) -> str:
    """A line for each public property and method that a class defines itself."""
    lines = []
    for name, member in vars(kind).items():
        value = member.__func__ if isinstance(member, classmethod | staticmethod) else member
        function = value.fget if isinstance(value, property) else value
        if name.startswith("_") or not inspect.isfunction(function) or not function.__doc__:
            continue
        first = " ".join(inspect.cleandoc(function.__doc__).split("\n\n")[0].split())
        shown = name if isinstance(value, property) else _signature(name, value).split(" -> ")[0]
        lines.append(f"- `{' '.join(shown.split())}`: {first}")
    return "\n".join(lines)


def _entry(name: str, value: Any) -> str:
    parts = [f"### `{name}`", f"```text\n{_signature(name, value)}\n```", _docstring(value)]
    if inspect.isclass(value) and (members := _members(value)):
        parts += ["**Members**", members]
    return "\n\n".join(parts)


def render() -> str:
    """The whole page."""
    public = {name: getattr(rmtkern, name) for name in rmtkern.__all__}
    functions = {name: value for name, value in public.items() if inspect.isfunction(value)}
    errors = {n: v for n, v in public.items() if inspect.isclass(v) and issubclass(v, Exception)}
    classes = {name: value for name, value in public.items() if name not in functions and name not in errors}
    parts = ["# API reference", "Generated from the docstrings by `python -m docs.make_api`; edit those."]
    for title, names in (("Functions", functions), ("What they take and return", classes)):
        parts += [f"## {title}", *(_entry(name, value) for name, value in sorted(names.items()))]
    parts += ["## Errors", *(f"- `{name}`: {inspect.cleandoc(value.__doc__)}" for name, value in errors.items())]
    for path, title in MODULES.items():
        module = importlib.import_module(path)
        parts += [f"## {title}: `{path}`", (module.__doc__ or "").strip()]
        found = {name: getattr(module, name) for name in module.__all__}
        parts += [_entry(name, value) for name, value in found.items() if callable(value)]
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    API.write_text(render())
