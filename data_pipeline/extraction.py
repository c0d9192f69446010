"""HTML to main text, repair of text, and the cut into shards: the second half of the extract stage.

Resiliparse reads pages (fast, keeps more), trafilatura where it finds nothing or where precision is asked
for. Lists of unwanted URLs and removal of personal data are left out.
"""

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import ftfy
import trafilatura
from datatrove.data import Document, DocumentsPipeline
from datatrove.pipeline.base import PipelineStep
from resiliparse.extract.html2text import extract_plain_text

from data_pipeline.ledger import Tally
from data_pipeline.reading import BROKEN

_SAMPLES = 5
_SAMPLE_CHARS = 300
# Only what is damage. Curly quotes, full-width forms and ligatures are the author's: full-width punctuation
# is how Chinese is written.
_REPAIR = ftfy.TextFixerConfig(
    unescape_html=False,
    fix_latin_ligatures=False,
    fix_character_width=False,
    uncurl_quotes=False,
    normalization="NFC",
    explain=False,
)
_SAFE_CONTROLS = frozenset("\n\t")


def main_text(html: str, favour: Literal["recall", "precision"] = "recall") -> tuple[str, str]:
    """(text, name of the extractor that found it) of a page; ("", "") when neither finds any."""
    order = (_resiliparse, _trafilatura) if favour == "recall" else (_trafilatura, _resiliparse)
    for extractor in order:
        if text := extractor(html).strip():
            return text, extractor.__name__.lstrip("_")
    return "", ""


def _resiliparse(html: str) -> str:
    return extract_plain_text(html, main_content=True, preserve_formatting=True, alt_texts=False)


def _trafilatura(html: str) -> str:
    return trafilatura.extract(html, include_comments=False, favor_precision=True) or ""


def repair(text: str) -> str:
    """`text` without mojibake, terminal escapes, stray control characters and foreign line ends, in NFC."""
    if text.isascii() and (text.isprintable() or not _has_controls(text)):
        return text  # nothing in it can be damaged; ftfy would look at every line
    return ftfy.fix_text(text, _REPAIR)


def _has_controls(text: str) -> bool:
    return any(not character.isprintable() and character not in _SAFE_CONTROLS for character in set(text))


class Extract(PipelineStep):
    """Replaces a page by its main text and repairs text; marks pages that have none."""

    name = "Extract"
    type = "🔍 - EXTRACTOR"

    def __init__(self, favour: Literal["recall", "precision"], fix: bool) -> None:
        super().__init__()
        self.favour = favour
        self.fix = fix

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        for document in data:
            raw = document.metadata["raw"]
            if not raw["reason"]:
                with self.track_time():
                    self._work(document, raw)
            yield document

    def _work(self, document: Document, raw: dict[str, Any]) -> None:
        if raw["html"]:
            page = document.text
            document.text, raw["extractor"] = main_text(page, self.favour)
            if not document.text:
                raw["reason"] = "no_main_text"
                document.text = page[:_SAMPLE_CHARS]
                return
        if self.fix:
            repaired = repair(document.text)
            raw["repaired"] = repaired != document.text
            document.text = repaired
        if not document.text.strip():
            raw["reason"] = "empty"


class SetAside(PipelineStep):
    """Counts documents, writes what carries a reason to `rejected/` or `drops/`, names the others' shards.

    Broken records go to `rejected/<source>-<file>.jsonl`, all of them, with file, position and reason. Of
    sound records without a page a few a file are kept in `drops/`. A shard is `<source>/<file>-<part>`, cut
    at `shard_bytes` of text, so that shards do not depend on how files were shared out.
    """

    name = "Set aside"
    type = "🔻 - FILTER"

    def __init__(self, folder: str, tallies: str, shard_bytes: int) -> None:
        super().__init__()
        self.folder = folder
        self.tallies = tallies
        self.shard_bytes = shard_bytes

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        tally = Tally()
        filled: Counter[tuple[str, int]] = Counter()
        sampled: Counter[tuple[str, int, str]] = Counter()
        for document in data:
            raw = document.metadata.pop("raw")
            source, index = document.metadata["source"], raw["index"]
            if reason := raw["reason"]:
                tally.dropped(source, reason, raw["bytes"])
                sampled[source, index, reason] += 1
                if reason in BROKEN or sampled[source, index, reason] <= _SAMPLES:
                    self._write(document, raw)
                continue
            size = len(document.text.encode())
            tally.kept(source, raw["bytes"], passed_on=size)
            if raw.get("repaired"):
                tally.note(source, "repaired")
            if raw.get("extractor") == "trafilatura":
                tally.note(source, "extracted by trafilatura")
            document.metadata["shard"] = f"{index:04d}-{filled[source, index] // self.shard_bytes:04d}"
            filled[source, index] += size
            yield document
        tally.save(Path(self.tallies) / f"out-{rank:05d}.json")

    def _write(self, document: Document, raw: dict[str, Any]) -> None:
        folder = Path(self.folder) / ("rejected" if raw["reason"] in BROKEN else "drops")
        folder.mkdir(parents=True, exist_ok=True)
        line = {
            "file": raw["path"],
            "position": document.metadata["position"],
            "reason": raw["reason"],
            "bytes": raw["bytes"],
            "id": document.id,
            "sample": document.text[:_SAMPLE_CHARS],
        }
        with (folder / f"{document.metadata['source']}-{raw['index']:04d}.jsonl").open("a", encoding="utf-8") as out:
            out.write(json.dumps(line, ensure_ascii=False) + "\n")


def shard_record(step: PipelineStep, document: Document) -> dict[str, Any]:
    """What of a document goes into an extract shard."""
    metadata = {key: value for key, value in document.metadata.items() if key != "shard"}
    return {"text": document.text, "id": document.id, "metadata": metadata}


def bad_shares(tally: Tally) -> Iterator[tuple[str, int, int]]:
    """(source, broken records, all records) per source."""
    for source, counts in sorted(tally.sources.items()):
        broken = sum(amount.documents for reason, amount in counts.dropped.items() if reason in BROKEN)
        yield source, broken, counts.came_in.documents
