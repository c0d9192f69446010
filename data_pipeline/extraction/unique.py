"""Last part of the extract stage: makes the ids of a run's documents unique.

Records may bring their own ids, and several records may bring the same one. Every task writes down the hashes of the
ids it passes on (`NoteIds`). Once all are known, repeated hashes are searched for, one range of hashes at a time, and
every document that shares its id gets its location appended (`MakeUnique`): ID#SOURCE/FILE/LINE. No document keeps the
bare id, so that ids do not depend on the order of documents or on how they are distributed among tasks. Two ids with
the same 64-bit hash count as the same.
"""

from array import array
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from datatrove.data import DocumentsPipeline
from datatrove.pipeline.base import PipelineStep

from data_pipeline.core.canary_naming import is_canary
from data_pipeline.core.hashing import stable_hash
from data_pipeline.core.ledger import Tally
from data_pipeline.core.progress import ProgressFile
from data_pipeline.core.shards import read_records, shard_path, write_records
from data_pipeline.reading.ids import Roots, id_of_location, name_of, unique_id

MADE_UNIQUE = "ids made unique"  # the ledger's note under which such documents are counted
_NOTED = np.dtype([("id", "<u8"), ("shard", "<u4"), ("row", "<u4")])
_PART = 4_000_000  # ids that a task collects before it writes them to a file
_RANGE = 20_000_000  # about as many ids are compared at a time, 16 bytes each


class IdNotes:
    """Writes hashes of ids to `<name>-<part>.npy`, sorted, and the shards' names to `<name>-<part>.txt`, one a line."""

    def __init__(self, folder: Path, name: str) -> None:
        self._folder, self._name = folder, name
        self._parts = 0
        self._start()

    def _start(self) -> None:
        self._shards: list[str] = []
        self._ids, self._numbers, self._rows = array("Q"), array("I"), array("I")

    def add(self, shard: str, row: int, document_id: str) -> None:
        """Notes one document's id; writes a part to files when it is full."""
        if len(self._ids) >= _PART:
            self.close()
        if not self._shards or self._shards[-1] != shard:
            self._shards.append(shard)
        self._ids.append(stable_hash(document_id))
        self._numbers.append(len(self._shards) - 1)
        self._rows.append(row)

    def close(self) -> None:
        """Writes the ids noted since the last part to a pair of files."""
        noted = np.empty(len(self._ids), _NOTED)
        for field, values in (("id", self._ids), ("shard", self._numbers), ("row", self._rows)):
            noted[field] = np.frombuffer(values, f"<u{values.itemsize}") if values else 0
        self._folder.mkdir(parents=True, exist_ok=True)
        stem = f"{self._name}-{self._parts:04d}"
        np.save(self._folder / f"{stem}.npy", noted[np.argsort(noted["id"], kind="stable")])
        (self._folder / f"{stem}.txt").write_text("\n".join(self._shards), encoding="utf-8")
        self._parts += 1
        self._start()


class NoteIds(PipelineStep):
    """Passes documents on and writes down each one's id hash, shard and row."""

    name = "Ids"
    type = "🪪 - IDS"

    def __init__(self, folder: str) -> None:
        super().__init__()
        self.folder = folder

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        notes = IdNotes(Path(self.folder), f"{rank:05d}")
        last, row = "", 0
        for document in data:
            shard = f"{document.metadata['source']}/{document.metadata['shard']}"
            row = row + 1 if shard == last else 0
            last = shard
            notes.add(shard, row, document.id)
            yield document
        notes.close()


def shared(rounds: Sequence[Path]) -> dict[str, np.ndarray]:
    """Returns {shard: rows of the documents that share their id with another document}.

    Each of `rounds` is a folder of `IdNotes`; a shard's notes in a later round replace those in earlier ones. Canaries
    are left out, since they are found by their ids later.
    """
    parts: list[tuple[np.ndarray, list[str], np.ndarray]] = []  # entries, names of shards, which of them count
    replaced: set[str] = set()
    for folder in reversed(rounds):
        of_round = set[str]()
        for path in sorted(folder.glob("*.npy")):
            shards = path.with_suffix(".txt").read_text(encoding="utf-8").split("\n")
            counts = np.array([shard not in replaced for shard in shards], bool)
            parts.append((np.load(path, mmap_mode="r"), shards, counts))
            of_round.update(shards)
        replaced |= of_round
    found: dict[str, list[int]] = {}
    for noted in _ranges(parts):
        same = noted["id"][1:] == noted["id"][:-1]
        twice = np.concatenate([[False], same]) | np.concatenate([same, [False]])
        for entry in noted[twice]:
            shard = parts[entry["part"]][1][entry["shard"]]
            if not is_canary(shard):
                found.setdefault(shard, []).append(int(entry["row"]))
    return {shard: np.array(sorted(rows), np.uint32) for shard, rows in sorted(found.items())}


def _ranges(parts: Sequence[tuple[np.ndarray, list[str], np.ndarray]]) -> Iterator[np.ndarray]:
    """Yields the entries of one range of hashes after another, sorted by hash; `part` indexes `parts`."""
    total = sum(len(noted) for noted, _, _ in parts)
    ranges = 1 + total // _RANGE
    bounds = [np.uint64(number * (2**64 // ranges)) for number in range(ranges)]
    for low, high in zip(bounds, [*bounds[1:], None], strict=True):
        slices = []
        for number, (noted, _, counts) in enumerate(parts):
            first = np.searchsorted(noted["id"], low)
            last = np.searchsorted(noted["id"], high) if high is not None else len(noted)
            of_part = np.array(noted[first:last])
            of_part = of_part[counts[of_part["shard"]]]
            entries = np.empty(len(of_part), [*_NOTED.descr, ("part", "<u4")])
            for field in _NOTED.names or ():
                entries[field] = of_part[field]
            entries["part"] = number
            slices.append(entries)
        whole = np.concatenate(slices) if slices else np.empty(0, [*_NOTED.descr, ("part", "<u4")])
        if len(whole):
            yield whole[np.argsort(whole["id"], kind="stable")]


class MakeUnique(PipelineStep):
    """Rewrites the shards that `shared` found and appends each shared id's location to it.

    With `again`, for ids that are still shared after a first round, the location is the document's shard and row.
    """

    name = "Unique ids"
    type = "🪪 - IDS"

    def __init__(
        self,
        folder: str,
        found: Mapping[str, np.ndarray],
        roots: Mapping[str, Roots],
        notes: str,
        tallies: str,
        progress: str,
        again: bool,
    ) -> None:
        super().__init__()
        self.folder, self.notes, self.tallies, self.progress = folder, notes, tallies, progress
        self.found, self.roots, self.again = dict(found), dict(roots), again

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        notes, tally, progress = IdNotes(Path(self.notes), f"{rank:05d}"), Tally(), ProgressFile(self.progress, rank)
        for shard in sorted(self.found)[rank::world_size]:
            source, path = shard.split("/")[0], shard_path(self.folder, shard)
            rows = set(self.found[shard].tolist())
            records = list(read_records(path))
            for row, record in enumerate(records):
                if row in rows:
                    metadata = record["metadata"]
                    name = name_of(metadata["file"], self.roots[source])
                    location = f"{shard}/{row}" if self.again else id_of_location(source, name, metadata["position"])
                    record["id"] = unique_id(record["id"], location)
                notes.add(shard, row, record["id"])
            progress.advance(path.stat().st_size)
            write_records(path, records)
            if not self.again:
                tally.note(source, MADE_UNIQUE, len(rows))
        notes.close()
        tally.save(Path(self.tallies) / f"ids-{rank:05d}{'-again' if self.again else ''}.json")
        progress.close()
        yield from ()
