"""Where a document is in each stage's tables, in the token stores and in the plan. Reads what a data run published."""

import contextlib
import json
import os
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from configs.loader import ConfigError
from configs.sealed import CHECKPOINT
from data_pipeline.core.checked_parquet import read_parquet
from data_pipeline.core.shards import TRAIN
from data_pipeline.core.stage import read_manifest
from data_pipeline.core.tables import TABLE_STAGES, read_table, shards_of
from data_pipeline.documents.write import URL_KEY
from data_pipeline.mixture.earlier import find
from data_pipeline.mixture.rows import Plan, open_plans
from data_pipeline.reading.addresses import url_key, url_of
from data_pipeline.reading.ids import unique_id


@dataclass(frozen=True)
class DocumentLocation:
    """A document as extract published it."""

    source: str
    shard: str  # <source>/<file>-<part>
    row: int
    id: str


@dataclass(frozen=True)
class StoredDocument:
    """A document in a token store of `split`."""

    split: str
    source: str
    store: str  # its name in the split and source
    document: int
    id: str
    tokens: int
    origin: tuple[str, int]  # raw file and position there
    url: int  # `url_key` of its address, 0 for none


def stages_of(run_dir: Path) -> list[str]:
    """The table stages that a run has finished, in their order. Errors: ConfigError when there is none."""
    found = [name for name in TABLE_STAGES if read_manifest(run_dir / name) is not None]
    if not found:
        raise ConfigError(f"run.dir = {str(run_dir)!r} holds no finished stage; run: trivium data run CONFIG")
    return found


def locations(run_dir: Path, wanted: Collection[str]) -> list[DocumentLocation]:
    """The documents with these ids."""
    value_set = pa.array(sorted(wanted), pa.string())
    found = []
    for shard in shards_of(run_dir / "language"):
        table = read_table(run_dir / "language", shard, ["source", "row", "id"])
        for row in table.filter(pc.is_in(table["id"], value_set)).to_pylist():
            found.append(DocumentLocation(row["source"], shard, row["row"], row["id"]))
    return found


def given(run_dir: Path, own: str) -> list[str]:
    """The ids of the documents that were told apart because their records all gave the id `own`, as it is published."""
    found: set[str] = set()
    for shard in shards_of(run_dir / "language"):
        ids = read_table(run_dir / "language", shard, ["id"])["id"]
        found.update(ids.filter(pc.starts_with(ids, unique_id(own, ""))).to_pylist())
    return sorted(found)


def rows_of(run_dir: Path, stage: str, location: DocumentLocation) -> dict[str, Any] | None:
    """The stage's row of a document; None where the document never got that far."""
    if not (run_dir / stage / f"{location.shard}.parquet").is_file():
        return None
    table = read_table(run_dir / stage, location.shard)
    rows = table.filter(pc.equal(table["row"], location.row)).to_pylist()
    return rows[0] if rows else None


def set_aside(run_dir: Path, wanted: Collection[str]) -> Iterator[dict[str, Any]]:
    """Records that extract did not publish and kept a line of: broken ones all, others as samples."""
    for path in sorted([*run_dir.glob("extract/rejected/*.jsonl"), *run_dir.glob("extract/drops/*.jsonl")]):
        with path.open(encoding="utf-8") as lines:
            for line in lines:
                record = json.loads(line)
                if record["id"] in wanted:
                    yield record


def stored(run_dir: Path, wanted: Collection[str], urls: Collection[str] = ()) -> list[StoredDocument]:
    """Documents of these ids or addresses in the token stores, those held out too."""
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
    """`url_key` of the address that a published document came from, also where it is not shown as it was."""
    if URL_KEY in metadata:
        return int(metadata[URL_KEY], 16)
    return url_key(url_of(metadata))


def uses(plan: Plan, documents: Collection[StoredDocument]) -> dict[StoredDocument, list[tuple[int, int, int]]]:
    """(sample, first token, tokens) of every training segment that holds a piece of each document, by sample."""
    return {
        document: plan.uses(document.source, document.store, document.document) if document.split == TRAIN else []
        for document in documents
    }


@dataclass(frozen=True)
class DataSpan:
    """Steps of a training run, from `first_step` on, with one plan and one batch size."""

    first_step: int
    first_sample: int  # of the run, from the first step of all
    global_batch_size: int
    data: str  # the plan's fingerprint
    plan: str  # where it was
    plan_paths: tuple[str, ...] = ()  # where else it may be: seen from the run, which may have moved with it

    def find_plan(self) -> Plan | None:
        """The plan that the steps were trained on; None where it is no longer to be found.

        Errors: ValueError for one that is damaged.
        """
        return find_in((self.plan, *self.plan_paths), self.data)


def find_in(paths: Iterable[str], fingerprint: str) -> Plan | None:
    """The first plan of this fingerprint, at a path or kept beside it. Errors: ValueError for a damaged one."""
    return next((plan for path in paths if (plan := find(path, fingerprint))), None)


def kept_plan_paths(run: Path) -> tuple[str, ...]:
    """Where the plans of a training run are by what its checkpoints say, the newest checkpoint first."""
    found = []
    for path in sorted(run.glob("checkpoints/*/manifest.json"), reverse=True):
        with contextlib.suppress(OSError, ValueError):
            if plan := CHECKPOINT.read(path.read_bytes(), path).get("plan"):
                found += [plan["path"], os.path.normpath(run.resolve() / plan["relative"])]
    return tuple(dict.fromkeys(found))


def _started_in(run: Path, named: str) -> Path | None:
    """The folder from which the run of this directory was started, where its config called it `named`."""
    parts, own = Path(os.path.normpath(named)).parts, run.resolve().parts
    if Path(named).is_absolute() or not parts or own[-len(parts) :] != parts:
        return None
    return Path(*own[: -len(parts)])


def plans(run_dir: Path, run: Sequence[DataSpan]) -> dict[str, Plan]:
    """The plans of a data run and those that a training run had from elsewhere, by their folder.

    Errors: ValueError for one that is gone or damaged.
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
    """What a training run was trained on, from its history.json. Errors: ConfigError when `run` is none."""
    path = run / "history.json"
    if not path.is_file():
        raise ConfigError(f"--run {run}: there is no {path}; name the run.dir of a pretraining run")
    entries = json.loads(path.read_text(encoding="utf-8"))
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
    """The steps, from 0, that train on these samples of a plan; those that the run left out for another have none."""
    found = set()
    for sample in samples:
        for one, following in zip(run, [*run[1:], None], strict=True):
            behind = plan.first_sample + sample - one.first_sample
            step = one.first_step + behind // one.global_batch_size
            if one.data == plan.fingerprint and behind >= 0 and (following is None or step < following.first_step):
                found.add(step)
    return sorted(found)
