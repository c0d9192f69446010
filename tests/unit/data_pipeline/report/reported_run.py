"""A small data run with every kind of drop and cut, and its report."""

import gzip
import json
from pathlib import Path
from typing import Any

from data_pipeline import command
from data_pipeline.report import ledger_tables
from tests.data_runs import data_config

ROOT = Path(__file__).parents[4]
SCRIPT = "<script>alert('&')</script> </svg> "
MAIL = "jane.roe@acme-corp.com"


def config_in(folder: Path) -> Path:
    """Returns the config of a run whose files are in `folder`."""
    return data_config(
        folder / "data.toml",
        {
            "prose": {"files": [f"{folder}/prose.jsonl"], "format": "jsonl", "rules": {"en": "english"}},
            "code": {"files": [f"{folder}/code.jsonl"], "format": "jsonl", "rules": {"any": "code"}},
        },
        run={"shard_bytes": 20000},
        extract={"max_bad_share": 0.1},
        rules={
            "english": {
                "stop_words": ["the", "of", "and", "to"],
                "language_score": {"min": 0.5},
                "word_count": {"min": 50, "max": 100000},
                "mean_word_length": {"min": 4.5},
                "stop_word_count": {"min": 2},
            },
            "code": {"max_line_length": {"max": 100}},
        },
        decontaminate={"files": [f"{folder}/evaluation.jsonl"]},
        lines={"max_copies": 1},
        pii={},
        heldout={"share": 0.1},
        mixture={"samples": 100, "weights": {"prose": 3.0, "code": 1.0}},
        alarms={"min_documents": 10, "max_drop_share": 0.9},
    )


def records(source: str, step: int) -> list[dict[str, Any]]:
    with gzip.open(ROOT / f"data/demo/{source}.jsonl.gz", "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines][::step]


def make_run(folder: Path) -> Path:
    """Returns the config of a finished run in `folder`; four texts are copies, one is short, one French, one broken."""
    prose = [dict(record, text=record["text"][:3000]) for record in records("english", 9)]
    copied = SCRIPT + prose[0]["text"]
    prose += [{"id": f"copy-{number}<b>", "text": copied} for number in range(4)]
    prose.append({"id": "short", "text": f"Write to {MAIL} about the roads of the town and the ships in the harbour."})
    prose.append({"id": "letter", "text": f"Write to {MAIL} about it.\n{prose[5]['text'][1000:2500]}"})
    prose.append(
        {"id": "french", "text": "Nous sommes arrivés hier soir dans la ville, et il faisait déjà nuit. " * 20}
    )
    question = " ".join(prose[3]["text"].split()[100:140])
    (folder / "evaluation.jsonl").write_text(json.dumps({"text": question}) + "\n", encoding="utf-8")
    lines = [json.dumps(record) for record in prose]
    (folder / "prose.jsonl").write_text("\n".join([*lines, '{"text": "cut']) + "\n", encoding="utf-8")
    code = [dict(record, text=record["text"][:2000]) for record in records("code", 6)]
    (folder / "code.jsonl").write_text("".join(json.dumps(record) + "\n" for record in code), encoding="utf-8")
    path = config_in(folder)
    assert command.main([str(path)]) == 0
    assert ledger_tables.main([str(path)]) == 0
    return path
