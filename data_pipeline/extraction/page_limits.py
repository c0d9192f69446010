"""Limits on the time that pages may take: bounds on their tags, and CPU time for pages that may be slow nevertheless.

The parsers' time grows with the square of some counts. Three of these counts have fixed bounds here, so that the
result does not depend on the machine: nesting depth, attributes of one tag, and the sum of all tags' depths, on which
resiliparse's time depends (0.1 s per million). Pages within the bounds may still be slow for one of the parsers (for
trafilatura, 20,000 open <option> or 5,000 open <li>). So pages with many tags are parsed in a process of their own,
with a limit of `extract.seconds_per_page` of CPU time per page, by the same code and to the same text. This limit is
the last resort, since it depends on the machine which pages exceed it. Memory is not limited.
"""

import contextlib
import json
import re
import signal
import subprocess
import sys
from types import TracebackType
from typing import BinaryIO, cast

from data_pipeline.extraction import extractors
from data_pipeline.extraction.extractors import Extractor, main_text, receive, send

# Browsers nest elements 512 deep; they make deeper ones siblings.
_MAX_DEPTH = 2000
_MAX_ATTRIBUTES = 5000
# Sum of the depths of all tags; resiliparse takes 5 s for this many. No page of the demo has more than 0.3 million.
_MAX_DEPTHS = 50_000_000
# Pages with more tags are parsed in a process of their own. The slowest known page with fewer tags takes
# resiliparse 1.4 s.
_MANY_TAGS = 5000
_TAGS = re.compile(r"<(/?)([A-Za-z][A-Za-z0-9]*)")
_QUOTED = re.compile(r"\"[^\"]*\"|'[^']*'")
# Elements that have no content or no mandatory end tag (HTML, 13.1.2), and so do not count as nested.
_NOT_NESTED = frozenset(
    {
        *("area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "param", "source", "track"),
        *("wbr", "p", "li", "dt", "dd", "tr", "td", "th", "thead", "tbody", "tfoot", "caption", "colgroup", "rt", "rp"),
        *("option", "optgroup", "html", "head", "body"),
    }
)


def too_complex(html: str) -> bool:
    """Whether a page's nesting or attributes exceed the bounds; the result is the same on every machine."""
    if any(_attributes(piece) > _MAX_ATTRIBUTES for piece in html.split(">") if len(piece) > 2 * _MAX_ATTRIBUTES):
        return True
    if html.count("<") <= _MAX_DEPTH:
        return False
    depth, depths = 0, 0
    for closing, name in _TAGS.findall(html):
        depths += depth
        if name.lower() in _NOT_NESTED:
            continue
        depth = max(0, depth - 1) if closing else depth + 1
        if depth > _MAX_DEPTH or depths > _MAX_DEPTHS:
            return True
    return False


def _attributes(piece: str) -> int:
    """Returns about how many attributes the tag at the end of `piece` has."""
    start = _TAGS.search(piece)
    return len(_QUOTED.sub("", piece[start.start() :]).split()) if start else 0


class PageReader:
    """Function of a page that returns (text, extractor, reason why there is no text or "").

    Pages with many tags are parsed in a helper process, which is started at the first one and ends with the context.
    """

    def __init__(self, first: Extractor, seconds: int) -> None:
        self._first: Extractor = first
        self._seconds = seconds
        self._helper: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> "PageReader":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def __call__(self, html: str) -> tuple[str, str, str]:
        if too_complex(html):
            return "", "", "too_complex"
        if html.count("<") > _MANY_TAGS:
            return self._read_in_process(html)
        try:
            return (*main_text(html, self._first), "")
        except MemoryError:
            raise
        except Exception:  # a parser fails on this page; it may still read the next one
            return "", "", "extractor_failed"

    def _read_in_process(self, html: str) -> tuple[str, str, str]:
        helper = self._helper = self._helper or self._start()
        answer = None
        with contextlib.suppress(BrokenPipeError):  # the process has ended; its exit status is looked at below
            send(cast(BinaryIO, helper.stdin), html.encode("utf-8", "surrogatepass"))
            answer = receive(cast(BinaryIO, helper.stdout))
        if answer is not None:
            text, extractor, error = json.loads(answer)
            return text, extractor, "extractor_failed" if error else ""
        return "", "", "page_too_slow" if self._end() == -signal.SIGXCPU else "extractor_failed"

    def _start(self) -> "subprocess.Popen[bytes]":
        # -P: modules beside the script must not shadow those of the standard library.
        command = [sys.executable, "-P", extractors.__file__, self._first, str(self._seconds)]
        return subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, bufsize=-1
        )

    def _end(self) -> int:
        """Closes the helper process's input, waits for its end and returns its exit status; 0 if there is none."""
        if self._helper is None:
            return 0
        helper, self._helper = self._helper, None
        with contextlib.suppress(BrokenPipeError):  # closing flushes what could not be sent
            cast(BinaryIO, helper.stdin).close()
        cast(BinaryIO, helper.stdout).close()
        return helper.wait()
