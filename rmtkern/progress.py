"""A progress bar for long work: shown on a terminal, silent elsewhere."""

import sys
from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

__all__ = ["progress"]

Item = TypeVar("Item")


def progress(items: Iterable[Item], label: str, total: int | None = None, show: bool | None = None) -> Iterator[Item]:
    """Iterate with a bar on stderr; `show=None` means only when stderr is a terminal."""
    hidden = not (sys.stderr.isatty() if show is None else show)
    return iter(tqdm(items, desc=label, total=total, disable=hidden, leave=False))
