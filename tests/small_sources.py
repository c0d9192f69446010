"""Small sources of generated documents, and the config of a data run over them."""

import json
from pathlib import Path

WORDS = ("quick brown fox jumps over lazy dog", "seven wise wizards quietly judge boxing matches in june")


def word(number: int) -> str:
    words = " ".join(WORDS).split()
    return words[number % len(words)]


def text(number: int) -> str:
    """Returns a short document that is different for each number."""
    return " ".join(word(number * 7 + at * (number + 3)) + str(number * at % 97) for at in range(60))


def write_config(folder: Path, sources: dict[str, int], mixture: str, more: str = "") -> Path:
    """Writes the config of a run; `sources` has the number of documents of each source.

    The documents of a source named `short` are dropped by its rule.
    """
    parts = [f'[run]\ndir = "{folder}/run"\nworkers = 1\n']
    for name, count in sources.items():
        lines = [json.dumps({"id": f"{name}/{n}", "text": text(n + 1000 * sum(map(ord, name)))}) for n in range(count)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
        parts.append(
            f'[sources.{name}]\nfiles = ["{folder}/{name}.jsonl"]\nformat = "jsonl"\nrules = {{ any = "{name}" }}'
        )
        parts.append(f"[rules.{name}]\nword_count = {{ min = {1000 if name == 'short' else 5} }}")
    parts.append("[dedup]\nminhash = false\n[tokenizer]\nvocab_size = 400\n")
    (folder / "data.toml").write_text("\n".join([*parts, more, mixture]))
    return folder / "data.toml"
