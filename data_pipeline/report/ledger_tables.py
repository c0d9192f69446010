"""`trivium data report CONFIG`: prints what a data run kept and dropped, and writes it as an HTML page (`report_page`).

The printed tables come from the ledger and the samples alone. `trivium data explain` follows a single document.
"""

import itertools
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from configs.cli import entrypoint, parse_args
from configs.data import DataConfig
from configs.folders import check_can_hold
from configs.loader import ConfigError, load
from data_pipeline.core.canary_naming import is_canary
from data_pipeline.core.console import say, wide_console
from data_pipeline.core.stage import LEDGER
from data_pipeline.report.report_page import write

_SAMPLE_CHARS = 160
_SAMPLES = 2  # documents printed from each file of samples
_NARROW = 120  # columns; in a narrower console the table would break the words of its last two columns


def print_ledger(ledger: dict[str, Any], run_dir: Path, console: Console) -> None:
    """Prints the table of stages: documents in, kept and dropped, bytes, time, reasons, and where to look.

    In a narrow console the last two follow below the table.
    """
    table, narrow = Table(title=f"Data run in {run_dir}", title_justify="left"), console.width < _NARROW
    for name in ("stage", "in", "kept", "dropped", "MB kept", "seconds"):
        table.add_column(name, justify="left" if name == "stage" else "right", overflow="fold")
    if not narrow:
        table.add_column("most dropped for", overflow="fold")
        table.add_column("where to look", overflow="fold")
    below = []
    for stage in ledger["stages"]:
        total = stage["total"]
        dropped = {reason: amount["documents"] for reason, amount in total["dropped"].items()}
        top = sorted(
            ((reason, count) for reason, count in dropped.items() if count), key=lambda item: (-item[1], item[0])
        )
        parts = {reason: amount["bytes"] for reason, amount in total["dropped"].items() if not amount["documents"]}
        notes = [f"({name}: {count:,})" for name, count in total["notes"].items()]
        reasons = ", ".join(
            [
                *(f"{reason} {count:,}" for reason, count in top[:3]),
                *(f"{reason} {size:,} bytes" for reason, size in parts.items()),
                *notes,
            ]
        )
        if narrow and reasons:
            below.append(f"{stage['name']}: {reasons}; look at {stage['where']}")
        table.add_row(
            stage["name"],
            f"{total['in']['documents']:,}",
            f"{total['kept']['documents']:,}",
            f"{sum(dropped.values()):,}",
            f"{total['passed_on']['bytes'] / 1e6:.2f}",
            f"{stage['seconds']:.1f}" + ("" if stage["fresh"] else " (kept)"),
            *([] if narrow else [reasons, stage["where"]]),
        )
    console.print(table)
    for line in below:
        console.print(line, highlight=False, markup=False)


def print_drops(run_dir: Path, stages: Sequence[str], console: Console) -> None:
    """Prints a few of the dropped documents of each stage and reason, and of the broken records."""
    found = [path for stage in stages for path in (run_dir / stage).glob("[dr]*/*.jsonl")]
    for path in sorted(path for path in found if path.parent.name in ("drops", "rejected")):
        with path.open(encoding="utf-8") as lines:
            documents = (one for one in map(json.loads, lines) if not is_canary(one.get("source") or path.stem[:-5]))
            samples = list(itertools.islice(documents, _SAMPLES))
        if not samples:
            continue
        console.print(f"\n[bold]{path}[/bold]", soft_wrap=True)
        for sample in samples:
            reason = sample.get("verdict") or sample.get("reason")
            text = " ".join((sample.get("head") or sample.get("sample") or sample.get("context") or "").split())[
                :_SAMPLE_CHARS
            ]
            say(f"  {reason}  {sample['id']}", console)
            say(f"    {text}", console)


def read_ledger(run_dir: Path) -> dict[str, Any]:
    """Reads the ledger of a data run; raises ValueError if it is missing or damaged."""
    path = run_dir / LEDGER
    if not path.is_file():
        raise ValueError(f"{path} does not exist: no data run has finished in {run_dir}; run: trivium data run CONFIG")
    try:
        ledger = json.loads(path.read_text(encoding="utf-8"))
        if not ledger["stages"]:
            raise LookupError
        return ledger
    except LookupError:
        raise ValueError(f"{path} lists no finished stage; run: trivium data run CONFIG") from None
    except ValueError as error:
        raise ValueError(
            f"{path} is damaged ({error}); run `trivium data run CONFIG` again, which rewrites it"
        ) from None


def main(argv: Sequence[str] | None = None) -> int:
    config, args = parse_args(
        DataConfig,
        argv,
        prog="trivium data report",
        description="Prints what a data run kept and dropped, with samples, and writes report.html to its run.dir.",
        example="trivium data report configs/data/demo.toml",
    )
    run_dir, console = Path(config.run.dir), wide_console()
    try:
        ledger = read_ledger(run_dir)
        if args.dry_run:
            console.print(f"would report on {run_dir}, {len(ledger['stages'])} stages", soft_wrap=True)
            return 0
        print_ledger(ledger, run_dir, console)
        print_drops(run_dir, [stage["name"] for stage in ledger["stages"]], console)
        check_can_hold(run_dir, "report.html")
        # The config of the run itself: the thresholds in the file may have changed since.
        page = write(load(DataConfig, run_dir / "config.toml"), run_dir, ledger)
    except ConfigError:
        raise
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for alarm in ledger["alarms"]:
        say(f"alarm: {alarm}", console)
    say(f"page: {page}", console)
    return 0


if __name__ == "__main__":
    entrypoint(main)
