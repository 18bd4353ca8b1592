"""What becomes of the memory of tensors that die, in a process that trains on a processor.

The C library would keep it in one heap, among which small objects settle: the next tensor finds no
hole, and the heap grows to up to twice of what is alive (`docs/results/plan.md`). Or it would give
it back, and the kernel zero every page at its next first touch, which in a training step costs more
than the arithmetic of the element-wise operations. Here tensors of a megabyte and more lie in
mappings of their own, which are kept and given to the next tensor of the same size
(`kept_mappings.cpp`). A training step asks for the same sizes again and again.

Where there is no C++ compiler, the C library's heap is kept instead.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch

from solollm_torch.native import built, version_of

SOURCE = Path(__file__).with_name("kept_mappings.cpp")
FLAGS = ("-O2", "-std=c++20", "-shared", "-fPIC")
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's mallopt(3)


@functools.cache
def keep_freed_memory() -> None:
    """From now on, in this process. The C library keeps what is not a tensor's, and all where
    mappings cannot be had. Does nothing but on Linux."""
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 2**30)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
    library = load()
    if library is not None:
        library.use_kept_mappings(1)


def give_back() -> None:
    """All that is kept goes back to the system."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    if load.cache_info().currsize and (library := load()) is not None:
        library.give_back_kept_mappings()


def compiler() -> str | None:
    """Of C++, where mappings can be had."""
    if not sys.platform.startswith("linux"):
        return None
    return shutil.which(os.environ.get("CXX", "c++"))


@functools.cache
def load() -> ctypes.CDLL | None:
    """The compiled allocator, not in use yet; None where it cannot be made."""
    found = compiler()
    if found is None:
        return None
    headers, libraries = (Path(torch.__file__).parent / name for name in ("include", "lib"))
    command = (
        found, *FLAGS, f"-I{headers}", str(SOURCE), f"-L{libraries}", "-lc10",
        f"-Wl,-rpath,{libraries}",
    )  # fmt: skip
    parts = (SOURCE.read_bytes(), version_of(found), repr(command[1:]).encode(),
             torch.__version__.encode())  # fmt: skip
    digest = hashlib.sha256(b"\0".join(parts)).hexdigest()[:12]
    try:
        library = ctypes.CDLL(str(built(command, digest)))
    except (OSError, subprocess.SubprocessError):  # old compilers; a PyTorch without headers
        return None
    library.kept_mappings_mapped_bytes.restype = ctypes.c_uint64
    return library
