"""HTML to text: resiliparse with trafilatura as the fallback, as in the stage extract, against trafilatura alone.

The demo has no Chinese page; the Chinese row has its English pages with every paragraph replaced by one of a Chinese
book, so that frame, menus and scripts stay real. Agreement is the share of words (characters in Chinese) that both
have, over all pages. What differs is the definition of main content: trafilatura as datatrove calls it
(favour_precision) also takes out lists of links, short blocks and repeated ones, resiliparse the frame around the text.
"""

import re
from collections import Counter
from itertools import cycle

from datatrove.pipeline.extractors import Trafilatura
from fastwarc.warc import ArchiveIterator, WarcRecordType

from data_pipeline.extraction.extractors import main_text
from tests.bench.data_pipeline.measure import DEMO, Result, cpu_seconds, size_mb, spread, texts

_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W\u3040-\u30ff\u3400-\u9fff]+")
_PARAGRAPH = re.compile(r"(<p\b[^>]*>).*?(</p>)", re.DOTALL | re.IGNORECASE)


def run(source: str, megabytes: float) -> Result:
    pages = _pages()
    if source == "chinese":
        lines = cycle([line for text in texts("chinese", 10) for line in text.split("\n") if len(line) > 20])
        pages = [_PARAGRAPH.sub(lambda found: found[1] + next(lines) + found[2], page) for page in pages]
    pages = spread(pages, [len(page.encode()) for page in pages], megabytes)
    peer = Trafilatura()
    for page in pages[:3]:
        main_text(page), peer.extract(page)  # loads both before the clock starts
    ours = cpu_seconds(lambda: [main_text(page) for page in pages], times=3)
    peers: list[str] = []  # kept from one run, since it remembers paragraphs and leaves them out the second time
    theirs = cpu_seconds(lambda: peers.extend(peer.extract(page) or "" for page in pages))
    found = [main_text(page) for page in pages]
    fallbacks = sum(name == "trafilatura" for _, name in found)
    pairs = [(_words(text), _words(its)) for (text, _), its in zip(found, peers, strict=True)]
    shared = sum((one & other).total() for one, other in pairs)
    mine, its = (sum(pair[side].total() for pair in pairs) for side in (0, 1))
    said = (
        f"{shared / max(its, 1):.1%} of its words are in ours, {shared / max(mine, 1):.1%} of ours in its (main text "
        f"as resiliparse or as trafilatura has it); {fallbacks} of {len(pages)} pages by the fallback"
    )
    return Result(f"HTML extraction, {source}", size_mb(pages), ours, theirs, 15, "datatrove's Trafilatura", said)


def _pages() -> list[str]:
    with (DEMO / "web.warc.gz").open("rb") as file:
        records = ArchiveIterator(file, record_types=WarcRecordType.response)
        return [record.reader.read().decode("utf-8", errors="replace") for record in records]


def _words(text: str) -> Counter[str]:
    return Counter(_WORD.findall(text.lower()))
