"""`trivium data what-if CONFIG rule=value ...`: shows in seconds what other thresholds would keep, from scores alone.

Prints, by source, the documents, bytes and tokens that the config and the changed config keep; how many documents break
each rule, and how many break it alone; and the documents nearest to each changed threshold, on both sides. Nothing is
written. Counts are those after the filter stage, since deduplication is not repeated.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from rich.console import Console
from rich.table import Table

from configs.cli import command_parser, entrypoint
from configs.data import DataConfig
from configs.loader import ConfigError, load
from configs.rules import RuleSet
from data_pipeline.core.canary_naming import is_canary
from data_pipeline.core.checked_parquet import columns_in
from data_pipeline.core.console import say, wide_console
from data_pipeline.core.stage import has_finished, read_manifest
from data_pipeline.core.tables import read_table, shards_of
from data_pipeline.scan.scores import definition_of
from data_pipeline.scores.filtering import broken, verdicts

_MARGIN = 3  # documents shown on each side of a threshold
_HEAD_CHARS = 160


@dataclass(frozen=True)
class BoundChange:
    """Change of one bound of rule set `rules` from `before` to `after`; None stands for no bound."""

    rules: str
    score: str
    side: str  # min or max
    before: float | None
    after: float | None


def changes(before: dict[str, RuleSet], after: dict[str, RuleSet]) -> list[BoundChange]:
    """Returns every bound that differs between the rule sets of two configs, which are given by their names.

    Raises ConfigError for a change whose effect does not follow from the scores.
    """
    found = []
    for name in before:
        if definition_of(before[name]) != definition_of(after[name]):
            raise ConfigError(
                f"rules.{name}: a change of splitter, stop words, bad words or form of C4 changes the scores, and "
                "what-if only has those of the last run; change the config and run: trivium data run CONFIG"
            )
        for score in sorted(before[name].bounds().keys() | after[name].bounds().keys()):
            for side in ("min", "max"):
                was, would = (getattr(rules.bounds().get(score), side, None) for rules in (before[name], after[name]))
                if was == would:
                    continue
                if score == "language_score" and not _stricter(side, was, would):
                    raise ConfigError(
                        f"rules.{name}.language_score.{side} = {would} would let in documents that the language stage "
                        "dropped, which have no scores; change the config and run: trivium data run CONFIG"
                    )
                found.append(BoundChange(name, score, side, was, would))
    return found


def _stricter(side: str, was: float | None, would: float | None) -> bool:
    """Tells whether the new bound lets fewer documents pass than the old one."""
    if was is None or would is None:
        return would is not None
    return would > was if side == "min" else would < was


def expanded(overrides: Sequence[str], rules: Sequence[str]) -> list[str]:
    """Expands overrides such as `word_count.min=60` to every rule set; keeps those that name a config section."""
    found = []
    for override in overrides:
        name = override.split(".")[0].split("=")[0]
        if name in RuleSet.model_fields:
            found += [f"rules.{one}.{override}" for one in rules]
        else:
            found.append(override)
    return found


def scores_of(run_dir: Path) -> pa.Table:
    """Reads the score stage's rows without excerpts; leaves canaries out; raises ConfigError if there are none."""
    folder = run_dir / "score"
    shards = [shard for shard in shards_of(folder) if not is_canary(shard)] if has_finished(run_dir, "score") else []
    if not shards:
        raise ConfigError(f"run.dir = {str(run_dir)!r} holds no scores yet; run: trivium data run CONFIG")
    columns = [name for name in columns_in(folder / f"{shards[0]}.parquet") if name != "head"]
    return pa.concat_tables([read_table(folder, shard, columns) for shard in shards])


def head_of(run_dir: Path, row: dict[str, Any]) -> str:
    """Reads the beginning of a document's text, by its row of scores."""
    table = read_table(run_dir / "score", row["shard"], ["row", "head"])
    return table.filter(pc.equal(table["row"], row["row"]))["head"][0].as_py()


def tokens_per_byte(run_dir: Path) -> dict[str, float]:
    """Returns tokens per byte by source, from the run's tokens stage; empty if that is not finished."""
    sources = (read_manifest(run_dir / "tokens") or {"sources": {}})["sources"]
    return {
        name: counts["notes"].get("tokens", 0) / counts["kept"]["bytes"]
        for name, counts in sources.items()
        if counts["kept"]["bytes"]
    }


def compare(table: pa.Table, before: np.ndarray, after: np.ndarray, rates: dict[str, float]) -> Table:
    """Returns a table of kept documents, bytes and tokens by source; `before` and `after` are verdicts by row."""
    shown = Table(title="Kept after the filter stage", title_justify="left")
    for name in ("source", "documents", "would be", "MB", "would be", "tokens (M)", "would be"):
        shown.add_column(name, justify="left" if name == "source" else "right")
    sources = np.array(table["source"].to_pylist(), dtype=object)
    sizes = table["bytes"].to_numpy()
    totals = np.zeros(6)
    known = True
    for source in sorted(set(sources)):
        numbers = []
        for said in (before, after):
            kept = (sources == source) & (said == "")
            size = sizes[kept].sum() / 1e6
            numbers.append((kept.sum(), size, size * rates.get(source, np.nan)))
        row = np.array(numbers).T.ravel()
        known &= bool(np.isfinite(row).all())
        totals += np.nan_to_num(row)
        shown.add_row(source, *_cells(row, source in rates))
    shown.add_section()
    shown.add_row("all", *_cells(totals, known))
    return shown


def _cells(row: np.ndarray, tokens: bool) -> list[str]:
    """Formats numbers of documents, megabytes and, if known, million tokens, each before and after."""
    counts = [f"{row[0]:,.0f}", f"{row[1]:,.0f}", f"{row[2]:,.2f}", f"{row[3]:,.2f}"]
    return [*counts, *((f"{row[4]:,.2f}", f"{row[5]:,.2f}") if tokens else ("not yet", "not yet"))]


def overlap(reasons: dict[str, np.ndarray]) -> Table:
    """Returns a table: documents that break each rule, those that break no other, and the most frequent second rule."""
    shown = Table(title="Rules, as changed", title_justify="left")
    for name in ("rule", "breaks", "alone", "most often with"):
        shown.add_column(name, justify="right" if name in ("breaks", "alone") else "left")
    count = sum((rows.astype(int) for rows in reasons.values()), start=np.zeros(1, int))
    for reason, rows in sorted(reasons.items(), key=lambda item: (-item[1].sum(), item[0])):
        if not rows.any():
            continue
        shared = {other: int((rows & theirs).sum()) for other, theirs in reasons.items() if other != reason}
        partner = max(shared, key=lambda other: (shared[other], other), default="")
        said = f"{partner} ({shared[partner]:,})" if partner and shared[partner] else ""
        shown.add_row(reason, f"{int(rows.sum()):,}", f"{int((rows & (count == 1)).sum()):,}", said)
    return shown


def margin(table: pa.Table, change: BoundChange) -> list[tuple[str, dict[str, Any]]]:
    """Returns ("in" or "out", row) of the documents nearest to a changed threshold, the nearest first on each side."""
    limit = change.after if change.after is not None else change.before
    mine = table.filter(pa.array([name == change.rules for name in table["rules"].to_pylist()]))
    values = mine[change.score].to_numpy()
    outside = values < limit if change.side == "min" else values > limit
    found: list[tuple[str, dict[str, Any]]] = []
    for word, rows in (("in", np.flatnonzero(~outside)), ("out", np.flatnonzero(outside))):
        nearest = rows[np.argsort(np.abs(values[rows] - limit), kind="stable")][:_MARGIN]
        found += [(word, mine.slice(int(row), 1).to_pylist()[0]) for row in nearest]
    return found


def show(config: DataConfig, changed: DataConfig, console: Console) -> None:
    """Prints what `changed` would keep; raises ConfigError if the change affects the scores themselves."""
    run_dir = Path(config.run.dir)
    differing = changes(config.rules, changed.rules)
    if config.scores != changed.scores or config.language != changed.language:
        raise ConfigError(
            "a changed key under scores or language changes the scores, and what-if only has those of the last run; "
            "change the config and run: trivium data run CONFIG"
        )
    table = scores_of(run_dir)
    for change in differing:
        if change.score not in table.column_names:
            raise ConfigError(
                f"rules.{change.rules}.{change.score}: the scores in {run_dir} were made without it; run: trivium data "
                "run CONFIG"
            )
    before, after = verdicts(table, config.rules), verdicts(table, changed.rules)
    console.print(compare(table, before, after, tokens_per_byte(run_dir)))
    console.print(overlap(broken(table, changed.rules)))
    for change in differing:
        title = f"{change.score}.{change.side} of {change.rules}: {change.before} -> {change.after}; nearest to it:"
        say(f"\n{title}", console)
        for word, row in margin(table, change):
            text = " ".join(head_of(run_dir, row).split())[:_HEAD_CHARS]
            say(f"  {word:<3} {row[change.score]:<10.4g} {row['id']}", console)
            say(f"      {text}", console)
    if not differing:
        say("no bound differs from the config's; change one, e.g. word_count.min=100", console)


def main(argv: Sequence[str] | None = None) -> int:
    parser = command_parser(
        "trivium data what-if",
        "Shows what other thresholds would keep, from the scores of a finished run; nothing is written.",
        "trivium data what-if configs/data/demo.toml word_count.min=100 rules.english.dup_5_gram.max=0.1",
        DataConfig,
    )
    parser.add_argument("config", metavar="CONFIG", help="the TOML file of the run")
    parser.add_argument("changes", metavar="rule=value", nargs="*", help="score.min=, score.max=, or any config key")
    args = parser.parse_args(argv)
    config = load(DataConfig, args.config)
    changed = load(DataConfig, args.config, expanded(args.changes, sorted(config.rules)))
    if changed.run.dir != config.run.dir:
        config = load(DataConfig, args.config, [f'run.dir="{changed.run.dir}"'])
    try:
        show(config, changed, wide_console())
    except ConfigError:
        raise
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    entrypoint(main)
