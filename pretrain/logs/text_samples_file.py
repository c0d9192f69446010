"""Reads samples.jsonl, the texts that a model wrote while it was trained."""

import json
from pathlib import Path

FILE = "samples.jsonl"


def read(run_dir: Path) -> dict[str, list[tuple[int, str]]]:
    """Returns by prompt the (step, continuation) of each evaluation, in the order of steps; broken lines are left out.

    A run that went on from a checkpoint wrote some steps again, of which the later text counts.
    """
    found: dict[str, dict[int, str]] = {}
    path = run_dir / FILE
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []:
        try:
            record = json.loads(line)
            for sample in record["samples"]:
                found.setdefault(sample["prompt"], {})[int(record["step"])] = str(sample["text"])
        except (ValueError, KeyError, TypeError):
            continue
    return {prompt: sorted(texts.items()) for prompt, texts in found.items()}
