"""Command lines: arguments, `--help` with an example, exit status, and the --resume option of training commands."""

import argparse
import errno
import io
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, TypeVar

from pydantic import BaseModel

from configs import signals
from configs.checkpoint_folders import check_start
from configs.kinds import SCHEMAS
from configs.loader import ConfigError, Failure, load
from configs.memory_errors import lack_of_memory

T = TypeVar("T", bound=BaseModel)

# How long other ranks wait, after a mistake in the config or a fault of files, for rank 0 to print it: when one rank
# ends, a launcher may end all of them at once.
_UNKNOWN_KEYS = 2  # from as many on a config may be another command's
_COMMANDS = {"pretrain": "train", "data": "data run", "recipe": "recipe run", "tokenizer": "tokenizer train"}
TURN_SECONDS = 1.0

# Options of every training command (name, default, help); pretrain/checkpoint/resume.py and pretrain/profiling.py carry
# them out.
RESUME = (
    "--resume",
    "auto",
    "auto: continue from the newest complete checkpoint of run.dir, or start new if it has none; no: start new, an "
    "error if run.dir has checkpoints; or the path of a checkpoint of this run, or of another one like it",
)
PROFILE = (
    "--profile",
    "",
    "steps to profile, such as 10-12: traces of all ranks in run.dir/profile, and a table of the time that each rank "
    "spends on computation, communication, data, the optimizer and nothing",
)
TRAINING_OPTIONS = (RESUME, PROFILE)


def command_parser(
    prog: str, description: str, example: str, schema: type[BaseModel] | None = None
) -> argparse.ArgumentParser:
    """Returns a parser whose `--help` ends with an example and, with `schema`, how to look up the config's keys."""
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
    complete: Callable[[dict[str, Any], argparse.Namespace], dict[str, Any]] = lambda tree, args: tree,
) -> tuple[T, argparse.Namespace]:
    """Parses `CONFIG [key=value ...] [--flag ...]` and returns (validated config, parsed options).

    `flags` are (name, help) of boolean switches; `--dry-run` is always there. `options` are (name, default, help) of
    options with a value. `keys` are (name, key, help) of options that override a config key and win over key=value.
    `complete` may add keys to the config's tree that follow from others. Raises ConfigError if the config is wrong.
    """
    parser = command_parser(prog, description, example, schema)
    parser.add_argument("config", metavar="CONFIG", help="a TOML file; configs/ has examples")
    parser.add_argument(
        "overrides",
        metavar="key=value",
        nargs="*",
        help="overrides of its keys, e.g. train.steps=50; none leaves a key out",
    )
    parser.add_argument("--dry-run", action="store_true", help="check everything, print what would be done, and stop")
    for name, text in flags:
        parser.add_argument(name, action="store_true", help=text)
    for name, default, text in options:
        said = f"{text} (default {default})" if default else text
        parser.add_argument(name, default=default, metavar="WHICH", help=said)
    for name, key, text in keys:
        parser.add_argument(name, dest=key, metavar="WHICH", help=f"{text} (the same as {key}=WHICH)")
    args = parser.parse_intermixed_args(argv)
    chosen = [f"{key}={getattr(args, key)}" for _, key, _ in keys if getattr(args, key) is not None]
    try:
        config = load(schema, args.config, [*args.overrides, *chosen], lambda tree: complete(tree, args))
    except ConfigError as error:
        raise ConfigError(_of_another_kind(schema, args.config, prog, str(error)) or str(error)) from None
    check_start(config.model_dump(include={"run", "init"}), getattr(args, "resume", "auto"))
    return config, args


def _of_another_kind(schema: type[BaseModel], path: str, prog: str, error: str) -> str:
    """Says which command a config is for, if several of its keys are unknown to `schema` and known to another."""
    if error.count("unknown key") < _UNKNOWN_KEYS:
        return ""
    from configs.config_kind import kind_of  # imports this module

    try:
        kind = kind_of(path)
    except ConfigError:
        return ""
    if SCHEMAS[kind] == f"{schema.__module__}:{schema.__name__}":
        return ""
    command = _COMMANDS.get(kind, kind)
    return f"{path} is a config for `trivium {command}`, by its keys, and not for `{prog}`; name another config"


def profiled_steps(chosen: str, steps: int) -> range:
    """Returns the steps, counted from 1, that `--profile` names in a run of `steps` steps; empty for "".

    Raises ConfigError if these are no steps of the run.
    """
    if not chosen:
        return range(0)
    first, dash, last = chosen.partition("-")
    if not (chosen.isascii() and first.isdigit() and (last.isdigit() or not dash)):
        raise ConfigError(
            f"--profile {chosen} names no steps; give the first and the last one, such as --profile "
            f"{max(1, steps - 2)}-{steps}, or one step, such as --profile {steps}"
        )
    begin, end = int(first), int(last or first)
    if not 1 <= begin <= end <= steps:
        raise ConfigError(
            f"--profile {chosen} does not go from an earlier to a later step of 1 to train.steps = {steps}; give "
            f"others, such as --profile {max(1, steps - 2)}-{steps}"
        )
    return range(begin, end + 1)


def entrypoint(
    main: Callable[[Sequence[str] | None], int | None],
    argv: Sequence[str] | None = None,
    prints_errors: bool = True,
    on_error: Callable[[str], None] | None = None,
) -> NoReturn:
    """Runs `main` and exits: 0 done, 1 failed, 2 bad arguments or config, 130 interrupted, or what `main` returns.

    Of many ranks that all find the same mistake in a config, only the one with `prints_errors` prints it; a fault of
    files, which one rank alone may find, is printed by it first, and by the others if they still run. `on_error` is
    called with the message of a ConfigError or Failure on every rank.
    """
    if argv is None:  # called for the process's own command line, not by a test
        signals.begin(prints_errors=prints_errors)
    signals.run()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # Names of files need not be UTF-8, and a terminal may have no character for what is printed.
            stream.reconfigure(errors="backslashreplace")
    try:
        status = main(argv) or 0
    except ConfigError as error:
        if prints_errors:
            print(f"error: {error}", file=sys.stderr)
        else:
            time.sleep(TURN_SECONDS)
        if on_error is not None:
            on_error(f"error: {error}")
        status = 2
    except Failure as error:
        if not prints_errors:
            time.sleep(TURN_SECONDS)
        if prints_errors or not error.of_all_ranks:
            print(f"error: {error}", file=sys.stderr)
        if on_error is not None:
            on_error(f"error: {error}")
        status = 1
    except KeyboardInterrupt:
        status = _interrupted(prints_errors)
    except SystemExit:  # raised by --help
        signals.flush()
        raise
    except Exception as error:
        signals.let_a_signal_pass()
        if signals.was_interrupted():
            signals.exit(_interrupted(prints_errors))
        of_all_ranks = isinstance(error, FloatingPointError)
        if (said := _not_finite(error) or _file_fault(error) or _memory_fault(error)) is not None:
            if of_all_ranks and not prints_errors:
                time.sleep(TURN_SECONDS)
            else:
                print(f"error: {said}", file=sys.stderr)
            if on_error is not None:
                on_error(f"error: {said}")
        elif not (isinstance(error, BrokenPipeError) and signals.nobody_reads()):
            traceback.print_exc()
        status = 1
    signals.exit(status)


def _interrupted(prints_errors: bool) -> int:
    if prints_errors:
        print(f"interrupted; {signals.AGAIN}", file=sys.stderr)
    return signals.INTERRUPTED


def _not_finite(error: Exception) -> str | None:
    """Says why a training run ended at numbers that are not finite, None for other errors.

    A checkpoint from before the end may have weights that no lower rate can save.
    """
    if not isinstance(error, FloatingPointError):
        return None
    more = ", without the newest checkpoint if it ends there again" if "lower optimizer.lr" in str(error) else ""
    return f"{error}{more}"


def _memory_fault(error: Exception) -> str | None:
    """Says that memory is used up, None for other errors; a training run names its settings, see pretrain/run."""
    if (said := lack_of_memory(error)) is None:
        return None
    return f"{said}; end other programs on this machine, or take one with more memory, then {signals.AGAIN}"


def _file_fault(error: Exception) -> str | None:
    """Says in a sentence which file or folder the system keeps from being written or read, None for other errors."""
    if not isinstance(error, OSError):
        return None
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        where = f" for {error.filename}" if error.filename else ""
        return f"no space is left on disk{where}; make room, then {signals.AGAIN}"
    if error.errno == errno.ENAMETOOLONG and error.filename:
        return f"the file system takes no name as long as {error.filename}; give a shorter one"
    if error.errno in (errno.EIO, errno.ESTALE, errno.EFBIG):
        what = error.filename2 or error.filename or "a file"
        return f"{what} cannot be read or written ({error.strerror}); see to its disk, then {signals.AGAIN}"
    if error.errno == errno.EISDIR and error.filename:
        return f"{error.filename2 or error.filename} is a folder, and should be a file; remove or rename it"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS) and error.filename:
        if error.errno == errno.EROFS:
            return f"{error.filename} is on a read-only file system; name another file or folder"
        return f"{error.filename} is closed to this user; name another, or have its permissions changed"
    return None
