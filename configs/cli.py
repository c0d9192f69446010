"""What every command shares: arguments, `--help` with an example, the exit status, and training's --resume."""

import argparse
import errno
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from typing import NoReturn, TypeVar

from pydantic import BaseModel

from configs import signals
from configs.loader import ConfigError, load

T = TypeVar("T", bound=BaseModel)

# How long a rank that finds a mistake in a config lets the one that tells it go first: a launcher may end all at once.
TURN_SECONDS = 1.0

# The kinds of config, by the name that `trivium config` knows them by, with the schema of each.
SCHEMAS = {
    "data": "configs.data:DataConfig",
    "pretrain": "configs.train:PretrainConfig",
    "sft": "configs.posttrain:SFTConfig",
    "grpo": "configs.posttrain:GRPOConfig",
    "export": "configs.export:ExportConfig",
}

# An option of every training command: see pretrain/checkpoint/resume.py.
RESUME = (
    "--resume",
    "auto",
    "auto: from the newest whole checkpoint of run.dir, or a new start; no: a new start, refused where run.dir has "
    "checkpoints; or the path of a checkpoint, of this run or of another one like it",
)


def command_parser(
    prog: str, description: str, example: str, schema: type[BaseModel] | None = None
) -> argparse.ArgumentParser:
    """A parser whose `--help` ends with an example that can be copied, and says where a config's keys are explained."""
    epilog = f"example:\n  {example}"
    if schema:
        kind = next(kind for kind, target in SCHEMAS.items() if target == f"{schema.__module__}:{schema.__name__}")
        epilog += f"\n\nevery key of CONFIG:    trivium config --explain {kind}"
        epilog += f"\na CONFIG to begin with: trivium config --new {kind}"
    return argparse.ArgumentParser(
        prog=prog,
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def parse_args(
    schema: type[T],
    argv: Sequence[str] | None,
    prog: str,
    description: str,
    example: str,
    flags: Sequence[tuple[str, str]] = (),
    options: Sequence[tuple[str, str, str]] = (),
    keys: Sequence[tuple[str, str, str]] = (),
) -> tuple[T, argparse.Namespace]:
    """Command line `CONFIG [key=value ...] [--flag ...]` to (validated config, parsed flags).

    `flags` are (name, help) of extra boolean switches; `--dry-run` is always there. `options` take a value: (name,
    default, help). `keys` are options that stand for an override of a key and win over all others: (name, key, help).
    """
    parser = command_parser(prog, description, example, schema)
    parser.add_argument("config", metavar="CONFIG", help="a TOML file, see configs/")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="dotted overrides of its keys")
    parser.add_argument("--dry-run", action="store_true", help="check everything, say what would be done, do nothing")
    for name, text in flags:
        parser.add_argument(name, action="store_true", help=text)
    for name, default, text in options:
        said = f"{text} (default {default})" if default else text
        parser.add_argument(name, default=default, metavar="WHICH", help=said)
    for name, key, text in keys:
        parser.add_argument(name, dest=key, metavar="WHICH", help=f"{text} (the same as {key}=WHICH)")
    args = parser.parse_intermixed_args(argv)
    chosen = [f"{key}={getattr(args, key)}" for _, key, _ in keys if getattr(args, key) is not None]
    return load(schema, args.config, [*args.overrides, *chosen]), args


def entrypoint(
    main: Callable[[Sequence[str] | None], int | None],
    argv: Sequence[str] | None = None,
    speaks: bool = True,
    tell: Callable[[str], None] | None = None,
) -> NoReturn:
    """Runs `main` and exits: 0 done, 1 failed, 2 bad arguments or config, 130 interrupted, or what `main` returns.

    Of many ranks that all find the same mistake in a config, only the one that `speaks` prints it; each gives it to
    `tell`.
    """
    if argv is None:  # this is the process's own command line, and not one that a test calls
        signals.begin(speaks=speaks)
    signals.run()
    try:
        status = main(argv) or 0
    except ConfigError as error:
        if speaks:
            print(f"error: {error}", file=sys.stderr)
        else:
            time.sleep(TURN_SECONDS)
        if tell is not None:
            tell(f"error: {error}")
        status = 2
    except KeyboardInterrupt:
        if speaks:
            print(f"interrupted; {signals.AGAIN}", file=sys.stderr)
        status = signals.INTERRUPTED
    except SystemExit:  # of --help
        signals.flush()
        raise
    except Exception as error:
        signals.let_a_signal_pass()
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            where = f" for {error.filename}" if error.filename else ""
            print(f"error: no space is left on disk{where}; make room, then {signals.AGAIN}", file=sys.stderr)
        elif not (isinstance(error, BrokenPipeError) and signals.nobody_reads()):
            traceback.print_exc()
        status = 1
    signals.exit(status)
