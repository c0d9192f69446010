"""A process that keeps freed memory does not ask the system for it again."""

import platform
import subprocess
import sys

import pytest

# Takes 96 MB in parts of 8 MB, writes to each page and frees all of it, three times; counts the last time's new pages.
PROGRAM = """
import ctypes, resource, sys
from pretrain.parallel.host_memory import keep_freed_memory
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
if sys.argv[1] == "keep":
    keep_freed_memory()
for _ in range(3):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    parts = [libc.malloc(2**23) for _ in range(12)]
    for part in parts:
        ctypes.memset(part, 1, 2**23)
    for part in parts:
        libc.free(part)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is told to keep memory")
def test_freed_memory_is_used_again_without_new_pages() -> None:
    def new_pages(how: str) -> int:
        command = [sys.executable, "-c", PROGRAM, how]
        return int(subprocess.run(command, capture_output=True, check=True, text=True).stdout)

    assert new_pages("keep") < 100
    assert new_pages("give back") > 10_000
