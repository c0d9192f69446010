"""`trivium data baselines CONFIG`: bits per byte of a data run's held-out text without a neural network, by source.

A language model's held-out bits per byte are read beside them: `xz -9` of the held-out text; `xz -9` with the source's
training text before it (the difference in size); and a 5-gram model of the run's tokens (modified Kneser-Ney),
estimated from the source's training text, unless tokens have no bytes, as those of WordPiece. Results are in
baselines.json in the run directory, and are computed again only after the tokens have changed.
"""

import json
import lzma
import sys
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table

from configs.cli import entrypoint, parse_args
from configs.data import DataConfig
from configs.files import file_sha256, write_atomic
from configs.folders import check_can_hold
from data_pipeline.core.console import say, wide_console
from data_pipeline.core.integrity import STAGE_MANIFEST
from data_pipeline.core.shards import HELDOUT, TRAIN, read_records, shard_path, shards_under
from data_pipeline.report.baselines_file import FILE, ORDER, TITLES, kept
from data_pipeline.scores.ngram_training import estimate
from data_pipeline.tokens.store import SourceStores
from data_pipeline.tokens.tokenizer import Tokenizer


def baselines(run_dir: Path, workers: int = 2) -> dict[str, dict[str, float]]:
    """Returns {source: {"bytes" of its held-out text, and bits per byte by each of TITLES}}, and writes baselines.json.

    Sources without held-out text are left out, and so is the 5-gram model if the tokenizer is not lossless. Raises
    ValueError if the run has no tokens yet.
    """
    manifest = run_dir / "tokens" / STAGE_MANIFEST
    if not manifest.is_file():
        raise ValueError(f"{run_dir} has no tokens yet; run: trivium data run CONFIG")
    made_from = file_sha256(manifest)
    if known := kept(run_dir):
        return known
    sources = sorted({store.parent.name for store in (run_dir / "tokens" / HELDOUT).glob("*/*.idx")})
    with ThreadPoolExecutor(workers) as pool:  # xz and numpy's sorting run beside each other
        jobs = {source: (pool.submit(_ngram, run_dir, source), _start_xz(run_dir, source, pool)) for source in sources}
        result = {}
        for source, (ngram, sizes) in jobs.items():
            held_out, training, both = (size.result() for size in sizes)
            if not held_out.before:
                continue
            bits = 8 / held_out.before
            result[source] = {
                "bytes": held_out.before,
                "xz": held_out.after * bits,
                "xz_after_training": (both.after - training.after) * bits,
            }
            if (bits_per_byte := ngram.result()) is not None:
                result[source]["ngram"] = bits_per_byte
    content = {"made_from": made_from, "titles": TITLES, "sources": result}
    write_atomic(run_dir / FILE, (json.dumps(content, indent=1) + "\n").encode())
    return result


class Sizes(NamedTuple):
    """Bytes of a text before and after compression."""

    before: int
    after: int


def _start_xz(run_dir: Path, source: str, pool: ThreadPoolExecutor) -> list[Future[Sizes]]:
    """Starts to compress a source's held-out text, its training text, and both, the held-out text last."""
    held_out, training = (_text(run_dir / "documents", split, source) for split in (HELDOUT, TRAIN))
    return [pool.submit(_xz, text) for text in (held_out, training, training + held_out)]


def _xz(text: bytes) -> Sizes:
    return Sizes(len(text), len(lzma.compress(text, preset=9)))


def _text(documents: Path, split: str, source: str) -> bytes:
    shards = [shard for shard in shards_under(documents) if shard.startswith(f"{split}/{source}/")]
    return b"".join(
        record["text"].encode() for shard in shards for record in read_records(shard_path(documents, shard))
    )


def _ngram(run_dir: Path, source: str) -> float | None:
    """Returns the bits per byte of a source's held-out tokens in the n-gram model of its training tokens.

    None if that cannot be told: the tokens have no bytes, or there are none.
    """
    tokenizer = Tokenizer.load(run_dir / "tokenizer")
    if not tokenizer.token_bytes.any():
        return None
    # The model needs a mark before each document; without one of its own, the end of the document before is one.
    begin = np.array([tokenizer.eos_id] * (tokenizer.bos_id < 0), np.int32)
    held_out, training = (
        [np.concatenate([begin, ids]) for ids in _tokens(run_dir / "tokens" / split / source)]
        for split in (HELDOUT, TRAIN)
    )
    mark = tokenizer.bos_id if tokenizer.bos_id >= 0 else tokenizer.eos_id
    model = estimate(training, tokenizer.vocab_size, mark, tokenizer.eos_id, ORDER)
    size = sum(int(tokenizer.token_bytes[document].sum()) for document in held_out)
    return model.bits(held_out) / size if size else None


def _tokens(folder: Path) -> list[np.ndarray]:
    return [store.tokens(index) for store in SourceStores.in_folder(folder).stores for index in range(len(store))]


def show(sources: dict[str, dict[str, Any]], console: Console) -> None:
    """Prints the table of all sources."""
    table = Table(title="Bits per byte of the held-out text", title_justify="left")
    for name in ("source", "bytes", *TITLES.values()):
        table.add_column(name, justify="left" if name == "source" else "right")
    for source, values in sources.items():
        table.add_row(
            source, f"{values['bytes']:,}", *(f"{values[name]:.3f}" if name in values else "" for name in TITLES)
        )
    console.print(table)


def main(argv: Sequence[str] | None = None) -> int:
    config, args = parse_args(
        DataConfig,
        argv,
        prog="trivium data baselines",
        description="Measures bits per byte of the held-out text under xz and a 5-gram model, beside which a language "
        "model's are read; writes baselines.json to run.dir.",
        example="trivium data baselines configs/data/demo.toml",
    )
    run_dir, console = Path(config.run.dir), wide_console()
    if args.dry_run:
        say(f"would measure the held-out text of {run_dir}", console)
        return 0
    check_can_hold(run_dir, FILE)
    try:
        found = baselines(run_dir, config.run.workers)
        if not found and config.heldout.share and not (run_dir / "documents" / STAGE_MANIFEST).is_file():
            raise ValueError(f"{run_dir} has no documents any more; run: trivium data run CONFIG")
        if not found:
            raise ValueError(
                f"{run_dir} holds no text out to measure on (heldout.share = {config.heldout.share:g}); set "
                "heldout.share above 0, such as heldout.share=0.02, and run `trivium data run` again"
            )
        show(found, console)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    entrypoint(main)
