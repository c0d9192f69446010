"""`make bench-data`: measures megabytes per second and ratios, as a table and JSON. Needs the extra `bench`.

All steps take about ten minutes with the default sizes, most of it in datatrove. `measure` says what the clocks count.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from tests.bench.data_pipeline import extraction, heuristics, language, minhash, recipe, tokenizing
from tests.bench.data_pipeline import stage_speed as stages
from tests.bench.data_pipeline.measure import Result, machine

_LANGUAGES = ("english", "chinese")


def steps(megabytes: float, folder: Path) -> dict[str, Callable[[], list[Result]]]:
    """Returns, by name, the function that measures each step."""
    return {
        "language": lambda: [language.run(source, megabytes) for source in _LANGUAGES],
        "heuristics": lambda: [heuristics.run(source, megabytes) for source in _LANGUAGES],
        "minhash": lambda: [
            row for source in _LANGUAGES for row in minhash.run(source, megabytes, folder / f"minhash-{source}")
        ],
        "html": lambda: [extraction.run(source, 2 * megabytes) for source in _LANGUAGES],
        "tokenizing": lambda: [
            row for source in _LANGUAGES for row in tokenizing.run(source, megabytes, folder / f"tokens-{source}")
        ],
        "recipe": lambda: [recipe.run(4 * megabytes, folder / "recipe")],
        "stages": lambda: stages.run(),
    }


def table_of(rows: list[Result]) -> Table:
    table = Table(title="MB a CPU second, one core each, this run", title_justify="left")
    for name in ("step", "ours", "peer's", "ratio", "to reach", "peer", "agreement"):
        table.add_column(name, justify="right" if name in ("ours", "peer's", "ratio", "to reach") else "left")
    for row in rows:
        compared = [_number(row.peer_rate, 3), _number(row.ratio, 1), _number(row.wanted, 0)]
        table.add_row(row.step, f"{row.rate:.2f}", *compared, row.peer, row.agreement)
    return table


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--megabytes", type=float, default=2.0, help="of each language; pages twice, the recipe four times"
    )
    parser.add_argument("--steps", default="", help=f"some of {','.join(steps(0, Path()))}; all by default")
    parser.add_argument("--out", type=Path, default=Path("runs/bench/data.json"))
    args = parser.parse_args()
    rows: list[Result] = []
    with tempfile.TemporaryDirectory() as temporary:
        todo = steps(args.megabytes, Path(temporary))
        wanted = args.steps.split(",") if args.steps else list(todo)
        if unknown := sorted(set(wanted) - todo.keys()):
            parser.error(f"--steps {','.join(unknown)}: there are {', '.join(todo)}")
        facts: dict[str, Any] = machine()
        for name in wanted:
            started = time.monotonic()
            rows += todo[name]()
            print(f"{name}: {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
            args.out.parent.mkdir(parents=True, exist_ok=True)
            result = {"machine": facts, "rows": [row.plain() for row in rows]}
            args.out.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    Console(width=180).print(table_of(rows))


if __name__ == "__main__":
    main()
