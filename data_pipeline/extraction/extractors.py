"""Main text of a page by resiliparse or trafilatura; as a program, within a limit of processor time for each page.

Neither parser can be interrupted: they hold the interpreter's lock in C code, so that no thread and no signal handler
gets a turn. As a program this module reads pages from its standard input, and the kernel ends it where a page takes
longer than it may (RLIMIT_CPU); `page_limits` starts it and sees it end. It imports nothing of Trivium's, so that it
starts quickly. Frames in both directions are 8 bytes of length, big-endian, and that many bytes.
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
    """(text, name of the extractor that found it) of a page; ("", "") when neither finds any."""
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
    pipe.write(len(content).to_bytes(_LENGTH_BYTES, "big"))
    pipe.write(content)
    pipe.flush()


def receive(pipe: BinaryIO) -> bytes | None:
    """None where the other side has gone, in the midst of a frame or before one."""
    head = pipe.read(_LENGTH_BYTES)
    size = int.from_bytes(head, "big")
    content = pipe.read(size) if len(head) == _LENGTH_BYTES else b""
    return content if len(head) == _LENGTH_BYTES and len(content) == size else None


def serve(first: Extractor, seconds: int) -> None:
    """Answers each page with a JSON list of text, extractor and the error's name, "" for none."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a library prints does not get among the answers
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that started this one
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
