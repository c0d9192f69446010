"""Data runs on a small slice of the demo corpus: a config, a command, and what a run published.

The slice is cut to what a few seconds suffice for, with enough files and shards that tasks have something to share.
"""

import gzip
import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import tomli_w

ROOT = Path(__file__).resolve().parents[1]
TEMPORARY = ("ledger.json", "inputs.json", "config.toml", "stage.json", ".lock")  # these hold times, paths and choices

CONFIG = """
[run]
dir = "{run}"
shard_bytes = 20000

[sources.prose]
files = ["{files}/prose*.jsonl*"]
format = "jsonl"
rules = {{ en = "english" }}

[sources.pages]
files = ["{files}/pages*.warc.gz"]
format = "warc"
rules = {{ en = "pages" }}

[extract]
max_bad_share = 0.1

[rules.english]
stop_words = ["the", "of", "and", "to"]
language_score = {{ min = 0.5 }}
word_count = {{ min = 50 }}

[rules.pages]
word_count = {{ min = 50 }}

[tokenizer]
vocab_size = 400

[heldout]
share = 0.1

[mixture]
seq_length = 64
samples = 60
weights = {{ prose = 1.0, pages = 1.0 }}
"""


def data_config(path: Path, sources: dict[str, dict[str, Any]], **sections: dict[str, Any]) -> Path:
    """Writes the config of a small data run to `path`: `sources`, and what other sections say beyond the least."""
    tree: dict[str, dict[str, Any]] = {
        "run": {"dir": str(path.parent / "run"), "workers": 1},
        "sources": sources,
        "tokenizer": {"vocab_size": 400},
        "mixture": {"seq_length": 64, "samples": 50, "weights": dict.fromkeys(sources, 1.0)},
    }
    for name, section in sections.items():
        tree[name] = tree.get(name, {}) | section
    path.write_text(tomli_w.dumps(tree), encoding="utf-8")
    return path


def write_inputs(folder: Path) -> Path:
    """A config and its files in `folder`: three of prose, two of pages, one broken line, one copy."""
    with gzip.open(ROOT / "data/demo/english.jsonl.gz", "rb") as lines:
        records = [json.loads(line) for line in lines.readlines()[::12]]
    for record in records:
        record["text"] = record["text"][:2000]
    records.append(dict(records[0], id="copy"))
    for part in range(3):
        rows = [json.dumps(record).encode() for record in records[part::3]]
        (folder / f"prose-{part}.jsonl").write_bytes(b"\n".join([*rows, *([b"{"] if part == 0 else [])]))
    pages = (ROOT / "data/demo/web.warc.gz").read_bytes()
    half, end = (pages.index(b"\x1f\x8b\x08", offset) for offset in (40_000, 80_000))
    (folder / "pages-0.warc.gz").write_bytes(pages[:half])
    (folder / "pages-1.warc.gz").write_bytes(pages[half:end])
    config = folder / "data.toml"
    config.write_text(CONFIG.format(run=folder / "run", files=folder))
    return config


def command(config: Path, *args: str, ranks: int = 0) -> list[str]:
    """`trivium data run` as a command line, under mpirun where `ranks` are given."""
    mpirun = [str(Path(sys.executable).with_name("mpirun")), "-n", str(ranks)] if ranks else []
    return [*mpirun, sys.executable, "-m", "data_pipeline.run", str(config), *args]


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **more}


def published(run_dir: Path) -> dict[str, str]:
    """SHA-256 of every published file but those that hold times, paths and choices."""
    return {
        path.relative_to(run_dir).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(run_dir.rglob("*"))
        if path.is_file() and path.name not in TEMPORARY and path.relative_to(run_dir).parts[0] != "logs"
    }


def took_part(run_dir: Path) -> set[str]:
    """The processes that did tasks, by name."""
    return {path.read_text() for path in run_dir.glob("logs/**/started/*")}


def ledger(run_dir: Path) -> dict[str, dict[str, Any]]:
    """What the ledger says of each stage, by its name."""
    return {stage["name"]: stage for stage in json.loads((run_dir / "ledger.json").read_text())["stages"]}


def run_folder(config: Path) -> Path:
    """The run directory of a config of CONFIG that stands in the folder of the run."""
    return config.parent / "run"
