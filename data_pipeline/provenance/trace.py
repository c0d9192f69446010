"""`trivium data trace --step N --run RUN`: the documents in one training step's batch, and their sources.

Step s trains on samples [s * G, (s + 1) * G) of the plan, G the global batch size of the run.
"""

import json
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from configs.loader import ConfigError, command_parser, entrypoint
from data_pipeline.provenance.lookup import global_batch_size, plan_of
from data_pipeline.report import wide_console
from data_pipeline.rows import Plan


def batch(plan: Plan, step: int, size: int) -> list[dict[str, Any]]:
    """What each segment of the step's rows is, `sample` among it. Errors: ConfigError for a step without rows."""
    steps = plan.num_samples // size
    if not 0 <= step < steps:
        raise ConfigError(
            f"--step {step}: the plan's {plan.num_samples:,} rows make steps 0 to {steps - 1}, {size} each"
        )
    found = []
    for sample in range(step * size, (step + 1) * size):
        found += [{"sample": sample, **segment} for segment in plan.provenance(sample)]
    return found


def main(argv: Sequence[str] | None = None) -> int:
    parser = command_parser(
        "trivium data trace",
        "The documents in one training step's batch, and their sources.",
        "trivium data trace --step 40 --run runs/demo/pretrain",
    )
    parser.add_argument("--run", required=True, type=Path, help="a training run's directory")
    parser.add_argument("--step", required=True, type=int, help="from 0")
    parser.add_argument("--plan", type=Path, help="where the plan is now, if not where the run's config says")
    parser.add_argument("--json", action="store_true", help="one JSON object a segment instead of a table")
    args = parser.parse_args(argv)
    size = global_batch_size(args.run)
    try:
        found = batch(Plan.open(args.plan or plan_of(args.run)), args.step, size)
    except ConfigError:
        raise
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if args.json:
        for segment in found:
            print(json.dumps(segment, ensure_ascii=False))
        return 0
    console = wide_console()
    table = Table(title=f"Step {args.step} of {args.run}: {size} rows", title_justify="left")
    for name in ("sample", "source", "document", "tokens", "store"):
        table.add_column(name, justify="right" if name == "sample" else "left")
    for segment in found:
        span = f"{segment['start']:,} to {segment['start'] + segment['length']:,}"
        store = f"{segment['shard']}, document {segment['document']}"
        table.add_row(str(segment["sample"]), segment["source"], segment["document_id"], span, store)
    console.print(table)
    tokens = Counter[str]()
    for segment in found:
        tokens[segment["source"]] += segment["length"]
    whole = sum(tokens.values())
    shares = ", ".join(f"{source} {count:,} ({count / whole:.1%})" for source, count in tokens.most_common())
    console.print(f"{whole:,} tokens: {shares}", highlight=False)
    return 0


if __name__ == "__main__":
    entrypoint(main)
