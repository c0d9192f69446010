"""Targets of the benchmark: their values in the same run's numbers, and what bounds those that are missed."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from rich.table import Table

from tests.bench.training.contests import OURS, PRODUCTS, Record

BOUNDED = ("ratio", "share_of_products")  # what all but products and attention can lower


@dataclass(frozen=True)
class Target:
    """A least value of a key of those records of Trivium's that `counts` chooses."""

    what: str
    key: str
    wanted: float
    counts: Callable[[Record], bool]


def _dense(one: Record) -> bool:
    return one["contest"].startswith("dense") and one["documents"] == 1


def _compiled(precision: str) -> Callable[[Record], bool]:
    return lambda one: _dense(one) and one["compiled"] and one["precision"] == precision


TARGETS = (
    Target("compiled in bf16, to the best peer", "ratio", 1.2, _compiled("bf16")),
    Target("compiled in bf16, of the rate of products", "share_of_products", 0.85, _compiled("bf16")),
    Target("compiled in fp32, to the best peer", "ratio", 1.05, _compiled("fp32")),
    Target("compiled in fp32, of the rate of products", "share_of_products", 0.90, _compiled("fp32")),
    Target("eager, to the best eager peer", "ratio", 1.1, lambda one: _dense(one) and not one["compiled"]),
    Target("mixture of experts, to Mixtral", "ratio", 3.0, lambda one: one["contest"].startswith("MoE")),
    Target("four documents a row, to one", "of_one_rank_and_document", 1.0, lambda one: one["documents"] > 1),
    Target("two ranks, to one with both cores", "of_one_rank_and_document", 0.95, lambda one: one["ranks"] > 1),
)


def reached(records: list[Record], clock: str) -> Iterator[Record]:
    """Yields what was reached of every target, for each record that it is about.

    `free_rest` is what would be reached if all of the step but products and attention took no time. `longer` is how
    many times as long the step's products take as the same products alone. Both take the shares of a profiled step,
    which is slower, for those of the timed ones.
    """
    for target in TARGETS:
        for one in records:
            if one["who"] != OURS or not target.counts(one) or one.get(target.key) is None:
                continue
            needed = one["shares"]["products"] + one["shares"]["attention"] if one["shares"] else 0.0
            alone = next((p for p in records if (p["contest"], p["who"]) == (one["contest"], PRODUCTS)), None)
            speed = f"tokens_per_{clock}"
            yield {
                "what": target.what,
                "contest": one["contest"],
                "label": one["label"],
                "wanted": target.wanted,
                "reached": one[target.key],
                "met": one[target.key] >= target.wanted,
                "free_rest": round(one[target.key] / needed, 2) if needed and target.key in BOUNDED else None,
                "longer": round(one["shares"]["products"] * alone[speed] / one[speed], 2) if alone and needed else None,
            }


def table_of(found: list[Record]) -> Table:
    table = Table(title="what is to be reached", title_justify="left")
    for name in ("target", "contest", "contender"):
        table.add_column(name)
    for name in ("wanted", "reached", "if all but products and attention were free", "products, to alone"):
        table.add_column(name, justify="right")
    for one in found:
        numbers = [f"{one['wanted']:.2f}", f"{one['reached']:.2f}{'' if one['met'] else ' (missed)'}"]
        numbers += ["" if one[key] is None else f"{one[key]:.2f}" for key in ("free_rest", "longer")]
        table.add_row(one["what"], one["contest"], one["label"], *numbers)
    return table
