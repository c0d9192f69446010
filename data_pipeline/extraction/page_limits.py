"""What pages may cost: bounds on their tags, and a limit of processor time where no bound is known to hold.

Parsers take time with the square of some counts. Three of them are bounded here, which no machine changes: depth,
attributes of one tag, and the sum of all tags' depths, resiliparse's cost (0.1 s per million). Pages within the bounds
may still be slow for one of the parsers (20,000 open options, 5,000 open list items for trafilatura), so that those of
many tags are read by a process of their own, which may take `extract.seconds_per_page` of processor time for each. The
same code reads them, to the same text. That limit is the last resort: whether a page meets it depends on the machine.
Limits on memory are left out.
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

# Browsers nest 512 deep and put what is deeper side by side.
_MAX_DEPTH = 2000
_MAX_ATTRIBUTES = 5000
# Sum of the depths of all tags: 5 s of resiliparse. Of the demo's pages none has above 0.3 million.
_MAX_DEPTHS = 50_000_000
# Of so many tags, the worst pages that are known take resiliparse 1.4 s.
_MANY_TAGS = 5000
_TAGS = re.compile(r"<(/?)([A-Za-z][A-Za-z0-9]*)")
_QUOTED = re.compile(r"\"[^\"]*\"|'[^']*'")
# Elements without content, or that end without an end tag (HTML, 13.1.2).
_NOT_NESTED = frozenset(
    {
        *("area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "param", "source", "track"),
        *("wbr", "p", "li", "dt", "dd", "tr", "td", "th", "thead", "tbody", "tfoot", "caption", "colgroup", "rt", "rp"),
        *("option", "optgroup", "html", "head", "body"),
    }
)


def too_complex(html: str) -> bool:
    """Whether a page's nesting or attributes are beyond all measure; the same on every machine."""
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
    """About how many attributes the tag has that `piece` ends in."""
    start = _TAGS.search(piece)
    return len(_QUOTED.sub("", piece[start.start() :]).split()) if start else 0


class PageReader:
    """page -> (text, extractor, reason why there is none); holds a process once there was a page of many tags."""

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
            return self._apart(html)
        try:
            return (*main_text(html, self._first), "")
        except MemoryError:
            raise
        except Exception:  # of a parser, over this page: the next one may be sound
            return "", "", "extractor_failed"

    def _apart(self, html: str) -> tuple[str, str, str]:
        helper = self._helper = self._helper or self._start()
        answer = None
        with contextlib.suppress(BrokenPipeError):  # it has ended: how, is seen below
            send(cast(BinaryIO, helper.stdin), html.encode("utf-8", "surrogatepass"))
            answer = receive(cast(BinaryIO, helper.stdout))
        if answer is not None:
            text, extractor, error = json.loads(answer)
            return text, extractor, "extractor_failed" if error else ""
        return "", "", "page_too_slow" if self._end() == -signal.SIGXCPU else "extractor_failed"

    def _start(self) -> "subprocess.Popen[bytes]":
        # -P: what stands beside the script is not to be found under names of the standard library.
        command = [sys.executable, "-P", extractors.__file__, self._first, str(self._seconds)]
        return subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, bufsize=-1
        )

    def _end(self) -> int:
        """How the process ended: with its input at the end, if it had not before."""
        if self._helper is None:
            return 0
        helper, self._helper = self._helper, None
        with contextlib.suppress(BrokenPipeError):  # by what was still to be sent
            cast(BinaryIO, helper.stdin).close()
        cast(BinaryIO, helper.stdout).close()
        return helper.wait()
