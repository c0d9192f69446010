"""`make bench-rl`: tokens a second of rollouts beside transformers, and what GRPO and PPO learn on tiny tasks.

Learning starts from the demo's fine-tuned model (`make demo` first); `--rollouts` measures sampling alone.
"""

import argparse
import json
from pathlib import Path

from rich.console import Console
from rich.table import Table

from configs.files import write_atomic
from tests.bench.rl.learning import SEEDS, STEPS, learned
from tests.bench.rl.rollouts import measured
from tests.bench.training.__main__ import machine


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rollouts", action="store_true", help="measure sampling alone")
    parser.add_argument("--size", default="5M", help="the model of the rollouts (5M)")
    parser.add_argument("--rounds", type=int, default=3, help="timed batches of each side (3)")
    parser.add_argument("--base", type=Path, default=Path("runs/demo/sft"), help="the fine-tuned run to start from")
    parser.add_argument("--out", type=Path, default=Path("runs/bench/rl.json"))
    args = parser.parse_args()
    found = {"machine": machine(), "rollouts": measured(args.size, args.rounds), "learning": []}
    console = Console()
    table = Table("who", "tokens/s", "ratio", title="sampling 64 texts in groups of 8", title_justify="left")
    for one in found["rollouts"]:
        table.add_row(one["who"], f"{one['tokens_per_second']:,.0f}", f"{one['ratio']:.2f}")
    console.print(table)
    if not args.rollouts:
        found["learning"] = [learned(t, seed, args.base, args.out.parent / "rl") for t in STEPS for seed in SEEDS]
        table = Table("task", "seed", "before", "after", "seconds", title="answered right, sampled")
        for one in found["learning"]:
            table.add_row(one["task"], str(one["seed"]), f"{one['before']}", f"{one['after']}", f"{one['seconds']}")
        console.print(table)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(args.out, json.dumps(found, indent=1).encode())


if __name__ == "__main__":
    main()
