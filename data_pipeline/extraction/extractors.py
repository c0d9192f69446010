"""Extraction of a page's main text by resiliparse or trafilatura, as functions and as a program with a CPU time limit.

The parsers cannot be interrupted from within the process: their C code holds the interpreter lock, so that no other
thread and no signal handler runs. Run as a program, this module therefore reads pages from its standard input, and the
kernel kills it when a page takes more CPU time than the limit (RLIMIT_CPU); `page_limits` starts the program and
notices its end. It imports no other module of Trivium, so that it starts quickly. A frame, in both directions, is a
length of 8 bytes, big-endian, and then that many bytes.
"""

import json
import math
import os
import resource
import signal
import sys
import time
from typing import BinaryIO, Literal

import trafilatura
from resiliparse.extract.html2text import extract_plain_text

Extractor = Literal["resiliparse", "trafilatura"]

_LENGTH_BYTES = 8


def main_text(html: str, first: Extractor = "resiliparse") -> tuple[str, str]:
    """Returns (main text of a page, name of the extractor that found it); ("", "") if neither extractor finds any.

    The extractor `first` is tried first.
    """
    for name in (first, "trafilatura" if first == "resiliparse" else "resiliparse"):
        if text := _EXTRACTORS[name](html).strip():
            return text, name
    return "", ""


def _resiliparse(html: str) -> str:
    return extract_plain_text(html, main_content=True, preserve_formatting=True, alt_texts=False)


def _trafilatura(html: str) -> str:
    return trafilatura.extract(html, include_comments=False, favor_precision=True) or ""


_EXTRACTORS = {"resiliparse": _resiliparse, "trafilatura": _trafilatura}


def send(pipe: BinaryIO, content: bytes) -> None:
    """Writes one frame, as the module's docstring defines it, to a pipe."""
    pipe.write(len(content).to_bytes(_LENGTH_BYTES, "big"))
    pipe.write(content)
    pipe.flush()


def receive(pipe: BinaryIO) -> bytes | None:
    """Reads one frame; returns None if the other side has closed the pipe before the frame was complete."""
    head = pipe.read(_LENGTH_BYTES)
    size = int.from_bytes(head, "big")
    content = pipe.read(size) if len(head) == _LENGTH_BYTES else b""
    return content if len(head) == _LENGTH_BYTES and len(content) == size else None


def serve(first: Extractor, seconds: int) -> None:
    """Answers each page on standard input with a JSON list: text, extractor, and the name of the error or "".

    `seconds` is the limit of CPU time per page, at which the kernel kills this process.
    """
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints goes to standard error and not between the answers
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent process handles Ctrl-C
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _, most = resource.getrlimit(resource.RLIMIT_CPU)
    while (page := receive(sys.stdin.buffer)) is not None:
        limit = math.ceil(time.process_time()) + seconds
        resource.setrlimit(resource.RLIMIT_CPU, (limit if most == resource.RLIM_INFINITY else min(limit, most), most))
        try:
            text, extractor = main_text(page.decode("utf-8", "surrogatepass"), first)
            answer = [text, extractor, ""]
        except Exception as error:
            answer = ["", "", type(error).__name__]
        send(answers, json.dumps(answer).encode())


if __name__ == "__main__":
    serve("trafilatura" if sys.argv[1] == "trafilatura" else "resiliparse", int(sys.argv[2]))
