"""What tests of several processes and of several Python threads share."""

import socket
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch import multiprocessing as mp


def on_two_ranks(work: Callable[[int, int, str], None], folder: Path) -> list[dict[str, Tensor]]:
    """Run work(rank, port, folder) in two processes; what each wrote to RANK.safetensors."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    mp.spawn(work, (port, str(folder)), nprocs=2)
    return [load_file(folder / f"{rank}.safetensors") for rank in range(2)]


def part(found: dict[str, Any], name: str) -> dict[str, Any]:
    """The entries NAME/KEY, by KEY."""
    return {key.partition("/")[2]: value for key, value in found.items() if key.partition("/")[0] == name}


def wrong_in_threads(
    call: Callable[[Tensor], Tensor], inputs: Sequence[Tensor], *, threads: int, calls: int
) -> list[int]:
    """The inputs on which some of several threads, each calling with all in turn, got other bits than one alone."""
    expected = [call(x) for x in inputs]
    wrong: list[int] = []

    def work(first: int) -> None:
        for i in range(calls):
            j = (first + i) % len(inputs)
            if not torch.equal(call(inputs[j]), expected[j]):
                wrong.append(j)

    running = [threading.Thread(target=work, args=(first,)) for first in range(threads)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    return wrong
