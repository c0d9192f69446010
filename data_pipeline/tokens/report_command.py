"""`trivium tokenizer report RUN`: bytes per token of a data run's tokenizer and of others on the same text.

The text is what the run holds out, on which its own tokenizer was not trained. Bytes per token are given by source and
by language. For each tokenizer there are also its longest tokens and those that the text does not use. All of it is
written to a JSON file; the table shows the bytes per token.
"""

import json
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from configs.cli import command_parser, entrypoint
from configs.files import write_atomic
from configs.folders import check_writable
from configs.loader import ConfigError
from data_pipeline.core.console import say, wide_console
from data_pipeline.core.shards import HELDOUT, TRAIN
from data_pipeline.tokens.published import Published, open_published
from data_pipeline.tokens.store import SourceStores
from data_pipeline.tokens.training_text import run_shards, shard_records

FILE = "tokenizer_report.json"
ALL = "all"
_LONGEST = 20  # tokens that are listed
_UNUSED = 200  # unused tokens that are listed
_BATCH = 64  # documents that are encoded together
EXAMPLE = (
    "trivium tokenizer report runs/demo/data --against gpt2=downloads/gpt2 --against downloads/qwen3/tokenizer.json"
)


@dataclass
class TokenizerMeasures:
    """Documents and bytes of the text of one source in one language, and how many tokens each tokenizer makes of it."""

    source: str
    language: str
    documents: int = 0
    bytes: int = 0
    tokens: dict[str, int] = field(default_factory=lambda: defaultdict(int))

    def plain(self) -> dict[str, Any]:
        """Returns the row as JSON, with bytes per token."""
        rates = {name: round(self.bytes / count, 4) if count else None for name, count in self.tokens.items()}
        return {
            "source": self.source,
            "language": self.language,
            "documents": self.documents,
            "bytes": self.bytes,
            "tokens": dict(self.tokens),
            "bytes_per_token": rates,
        }


def report(
    run_dir: Path, own: str, tokenizers: Mapping[str, Published], split: str = HELDOUT, max_bytes: int = 50_000_000
) -> dict[str, Any]:
    """Measures the tokenizers on a data run's documents of one split, on up to `max_bytes` of each source.

    `own` is the name of the run's own tokenizer among them. Raises ConfigError if the run has no such documents.
    """
    rows: dict[tuple[str, str], TokenizerMeasures] = {}
    counts = {name: np.zeros(one.vocab_size, np.int64) for name, one in tokenizers.items()}
    for (source, language), texts in _batches(run_dir, split, max_bytes):
        size = sum(len(text.encode()) for text in texts)
        keys = dict.fromkeys([(source, language), (source, ALL), (ALL, language), (ALL, ALL)])
        row_of = [rows.setdefault(key, TokenizerMeasures(*key)) for key in keys]
        for row in row_of:
            row.documents += len(texts)
            row.bytes += size
        for name, tokenizer in tokenizers.items():
            found = tokenizer.count(texts)
            counts[name] += found
            for row in row_of:
                row.tokens[name] += int(found.sum())
    order = sorted(rows, key=lambda key: (key[0] == ALL, key[0], key[1] == ALL, key[1]))
    # A source in one language needs no row for all of its languages.
    languages = {source: {language for one, language in rows if one == source} - {ALL} for source, _ in rows}
    kept = [key for key in order if key[1] != ALL or len(languages[key[0]]) > 1 or key[0] == ALL]
    described = {name: _described(one, counts[name]) for name, one in tokenizers.items()}
    if own in described and (used := _used_in_run(run_dir, tokenizers[own])) is not None:
        described[own]["unused_in_run"] = len(_unused(tokenizers[own], used))
    return {
        "run": str(run_dir),
        "split": split,
        "own": own,
        "tokenizers": described,
        "rows": [rows[key].plain() for key in kept],
    }


def _batches(run_dir: Path, split: str, max_bytes: int) -> Iterator[tuple[tuple[str, str], list[str]]]:
    """Yields ((source, language), texts) for batches of documents of one source and language."""
    left: dict[str, int] = defaultdict(lambda: max_bytes)
    by_kind: dict[tuple[str, str], list[str]] = defaultdict(list)
    for source, record in shard_records(run_shards(run_dir, split, "RUN")):
        if left[source] <= 0:
            continue
        left[source] -= len(record["text"].encode())
        kind = (source, str((record.get("metadata") or {}).get("language") or "unknown"))
        by_kind[kind].append(record["text"])
        if len(by_kind[kind]) == _BATCH:
            yield kind, by_kind.pop(kind)
    yield from by_kind.items()


def _described(tokenizer: Published, counts: np.ndarray) -> dict[str, Any]:
    """Returns size, longest tokens and unused tokens of a tokenizer whose ids occur `counts` times."""
    spellings = tokenizer.spellings
    longest = sorted(range(len(spellings)), key=lambda one: (-len(spellings[one].encode()), one))[:_LONGEST]
    unused = _unused(tokenizer, counts)
    return {
        "path": tokenizer.path,
        "sha256": tokenizer.sha256,
        "vocab_size": tokenizer.vocab_size,
        "longest": [
            {"id": one, "text": spellings[one], "bytes": len(spellings[one].encode()), "count": int(counts[one])}
            for one in longest
        ],
        "unused": len(unused),
        "unused_share": round(len(unused) / max(1, sum(map(bool, spellings))), 4),
        "unused_tokens": [{"id": one, "text": spellings[one]} for one in unused[:_UNUSED]],
    }


def _unused(tokenizer: Published, counts: np.ndarray) -> list[int]:
    """Returns the ids that do not occur; control symbols are none of them, since text never becomes one."""
    return [one for one, text in enumerate(tokenizer.spellings) if text and not counts[one]]


def _used_in_run(run_dir: Path, tokenizer: Published) -> np.ndarray | None:
    """Returns how often each id is in all tokens of a run; None if it has none that this tokenizer made."""
    counts = np.zeros(tokenizer.vocab_size, np.int64)
    folders = sorted(
        {path.parent for split in (TRAIN, HELDOUT) for path in (run_dir / "tokens" / split).glob("*/*.idx")}
    )
    for folder in folders:
        for store in SourceStores.in_folder(folder).stores:
            if store.facts()["tokenizer_sha256"] != tokenizer.sha256:
                return None
            for number in range(len(store)):
                counts += np.bincount(store.tokens(number), minlength=len(counts))
    return counts if folders else None


def show(found: Mapping[str, Any], console: Console) -> None:
    """Prints bytes per token as a table, and the longest and the unused tokens of each tokenizer as lines."""
    names = list(found["tokenizers"])
    table = Table(title=f"Bytes per token of {found['split']} text (more bytes, fewer tokens)", title_justify="left")
    for name in ("source", "language", "bytes", *names):
        table.add_column(name, justify="left" if name in ("source", "language") else "right")
    for row in found["rows"]:
        rates = (row["bytes_per_token"].get(name) for name in names)
        shown = (f"{rate:.3f}" if rate is not None else "" for rate in rates)
        table.add_row(row["source"], row["language"], f"{row['bytes']:,}", *shown)
    console.print(table)
    for name, one in found["tokenizers"].items():
        longest = ", ".join(f"{token['text']!r} ({token['bytes']})" for token in one["longest"][:3])
        whole = f", {one['unused_in_run']:,} in all of the run" if "unused_in_run" in one else ""
        say(
            f"{name}: {one['vocab_size']:,} tokens; not used by this text {one['unused']:,} "
            f"({one['unused_share']:.0%}){whole}; longest, in bytes: {longest}",
            console,
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Measures the tokenizers that the command line names and returns the exit status."""
    parser = command_parser(
        "trivium tokenizer report",
        "Measures bytes per token of a data run's tokenizer, and of others, on the text that the run holds out.",
        EXAMPLE,
    )
    parser.add_argument("run", metavar="RUN", help="the folder of a data run")
    parser.add_argument(
        "--against",
        metavar="[NAME=]PATH",
        action="append",
        default=[],
        help="another tokenizer: tokenizer.json, a sentencepiece model, GPT-2's two files or ranks of tiktoken",
    )
    parser.add_argument("--tokenizer", metavar="PATH", help="measure this one in place of the run's own")
    parser.add_argument(
        "--split", choices=(HELDOUT, TRAIN), default=HELDOUT, help="split to measure on (default heldout)"
    )
    parser.add_argument(
        "--max-bytes", type=int, default=50_000_000, help="most bytes of text of each source (default 50000000)"
    )
    parser.add_argument("--out", metavar="FILE", help=f"the JSON file to write (default RUN/{FILE})")
    args = parser.parse_args(argv)
    if args.max_bytes < 1:
        raise ConfigError(f"--max-bytes {args.max_bytes} leaves no text; give 1 or more")
    run_dir, console = Path(args.run), wide_console()
    out = Path(args.out) if args.out else run_dir / FILE
    run_shards(run_dir, args.split, "RUN")
    check_writable(out.parent, "--out", out)
    if out.is_dir():
        raise ConfigError(f"--out {out} is a folder; name a file in it, such as {out / FILE}")
    own = Path(args.tokenizer) if args.tokenizer else run_dir / "tokenizer"
    if not own.exists():
        raise ConfigError(
            f"{own} does not exist; name a tokenizer as --tokenizer PATH, or make the run's own with `trivium data run`"
        )
    named = _named(str(own), args.against)
    try:
        found = report(run_dir, next(iter(named)), named, args.split, args.max_bytes)
    except ConfigError:
        raise
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    write_atomic(out, (json.dumps(found, indent=1, ensure_ascii=False) + "\n").encode())
    show(found, console)
    say(f"written to {out}", console)
    return 0


def _named(own: str, against: Sequence[str]) -> dict[str, Published]:
    """Opens the tokenizers, under the names that the command line gives them, or those of their folders or files."""
    named = {"own": open_published(own)}
    for given in against:
        name, equals, path = given.partition("=")
        if not equals or Path(given).exists():
            path = given
            name = Path(path).name if Path(path).name != "tokenizer.json" else Path(path).absolute().parent.name
        if name in named:
            raise ConfigError(f"--against {given}: there is another tokenizer named {name!r}; write NAME={path}")
        named[name] = open_published(path)
    return named


if __name__ == "__main__":
    entrypoint(main)
