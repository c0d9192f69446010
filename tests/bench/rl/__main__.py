"""`make bench-rl`: rollouts beside transformers, what methods learn on tiny tasks, and steps beside TRL.

It starts from the demo's models (`make demo` first) and takes some 50 minutes on two cores, of which countdown takes
half. `make bench-rl PART="sort dpo"` runs some parts, and `SEEDS=1` trains once where three seeds are the rule; the
JSON keeps what other parts found before.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from configs.files import write_atomic
from tests.bench.rl import learning, peer, rollouts
from tests.bench.training.__main__ import machine

# Minutes that each part takes on two cores, for whoever waits; those of `SEEDED` with three seeds.
MINUTES = {"rollouts": 4, "sort": 6, "countdown": 25, "ppo": 3, "dpo": 1, "rm": 2, "lora": 4, "trl": 5}
SEEDED = ("sort", "countdown")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--parts", nargs="+", choices=list(MINUTES), default=list(MINUTES), help="the parts to run (all)"
    )
    parser.add_argument(
        "--seeds", nargs="+", type=int, default=list(learning.SEEDS), help="the seeds of sort and countdown (1 2 3)"
    )
    parser.add_argument("--rounds", type=int, default=5, help="timed batches of each side in rollouts (5)")
    parser.add_argument("--quick", action="store_true", help="rollouts by processor time, one thread a side")
    parser.add_argument("--base", type=Path, default=Path("runs/demo"), help="the demo's runs (runs/demo)")
    parser.add_argument("--out", type=Path, default=Path("runs/bench/rl.json"), help="the file for all results")
    args = parser.parse_args()
    base = args.base.absolute()
    folder = (args.out.parent / "rl").absolute()
    runs = learning.Runs(folder, base / "pretrain", base / "sft", tuple(args.seeds))
    if args.parts != ["rollouts"] and not (runs.pretrained.exists() and runs.fine_tuned.exists()):
        sys.exit(
            f"{base} has no runs pretrain and sft to start from; run `make demo` first, or name another with --base"
        )
    folder.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = json.loads(args.out.read_text()) if args.out.exists() else {}
    console = Console()
    console.print(
        f"parts: {', '.join(args.parts)}; some {sum(_minutes(part, args.seeds) for part in args.parts)} minutes"
    )
    for part in args.parts:
        started = time.perf_counter()

        def said(what: str, part: str = part, started: float = started) -> None:
            console.print(f"[{time.strftime('%H:%M:%S')}] {part}: {what} ({time.perf_counter() - started:.0f} s)")

        said(f"begins, some {_minutes(part, args.seeds)} minutes")
        records = _records(part, runs, args, said)
        found[part] = {"machine": machine(), "seconds": round(time.perf_counter() - started, 1), "records": records}
        write_atomic(args.out, json.dumps(found, indent=1).encode())
        console.print(_table(part, records))
    wanted = [one for part in args.parts for one in found[part]["records"] if one.get("wanted")]
    console.print(f"{sum(one['met'] for one in wanted)} of {len(wanted)} targets met; all results are in {args.out}")


def _minutes(part: str, seeds: list[int]) -> int:
    share = len(seeds) / len(learning.SEEDS) if part in SEEDED else 1
    return max(1, round(MINUTES[part] * share))


def _records(
    part: str, runs: learning.Runs, args: argparse.Namespace, said: Callable[[str], None]
) -> list[dict[str, Any]]:
    records = []
    try:
        if part == "rollouts":
            found = rollouts.measured(args.rounds, args.quick)
        else:
            found = peer.contest(runs) if part == "trl" else learning.PARTS[part](runs)
        for record in found:
            said(", ".join(f"{name} {value}" for name, value in record.items()))
            records.append(record)
    except peer.NoPeer as error:
        said(str(error))
        records.append({"what": str(error), "wanted": "", "met": True})
    return records


def _table(part: str, records: list[dict[str, Any]]) -> Table:
    columns = [name for name in records[0] if name not in ("met", "wanted", "load")]
    table = Table(*columns, "wanted", title=part, title_justify="left")
    for one in records:
        goal = one.get("wanted", "")
        cells = [str(one.get(name, "")) for name in columns]
        table.add_row(*cells, goal and f"{goal}: {'met' if one['met'] else 'not met'}")
    return table


if __name__ == "__main__":
    main()
