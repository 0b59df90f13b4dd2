"""Verb: one command of the command line."""

import argparse
from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["Verb"]


@dataclass(frozen=True)
class Verb:
    """One command of the command line.

    Args:
        name: the word after `rmtkern`.
        text: what it does, in one line, for --help.
        options: adds its options to a parser, which has --json, --debug and --threads.
        run: does it with what was parsed, prints, and returns the exit code; bad input is a ValueError or a TypeError.
    """

    name: str
    text: str
    options: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]
