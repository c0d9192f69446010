"""Runs a Python program that a model wrote, in a subprocess with limits, and tells whether it ran to its end.

A program has limits of time, memory, file size and open files, an empty folder that is removed afterwards, and almost
no environment variables. It may not use the network, start processes, send signals, or change files outside of its
folder: `sandbox_child.py` forbids that and, where the system allows it, puts it into namespaces of its own, in which
there is no network and whose processes all end with it. These limits stop mistakes, not an attack on this machine:
programs of a model that you do not trust belong into a container or a virtual machine as well.
"""

import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

CHILD = Path(__file__).with_name("sandbox_child.py")
START_SECONDS = 20.0  # for the interpreter to start on a busy machine; the program's own time begins after that
MOST_REPORT = 100_000  # bytes of the child's report that are read


@dataclass(frozen=True)
class Limits:
    """The most that a program may use: seconds of wall-clock and of CPU time, and bytes of memory and of a file."""

    seconds: float = 5.0
    memory_bytes: int = 2**30
    file_bytes: int = 2**20


LIMITS = Limits()


@dataclass(frozen=True)
class Outcome:
    """The outcome of a program: whether it ran to its end without an exception, what happened, and what it printed.

    `output` is the beginning of what the program printed; "" if the program ended its process.
    """

    passed: bool
    result: str
    output: str = ""


def run_program(program: str, limits: Limits = LIMITS) -> Outcome:
    """Runs one program and ends it, with everything that it started, at the latest when its time is over."""
    token = secrets.token_hex(16)
    request = json.dumps({"program": program, "token": token, "limits": asdict(limits)}).encode()
    with tempfile.TemporaryDirectory(prefix="trivium-program-", ignore_cleanup_errors=True) as folder:
        environment = {"PATH": os.defpath, "HOME": folder, "TMPDIR": folder, "LANG": "C.UTF-8", "OMP_NUM_THREADS": "1"}
        with subprocess.Popen(
            [sys.executable, "-I", "-B", str(CHILD)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env=environment,
            start_new_session=True,  # a process group of its own, which is killed as a whole
        ) as process:
            try:
                answer, _ = process.communicate(request, timeout=START_SECONDS + limits.seconds)
            except subprocess.TimeoutExpired:
                return Outcome(False, f"timed out after {limits.seconds:g} s")
            finally:
                with suppress(ProcessLookupError, PermissionError):
                    os.killpg(process.pid, signal.SIGKILL)
    return _outcome(answer[-MOST_REPORT:], token, process.returncode)


def run_programs(programs: Sequence[str], limits: Limits = LIMITS, workers: int | None = None) -> list[Outcome]:
    """Runs programs, `workers` of them at a time, by default one a CPU core; returns their outcomes in order."""
    with ThreadPoolExecutor(workers or os.cpu_count() or 1) as pool:
        return list(pool.map(lambda program: run_program(program, limits), programs))


def _outcome(answer: bytes, token: str, status: int) -> Outcome:
    """Reads the child's report, which counts only with the token that the program was never given."""
    lines = answer.decode("utf-8", errors="replace").splitlines()
    if not lines or not lines[-1].startswith(token):
        ended = f"ended by {signal.Signals(-status).name}" if status < 0 else f"ended itself with status {status}"
        return Outcome(False, f"failed: the program {ended}")
    result = lines[-1].removeprefix(token).strip()
    printed = lines[-2].removeprefix(token) if len(lines) > 1 and lines[-2].startswith(token) else ""
    return Outcome(result == "passed", result, bytes.fromhex(printed).decode("utf-8", errors="replace"))
