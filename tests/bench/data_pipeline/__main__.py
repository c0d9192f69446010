"""`make bench-data`: a table and JSON of megabytes a second and ratios. Needs the extra `bench` (spaCy, jieba)."""

import argparse
import json
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tests.bench.data_pipeline import extraction, heuristics, minhash, recipe, tokenizing
from tests.bench.data_pipeline.measure import Result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=float, default=4.0, help="of each language, for the steps on prose")
    parser.add_argument("--out", type=Path, default=Path("runs/bench/data.json"))
    args = parser.parse_args()
    results: list[Result] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for source in ("english", "chinese"):
            results.append(heuristics.run(source, args.megabytes))
            results.extend(minhash.run(source, args.megabytes, folder / f"minhash-{source}"))
            results.append(tokenizing.run(source, args.megabytes, folder / f"tokens-{source}"))
        results.append(extraction.run(args.megabytes))
        results.append(recipe.run(folder / "recipe"))
    table = Table(title="MB a CPU second, one core each, this run", title_justify="left")
    for name in ("step", "ours", "peer's", "ratio", "to reach", "peer", "agreement"):
        table.add_column(name, justify="right" if name in ("ours", "peer's", "ratio", "to reach") else "left")
    for row in results:
        numbers = (f"{row.ours:.2f}", f"{row.theirs:.3f}", f"{row.ratio:.1f}", f"{row.wanted:g}")
        table.add_row(row.step, *numbers, row.peer, row.agreement)
    Console(width=180).print(table)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    rows = [{**vars(row), "ratio": row.ratio} for row in results]
    args.out.write_text(json.dumps(rows, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
