"""Measures how often the rule sets named @datatrove (and c4@fineweb) and stock datatrove agree on English documents.

    python -m tests.bench.data_pipeline.agreement                        # the demo's prose and web pages
    python -m tests.bench.data_pipeline.agreement /usr/share/doc --most 500

Needs the extra `bench` (spaCy, and what datatrove asks for beside it). A document is a file of text in one of the
folders, unpacked if it ends in .gz, or a message of one that ends in .mbox. HTML is read as the demo's pages are.
"""

import argparse
import gzip
import mailbox
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from datatrove.data import Document
from datatrove.pipeline.filters import (
    C4QualityFilter,
    FineWebQualityFilter,
    GopherQualityFilter,
    GopherRepetitionFilter,
)
from datatrove.pipeline.filters.base_filter import BaseFilter
from fastwarc.warc import ArchiveIterator, WarcRecordType
from rich.console import Console
from rich.table import Table

from configs.data import RuleSet
from data_pipeline.extraction.extractors import main_text
from data_pipeline.scan.scores import Scanner, definition_of
from data_pipeline.scores.filtering import verdict
from tests.bench.data_pipeline.measure import DEMO, texts

MOST_CHARS = 100_000  # longer documents are cut
_TEXT = ("", ".txt", ".md", ".rst", ".text", ".eml", ".html", ".htm")


def peers() -> dict[str, BaseFilter]:
    """Returns datatrove's filters with their defaults, by the name of Trivium's rule set."""
    return {
        "gopher_quality@datatrove": GopherQualityFilter(),
        "gopher_repetition@datatrove": GopherRepetitionFilter(),
        "fineweb@datatrove": FineWebQualityFilter(),
        "c4@datatrove": C4QualityFilter(),
        "c4@fineweb": C4QualityFilter(filter_no_terminal_punct=False),
    }


def agreement(name: str, peer: BaseFilter, documents: Sequence[str]) -> tuple[int, int]:
    """Returns (number of equal verdicts, number of documents that datatrove keeps)."""
    rules = RuleSet(use=(name,))
    scanner = Scanner(definition_of(rules))
    same = kept = 0
    for text in documents:
        with np.errstate(all="ignore"):
            keeps = peer.filter(Document(text=text, id="0")) is True
        same += (verdict(scanner.scores(text), rules) == "") == keeps
        kept += keeps
    return same, kept


def web_pages(megabytes: float) -> list[str]:
    found = []
    with (DEMO / "web.warc.gz").open("rb") as file:
        for record in ArchiveIterator(file, record_types=WarcRecordType.response):
            if text := extracted(record.reader.read().decode("utf-8", "replace")):
                found.append(text)
    step = max(1, round(sum(map(len, found)) / 1e6 / megabytes))
    return found[::step]


def extracted(page: str) -> str:
    return main_text(page)[0]


def documents_in(folder: Path, most: int) -> list[str]:
    """Returns about `most` texts, taken at equal distances from all files of a folder or one file."""
    files = [folder] if folder.is_file() else sorted(path for path in folder.rglob("*") if path.is_file())
    found: list[str] = []
    for path in files[:: max(1, len(files) // most)]:
        found += [text for text in _texts(path) if text.strip()]
    return found[:most] if folder.is_dir() else found[:: max(1, len(found) // most)]


def _texts(path: Path) -> Iterator[str]:
    if path.suffix == ".mbox":
        yield from (message.as_bytes().decode("utf-8", "replace")[:MOST_CHARS] for message in mailbox.mbox(path))
        return
    name = path.with_suffix("") if path.suffix == ".gz" else path
    if name.suffix.lower() not in _TEXT:
        return
    raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError:
        return
    yield (extracted(text) if name.suffix.lower() in (".html", ".htm") else text)[:MOST_CHARS]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", type=Path)
    parser.add_argument("--most", type=int, default=500, help="documents of a folder")
    parser.add_argument("--megabytes", type=float, default=1.0, help="of the demo's prose, and of its pages")
    args = parser.parse_args()
    corpora = {"demo prose": texts("english", args.megabytes), "demo pages": web_pages(args.megabytes)}
    corpora |= {str(folder): documents_in(folder, args.most) for folder in args.folders}
    table = Table(title="Verdicts that are stock datatrove's", title_justify="left")
    for column in ("rule set", "text", "documents", "kept", "the same", "agreement"):
        table.add_column(column, justify="left" if column in ("rule set", "text") else "right")
    for name, peer in peers().items():
        for corpus, documents in corpora.items():
            same, kept = agreement(name, peer, documents)
            share = f"{same / max(len(documents), 1):.2%}"
            table.add_row(name, corpus, f"{len(documents):,}", f"{kept:,}", f"{same:,}", share)
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
