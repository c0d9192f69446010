"""`trivium data trace --step N --run RUN`: prints the documents in one training step's batch, and their sources.

With global batch size G, step n trains on the plan's samples [n * G, (n + 1) * G). If a run changed plan or batch size,
its history.json records from which step on.
"""

import json
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from configs.cli import command_parser, entrypoint
from configs.loader import ConfigError
from data_pipeline.core.console import say, wide_console
from data_pipeline.mixture.earlier import find
from data_pipeline.mixture.rows import Plan
from data_pipeline.provenance.lookup import DataSpan, data_spans


def batch(plan: Plan, data_span: DataSpan, step: int) -> list[dict[str, Any]]:
    """Returns sample and provenance of each segment in a step's rows; raises ConfigError if there is no such step."""
    size = data_span.global_batch_size
    first = data_span.first_sample - plan.first_sample
    steps = (plan.num_samples - first) // size
    sample = first + (step - data_span.first_step) * size
    if not 0 <= step < data_span.first_step + steps:
        raise ConfigError(
            f"--step {step}: the {plan.num_samples:,} rows of {data_span.plan} make steps {data_span.first_step} to "
            f"{data_span.first_step + steps - 1}, {size} each; give one of these steps"
        )
    found = []
    for number in range(sample, sample + size):
        found += [{"sample": number, **segment} for segment in plan.provenance(number)]
    return found


def _plan(data_span: DataSpan, path: Path | None) -> Plan:
    """Opens the plan of a span, at `path` if given; raises ConfigError if it is not found."""
    plan = find(path, data_span.data) if path else data_span.find_plan()
    if plan is None:
        raise ConfigError(
            f"neither {path or data_span.plan} nor a plan kept beside it is the one that the step was trained on, "
            f"which was at {data_span.plan}; name the folder where it is now by --plan"
        )
    return plan


def main(argv: Sequence[str] | None = None) -> int:
    parser = command_parser(
        "trivium data trace",
        "Prints the documents in one training step's batch, and their sources.",
        "trivium data trace --step 40 --run runs/demo/pretrain",
    )
    parser.add_argument("--run", required=True, type=Path, help="a training run's directory")
    parser.add_argument("--step", required=True, type=int, help="number of the step, counted from 0")
    parser.add_argument("--plan", type=Path, help="where the plan is now, if not where the run found it")
    parser.add_argument("--json", action="store_true", help="print one JSON object per segment instead of a table")
    args = parser.parse_args(argv)
    run = data_spans(args.run)
    data_span = next((one for one in reversed(run) if one.first_step <= args.step), run[0])
    size = data_span.global_batch_size
    try:
        found = batch(_plan(data_span, args.plan), data_span, args.step)
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
    say(f"{whole:,} tokens: {shares}", console)
    return 0


if __name__ == "__main__":
    entrypoint(main)
