"""`trivium tokenizer train CONFIG`: trains a tokenizer on files, or on the documents of a data run.

The folder is written under another name and renamed when it is complete. A data run takes the tokenizer as
`tokenizer.file`.
"""

import sys
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from configs.cli import entrypoint, parse_args
from configs.files import new_folder
from configs.folders import check_writable
from configs.loader import ConfigError
from configs.tokenizer import TokenizerTrainConfig
from data_pipeline.core.console import say, wide_console
from data_pipeline.core.shards import TRAIN
from data_pipeline.tokens.tokenizer import Tokenizer
from data_pipeline.tokens.tokenizer_training import train_on_texts
from data_pipeline.tokens.training_text import FileTexts, described, run_shards, shard_texts
from data_pipeline.tokens.vocabulary import padding, symbols


def main(argv: Sequence[str] | None = None) -> int:
    """Trains the tokenizer that the config describes and returns the exit status."""
    config, args = parse_args(
        TokenizerTrainConfig,
        argv,
        prog="trivium tokenizer train",
        description="Trains a tokenizer on files, or on the documents of a data run.",
        example="trivium tokenizer train configs/tokenizer/demo.toml tokenizer.kind=unigram out=runs/mine/unigram",
    )
    console, out = wide_console(), Path(config.out)
    if out.exists():
        raise ConfigError(f"out = {config.out!r} exists already; name another folder, or remove it")
    check_writable(out.parent, "out", out)
    files = FileTexts(config.text)
    shards = run_shards(config.text.run, TRAIN) if config.text.run is not None else []
    _say(config, files, shards, console)
    if args.dry_run:
        return 0
    try:
        trained = _train(config, files, shards, out, console)
    except ConfigError:
        raise
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if files.unusable:
        console.print(
            f"{files.unusable.total():,} records had no text that could be used ({described(files.unusable)})",
            markup=False,
            soft_wrap=True,
        )
    say(
        f"{out}: {trained.vocab_size:,} tokens, of which {len(trained.special_ids):,} are control symbols; a data run "
        f"takes it as tokenizer.file={out}",
        console,
    )
    return 0


def _say(config: TokenizerTrainConfig, files: FileTexts, shards: Sequence[Path], console: Console) -> None:
    """Prints which tokenizer is trained on how much text.

    Raises ConfigError if the control symbols leave no room in the vocabulary.
    """
    settings = config.tokenizer
    try:
        own = len(symbols(settings, ()))
    except ValueError as error:
        raise ConfigError(str(error)) from None
    filled = len(padding(settings))
    size = files.size + sum(shard.stat().st_size for shard in shards)
    rounded = f" and {filled} reserved to make it a multiple of {settings.vocab_multiple}" if filled else ""
    say(
        f"{settings.kind.value}, {settings.vocab_size:,} tokens, {own} of them control symbols{rounded}; up to "
        f"{settings.train_bytes:,} bytes of text from {len(files.paths) + len(shards):,} files ({size:,} bytes)",
        console,
    )


def _train(
    config: TokenizerTrainConfig, files: FileTexts, shards: Sequence[Path], out: Path, console: Console
) -> Tokenizer:
    """Trains, and publishes the folder `out`; returns the tokenizer. Raises ValueError as `train_on_texts` does."""
    with new_folder(out) as partial:
        with Progress(console=console, transient=True) as bar:
            task = bar.add_task("reading", total=None)

            def texts() -> Iterator[str]:
                for number, text in enumerate(chain(files, shard_texts(shards))):
                    bar.update(task, description=f"reading, {number:,} documents")
                    yield text
                bar.update(task, description="training")

            train_on_texts(texts(), partial, config.tokenizer)
        Tokenizer.load(partial)
    return Tokenizer.load(out)


if __name__ == "__main__":
    entrypoint(main)
