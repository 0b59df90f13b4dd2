"""Memory that libraries keep after it was freed, given back to the system. It knows nothing about what used it."""

import ctypes
import os
from contextlib import suppress
from pathlib import Path

import torch

__all__ = ["give_memory_back", "give_thread_buffers_back"]


def give_memory_back() -> None:
    """To the system, what the allocator keeps of it: glibc's keeps some for every thread, several times a model's size.

    Nothing happens with another C library, or where it cannot be reached.
    """
    with suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def give_thread_buffers_back() -> None:
    """What MKL keeps for the next product of the calling thread, some 5 MB: for a thread that will not compute soon.

    Nothing happens in a PyTorch without MKL, or where it cannot be reached.

    Source: Intel oneMKL, mkl_thread_free_buffers; it may be called at any time, between products.
    """
    with suppress(AttributeError, OSError, TypeError):
        library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
        ctypes.CDLL(str(library), mode=os.RTLD_NOLOAD).mkl_serv_thread_free_buffers()
