"""Compiles a kernel in C++ to a library, once for each source, set of flags and processor."""

import ctypes
import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch

COMPILERS = ("g++", "c++", "clang++")
# Sums may be taken in the order of vectors, and a NaN stays one.
ORDER = ("-fno-math-errno", "-fno-trapping-math", "-fassociative-math", "-fno-signed-zeros")
FLAGS = ("-O3", "-std=c++20", "-shared", "-fPIC", "-fopenmp", *ORDER)


@cache
def plain_library(source: Path) -> ctypes.CDLL | None:
    """Returns kernels that need nothing of torch, compiled for this processor, or None where that fails."""
    native = "-mcpu=native" if platform.machine() in ("aarch64", "arm64") else "-march=native"
    processor = f"{platform.machine()} {sorted(torch.cpu.get_capabilities().items())}"
    try:
        return ctypes.CDLL(str(built(source, (*FLAGS, native), (), Path.home() / ".cache" / "trivium", processor)))
    except (OSError, RuntimeError):  # no compiler, no home folder, or a folder that cannot be written to
        return None


def built(source: Path, flags: Sequence[str], libraries: Sequence[str], folder: Path, made_for: str) -> Path:
    """Compiles the C++ source of a kernel to a library in `folder`, unless it is there, and returns its path.

    `made_for` says for what it is compiled beside the flags: the version of a library, or a processor. Of several
    processes one compiles and the others wait. Raises OSError if there is no compiler, or it fails.
    """
    sources = [source, *sorted(source.parent.glob("*.h"))]
    facts = repr(([one.read_bytes() for one in sources], tuple(flags), made_for))
    library = folder / f"{source.stem}-{hashlib.sha256(facts.encode()).hexdigest()[:16]}.so"
    if library.exists():
        return library
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            _compile(source, flags, libraries, library)
    return library


def _compile(source: Path, flags: Sequence[str], libraries: Sequence[str], library: Path) -> None:
    compiler = next(filter(None, map(shutil.which, COMPILERS)), None)
    if compiler is None:
        raise OSError(f"there is no C++ compiler; install one of {', '.join(COMPILERS)}")
    unfinished = library.with_suffix(f".{os.getpid()}")
    command = [compiler, *flags, str(source), "-o", str(unfinished), *(f"-l{name}" for name in libraries)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if "error" in line] or [f"status {done.returncode}"]
        raise OSError(errors[0])
    os.replace(unfinished, library)
