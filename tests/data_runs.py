"""Data runs on a small slice of the demo corpus: their config, their command, and the files that they publish.

A run takes a few seconds, and has enough files and shards to be divided into several tasks.
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
TEMPORARY = ("ledger.json", "inputs.json", "config.toml", "stage.json", ".lock")  # have times and paths in them


def data_config(path: Path, sources: dict[str, dict[str, Any]], **sections: dict[str, Any]) -> Path:
    """Writes the config of a small data run to `path`; `sections` add keys to the few that are required."""
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


def prose_and_pages(path: Path, files: Path | str, run: str = "run") -> Path:
    """Writes to `path` the config of a run, in folder `run` beside it, over the prose and the pages in `files`."""
    return data_config(
        path,
        {
            "prose": {"files": [f"{files}/prose*.jsonl*"], "format": "jsonl", "rules": {"en": "english"}},
            "pages": {"files": [f"{files}/pages*.warc.gz"], "format": "warc", "rules": {"en": "pages"}},
        },
        run={"dir": str(path.parent / run), "shard_bytes": 20000},
        extract={"max_bad_share": 0.1},
        rules={
            "english": {
                "stop_words": ["the", "of", "and", "to"],
                "language_score": {"min": 0.5},
                "word_count": {"min": 50},
            },
            "pages": {"word_count": {"min": 50}},
        },
        heldout={"share": 0.1},
        mixture={"samples": 60},
    )


def write_inputs(folder: Path) -> Path:
    """Writes a config and its inputs to `folder`: three files of prose, two of pages; a line is broken, one a copy."""
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
    return prose_and_pages(folder / "data.toml", folder)


def command(config: Path, *args: str, ranks: int = 0) -> list[str]:
    """Returns the command line of `trivium data run`, under mpirun if `ranks` is given."""
    mpirun = [str(Path(sys.executable).with_name("mpirun")), "-n", str(ranks)] if ranks else []
    return [*mpirun, sys.executable, "-m", "data_pipeline.command", str(config), *args]


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **more}


def published(run_dir: Path) -> dict[str, str]:
    """Returns the SHA-256 of every published file except those in TEMPORARY, by path."""
    return {
        path.relative_to(run_dir).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(run_dir.rglob("*"))
        if path.is_file() and path.name not in TEMPORARY and path.relative_to(run_dir).parts[0] != "logs"
    }


def took_part(run_dir: Path) -> set[str]:
    """Returns the names of the processes that did tasks."""
    return {path.read_text() for path in run_dir.glob("logs/**/started/*")}


def ledger(run_dir: Path) -> dict[str, dict[str, Any]]:
    """Returns the ledger's entry of each stage by the stage's name."""
    return {stage["name"]: stage for stage in json.loads((run_dir / "ledger.json").read_text())["stages"]}


def run_folder(config: Path) -> Path:
    """Returns the run directory of a config that `write_inputs` wrote."""
    return config.parent / "run"
