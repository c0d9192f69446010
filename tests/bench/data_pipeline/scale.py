"""Prints the tables of docs/scale.md: the results of a benchmark run, and their extrapolation to 100 TB.

    python -m tests.bench.data_pipeline.scale --rates runs/bench/data.json --terabytes 100 --core-hour 0.03
    python -m tests.bench.data_pipeline.scale --rates runs/bench/data.json --write   # docs/scale.json and docs/scale.md

A terabyte is 10^12 bytes of text after extraction. Everything is assumed to grow in proportion to the text, except what
the tables call fixed; docs/scale.md says where that fails. Wall time, network and the price of storage are left out.
"""

import argparse
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.dedup import DedupConfig
from data_pipeline.dedup.clusters import BYTES_A_DOCUMENT
from data_pipeline.dedup.duplicate_pairs import BYTES_A_KEY
from data_pipeline.dedup.signatures import kinds_of_keys
from tests.bench.data_pipeline.measure import ROOT

PAPER, RATES = ROOT / "docs/scale.md", ROOT / "docs/scale.json"
BEGIN, END = "<!-- begin: printed by tests.bench.data_pipeline.scale -->", "<!-- end -->"
CORPUS = "web"  # the corpus whose rates are extrapolated: pages in WARC files
STAGES = (
    "extract", "language", "score", "filter", "signatures", "dedup", "documents", "tokenizer", "tokens", "plan",
)  # fmt: skip
_FIXED = ("tokenizer",)  # trains on at most tokenizer.train_bytes
_AFTER_THE_SCORES = ("filter", "dedup", "documents", "tokens", "plan")  # run again if a threshold changes
_KEY_AND_ROW = 8 + 4  # bytes of a key in a shard's sorted files


@dataclass(frozen=True)
class Assumptions:
    """Numbers that are assumed and not measured; each can be set on the command line."""

    terabytes: float = 100.0
    core_hour: float = 0.03  # USD
    shard_mb: float = 1000.0  # run.shard_bytes
    memory_mb: float = 16_000.0  # dedup.memory_mb


class Model:
    """Extrapolates the rows of a benchmark run to the assumed size."""

    def __init__(self, result: dict[str, Any], assumed: Assumptions) -> None:
        self.machine = result["machine"]
        self.rows = {row["step"]: row for row in result["rows"]}
        self.assumed = assumed

    def stage(self, name: str, corpus: str = CORPUS) -> dict[str, Any]:
        return self.rows[f"{corpus}: {name}"]

    def core_hours(self, name: str) -> float:
        """Returns the core hours that a stage needs for a terabyte of text."""
        row = self.stage(name)
        return row["seconds"] / row["megabytes"] * 1e6 / 3600

    def per_byte(self, name: str, key: str, corpus: str = CORPUS) -> float:
        """Returns a count of a stage divided by the bytes of text after extraction."""
        row = self.stage(name, corpus)
        return row["details"][key] / (row["megabytes"] * 1e6)

    @property
    def documents(self) -> float:
        """Number of documents that reach deduplication."""
        return self.per_byte("dedup", "documents_in") * self.assumed.terabytes * 1e12

    @property
    def shards(self) -> float:
        return self.assumed.terabytes * 1e6 / self.assumed.shard_mb

    @property
    def ranges(self) -> int:
        return max(1, -(-int(self.documents) * BYTES_A_KEY // int(self.assumed.memory_mb * 1e6)))


def report(result: dict[str, Any], assumed: Assumptions) -> str:
    """Returns all tables, in Markdown."""
    model = Model(result, assumed)
    machine = model.machine
    packages = ", ".join(f"{name} {version}" for name, version in machine["packages"].items())
    said = (
        f"Measured {machine['date'][:10]} on {machine['cpu']}, {machine['cores']} cores, load {machine['load']}; "
        f"Python {machine['python']}, {packages}."
    )
    parts = [said, measured(model), sizes(model), total(model), memory(model), files(model), peers(model)]
    return "\n\n".join(parts) + "\n"


def measured(model: Model) -> str:
    head = ["stage", *(f"{corpus}: {what}" for corpus in ("demo", "web") for what in ("MB/s a core", "peak MB"))]
    lines = []
    for name in STAGES:
        cells = [name]
        for corpus in ("demo", "web"):
            row = model.stage(name, corpus)
            cells += [f"{row['mb_per_s']:.1f}", f"{row['details']['peak_memory_bytes'] / 1e6:.0f}"]
        lines.append(cells)
    return _table("Measured: text a CPU second, and the most memory of a process with one task", head, lines)


def sizes(model: Model) -> str:
    lines = []
    for name in STAGES:
        cells = [f"{model.per_byte(name, key):.3f}" for key in ("read_bytes", "written_bytes", "disk_bytes")]
        lines.append([name, *(["fixed"] * 3 if name in _FIXED else cells)])
    raw = model.per_byte("extract", "bytes_in")
    title = f"Measured, web pages ({raw:.2f} bytes of HTML to a byte of text): bytes for each byte of text"
    return _table(title, ["stage", "read", "written", "left on disk"], lines)


def total(model: Model) -> str:
    flowing = [name for name in STAGES if name not in _FIXED]
    lines = [[name, *_cost(model, (name,))] if name in flowing else [name, *["fixed"] * 5] for name in STAGES]
    lines.append(["**all**", *_cost(model, flowing)])
    lines.append(["another threshold: " + ", ".join(_AFTER_THE_SCORES), *_cost(model, _AFTER_THE_SCORES)])
    head = ["stage", "core hours a TB", "USD a TB", "read, TB", "written, TB", "on disk, TB"]
    assumed = model.assumed
    title = f"Extrapolated to {assumed.terabytes:g} TB of text, at {assumed.core_hour:g} USD a core hour"
    return _table(title, head, lines)


def _cost(model: Model, names: Sequence[str]) -> list[str]:
    """Returns the cells of a row: the cost of the stages `names` together."""
    hours = sum(model.core_hours(name) for name in names)
    flows = [sum(model.per_byte(name, key) for name in names) for key in ("read_bytes", "written_bytes", "disk_bytes")]
    price, terabytes = model.assumed.core_hour, model.assumed.terabytes
    return [f"{hours:.1f}", f"{hours * price:.2f}", *(f"{flow * terabytes:.1f}" for flow in flows)]


def memory(model: Model) -> str:
    documents = model.documents
    rows = [
        ["documents that reach deduplication", f"{documents / 1e9:.1f} billion", "measured share of the text"],
        ["dedup, pairs", f"{model.assumed.memory_mb / 1e3:g} GB a task", "bounded by dedup.memory_mb"],
        ["dedup, clusters", f"{BYTES_A_DOCUMENT * documents / 1e9:,.0f} GB", "mapped files of one task on one node"],
        ["keys on disk", f"{_key_bytes() * documents / 1e12:.1f} TB", f"{_key_bytes()} bytes a document"],
        [
            "the same in datatrove's files",
            f"{_peer_key_bytes() * documents / 1e12:.1f} TB",
            f"{_peer_key_bytes()} bytes a document: every hash is kept, not a key a band",
        ],
    ]
    return _table("Extrapolated: what grows with the number of documents", ["of what", "how much", "why"], rows)


def _key_bytes() -> int:
    return len(kinds_of_keys(DedupConfig())) * _KEY_AND_ROW


def _peer_key_bytes() -> int:
    """Returns the bytes per document of datatrove's stage 1: in each band 8 per hash and 4 for the document."""
    settings = DedupConfig()
    return settings.bands * (8 * settings.rows + 4)


def files(model: Model) -> str:
    extract = model.stage("extract")["details"]
    a_shard = sum(model.stage(name)["details"]["shard_files"] / extract["shards"] for name in STAGES[:-1])
    tasks = (DedupConfig().bands + 1) * model.ranges
    rows = [
        ["shards", f"{model.shards:,.0f}", f"of {model.assumed.shard_mb:,.0f} MB of text, run.shard_bytes"],
        ["files of all stages", f"{a_shard * model.shards / 1e6:.1f} million", f"{a_shard:.0f} a shard, as measured"],
        ["ranges of keys", f"{model.ranges}", f"{BYTES_A_KEY} bytes a key and document over dedup.memory_mb"],
        ["tasks of pairs", f"{tasks:,}", "ranges times bands and exact"],
        ["reads of ranges", f"{tasks * model.shards / 1e6:,.0f} million", "every task, of every shard"],
        [
            "size of such a read",
            f"{model.documents / model.shards / model.ranges * _KEY_AND_ROW / 1e3:.0f} kB",
            "keys and rows of one range of one shard",
        ],
    ]
    return _table("Extrapolated: files and requests", ["of what", "how many", "why"], rows)


def peers(model: Model) -> str:
    """Returns the table of the steps that were compared with a peer in the same run."""
    rows = []
    for name, row in model.rows.items():
        if row["ratio"] is None:
            continue
        hours = [1e6 / row[key] / 3600 for key in ("mb_per_s", "peer_mb_per_s")]
        rows.append([name, *(f"{value:,.0f}" for value in hours), f"{row['ratio']:.1f}", row["peer"]])
    head = ["step", "core hours a TB", "the peer's", "ratio", "peer"]
    return _table("Measured in the same run: this pipeline and stock libraries", head, rows)


def _table(title: str, head: list[str], rows: list[list[str]]) -> str:
    rule = "|".join(["---", *["---:"] * (len(head) - 1)])
    lines = ["| " + " | ".join(cells) + " |" for cells in (head, *rows)]
    return "\n".join([f"**{title}**", "", lines[0], f"|{rule}|", *lines[1:]])


def with_tables(paper: str, tables: str) -> str:
    """Returns the page with the tables between its marks. Raises ValueError if it has no marks."""
    before, begin, rest = paper.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{PAPER} has no {BEGIN!r} and {END!r}; put them back where the tables belong")
    return f"{before}{BEGIN}\n{tables}{END}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(description="The tables of docs/scale.md from the JSON of make bench-data.")
    parser.add_argument("--rates", type=Path, default=RATES)
    parser.add_argument("--write", action="store_true", help="keep the rates and tables in docs/")
    for name, value in vars(Assumptions()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    args = vars(parser.parse_args())
    rates, write = args.pop("rates"), args.pop("write")
    if write and Assumptions(**args) != Assumptions():
        parser.error("--write keeps the paper's assumptions; change them in scale.py, or print without --write")
    tables = report(json.loads(rates.read_text(encoding="utf-8")), Assumptions(**args))
    print(tables)
    if write:
        PAPER.write_text(with_tables(PAPER.read_text(encoding="utf-8"), tables), encoding="utf-8")
        if rates.resolve() != RATES:
            shutil.copyfile(rates, RATES)


if __name__ == "__main__":
    main()
