"""The process in which `sandbox.py` runs a program: takes limits upon itself, then runs what it reads from stdin.

Run by path and with `python -I`, it imports nothing but Python's own modules.
"""

import builtins
import contextlib
import ctypes
import io
import json
import os
import resource
import signal
import sys
from typing import Any, NoReturn

NEW_USER, NEW_PID, NEW_NET = 0x10000000, 0x20000000, 0x40000000  # CLONE_NEWUSER and so on of linux/sched.h
MOST_KEPT = 8000  # bytes of what a program prints that are told
PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of linux/prctl.h
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
# Audit events of Python that are refused, by the beginning of their names.
REFUSED = (
    *("socket.", "urllib.", "http.client.", "ftplib.", "smtplib.", "telnetlib.", "poplib.", "imaplib.", "nntplib."),
    *("subprocess.", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.forkpty", "os.startfile"),
    *("os.kill", "os.killpg", "signal.pthread_kill", "pty.spawn", "ctypes.", "webbrowser.", "resource.setrlimit"),
)
# Audit events whose first arguments are paths that must lie in the program's folder.
PATHS = (
    *("os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate", "os.chmod", "os.chown"),
    *("os.utime", "os.chdir", "os.setxattr", "os.removexattr", "shutil.rmtree", "shutil.move"),
)


def isolate() -> None:
    """Moves the process into namespaces without network and with processes of its own, if the system allows it.

    The process that goes on is the first of its namespace, so that all others end with it; this one waits for it.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "unshare") or libc.unshare(NEW_USER | NEW_PID | NEW_NET) != 0:
        return
    child = os.fork()
    if child:
        _, status = os.waitpid(child, 0)
        code = os.waitstatus_to_exitcode(status)
        if code < 0:
            os.kill(os.getpid(), -code)  # so that it ends as the program did
        os._exit(code & 0xFF)
    libc.prctl(PARENT_DEATH_SIGNAL, signal.SIGKILL)


def limit(limits: dict[str, Any]) -> None:
    """Sets the limits of memory, CPU time, file size, open files and processes; none can be raised again."""
    seconds = int(limits["seconds"]) + 1
    for kind, most in (
        (resource.RLIMIT_AS, int(limits["memory_bytes"])),
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_FSIZE, int(limits["file_bytes"])),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_CORE, 0),
    ):
        with contextlib.suppress(ValueError, OSError):  # the system's own limit is lower
            resource.setrlimit(kind, (most, most))


def guard(folder: str) -> None:
    """Refuses from now on what `REFUSED` lists, and changes of files outside of `folder`. It cannot be undone."""
    inside = os.path.realpath(folder)
    real = os.path.realpath
    fspath, fsdecode, separator = os.fspath, os.fsdecode, os.sep

    def lies_inside(path: Any) -> bool:
        if isinstance(path, int) or path == os.devnull:
            return True
        name = real(fsdecode(fspath(path)))
        return name == inside or name.startswith(inside + separator)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            if flags & WRITES and path is not None and not lies_inside(path):
                raise PermissionError(f"a program may not write {path!r}, outside of its folder")
        elif event in PATHS:
            for path in arguments[:2]:
                if isinstance(path, str | bytes | os.PathLike) and not lies_inside(path):
                    raise PermissionError(f"a program may not change {path!r}, outside of its folder")
        elif event.startswith(REFUSED):
            raise PermissionError(f"a program may not call {event}")

    sys.addaudithook(hook)


def run(program: str, seconds: float) -> str:
    """Runs the program and returns "passed", or what went wrong."""

    def over(*_: Any) -> NoReturn:
        raise _TimeIsOver

    signal.signal(signal.SIGALRM, over)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        exec(compile(program, "program.py", "exec"), {"__name__": "__main__", "__builtins__": builtins})
    except _TimeIsOver:
        return f"timed out after {seconds:g} s"
    except MemoryError:
        return "failed: out of memory"
    except BaseException as error:
        signal.setitimer(signal.ITIMER_REAL, 0)
        text = " ".join(str(error).split())[:200]
        return f"failed: {type(error).__name__}: {text}" if text else f"failed: {type(error).__name__}"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    return "passed"


class _TimeIsOver(BaseException):
    pass


class Printed(io.RawIOBase):
    """The standard output of the program, of which the beginning is kept."""

    def __init__(self) -> None:
        self.kept = bytearray()

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        part = bytes(data)
        self.kept += part[: MOST_KEPT - len(self.kept)]
        return len(part)


def main() -> None:
    request = json.loads(sys.stdin.buffer.read())
    report = os.dup(1)
    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1):
        os.dup2(nothing, stream)
    isolate()
    limits, token, program = request["limits"], request["token"], request["program"]
    del request
    limit(limits)
    write, leave = os.write, os._exit
    guard(os.getcwd())
    printed = Printed()
    sys.stdout = io.TextIOWrapper(printed, "utf-8", errors="replace", write_through=True)
    result = run(program, float(limits["seconds"]))
    # In digits, so that nothing that the program printed can look like a result.
    write(report, f"\n{token} {printed.kept.hex()}\n{token} {result}\n".encode("utf-8", errors="replace"))
    leave(0)


if __name__ == "__main__":
    main()
