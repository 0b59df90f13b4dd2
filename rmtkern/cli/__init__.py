"""The command line: rmtkern VERB; `rmtkern --help` lists the verbs. It parses, calls public functions and prints.

Each verb is a file of its own beside this one.
"""

import argparse
import logging
import os
import sys
import traceback
from collections.abc import Sequence

import torch

from rmtkern.cli import (
    advise,
    analyze,
    bench,
    certify,
    demo,
    finetune,
    gradual,
    info,
    prune,
    report,
    shrink,
    sweep,
)
from rmtkern.environment import version
from rmtkern.errors import PackedModelError

__all__ = ["main"]

VERBS = {
    file.VERB.name: file.VERB
    for file in (demo, analyze, advise, shrink, prune, sweep, certify, finetune, gradual, bench, report, info)
}
"""Name -> verb, in the order of --help."""

EXIT_CODES = """exit codes:
  0  done
  1  the work failed, or bench found the packed model slower than the strongest dense form, or nothing to pack
  2  bad usage or bad input (an unknown name, a damaged file, an impossible sparsity); nothing was written
  130  interrupted
"""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rmtkern",
        description="Prune Vision Transformers with random matrix theory and run the pruned model fast.",
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"rmtkern {version('rmtkern') or 'not installed'}")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--json", action="store_true", help="one JSON object on stdout and nothing else")
    common.add_argument("--debug", action="store_true", help="show the traceback of an error")
    common.add_argument("--threads", type=int, help="threads of torch and of the kernels")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar=f"{{{','.join(VERBS)}}}")
    for verb in VERBS.values():
        verb.options(
            verbs.add_parser(
                verb.name,
                help=verb.text,
                description=verb.text,
                parents=[common],
                epilog=EXIT_CODES,
                formatter_class=argparse.RawDescriptionHelpFormatter,
            )
        )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the words after the program's name; default, those of this process.

    Returns:
        The exit code; see EXIT_CODES. Wrong usage raises SystemExit(2), as argparse does.
    """
    args = _parser().parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="rmtkern: %(message)s")
    failure: Exception
    try:
        if args.threads is not None:
            most = os.cpu_count() or 1  # far more of them end the process without a word
            if not 1 <= args.threads <= most:
                raise ValueError(f"--threads must be 1 to {most}, the CPUs here, got {args.threads}")
            torch.set_num_threads(args.threads)
        return VERBS[args.verb].run(args)
    except (ValueError, TypeError, ModuleNotFoundError, PackedModelError) as error:
        code, failure = 2, error
    except KeyboardInterrupt:
        print(f"rmtkern {args.verb}: interrupted", file=sys.stderr)
        return 130
    except Exception as error:  # a user's model function may raise anything
        code, failure = 1, error
    if args.debug:
        traceback.print_exception(failure)
    text = " ".join(str(failure).split())
    print(f"rmtkern {args.verb}: {text or type(failure).__name__}", file=sys.stderr)
    return code
