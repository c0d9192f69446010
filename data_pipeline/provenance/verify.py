"""`trivium data verify RUN_OR_CONFIG`: holds every file that a data run published against its checksum.

RUN is the run.dir of a data run, the folder of one of its stages, or that of a plan (`trivium data replan --out
FOLDER`), of which the token stores are read too. Leaves out raw input and whether a stage's settings are those of the
config: the run looks at both.
"""

import json
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
from data_pipeline.core.console import wide_console
from data_pipeline.core.integrity import STAGE_MANIFEST, DamagedData, Expected, fault, remedy
from data_pipeline.core.stage import expected_files, read_manifest
from data_pipeline.mixture.earlier import USED_BY
from data_pipeline.mixture.rows import PLAN_FILE, Plan, open_plans

_READERS = 4  # files read at a time; hashing lets other threads run
_LINE_SECONDS = 5.0


@dataclass(frozen=True)
class VerifiedPart:
    """Files that are told of together: those of a stage, or a plan's token stores."""

    name: str
    files: list[Expected]
    faults: list[str]  # what is wrong before any file is read


def parts_of(folder: Path) -> list[VerifiedPart]:
    """What there is to verify. Errors: ConfigError for a folder that is neither a data run nor a plan."""
    own = [_stage_part(folder)] if (folder / STAGE_MANIFEST).is_file() else []
    if (folder / PLAN_FILE).is_file():
        own.append(_plan_part(folder))
    if own:
        return own
    stages = sorted(path.parent for path in folder.glob(f"*/{STAGE_MANIFEST}"))
    if not stages:
        where = "a training run; name its data run" if (folder / "metrics.jsonl").is_file() else "no data run"
        raise ConfigError(
            f"{folder} is {where}: no folder in it has a {STAGE_MANIFEST}; name the run.dir of `trivium data run`, its "
            "config, or the folder of a plan"
        )
    parts = [_stage_part(stage) for stage in stages]
    named = {stage.name for stage in stages}
    for name in _in_ledger(folder):
        if name not in named:
            lost = f"stage {name} ({folder / name}) has no {STAGE_MANIFEST}: run `trivium data run` again"
            parts.append(VerifiedPart(name, [], [lost]))
    return parts


def _stage_part(folder: Path) -> VerifiedPart:
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
    """Token stores that a run's plans name and that are no longer those that the plans were made of."""
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
    try:
        return VerifiedPart("token stores", Plan.open(folder).store_files(), [])
    except ValueError as error:
        return VerifiedPart("token stores", [], [str(error)])


def _in_ledger(folder: Path) -> list[str]:
    path = folder / "ledger.json"
    try:
        return [stage["name"] for stage in json.loads(path.read_text(encoding="utf-8"))["stages"]]
    except (OSError, ValueError, KeyError, TypeError):
        return []  # the ledger is printed, and nothing is made of it


class ReadProgress:
    """Says every few seconds how many bytes have been read."""

    def __init__(self, name: str, total: int, console: Console) -> None:
        self._name, self._total, self._console = name, total, console
        self._done, self._said = 0, time.monotonic()
        self._lock = threading.Lock()

    def advance(self, size: int) -> None:
        with self._lock:
            self._done += size
            if time.monotonic() - self._said < _LINE_SECONDS:
                return
            self._said = time.monotonic()
        self._console.print(
            f"{self._name}: {self._done / 1e9:.1f} of {self._total / 1e9:.1f} GB read", highlight=False, soft_wrap=True
        )


def verify(part: VerifiedPart, console: Console) -> list[str]:
    """Reads the files of a part and says what became of it. Returns a sentence for each that is damaged."""
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
    console.print(f"{counted}  {how}{beside}", highlight=False, soft_wrap=True)
    return faults


def main(argv: Sequence[str] | None = None) -> int:
    parser = command_parser(
        "trivium data verify",
        "Holds all that a data run published against its checksums: texts, tables, token stores, plans.",
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
        console.print(f"{folder}: everything is as it was written", highlight=False, markup=False, soft_wrap=True)
        return 0
    for sentence in faults:
        print(f"damaged: {sentence}", file=sys.stderr)
    return 1


def _folder(run: str, overrides: Any) -> Path:
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
