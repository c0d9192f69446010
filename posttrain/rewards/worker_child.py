"""The process in which `worker.py` calls a function: it reads arguments, calls the function, and writes its value.

Run by path and with `python -P`, it imports nothing but Python's own modules and what the function needs. The function
may do what it likes to standard input and output, which lead nowhere; arguments and values have pipes of their own.
"""

import faulthandler
import importlib
import inspect
import json
import math
import numbers
import os
import resource
import sys
from collections.abc import Callable
from contextlib import suppress
from decimal import Decimal
from typing import Any

ARGUMENTS = ("prompt", "completion", "answer", "metadata")
GRACE = 2.0  # seconds beyond the limit after which the process ends itself, should its parent not have ended it
SHOWN = 300  # characters of an error


def load(target: str, options: dict[str, Any]) -> Callable[..., Any]:
    """Returns the function "module:name". Raises TypeError if it does not take the four arguments and the options."""
    module, _, name = target.partition(":")
    found: Any = importlib.import_module(module)
    for part in name.split("."):
        found = getattr(found, part)
    if not callable(found):
        raise TypeError(f"{target} is {type(found).__name__}, not a function")
    try:
        signature = inspect.signature(found)
    except ValueError:  # a function written in C says nothing
        return found
    try:
        signature.bind(*ARGUMENTS, **options)
    except TypeError:
        raise TypeError(f"{name}{signature} does not take four arguments ({', '.join(ARGUMENTS)})") from None
    if inspect.iscoroutinefunction(found):
        raise TypeError(f"{name} is async; write a plain function")
    return found


def value_of(result: Any) -> dict[str, Any]:
    """Returns {"value"}, or {"reason"} for what is no finite number. True and False are 1 and 0."""
    if result is None:
        return {"reason": "returned None"}
    if not (isinstance(result, numbers.Real | Decimal) or _is_scalar(result)):
        return {"reason": f"returned {type(result).__name__}, which is no number"}
    try:
        value = float(result)
    except (ArithmeticError, ValueError):
        return {"reason": f"returned {type(result).__name__} that no float can hold"}
    return {"value": value} if math.isfinite(value) else {"reason": f"returned {value}"}


def _is_scalar(result: Any) -> bool:
    """Returns whether this is one real number in an array of numpy or a tensor of torch."""
    if not hasattr(result, "__float__") or getattr(result, "shape", None) != ():
        return False
    return getattr(getattr(result, "dtype", None), "kind", "f") in "biuf"  # texts have float() too, and tensors no kind


def call(function: Callable[..., Any], arguments: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    """Returns {"value"}, or {"reason", "detail"} if the function raises or returns no finite number."""
    try:
        return value_of(function(*(arguments[name] for name in ARGUMENTS), **options))
    except MemoryError:
        return {"reason": "ran out of memory"}
    except BaseException as error:  # SystemExit and KeyboardInterrupt too
        if type(error).__name__ == "Unscorable":
            return {"reason": str(error)}
        with suppress(BaseException):
            said = " ".join(str(error).split())[:SHOWN]
            return {"reason": f"raised {type(error).__name__}", "detail": said and f"which says: {said}"}
        return {"reason": "raised an exception that cannot be shown"}


def _text(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:SHOWN]


def main() -> None:
    requests, replies = os.fdopen(int(sys.argv[1]), "rb"), int(sys.argv[2])
    own = os.getpid()

    def reply(content: dict[str, Any]) -> None:
        if os.getpid() != own:  # a process that the function started, and that came back here too
            os._exit(0)
        os.write(replies, json.dumps(content).encode() + b"\n")

    setup = json.loads(requests.readline())
    sys.path[:] = setup["path"]
    for kind, most in ((resource.RLIMIT_AS, setup["memory_bytes"]), (resource.RLIMIT_CORE, 0)):
        with suppress(ValueError, OSError):  # the system's own limit is lower
            resource.setrlimit(kind, (most, most))
    try:
        function = load(setup["target"], setup["options"])
    except BaseException as error:
        reply({"error": _text(error)})
        return
    reply({"ready": True})
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for line in requests:
        faulthandler.dump_traceback_later(setup["seconds"] + GRACE, exit=True, file=nowhere)
        answer = call(function, json.loads(line), setup["options"])
        faulthandler.cancel_dump_traceback_later()
        reply(answer)


if __name__ == "__main__":
    main()
