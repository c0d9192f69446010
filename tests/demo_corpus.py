"""Records of the demo's corpus that tests use, and a writer of files like the corpus's."""

import gzip
import json
from pathlib import Path
from typing import Any

DEMO = Path(__file__).parents[1] / "data" / "demo"
SOURCES = {"english": slice(180, 300, 2), "chinese": slice(0, 8), "code": slice(0, 250)}


def demo_records(source: str) -> list[dict[str, Any]]:
    with gzip.open(DEMO / f"{source}.jsonl.gz", "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines][SOURCES[source]]


def write_jsonl(path: Path, records: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "wt", encoding="utf-8") as out:
        out.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    return path
