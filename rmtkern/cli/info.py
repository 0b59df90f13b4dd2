"""`rmtkern info`: versions, this CPU, and which layouts run here."""

import argparse
import json

from rmtkern.cli.outputs import print_json
from rmtkern.cli.verb import Verb
from rmtkern.environment import environment, environment_line, version
from rmtkern.ops import available
from rmtkern.tables import Table

__all__ = ["VERB"]

PACKAGES = {
    "rmtkern": "pip install .",
    "torch": "pip install torch",
    "numpy": "pip install numpy",
    "safetensors": "pip install safetensors",
    "timm": "pip install 'rmtkern[models]'",
    "pillow": "pip install 'rmtkern[models]'",
    "matplotlib": "pip install 'rmtkern[report]'",
    "triton": "comes with torch on Linux with CUDA",
    "cupy-cuda12x": "pip install 'rmtkern[gpu-cuda12]'",
    "cupy-cuda13x": "pip install 'rmtkern[gpu-cuda13]'",
}
"""Distribution -> how to get it."""


def _options(parser: argparse.ArgumentParser) -> None:
    """None of its own."""


def _run(args: argparse.Namespace) -> int:
    versions = {name: version(name) for name in PACKAGES}
    table = available()
    if args.json:
        print_json(
            {
                "environment": environment(),
                "versions": versions,
                "missing": {name: PACKAGES[name] for name, found in versions.items() if found is None},
                "available": json.loads(table.to_json()),
            }
        )
        return 0
    rows = [[name, found, None if found else PACKAGES[name]] for name, found in versions.items()]
    print(f"{environment_line()}\n\n{Table(('package', 'version', 'how to get it'), rows).to_text()}\n\n{table}")
    return 0


VERB = Verb("info", "versions, this CPU, and which layouts run here and why not the others", _options, _run)
