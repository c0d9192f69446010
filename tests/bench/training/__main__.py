"""`make bench-train`: tables and JSON of tokens a second beside transformers, plain PyTorch and litgpt.

All contenders of a contest have the same weights, tokens, precision and cores. They take turns, one step each, so that
a slower moment of the machine meets them all alike; what counts is the median step. Contenders' first losses must
agree, or the contest is refused. "of products" relates the floating-point operations of the model, causal attention
counted once, to the rate of the products of its weights alone, which is measured in the same turns. "time in" divides
one step more, under torch's profiler. The second table has what is to be reached, and where it was not, the bounds.
A third table has the peak memory of steps on rows of 8,192 tokens.

litgpt is installed into an environment of its own, beside the results; without a network its contests are left out.

`--quick` is for a machine that others use: small batches, nothing compiled, one core, and what counts is processor
time. Its ratios say whether a change helps; they are no measurement of speed.
"""

import argparse
import datetime
import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table

from configs.files import write_atomic
from tests.bench.environment import NoPeer
from tests.bench.training import contests, memory, targets
from tests.bench.training.contests import LITGPT
from tests.bench.training.litgpt_peer import python_with_litgpt


def table_of(records: list[dict[str, Any]], facts: dict[str, Any]) -> Table:
    about = f"{facts['cpu']}, {facts['cores']} cores, {', '.join(features(facts)) or 'no AVX'}; torch {facts['torch']}"
    by = facts["ratios_by"].replace("_", " ")
    table = Table(title=f"median training step, by {by}; {about}", title_justify="left")
    left = ("contest", "contender", "best peer", "time in")
    middle = ("documents a row", "tokens/s", "of products", "to best peer")
    alike = "to best with fp32 weights"
    for name in (*left[:2], *middle, left[2], alike, "to one rank, one document", left[3]):
        table.add_column(name, justify="left" if name in left else "right")
    speed = f"tokens_per_{facts['ratios_by']}"
    for one in records:
        parts = ", ".join(f"{part} {share:.0%}" for part, share in one["shares"].items() if share >= 0.005)
        numbers = [
            f"{one[speed]:,.0f}",
            _number(one["share_of_products"]),
            _number(one.get("ratio")),
        ]
        whole = _number(one.get("of_one_rank_and_document"))
        alike = _number(one.get("ratio_with_fp32_weights"))
        cells = [one["label"], str(one["documents"]), *numbers, one.get("best_peer") or "", alike, whole, parts]
        table.add_row(one["contest"], *cells)
    return table


def features(facts: dict[str, Any]) -> list[str]:
    """Names those instructions of the machine that decide how fast it multiplies matrices."""
    decide = ("avx2", "avx512_f", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_fp16", "sve", "bf16")
    return [name for name in decide if name in facts["instructions"]]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def machine() -> dict[str, Any]:
    """Returns the facts of this machine that the numbers depend on; `load` shows whether others used its cores."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "cpu": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "instructions": sorted(name for name, has in torch.cpu.get_capabilities().items() if has is True),
        "load": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def precisions() -> list[str]:
    """Returns fp32, and bf16 where the processor has products in bf16."""
    has = torch.cpu.get_capabilities()
    return ["fp32", *(["bf16"] if has.get("avx512_bf16") or has.get("amx_bf16") else [])]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small batches, one core, processor time")
    parser.add_argument("--only", default="", help="run the contests whose names contain this text, such as bf16")
    parser.add_argument("--rounds", type=int, default=5, help="timed steps of each contender (5)")
    parser.add_argument("--out", type=Path, default=Path("runs/bench/train.json"))
    args = parser.parse_args()
    clock, cores = ("cpu_second", 1) if args.quick else ("second", os.cpu_count() or 1)
    every = contests.contests(args.quick, precisions())
    chosen = [contest for contest in every if args.only in contest.name]
    # Memory is measured in the lower precision alone, and not in a quick run: attention over such rows takes long.
    weighed = [] if args.quick else [name for name in precisions()[-1:] if args.only in f"memory {name}"]
    if not chosen and not weighed:
        names = [*(contest.name for contest in every), *([] if args.quick else [f"memory {precisions()[-1]}"])]
        parser.error(f"--only {args.only}: the contests are {', '.join(names)}")
    pythons, left_out = {}, {}
    if any(contest.has(LITGPT) for contest in chosen):
        try:
            pythons[LITGPT] = python_with_litgpt(args.out.parent / "litgpt_environment")
        except NoPeer as error:
            left_out[LITGPT] = str(error)
            print(error, file=sys.stderr, flush=True)
            chosen = [contest for contest in chosen if not contest.has(LITGPT)]
    facts: dict[str, Any] = {**machine(), "quick": args.quick, "ratios_by": clock, "left_out": left_out}
    records: list[dict[str, Any]] = []
    result: dict[str, Any] = {"machine": facts}
    for contest in chosen:
        print(f"{contest.name}: {len(contest.contenders)} contenders", file=sys.stderr, flush=True)
        records += contests.run(contest, args.rounds, cores, pythons)
        contests.compare(records, clock)
        result |= {"records": records, "targets": list(targets.reached(records, clock))}
        write_atomic(args.out, (json.dumps(result, indent=1) + "\n").encode())
    for precision in weighed:
        print(f"memory {precision}", file=sys.stderr, flush=True)
        result["memory"] = list(memory.measure(precision, cores))
        write_atomic(args.out, (json.dumps(result, indent=1) + "\n").encode())
    console = Console(width=200)
    if records:
        console.print(table_of(records, facts))
        console.print(targets.table_of(result["targets"]))
    if weighed:
        console.print(memory.table_of(result["memory"]))


if __name__ == "__main__":
    main()
