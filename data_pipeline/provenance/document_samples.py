"""`trivium data sample CONFIG --stage STAGE`: prints random documents that a stage dropped, cut or kept.

Each is printed with its source, its id, the reason (the score and its bound, the duplicate kept in its place, the
evaluation item) and its text, or the cuts in their context. Documents are drawn by hash, so that a seed always draws
the same ones. In texts, personal data, keys and tokens are replaced by their kind. Nothing is written. `trivium data
explain` prints everything about a single document.
"""

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console

from configs.cli import entrypoint, parse_args
from configs.data import DataConfig
from configs.loader import ConfigError, load
from configs.rules import RuleSet
from data_pipeline.core.canary_naming import is_canary
from data_pipeline.core.console import say, wide_console
from data_pipeline.core.shards import read_records, shard_path, shards_under
from data_pipeline.core.stage import has_finished, read_manifest
from data_pipeline.core.tables import TABLE_STAGES, read_table, shards_of
from data_pipeline.cutting.cuts import FOLDER as CUTS
from data_pipeline.cutting.decontamination import FOLDER as MATCHES
from data_pipeline.provenance.excerpts import excerpt, piece, texts
from data_pipeline.provenance.smallest import Row, Smallest

_CUTS_SHOWN = 3  # cuts of one document
_NEAREST = 3  # scores shown of a kept document: those nearest to their bounds
_STAGES = ("extract", *TABLE_STAGES, "documents")


def candidates(run_dir: Path, stage: str, reason: str, kept: bool) -> Iterator[Row]:
    """Yields the documents that a stage dropped or cut, only for `reason` if given; with `kept`, those it kept."""
    if stage == "extract" and not kept:
        yield from _lines(run_dir, stage, reason)
    elif stage == "documents":
        yield from _published(run_dir) if kept else _lines(run_dir, stage, reason)
    else:
        folder = run_dir / ("language" if stage == "extract" else stage)
        for shard in (shard for shard in shards_of(folder) if not is_canary(shard)):
            cuts: dict[int, list[Row]] = {}
            if (folder / CUTS / f"{shard}.parquet").is_file() and not kept:
                for cut in read_table(folder / CUTS, shard).to_pylist():
                    if not reason or cut["reason"] == reason:
                        cuts.setdefault(cut["row"], []).append(cut)
            for row in read_table(folder, shard).to_pylist():
                fits = row["verdict"] == reason if reason else bool(row["verdict"])
                if (not row["verdict"] or stage == "extract") if kept else fits or row["row"] in cuts:
                    yield row | {"shard": shard, "cut": cuts.get(row["row"], [])}


def _lines(run_dir: Path, stage: str, reason: str) -> Iterator[Row]:
    """Yields rows from the JSONL files of a stage without tables: all broken records, and samples of other drops."""
    for path in sorted([*run_dir.glob(f"{stage}/rejected/*.jsonl"), *run_dir.glob(f"{stage}/drops/*.jsonl")]):
        with path.open(encoding="utf-8") as lines:
            for row in map(json.loads, lines):
                row.setdefault("source", path.stem.rpartition("-")[0])
                row["verdict"] = row.get("verdict") or row["reason"]
                if not is_canary(row["source"]) and reason in ("", row["verdict"]):
                    yield row


def _published(run_dir: Path) -> Iterator[Row]:
    """Yields the documents that the documents stage published, with their texts."""
    for shard in shards_under(run_dir / "documents"):
        source = shard.split("/")[1]
        for document in read_records(shard_path(run_dir / "documents", shard)):
            facts = {"source": source, "id": document["id"], "verdict": ""}
            yield facts | {"text": document["text"], "bytes": len(document["text"].encode())}


def draw(found: Iterator[Row], count: int, source: str, seed: str) -> list[Row]:
    """Draws up to `count` of the rows, only of `source` if given."""
    drawn = Smallest(count, seed)
    for row in found:
        if source in ("", row["source"]):
            drawn.offer(row)
    return drawn.rows()


def reasons(run_dir: Path, stage: str, row: Row, rules: dict[str, RuleSet]) -> list[str]:
    """Returns the lines that explain why a stage dropped, cut or kept a document."""
    said = [row["verdict"] and f"dropped for {row['verdict']}"]
    if row.get("cut"):
        size = sum(cut["end"] - cut["start"] for cut in row["cut"])
        said.append(f"{len(row['cut'])} {'cut' if len(row['cut']) == 1 else 'cuts'}, {size:,} bytes")
    for reason, size in row.get("cut_bytes", {}).items() if stage == "documents" else ():
        said.append(f"{size:,} bytes cut for {reason}")
    if stage == "language":
        said.append(f"{row['language']}, {row['language_score']:.3f}")
    if stage == "filter":
        said += _bounds(run_dir, row, rules)
    if stage == "dedup" and row["cluster_size"] > 1:
        said.append(f"in a cluster of {row['cluster_size']:,}")
    if stage == "dedup" and row["verdict"] and row["survivor"]:
        whose = " of an earlier run" if row["verdict"] == "in_index" else ""
        said.append(f"{row['survivor']}{whose} is kept in its place")
    if stage == "decontaminate" and row["items"]:
        table = read_table(run_dir / stage / MATCHES, row["shard"])
        for match in table.to_pylist():
            if match["row"] == row["row"]:
                said.append(f"{match['ngrams']} n-grams of {match['item']} in {match['file']}: {match['context']}")
                break
    if stage == "extract" and "file" in row:
        said.append(f"{row['file']}, at {row['position']}, byte {row['offset']:,}")
    return [line for line in said if line]


def _bounds(run_dir: Path, row: Row, rules: dict[str, RuleSet]) -> list[str]:
    """Describes the score whose bound a dropped document broke, or the scores of a kept one nearest to their bounds."""
    scores = next(one for one in read_table(run_dir / "score", row["shard"]).to_pylist() if one["row"] == row["row"])
    bounds = rules[scores["rules"]].bounds()
    broken = row["verdict"].rpartition("_")[0]
    found = []
    for name, bound in bounds.items():
        value = scores.get(name)
        if value is not None and broken in ("", name):
            sides = [(word, limit) for word, limit in (("least", bound.min), ("most", bound.max)) if limit is not None]
            margin = min(abs(value - limit) / (abs(limit) or 1) for _, limit in sides)
            limits = " and ".join(f"at {word} {limit:g}" for word, limit in sides)
            found.append((margin, f"{name} {value:.5g}, {limits} in {scores['rules']}"))
    return [line for _, line in sorted(found)[:_NEAREST]]


def shown(run_dir: Path, row: Row, chars: int) -> list[str]:
    """Returns the beginning of a document's text, or its first cuts in their context; masked."""
    if "shard" in row:
        ((_, text),) = texts(run_dir, row["shard"], {row["row"]})
        if row.get("cut"):
            more = len(row["cut"]) - _CUTS_SHOWN
            cuts = [str(excerpt(text, cut, longest=chars)) for cut in row["cut"][:_CUTS_SHOWN]]
            return cuts + ([f"... and {more} more"] if more > 0 else [])
        row = row | {"text": text}
    text = row.get("text") or row.get("sample") or ""
    return [piece(text, 0, chars) + (" ..." if len(text) > chars else "")]


def show(
    run_dir: Path, stage: str, rows: Sequence[Row], rules: dict[str, RuleSet], chars: int, console: Console
) -> None:
    """Prints documents with reasons and texts."""
    for row in rows:
        size = f"  {row['bytes']:,} bytes" if "bytes" in row else ""
        _say(console, f"\n{row['source']}  {row['id']}{size}")
        for line in reasons(run_dir, stage, row, rules):
            _say(console, f"  {line}")
        for part in shown(run_dir, row, chars):
            _say(console, "\n".join(f"    {line}" for line in part.splitlines() if line.strip()))


def _say(console: Console, line: str) -> None:
    say(line, console)


def _switched_off(config: DataConfig, stage: str) -> str:
    """Returns how to switch on a stage that the config has switched off; "" for a stage that is on."""
    if stage == "web_lines":
        cuts = any(rules.drop_lines for rules in config.rules.values())
        return "" if cuts else 'give a rule set drop_lines = ["c4"] or ["refinedweb"]'
    section = getattr(config, stage, True)  # stages that are always on have none, or one that cannot be left out
    if section is None:
        return f"add a section [{stage}]"
    return "" if getattr(section, "enabled", True) else f"set {stage}.enabled = true"


def _nothing(run_dir: Path, stage: str, reason: str, source: str) -> ConfigError:
    """Returns the error for a draw that found no document; its message lists the reasons that have some."""
    manifest = read_manifest(run_dir / stage)
    assert manifest is not None
    counts = {name: amount["documents"] for name, amount in manifest["total"]["dropped"].items()}
    cuts = {name.removesuffix(" cuts"): n for name, n in manifest["total"]["notes"].items() if name.endswith(" cuts")}
    reasons_found = ", ".join(f"{name} ({count:,})" for name, count in sorted({**counts, **cuts}.items()))
    if not reasons_found:
        return ConfigError(f"stage {stage} dropped and cut nothing; see what it kept by --kept")
    which = (f" for {reason}" if reason else "") + (f" of source {source!r}" if source else "")
    return ConfigError(f"stage {stage} has no such document{which}; it drops or cuts for: {reasons_found}")


def main(argv: Sequence[str] | None = None) -> int:
    config, args = parse_args(
        DataConfig,
        argv,
        prog="trivium data sample",
        description="Prints random documents that a stage dropped, cut or kept, with their texts and the reasons.",
        example="trivium data sample configs/data/demo.toml --stage filter --reason word_count_min -n 5",
        flags=[("--kept", "draw documents that the stage kept; those of stage documents are what the tokenizer gets")],
        options=[
            ("--stage", "filter", f"the stage: {', '.join(_STAGES)}"),
            ("--reason", "", "only documents dropped or cut for this reason"),
            ("--source", "", "only documents of this source"),
            ("-n", "20", "number of documents"),
            ("--seed", "0", "another seed draws other documents"),
            ("--chars", "400", "characters shown of each text"),
        ],
    )
    for name in ("n", "chars"):
        dashes = "-" if name == "n" else "--"
        if not getattr(args, name).isdigit() or int(getattr(args, name)) < 1:
            raise ConfigError(
                f"{dashes}{name} {getattr(args, name)!r} is not a whole number of at least 1; give one, e.g. 20"
            )
    if args.kept and args.reason:
        raise ConfigError(f"--kept and --reason {args.reason!r} exclude each other; leave one of them out")
    if args.stage not in _STAGES:
        raise ConfigError(f"--stage {args.stage!r} drops and cuts nothing; those that do: {', '.join(_STAGES)}")
    run_dir = Path(config.run.dir)
    if not has_finished(run_dir, args.stage):
        if remedy := _switched_off(config, args.stage):
            raise ConfigError(f"--stage {args.stage}: the config has this stage switched off; {remedy}, and run it")
        raise ConfigError(
            f"run.dir = {str(run_dir)!r} holds no finished stage {args.stage!r}; run: trivium data run CONFIG"
        )
    if args.source and args.source not in config.sources:
        raise ConfigError(f"--source {args.source!r} is no source; known: {', '.join(sorted(config.sources))}")
    if args.dry_run:
        print(f"would draw {args.n} documents of stage {args.stage} in {run_dir}")
        return 0
    try:
        found = candidates(run_dir, args.stage, args.reason, args.kept)
        rows = draw(found, int(args.n), args.source, args.seed)
        if not rows:
            raise _nothing(run_dir, args.stage, args.reason, args.source)
        # The config of the run itself: the thresholds in the file may have changed since.
        rules = load(DataConfig, run_dir / "config.toml").rules
        show(run_dir, args.stage, rows, rules, int(args.chars), wide_console())
    except ConfigError:
        raise
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    entrypoint(main)
