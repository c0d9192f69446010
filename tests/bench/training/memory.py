"""Peak memory of two training steps on rows of 8,192 tokens, of one document and of four, beside transformers.

It is that of the whole process with its libraries, some 0.4 GiB of it, and does not depend on how busy the machine is.
"""

import sys
from collections.abc import Iterator

from rich.table import Table

from tests.bench.training.contenders import Contender
from tests.bench.training.contests import DOCUMENTS, OURS, Record, Running

SIZE, STEPS = "34M, 8k", 2  # moments of a peer's optimizer are made in the first


def measure(precision: str, cores: int) -> Iterator[Record]:
    """Yields the peak of each contender and kind of row, each in a process of its own."""
    for who in (OURS, "transformers"):
        for documents in DOCUMENTS:
            contender = Contender(who, SIZE, precision)
            print(f"  {contender.label}, {documents} documents a row", file=sys.stderr, flush=True)
            running = Running(contender, cores, sys.executable)
            try:
                (answer,) = [running.ask("step", documents) for _ in range(STEPS)][-1]
            finally:
                running.close()
            names = {"label": contender.label, "size": contender.size, "precision": precision, "documents": documents}
            yield {**names, "peak_gib": round(answer["peak_bytes"] / 2**30, 2)}


def table_of(records: list[Record]) -> Table:
    title = f"peak memory of a process, rows of 8,192 tokens, {records[0]['size']}, {records[0]['precision']}"
    table = Table(title=title, title_justify="left")
    for name in ("contender", "documents a row", "GiB"):
        table.add_column(name, justify="left" if name == "contender" else "right")
    for one in records:
        table.add_row(one["label"], str(one["documents"]), f"{one['peak_gib']:.2f}")
    return table
