"""`trivium data verify RUN_OR_CONFIG`: verifies the checksum of every file that a data run published.

The argument is a config, the run.dir of a data run, the folder of one of its stages, or the folder of a plan (`trivium
data replan --out FOLDER`); for a plan, its token stores are verified too. Raw input, and whether stages were made with
the config's settings, are not verified: `trivium data run` checks both.
"""

import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from configs.cli import command_parser, entrypoint
from configs.data import DataConfig
from configs.loader import ConfigError, load
from data_pipeline.core.console import say, wide_console
from data_pipeline.core.integrity import STAGE_MANIFEST, DamagedData, Expected, fault, remedy
from data_pipeline.core.stage import expected_files, in_ledger, read_manifest
from data_pipeline.mixture.earlier import USED_BY
from data_pipeline.mixture.rows import PLAN_FILE, Plan, open_plans

_READERS = 4  # files read at a time; hashing releases the interpreter lock
_LINE_SECONDS = 5.0  # between two lines of progress


@dataclass(frozen=True)
class VerifiedPart:
    """Files that are reported together: those of a stage, or the token stores of a plan."""

    name: str
    files: list[Expected]
    faults: list[str]  # sentences on what is wrong already before files are read


def parts_of(folder: Path) -> list[VerifiedPart]:
    """Returns the parts of a folder; raises ConfigError if it is neither a data run nor a plan."""
    own = [_stage_part(folder)] if (folder / STAGE_MANIFEST).is_file() else []
    if (folder / PLAN_FILE).is_file():
        own.append(_plan_part(folder))
    if own:
        return own
    stages = sorted(path.parent for path in folder.glob(f"*/{STAGE_MANIFEST}"))
    if not stages:
        is_training = (folder / "metrics.jsonl").is_file()
        what = "a training run" if is_training else f"no data run: no folder in it has a {STAGE_MANIFEST}"
        raise ConfigError(
            f"{folder} is {what}; name the run.dir of `trivium data run`, its config, or the folder of a plan"
        )
    parts = [_stage_part(stage) for stage in stages]
    named = {stage.name for stage in stages}
    for name in in_ledger(folder) or []:
        if name not in named:
            lost = f"stage {name} ({folder / name}) has no {STAGE_MANIFEST}: run `trivium data run` again"
            parts.append(VerifiedPart(name, [], [lost]))
    return parts


def _stage_part(folder: Path) -> VerifiedPart:
    """Returns the files of a stage, as its manifest lists them; files that are not in the manifest are faults."""
    try:
        manifest = read_manifest(folder)
        assert manifest is not None
        files = expected_files(folder, manifest)
    except DamagedData as error:
        return VerifiedPart(folder.name, [], [str(error)])
    except (KeyError, TypeError, AttributeError):
        return VerifiedPart(
            folder.name, [], [f"{folder / STAGE_MANIFEST} lists no files; {remedy(folder / STAGE_MANIFEST)}"]
        )
    known = {file.path for file in files} | {folder / STAGE_MANIFEST}
    known |= {path for path in folder.rglob(USED_BY)}  # written by training runs
    strays = [path for path in sorted(folder.rglob("*")) if path.is_file() and path not in known]
    faults = [f"{path} is not a file of the stage {folder.name}; move it elsewhere" for path in strays]
    if folder.name == "plan":
        faults += _other_tokens(folder)
    return VerifiedPart(folder.name, files, faults)


def _other_tokens(folder: Path) -> Iterator[str]:
    """Yields a sentence for each file of a token store that is no longer the one that a plan was made of."""
    try:
        manifest = read_manifest(folder.parent / "tokens") or {"files": {}}
        now = {file.path.resolve(): file.sha256 for file in expected_files(folder.parent / "tokens", manifest)}
        for plan in open_plans(folder).values():
            for file in plan.store_files():
                if now.get(file.path.resolve(), file.sha256) not in (file.sha256, None):
                    yield f"{file.title} is not the one that {plan.path} was made of; {remedy(folder / PLAN_FILE)}"
    except (ValueError, KeyError, OSError) as error:
        yield str(error)


def _plan_part(folder: Path) -> VerifiedPart:
    """Returns the files of the token stores that a plan reads; opening the plan verifies its own files."""
    try:
        return VerifiedPart("token stores", Plan.open(folder).store_files(), [])
    except ValueError as error:
        return VerifiedPart("token stores", [], [str(error)])


class ReadProgress:
    """Prints every _LINE_SECONDS how many bytes have been read."""

    def __init__(self, name: str, total: int, console: Console) -> None:
        self._name, self._total, self._console = name, total, console
        self._done, self._said = 0, time.monotonic()
        self._lock = threading.Lock()

    def advance(self, size: int) -> None:
        """Adds to the bytes read; may be called from several threads."""
        with self._lock:
            self._done += size
            if time.monotonic() - self._said < _LINE_SECONDS:
                return
            self._said = time.monotonic()
        say(f"{self._name}: {self._done / 1e9:.1f} of {self._total / 1e9:.1f} GB read", self._console)


def verify(part: VerifiedPart, console: Console) -> list[str]:
    """Reads the files of a part, prints one line on it, and returns a sentence for each fault."""
    progress = ReadProgress(part.name, sum(file.size or 0 for file in part.files), console)

    def look(file: Expected) -> str:
        wrong = fault(file, progress.advance)
        return f"{file.title} ({file.path}) {wrong}; {remedy(file.path)}" if wrong else ""

    with ThreadPoolExecutor(_READERS) as readers:
        faults = [*part.faults, *(sentence for sentence in readers.map(look, part.files) if sentence)]
    unknown = sum(file.sha256 is None for file in part.files)
    how = f"{len(faults)} damaged" if faults else "as written"
    beside = f" ({unknown} of an earlier version, by their size alone)" if unknown else ""
    size = sum(file.size or 0 for file in part.files)
    counted = f"{part.name:<13} {len(part.files):>6,} files {size / 1e6:>12,.1f} MB"
    say(f"{counted}  {how}{beside}", console)
    return faults


def main(argv: Sequence[str] | None = None) -> int:
    parser = command_parser(
        "trivium data verify",
        "Verifies the checksums of all files that a data run published: texts, tables, token stores, plans.",
        "trivium data verify runs/demo/data\n  trivium data verify configs/data/demo.toml",
    )
    parser.add_argument(
        "run", metavar="RUN_OR_CONFIG", help="the run.dir of a data run, its config, or a plan's folder"
    )
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="dotted overrides of the config's keys")
    args = parser.parse_args(argv)
    folder = _folder(args.run, args.overrides)
    console = wide_console()
    faults: list[str] = []
    for part in parts_of(folder):
        faults += verify(part, console)
    if not faults:
        say(f"{folder}: everything is as it was written", console)
        return 0
    for sentence in faults:
        print(f"damaged: {sentence}", file=sys.stderr)
    return 1


def _folder(run: str, overrides: Any) -> Path:
    """Returns the folder to verify, from the command line; raises ConfigError if it does not exist."""
    path = Path(run)
    if path.is_dir():
        if overrides:
            raise ConfigError(
                f"overrides such as {overrides[0]} belong to a config, and {run} is a folder; leave them out"
            )
        return path
    folder = Path(load(DataConfig, path, overrides).run.dir)
    if not folder.is_dir():
        raise ConfigError(f"run.dir = {str(folder)!r} of {run} does not exist; run: trivium data run {run}")
    return folder


if __name__ == "__main__":
    entrypoint(main)
