"""What several verbs print."""

import argparse
import json
from typing import Any

from rmtkern.evaluation import Evaluation

__all__ = ["print_json", "print_made"]


def print_json(value: Any) -> None:
    """Print one JSON object."""
    print(json.dumps(value, indent=1))


def print_made(
    args: argparse.Namespace, name: str | None, made: Any, before: Evaluation | None, after: Evaluation | None
) -> None:
    """Print what was made of a model, its scores and the file.

    Args:
        args: with `json` and `output`.
        name: under which the JSON holds what was made; None puts its own entries beside the scores.
        made: has `to_json`, and words.
        before: scores of the model as it came, if asked for.
        after: the same of what is written.
    """
    if args.json:
        record = json.loads(made.to_json())
        scores = {"before": before.to_dict() if before else None, "after": after.to_dict() if after else None}
        print_json({"output": str(args.output), **scores, **(record if name is None else {name: record})})
        return
    print(made)
    if before and after:
        print(f"before: {before}\nafter:  {after}")
    print(f"wrote {args.output}")
