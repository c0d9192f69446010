"""Second half of the extract stage: main text of HTML pages, repair of text, and assignment to shards.

By default resiliparse extracts main text (it is fast and keeps more), and trafilatura the pages in which resiliparse
finds none; `extract.extractor` puts trafilatura first (`extractors`, within the limits of `page_limits`). Pages whose
URL is on a blocklist are not parsed. Personal data is not removed here.
"""

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ftfy
from datatrove.data import Document, DocumentsPipeline
from datatrove.pipeline.base import PipelineStep
from ftfy.badness import MOJIBAKE_CATEGORIES

from configs.sources import ExtractConfig
from data_pipeline.core.canary_naming import is_canary
from data_pipeline.core.ledger import SourceTally, Tally
from data_pipeline.extraction.blocklist import Blocklist
from data_pipeline.extraction.page_limits import PageReader
from data_pipeline.reading.document_urls import url_of
from data_pipeline.reading.input_records import BROKEN, HARMLESS

_SAMPLES = 5
_SAMPLE_CHARS = 300
# Repairs of damage only. Curly quotes, full-width forms and ligatures are the author's own: Chinese, for one, is
# written with full-width punctuation.
_REPAIR = ftfy.TextFixerConfig(
    unescape_html=False,
    fix_latin_ligatures=False,
    fix_character_width=False,
    uncurl_quotes=False,
    normalization="NFC",
    explain=False,
)
# Single characters that ftfy removes or replaces: controls, line ends, surrogates, deprecated format characters.
_STRAY = "\\x00-\\x08\\x0b\\r\\x0e-\\x1f\\x7f-\\x9f\\u2028\\u2029\\u206a-\\u206f\\ud800-\\udfff\\ufeff\\ufff9-\\ufffc"
# ftfy finds mojibake only in text that has a character of a category other than these.
_PUNCTUATION = ("common", "start_punctuation", "end_punctuation")
_SUSPECTS = "".join(members for name, members in MOJIBAKE_CATEGORIES.items() if name not in _PUNCTUATION)
_LINE = re.compile("[^\\n]*\\n|[^\\n]+")
_DAMAGE = re.compile(f"[{_STRAY}{_SUSPECTS}]")


def repair(text: str) -> str:
    """Removes mojibake, terminal escapes and stray control characters, makes all line ends \\n, and composes to NFC.

    ftfy works on each line by itself, in several passes, so only lines in which it could change something are passed to
    it.
    """
    if _is_sound(text):
        return text
    return "".join(line if _is_sound(line) else ftfy.fix_text(line, _REPAIR) for line in _LINE.findall(text))


def _is_sound(text: str) -> bool:
    """Whether ftfy would leave `text` unchanged: it has no suspect character and is in NFC."""
    return not _DAMAGE.search(text) and unicodedata.is_normalized("NFC", text)


class Extract(PipelineStep):
    """Replaces pages by their main text and repairs it; marks pages without text or with a blocked URL by a reason."""

    name = "Extract"
    type = "🔍 - EXTRACTOR"

    def __init__(self, config: ExtractConfig) -> None:
        super().__init__()
        self.config = config
        self._blocklist: Blocklist | None = None

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        # Loaded in the worker, so that the step that is sent to it stays small.
        self._blocklist = Blocklist.load(self.config.blocklist)
        with PageReader(self.config.extractor, self.config.seconds_per_page) as read_page:
            for document in data:
                raw = document.metadata["raw"]
                if not raw["reason"]:
                    with self.track_time():
                        self._work(document, raw, read_page)
                yield document

    def _work(self, document: Document, raw: dict[str, Any], read_page: PageReader) -> None:
        """Sets the text of one document, or the reason why it has none."""
        assert self._blocklist is not None
        if (url := url_of(document.metadata)) and self._blocklist.blocks(url):
            raw["reason"] = "blocked_url"
            document.text = document.text[:_SAMPLE_CHARS]
            return
        if raw["html"]:
            text, raw["extractor"], reason = read_page(document.text)
            if not text:
                raw["reason"] = reason or "no_main_text"
                document.text = document.text[:_SAMPLE_CHARS]
                return
            document.text = text
        if self.config.repair:
            repaired = repair(document.text)
            raw["repaired"] = repaired != document.text
            document.text = repaired
        words = document.text.strip()
        if not words:
            raw["reason"] = "empty"
        elif len(words) > 1 and words.count(words[0]) == len(words):
            raw["reason"] = "one_character"


class SetAside(PipelineStep):
    """Counts documents, writes those with a reason to `rejected/` or `drops/`, and assigns the others to shards.

    All broken records are written to `rejected/<source>-<unit>.jsonl`, with file, position, offset, reason and the
    beginning of their content. Records dropped for other reasons are sampled into `drops/`, a few per unit and reason.
    A shard is `<source>/<unit>-<part>`; a new part begins after `shard_bytes` of text, so that shards do not depend on
    how units are distributed among workers.
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
                tally.dropped(source, reason, raw["bytes"], raw["count"])
                sampled[source, index, reason] += 1
                if is_canary(source) or reason in BROKEN | HARMLESS or sampled[source, index, reason] <= _SAMPLES:
                    self._write(document, raw)
                continue
            size = len(document.text.encode())
            tally.kept(source, raw["bytes"], passed_on=size)
            if raw.get("charset_from"):
                tally.note(source, f"charset known by {raw['charset_from']}")
            for note in [*raw.get("notes", ()), *(["repaired"] if raw.get("repaired") else [])]:
                tally.note(source, note)
            if raw.get("extractor") == "trafilatura":
                tally.note(source, "extracted by trafilatura")
            document.metadata["shard"] = f"{index:04d}-{filled[source, index] // self.shard_bytes:04d}"
            filled[source, index] += size
            yield document
        tally.save(Path(self.tallies) / f"out-{rank:05d}.json")

    def _write(self, document: Document, raw: dict[str, Any]) -> None:
        """Appends a record with a reason to the file of its source and unit in `rejected/` or `drops/`."""
        folder = Path(self.folder) / ("rejected" if raw["reason"] in BROKEN | HARMLESS else "drops")
        folder.mkdir(parents=True, exist_ok=True)
        line = {
            "file": raw["path"],
            "position": document.metadata["position"],
            "offset": raw["offset"],
            "reason": raw["reason"],
            "bytes": raw["bytes"],
            "records": raw["count"],
            "id": document.id,
            "url": url_of(document.metadata),
            "sample": document.text[:_SAMPLE_CHARS],
        }
        with (folder / f"{document.metadata['source']}-{raw['index']:04d}.jsonl").open("a", encoding="utf-8") as out:
            out.write(json.dumps(line, ensure_ascii=False) + "\n")


def shard_record(step: PipelineStep, document: Document) -> dict[str, Any]:
    """Returns the fields of a document that are written to its shard: text, id, and metadata without the shard."""
    metadata = {key: value for key, value in document.metadata.items() if key != "shard"}
    return {"text": document.text, "id": document.id, "metadata": metadata}


def bad_shares(tally: Tally) -> Iterator[tuple[str, int, int]]:
    """Yields (source, broken records, all records) for each source but the canaries."""
    for source, counts in sorted(tally.sources.items()):
        if not is_canary(source):
            yield source, sum(set_aside(counts, BROKEN).values()), counts.came_in.documents


def set_aside(counts: SourceTally, reasons: frozenset[str] = BROKEN | HARMLESS) -> dict[str, int]:
    """Returns {reason: number of records set aside for it}."""
    return {reason: amount.documents for reason, amount in sorted(counts.dropped.items()) if reason in reasons}
