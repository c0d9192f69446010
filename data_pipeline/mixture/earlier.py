"""Plans that a later data run replaced: keeps them beside the new ones, finds them, and compares plans.

A training run identifies its plan by fingerprint. When a data run makes other plans, the earlier ones move from
`<run.dir>/plan` to `<run.dir>/plan.<name>`, so that a training run can continue with its own. Token stores and the
tokenizer are large and are kept in the same way only if a run has trained on a plan made of them (`note_use`). Kept
folders are never removed here.
"""

import contextlib
import hashlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from configs.differences import changes, words
from configs.files import sync
from configs.sealed import PLAN
from data_pipeline.mixture.rows import PLAN_FILE, Plan, Segments
from data_pipeline.tokens.store import Store

USED_BY = "used_by"  # file in a plan's folder: directories of the training runs that use the plan, one a line


def keep_plans(old: Path, new: Path) -> Path | None:
    """Moves the plans in folder `old` aside if those in `new` differ; returns the folder's new path, else None."""
    names = _fingerprints(old)
    if not names or names == _fingerprints(new):
        return None
    name = names[0] if len(names) == 1 else hashlib.sha256("".join(names).encode()).hexdigest()
    return _set_aside(old, name)


def keep_for_plans(old: Path, new: Path) -> Path | None:
    """Moves folder `old`, token stores or a tokenizer, aside if those in `new` differ and a training run needs it.

    A training run needs it if the run's plan was made of files in it. Returns the folder's new path, or None.
    """
    for file in _plan_files(old.parent):
        if not (file.parent / USED_BY).is_file():
            continue
        try:
            plan = Plan.open(file.parent)
        except ValueError:
            continue
        mine = [path for path in map(_absolute, plan.made_of) if path.is_relative_to(_absolute(old))]
        if not all(_same(path, new / path.relative_to(_absolute(old))) for path in mine):
            return _set_aside(old, plan.fingerprint)
    return None


def note_use(plan: Path, run_dir: Path) -> None:
    """Adds a training run to the users listed in a plan's folder; raises OSError if the folder cannot be written."""
    file, line = plan / USED_BY, f"{run_dir.resolve()}\n"
    if not file.is_file() or line not in file.read_text(encoding="utf-8").splitlines(keepends=True):
        with file.open("a", encoding="utf-8") as lines:
            lines.write(line)


def find(location: str | Path, fingerprint: str) -> Plan | None:
    """Opens the plan with a fingerprint, at `location` or among those kept beside it; returns None if there is none.

    Raises ValueError if the only such plans are damaged or lack the tokens that they were made of.
    """
    location = Path(location)
    problem: ValueError | None = None
    for folder in _candidates(location.parent if location.name == PLAN_FILE else location):
        if _fingerprint(folder / PLAN_FILE) == fingerprint:
            try:
                return Plan.open(folder)
            except ValueError as error:
                problem = problem or error
    if problem:
        raise problem
    return None


def where(location: str | Path, fingerprint: str) -> Path | None:
    """Returns the first folder, at `location` or kept beside it, whose plan has this fingerprint; None without one."""
    location = Path(location)
    folders = _candidates(location.parent if location.name == PLAN_FILE else location)
    return next((folder for folder in folders if _fingerprint(folder / PLAN_FILE) == fingerprint), None)


def following(plan: Plan) -> Path | None:
    """Returns the folder, beside the plan's, of a plan that goes on from its end; None if there is none."""
    end = plan.first_sample + plan.num_samples
    for file in sorted(plan.path.parent.glob(f"*/{PLAN_FILE}")):
        with contextlib.suppress(ValueError, OSError):
            after = PLAN.read(file.read_bytes(), file)["after"]
            if after and (after["plan"], after["first_sample"]) == (plan.fingerprint, end):
                return file.parent
    return None


def was_at(plan: Plan, location: str | Path) -> bool:
    """Whether the plan is in a folder that was moved aside when another plan took its place at `location`."""
    kept, standing = _absolute(plan.path), _absolute(Path(location))
    standing = standing.parent if standing.name == PLAN_FILE else standing
    if kept.parent == standing.parent:
        return kept.name.startswith(f"{standing.name}.")
    same_stage = kept.name == standing.name and kept.parent.parent == standing.parent.parent
    return same_stage and kept.parent.name.startswith(f"{standing.parent.name}.")


def first_difference(plan: Plan, other: Plan, samples: int) -> int | None:
    """Returns the first of the samples 0 to `samples` - 1 whose row differs between two plans; None if none does.

    A sample that one of the plans lacks counts as different. Rows are the same if they consist of the same segments of
    the same documents, in stores of the same checksums; all rows differ if length of rows, tokenizer, padding or the
    earlier plans that the two go on from differ.
    """
    if _frame(plan) != _frame(other):
        return 0
    count = min(samples, plan.num_samples, other.num_samples)
    number = {name: i for i, name in enumerate(plan.sources)}
    renumbered = np.array([number.get(name, -1) for name in other.sources])
    ours, theirs = plan.sample_sources[:count], renumbered[other.sample_sources[:count]]
    wrong = np.flatnonzero(ours != theirs)
    end = int(wrong[0]) if len(wrong) else count
    for i in np.unique(ours[:end]).tolist():
        samples_of = np.flatnonzero(ours[:end] == i)
        rows = _other_row(plan, other, plan.sources[i], len(samples_of))
        if rows is not None:
            end = min(end, int(samples_of[rows]))
    return end if end < samples else None


def differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    """Describes in words how the data of two plans differ; `before` and `after` are their `Plan.facts`."""
    said = words(changes(before["mixture"], after["mixture"]))
    ours, theirs = after["documents"], before["documents"]
    for name in [*theirs, *(name for name in ours if name not in theirs)]:
        if name not in ours:
            said.append(f"source {name} is gone")
        elif name not in theirs:
            said.append(f"source {name} is new")
        elif ours[name] != theirs[name]:
            said.append(f"the documents of source {name} differ")
    if before["tokenizer"] != after["tokenizer"]:
        said.append("the tokenizer differs")
    if before["without"] != after["without"]:
        said.append("different documents are left out")
    if before["after"] != after["after"]:
        said.append("it goes on after another plan")
    return "; ".join(said) or "the same settings and documents, laid out in another order"


def _frame(plan: Plan) -> tuple[Any, ...]:
    """Returns the properties that all rows of a plan share; plans that differ in them have no row in common."""
    return plan.seq_length, plan.facts["tokenizer"], plan.pad_id, plan.after, plan.first_sample


def _other_row(plan: Plan, other: Plan, source: str, count: int) -> int | None:
    """Returns the first of a source's `count` rows that differs between two plans; None if none does."""
    ours, theirs = plan.train_rows(source), other.train_rows(source)
    offsets, wrong = ours.offsets[: count + 1], np.flatnonzero(ours.offsets[: count + 1] != theirs.offsets[: count + 1])
    row = int(wrong[0]) - 1 if len(wrong) else count
    segments = int(offsets[row])
    ids: dict[tuple[str, str], int] = {}
    alike = _segment_keys(ours, segments, ids) == _segment_keys(theirs, segments, ids)
    forms, their_forms = (np.zeros(segments) if rows.fim is None else rows.fim[:segments] for rows in (ours, theirs))
    same = alike.all(0) & (forms == their_forms)
    if plan.description["seed"] != other.description["seed"]:  # then fill-in-the-middle splits pieces elsewhere
        same &= forms == 0
    same &= (forms == 0) | (ours.document[:segments] == theirs.document[:segments])
    wrong = np.flatnonzero(~same)
    if len(wrong):
        row = int(np.searchsorted(offsets, wrong[0], side="right")) - 1
    return row if row < count else None


def _segment_keys(rows: Segments, segments: int, ids: dict[tuple[str, str], int]) -> np.ndarray:
    """Returns int64 [4, segments]: store, document in the store, start and length of each of the first `segments`.

    Stores are numbered by checksums; `ids` holds these numbers and gets those of new stores.
    """
    stores = np.array([ids.setdefault(checksums, len(ids)) for checksums in rows.checksums], np.int64)
    firsts = np.cumsum([0, *(len(store) for store in rows.shards.stores)])
    document = rows.document[:segments]
    store = np.searchsorted(firsts, document, side="right") - 1
    return np.stack([stores[store], document - firsts[store], rows.start[:segments], rows.length[:segments]])


def _same(path: Path, new: Path) -> bool:
    """Whether two stores, or two tokenizer files, are the same."""
    if path.is_file():
        return new.is_file() and new.read_bytes() == path.read_bytes()
    return new.with_name(f"{new.name}.idx").is_file() and Store(new).facts() == Store(path).facts()


def _absolute(path: Path) -> Path:
    """Returns the path, absolute and without `..`; links are not resolved."""
    return Path(os.path.abspath(path))


def _set_aside(folder: Path, name: str) -> Path:
    """Renames a folder to `<folder>.<first 16 characters of name>`, unless that exists; returns the new path."""
    kept = folder.with_name(f"{folder.name}.{name[:16]}")
    if not kept.exists():
        os.rename(folder, kept)
        sync(kept.parent)
    return kept


def _plan_files(run_dir: Path) -> list[Path]:
    """Lists all plan.json files of a data run, also those in folders moved aside."""
    return sorted(path for depth in ("", "*/") for path in run_dir.glob(f"plan*/{depth}{PLAN_FILE}"))


def _fingerprints(folder: Path) -> list[str]:
    """Returns the fingerprints of the plan in a folder, or of the plans of all its stages, sorted."""
    files = [folder / PLAN_FILE, *folder.glob(f"*/{PLAN_FILE}")]
    return sorted(print for file in files if (print := _fingerprint(file)))


def _fingerprint(file: Path) -> str | None:
    """Returns the SHA-256 of a plan.json, which is the plan's fingerprint; None if the file does not exist."""
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else None


def _candidates(folder: Path) -> Iterator[Path]:
    """Yields the folders where a plan that was once at `folder` may be; `folder` may be that of one of its stages."""
    yield folder
    folder = _absolute(folder)
    for whole in (folder, folder.parent):
        for near in [whole, *sorted(whole.parent.glob(f"{whole.name}.*"))]:
            yield from (file.parent for file in sorted([*near.glob(PLAN_FILE), *near.glob(f"*/{PLAN_FILE}")]))
