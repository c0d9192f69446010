"""Finds documents in the tables of a data run's stages, its token stores and plans, and in a training run's steps."""

import contextlib
import json
import os
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from configs import run_history
from configs.loader import ConfigError
from configs.sealed import CHECKPOINT
from data_pipeline.core.checked_parquet import read_parquet
from data_pipeline.core.shards import TRAIN
from data_pipeline.core.stage import has_finished
from data_pipeline.core.tables import TABLE_STAGES, read_table, shards_of
from data_pipeline.mixture.earlier import find
from data_pipeline.mixture.rows import Plan, open_plans
from data_pipeline.reading.document_urls import URL_KEY, url_key, url_of
from data_pipeline.reading.ids import unique_id


@dataclass(frozen=True)
class DocumentLocation:
    """Location of a document in the shards that the extract stage published."""

    source: str
    shard: str  # <source>/<file>-<part>
    row: int
    id: str


@dataclass(frozen=True)
class StoredDocument:
    """Location of a document in the token stores of a split."""

    split: str
    source: str
    store: str  # name of the store, within split and source
    document: int  # index in the store
    id: str
    tokens: int
    origin: tuple[str, int]  # input file, and position in it
    url: int  # `url_key` of its address, 0 for none


def stages_of(run_dir: Path) -> list[str]:
    """Lists the last run's finished stages with tables, in their order; raises ConfigError if there is none."""
    found = [name for name in TABLE_STAGES if has_finished(run_dir, name)]
    if not found:
        raise ConfigError(f"run.dir = {str(run_dir)!r} holds no finished stage; run: trivium data run CONFIG")
    return found


def locations(run_dir: Path, wanted: Collection[str]) -> list[DocumentLocation]:
    """Finds the documents with the given ids in the tables of the language stage, which lists all documents."""
    value_set = pa.array(sorted(wanted), pa.string())
    found = []
    for shard in shards_of(run_dir / "language"):
        table = read_table(run_dir / "language", shard, ["source", "row", "id"])
        for row in table.filter(pc.is_in(table["id"], value_set)).to_pylist():
            found.append(DocumentLocation(row["source"], shard, row["row"], row["id"]))
    return found


def given(run_dir: Path, own: str) -> list[str]:
    """Returns the ids that documents got because their records share the id `own`; `own` is in its published form."""
    found: set[str] = set()
    for shard in shards_of(run_dir / "language"):
        ids = read_table(run_dir / "language", shard, ["id"])["id"]
        found.update(ids.filter(pc.starts_with(ids, unique_id(own, ""))).to_pylist())
    return sorted(found)


def rows_of(run_dir: Path, stage: str, location: DocumentLocation) -> dict[str, Any] | None:
    """Reads a document's row in a stage's table; returns None if the document did not reach the stage."""
    if not (run_dir / stage / f"{location.shard}.parquet").is_file():
        return None
    table = read_table(run_dir / stage, location.shard)
    rows = table.filter(pc.equal(table["row"], location.row)).to_pylist()
    return rows[0] if rows else None


def set_aside(run_dir: Path, wanted: Collection[str]) -> Iterator[dict[str, Any]]:
    """Yields the wanted records that extract did not publish: from all broken ones, and from samples of the others."""
    for path in sorted([*run_dir.glob("extract/rejected/*.jsonl"), *run_dir.glob("extract/drops/*.jsonl")]):
        with path.open(encoding="utf-8") as lines:
            for line in lines:
                record = json.loads(line)
                if record["id"] in wanted:
                    yield record


def stored(run_dir: Path, wanted: Collection[str], urls: Collection[str] = ()) -> list[StoredDocument]:
    """Finds the documents with these ids or addresses in the token stores, held-out ones included."""
    ids, keys = set(wanted), {url_key(url) for url in urls} - {0}
    found = []
    for path in sorted((run_dir / "tokens").glob("*/*/*.parquet")):
        table = read_parquet(path, ["document", "id", "file", "position", "length", "metadata"])
        for row in table.to_pylist():
            if row["id"] not in ids and not keys:
                continue
            url = key_of_address(json.loads(row["metadata"]))
            if row["id"] not in ids and url not in keys:
                continue
            split, source, store = path.relative_to(run_dir / "tokens").with_suffix("").parts
            origin = (row["file"] or "", row["position"] or 0)
            found.append(StoredDocument(split, source, store, row["document"], row["id"], row["length"], origin, url))
    return found


def key_of_address(metadata: dict[str, Any]) -> int:
    """Returns the `url_key` of a document's original address, even if the published one has personal data replaced."""
    if URL_KEY in metadata:
        return int(metadata[URL_KEY], 16)
    return url_key(url_of(metadata))


def uses(plan: Plan, documents: Collection[StoredDocument]) -> dict[StoredDocument, list[tuple[int, int, int]]]:
    """Returns, for each document, the sorted (sample, first token, tokens) of its segments in training rows."""
    return {
        document: plan.uses(document.source, document.store, document.document) if document.split == TRAIN else []
        for document in documents
    }


@dataclass(frozen=True)
class DataSpan:
    """Consecutive steps of a training run that have one plan and one batch size."""

    first_step: int
    first_sample: int  # number of samples that the run used before first_step
    global_batch_size: int
    data: str  # the plan's fingerprint
    plan: str  # path of the plan at that time
    plan_paths: tuple[str, ...] = ()  # other paths, from the run's own, since both may have been moved

    def find_plan(self) -> Plan | None:
        """Opens the plan that the steps were trained on; None if it is missing. Raises ValueError if it is damaged."""
        return find_in((self.plan, *self.plan_paths), self.data)


def find_in(paths: Iterable[str], fingerprint: str) -> Plan | None:
    """Opens the first plan with this fingerprint at or beside one of the paths; raises ValueError if it is damaged."""
    return next((plan for path in paths if (plan := find(path, fingerprint))), None)


def kept_plan_paths(run: Path) -> tuple[str, ...]:
    """Returns the paths at which a run's checkpoints recorded its plans, the newest checkpoint first."""
    found = []
    for path in sorted(run.glob("checkpoints/*/manifest.json"), reverse=True):
        with contextlib.suppress(OSError, ValueError):
            if plan := CHECKPOINT.read(path.read_bytes(), path).get("plan"):
                found += [plan["path"], os.path.normpath(run.resolve() / plan["relative"])]
    return tuple(dict.fromkeys(found))


def _started_in(run: Path, named: str) -> Path | None:
    """Folder in which a training run was started, if its config gave its directory as the relative path `named`.

    Returns None for an absolute path, or if the directory's path no longer ends in `named`.
    """
    parts, own = Path(os.path.normpath(named)).parts, run.resolve().parts
    if Path(named).is_absolute() or not parts or own[-len(parts) :] != parts:
        return None
    return Path(*own[: -len(parts)])


def plans(run_dir: Path, run: Sequence[DataSpan]) -> dict[str, Plan]:
    """Opens the plans of a data run and any other plans of a training run's spans, by folder.

    Raises ValueError if a plan is missing or damaged.
    """
    found = {(Path("plan") / name).as_posix(): plan for name, plan in open_plans(run_dir / "plan").items()}
    for one in run:
        if one.data not in {plan.fingerprint for plan in found.values()}:
            plan = one.find_plan()
            if plan is None:
                raise ValueError(
                    f"the plan that steps from {one.first_step} on were trained on is no longer at {one.plan}, nor "
                    "kept beside it; move it back there"
                )
            found[plan.path.as_posix()] = plan
    return found


def data_spans(run: Path) -> list[DataSpan]:
    """Reads the spans of a training run from its history; raises ConfigError if it was trained on no plan."""
    entries = run_history.read(run)
    if not entries:
        raise ConfigError(f"--run {run}: there is no {run / run_history.FILE}; name the run.dir of a pretraining run")
    if any(entry["plan"] is None for entry in entries):
        raise ConfigError(f"--run {run} was not trained on a plan; name the run.dir of a pretraining run")
    kept = kept_plan_paths(run)
    found = []
    for entry in entries:
        start = _started_in(run, entry.get("config", {}).get("run", {}).get("dir", ""))
        paths = (str(start / entry["plan"]),) if start else ()
        own = {field.name: entry[field.name] for field in fields(DataSpan) if field.name != "plan_paths"}
        found.append(DataSpan(**own, plan_paths=(*paths, *kept)))
    return found


def steps(run: Sequence[DataSpan], plan: Plan, samples: Iterable[int]) -> list[int]:
    """Returns the steps, counted from 0, that train on the given samples of a plan.

    Samples that the run did not reach, since it changed to another plan before, have no step.
    """
    found = set()
    for sample in samples:
        for one, following in zip(run, [*run[1:], None], strict=True):
            behind = plan.first_sample + sample - one.first_sample
            step = one.first_step + behind // one.global_batch_size
            if one.data == plan.fingerprint and behind >= 0 and (following is None or step < following.first_step):
                found.add(step)
    return sorted(found)
