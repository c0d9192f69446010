"""Plans that a data run has replaced: they stay beside the new ones, and are found and compared with them.

A training run knows its plan by fingerprint. When a data run makes other plans, those in `<run.dir>/plan` move to
`<run.dir>/plan.<name>`, so that a run can go on with its own. Tokens and the tokenizer are large, and are kept in the
same way only where a run has trained on a plan of theirs (`note_use`). Nothing here removes what was kept.
"""

import hashlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from configs.differences import changes, words
from configs.files import sync
from data_pipeline.mixture.rows import PLAN_FILE, Plan, Segments
from data_pipeline.tokens.store import Store

USED_BY = "used_by"  # in a plan's folder: the directories of training runs, one a line


def keep_plans(old: Path, new: Path) -> Path | None:
    """Moves the plans in folder `old` beside it, if `new` has others; returns where they are then."""
    names = _fingerprints(old)
    if not names or names == _fingerprints(new):
        return None
    name = names[0] if len(names) == 1 else hashlib.sha256("".join(names).encode()).hexdigest()
    return _set_aside(old, name)


def keep_for_plans(old: Path, new: Path) -> Path | None:
    """Moves tokens or a tokenizer in folder `old` beside it, if `new` has others and a run's plan is made of them."""
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
    """Notes in a plan's folder that a training run needs it. Errors: OSError where nothing can be written there."""
    file, line = plan / USED_BY, f"{run_dir.resolve()}\n"
    if not file.is_file() or line not in file.read_text(encoding="utf-8").splitlines(keepends=True):
        with file.open("a", encoding="utf-8") as lines:
            lines.write(line)


def find(location: str | Path, fingerprint: str) -> Plan | None:
    """The plan of that fingerprint at `location`, or else among those kept beside it; None if there is none.

    Errors: ValueError where it is there, and damaged or without the tokens that it was made of.
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
    """The folder of the plan that `find` would open; None if there is none."""
    location = Path(location)
    folders = _candidates(location.parent if location.name == PLAN_FILE else location)
    return next((folder for folder in folders if _fingerprint(folder / PLAN_FILE) == fingerprint), None)


def was_at(plan: Plan, location: str | Path) -> bool:
    """Whether the plan was kept when another one took its place at `location`."""
    kept, standing = _absolute(plan.path), _absolute(Path(location))
    standing = standing.parent if standing.name == PLAN_FILE else standing
    if kept.parent == standing.parent:
        return kept.name.startswith(f"{standing.name}.")
    same_stage = kept.name == standing.name and kept.parent.parent == standing.parent.parent
    return same_stage and kept.parent.name.startswith(f"{standing.parent.name}.")


def first_difference(plan: Plan, other: Plan, samples: int) -> int | None:
    """The first of `samples` whose row is not the same in both plans, or that one of them lacks; None for none.

    Rows are the same if they have the same tokens of the same documents, in stores of the same checksums, in the same
    rows, and follow the same earlier plans.
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
    """What is different about a plan's data, in words; both are `Plan.facts`."""
    said = words(changes(before["mixture"], after["mixture"]))
    ours, theirs = after["documents"], before["documents"]
    for name in [*theirs, *(name for name in ours if name not in theirs)]:
        if name not in ours:
            said.append(f"source {name} is gone")
        elif name not in theirs:
            said.append(f"source {name} is new")
        elif ours[name] != theirs[name]:
            said.append(f"the documents of source {name} are others")
    if before["tokenizer"] != after["tokenizer"]:
        said.append("the tokenizer is another")
    if before["without"] != after["without"]:
        said.append("other documents are left out")
    if before["after"] != after["after"]:
        said.append("it goes on after another plan")
    return "; ".join(said) or "the same settings and documents, laid out in another order"


def _frame(plan: Plan) -> tuple[Any, ...]:
    """What all rows of a plan have in common."""
    return plan.seq_length, plan.facts["tokenizer"], plan.pad_id, plan.after, plan.first_sample


def _other_row(plan: Plan, other: Plan, source: str, count: int) -> int | None:
    """The first of a source's `count` rows that the two plans do not have in common."""
    ours, theirs = plan.train_rows(source), other.train_rows(source)
    offsets, wrong = ours.offsets[: count + 1], np.flatnonzero(ours.offsets[: count + 1] != theirs.offsets[: count + 1])
    row = int(wrong[0]) - 1 if len(wrong) else count
    segments = int(offsets[row])
    ids: dict[tuple[str, str], int] = {}
    alike = _segment_keys(ours, segments, ids) == _segment_keys(theirs, segments, ids)
    forms, their_forms = (np.zeros(segments) if rows.fim is None else rows.fim[:segments] for rows in (ours, theirs))
    same = alike.all(0) & (forms == their_forms)
    if plan.description["seed"] != other.description["seed"]:  # where a document is split for it
        same &= forms == 0
    same &= (forms == 0) | (ours.document[:segments] == theirs.document[:segments])
    wrong = np.flatnonzero(~same)
    if len(wrong):
        row = int(np.searchsorted(offsets, wrong[0], side="right")) - 1
    return row if row < count else None


def _segment_keys(rows: Segments, segments: int, ids: dict[tuple[str, str], int]) -> np.ndarray:
    """int64 [4, segments]: the number of its store in `ids`, document in the store, start and length of each."""
    stores = np.array([ids.setdefault(checksums, len(ids)) for checksums in rows.checksums], np.int64)
    firsts = np.cumsum([0, *(len(store) for store in rows.shards.stores)])
    document = rows.document[:segments]
    store = np.searchsorted(firsts, document, side="right") - 1
    return np.stack([stores[store], document - firsts[store], rows.start[:segments], rows.length[:segments]])


def _same(path: Path, new: Path) -> bool:
    """Of two stores, or two tokenizers."""
    if path.is_file():
        return new.is_file() and new.read_bytes() == path.read_bytes()
    return new.with_name(f"{new.name}.idx").is_file() and Store(new).facts() == Store(path).facts()


def _absolute(path: Path) -> Path:
    """Without `..`, and links as they are."""
    return Path(os.path.abspath(path))


def _set_aside(folder: Path, name: str) -> Path:
    kept = folder.with_name(f"{folder.name}.{name[:16]}")
    if not kept.exists():
        os.rename(folder, kept)
        sync(kept.parent)
    return kept


def _plan_files(run_dir: Path) -> list[Path]:
    """All plan.json of a data run, those kept among them."""
    return sorted(path for depth in ("", "*/") for path in run_dir.glob(f"plan*/{depth}{PLAN_FILE}"))


def _fingerprints(folder: Path) -> list[str]:
    files = [folder / PLAN_FILE, *folder.glob(f"*/{PLAN_FILE}")]
    return sorted(print for file in files if (print := _fingerprint(file)))


def _fingerprint(file: Path) -> str | None:
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else None


def _candidates(folder: Path) -> Iterator[Path]:
    """Where a plan that is or was at `folder` may be: of a data run's plan or of one of its stages."""
    yield folder
    folder = _absolute(folder)
    for whole in (folder, folder.parent):
        for near in [whole, *sorted(whole.parent.glob(f"{whole.name}.*"))]:
            yield from (file.parent for file in sorted([*near.glob(PLAN_FILE), *near.glob(f"*/{PLAN_FILE}")]))
