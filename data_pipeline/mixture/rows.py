"""Training rows of a mixture plan; row i is a pure function of (plan, i).

`Plan` opens and checks what `plan_files.build_plan` wrote, and reads the segments of a row from the token stores, with
labels, document boundaries and positions. Segments that the plan marks are rearranged for fill-in-the-middle (`fim`).
Ranks, batches and torch play no part here.
"""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from configs.sealed import PLAN, SealError
from data_pipeline.core.integrity import DamagedData, Expected, remedy
from data_pipeline.mixture import cursor, fim
from data_pipeline.mixture.cursor import Cursor
from data_pipeline.mixture.epochs import Pieces
from data_pipeline.tokens.store import CONTENT, SourceStores, Store

PLAN_FILE = "plan.json"
# Keys of [mixture] that plan.json holds.
SETTINGS = (
    *("seq_length", "samples", "seed", "packing", "weights", "temperature", "unimax"),
    *("max_epochs", "epochs", "fim", "fim_spm"),
)
SEGMENT_ARRAYS = ("document", "start", "length", "offsets")
_REBUILD = "remove its folder and make it again, by `trivium data run` or the command that it came from"
_RESTORE = "restore what the plan was made of, or make a plan of what there is now, by `trivium data run`"


@dataclass(frozen=True)
class Row:
    """One row of L = seq_length positions, from one source.

    tokens     int64 [L], the pad id at padding
    labels     int64 [L], the next token of the same document, even if the segment ends before it; 0 where masked. In
               a rearranged segment its next token, and </s> at its end
    loss_mask  bool [L], False at padding and at a document's last token
    positions  int64 [L], counted from 0 in every segment
    segments   int64 [L], number of the segment in the row, from 0; -1 at padding
    source     index in Plan.sources
    """

    tokens: np.ndarray
    labels: np.ndarray
    loss_mask: np.ndarray
    positions: np.ndarray
    segments: np.ndarray
    source: int


@dataclass(frozen=True)
class Segments:
    """Rows of one source as segments of documents in its stores, in the arrays of `packing.Packed`."""

    shards: SourceStores
    checksums: list[tuple[str, str]]  # SHA-256 of each store's .bin and .idx
    document: np.ndarray
    start: np.ndarray
    length: np.ndarray
    offsets: np.ndarray
    fim: np.ndarray | None = None  # form of each segment (`fim.draw`); None if all are plain

    def __len__(self) -> int:
        return len(self.offsets) - 1


_ROLES = (("bos", "<s>"), ("eos", "</s>"))


class Plan:
    """An opened plan; training rows are read by sample, held-out rows by source and number.

    If the plan goes on from another one, `after` is that plan's fingerprint and `first_sample` the number of samples of
    the chain that come before its own sample 0; otherwise they are None and 0. `gone` are the documents left out, by
    "<split>/<source>".
    """

    def __init__(self, folder: Path, content: bytes, plan: dict[str, Any]) -> None:
        self.path = folder
        self.fingerprint = hashlib.sha256(content).hexdigest()
        self.description: dict[str, Any] = plan
        self.seq_length: int = plan["seq_length"]
        self.num_samples: int = plan["samples"]
        self.sources: list[str] = [source["name"] for source in plan["sources"]]
        self.vocab_size: int = plan["tokenizer"]["vocab_size"]
        self.pad_id: int = plan["tokenizer"]["pad_id"]
        self.special_ids: dict[str, int] = plan["tokenizer"]["special_ids"]
        self.tokenizer_path = _find_tokenizer(folder / plan["tokenizer"]["model"], plan["tokenizer"]["sha256"])
        self.token_bytes: np.ndarray = np.array(self._array("token_bytes.npy"))
        self.sample_sources: np.ndarray = self._array("sample_sources.npy")
        self._sample_rows = self._array("sample_rows.npy")
        self._seed: int = plan["seed"]
        facts = plan["tokenizer"]  # earlier versions wrote no bos_id and eos_id
        bos, eos = (facts.get(f"{role}_id", self.special_ids.get(name, -1)) for role, name in _ROLES)
        self._fim_symbols = fim.FimSymbols.of(self.special_ids, bos, eos) if plan.get("fim") else None
        after = plan["after"] or {"plan": None, "first_sample": 0}
        self.after: str | None = after["plan"]
        self.first_sample: int = after["first_sample"]
        self.gone: dict[str, list[tuple[str, int]]] = {
            name: [(store, document) for store, document in entries] for name, entries in plan["without"].items()
        }
        self._begins = cursor.read(plan["begins"], self._array)
        tokens = folder / plan["tokens"]
        if not folder.is_symlink():
            tokens = Path(os.path.normpath(tokens))  # without `..`, for readable messages
        self._train = [self._segments("train", s["name"], s["stores"], tokens) for s in plan["sources"]]
        self._heldout = [self._segments("heldout", s["name"], s["heldout"]["stores"], tokens) for s in plan["sources"]]
        self._count = np.arange(self.seq_length, dtype=np.int64)

    @classmethod
    def open(cls, path: str | Path) -> "Plan":
        """Opens a plan by its folder or plan.json; verifies checksums of its index arrays, and its stores' indexes.

        The tokens themselves are verified by size alone. Raises ValueError that names what is missing or does not
        match, and what to do.
        """
        path = Path(path)
        folder = path.parent if path.name == PLAN_FILE else path
        file = folder / PLAN_FILE
        if not file.is_file():
            stages = sorted(path.parent.as_posix() for path in folder.glob(f"*/{PLAN_FILE}"))
            which = f"name one of its stages: {', '.join(stages)}" if stages else "make it with `trivium data run`"
            raise ValueError(f"there is no plan at {file}; {which}, or correct the path")
        content = file.read_bytes()
        try:
            return cls(folder, content, PLAN.read(content, file))
        except SealError as error:
            raise ValueError(f"{error}; {_REBUILD}") from None

    @property
    def facts(self) -> dict[str, Any]:
        """Description of the plan's data by settings and checksums, small enough to be stored in checkpoints."""
        plan = self.description
        documents = {
            source["name"]: hashlib.sha256(repr([_checksums(store) for store in source["stores"]]).encode()).hexdigest()
            for source in plan["sources"]
        }
        return {
            "mixture": {name: plan[name] for name in SETTINGS},
            "tokenizer": plan["tokenizer"]["sha256"],
            "documents": documents,
            "without": plan["without"],
            "after": self.after,
        }

    @property
    def made_of(self) -> list[Path]:
        """Paths of the tokenizer's file and of the token stores, the latter without suffix."""
        return [
            self.tokenizer_path,
            *(store.path for rows in self._train + self._heldout for store in rows.shards.stores),
        ]

    def train_rows(self, source: str) -> Segments:
        """Returns a source's training rows in the order in which samples use them."""
        return self._train[self._source(source)]

    def store_files(self) -> list[Expected]:
        """Lists the files of the token stores that the plan reads, with their checksums at the time it was made."""
        found = []
        for number, source in enumerate(self.description["sources"]):
            stores = [*self._train[number].shards.stores, *self._heldout[number].shards.stores]
            for entry, store in zip([*source["stores"], *source["heldout"]["stores"]], stores, strict=True):
                for suffix in CONTENT:
                    if sha256 := entry.get(f"{suffix[1:]}_sha256"):
                        title = f"source {source['name']}, shard {entry['path']}: the file {store.file(suffix).name}"
                        size = entry["bin_bytes"] if suffix == ".bin" else None
                        found.append(Expected(store.file(suffix), title, size, sha256))
        return found

    def row(self, i: int) -> Row:
        """Reads the training row of sample i; raises ValueError unless 0 <= i < num_samples."""
        self._check_sample(i)
        source = int(self.sample_sources[i])
        return self._row(self._train[source], int(self._sample_rows[i]), source)

    def heldout_rows(self, source: str) -> int:
        """Returns the number of rows that hold the source's held-out documents, each of them once."""
        return len(self._heldout[self._source(source)])

    def heldout_row(self, source: str, i: int) -> Row:
        """Reads held-out row i of a source; raises ValueError if there is no such row."""
        number = self._source(source)
        rows = self._heldout[number]
        if not 0 <= i < len(rows):
            raise ValueError(f"held-out row {i} of {source} does not exist; it has {len(rows)}")
        return self._row(rows, i, number)

    def heldout_segments(self, source: str, i: int) -> list[tuple[str, bool]]:
        """Returns, for each segment of held-out row i, its document's language ("": unknown) and whether it begins."""
        rows = self._heldout[self._source(source)]
        span = range(int(rows.offsets[i]), int(rows.offsets[i + 1]))
        found = (rows.shards.locate(int(rows.document[segment])) for segment in span)
        return [
            (store.language(document), not rows.start[at]) for at, (store, document) in zip(span, found, strict=True)
        ]

    def provenance(self, i: int) -> list[dict[str, Any]]:
        """Returns source, shard, document (index in the shard), document_id, start and length of sample i's segments.

        Start and length count tokens of the stored document. A segment that is rearranged for fill-in-the-middle also
        has `fim`, psm or spm, and takes three positions more than its length.
        """
        self._check_sample(i)
        source = int(self.sample_sources[i])
        rows, row = self._train[source], int(self._sample_rows[i])
        found = []
        for segment in range(int(rows.offsets[row]), int(rows.offsets[row + 1])):
            store, document = rows.shards.locate(int(rows.document[segment]))
            entry: dict[str, Any] = {
                "source": self.sources[source],
                "shard": store.path.name,
                "document": document,
                "document_id": store.document_id(document),
                "start": int(rows.start[segment]),
                "length": int(rows.length[segment]),
            }
            if rows.fim is not None and rows.fim[segment]:
                entry["fim"] = fim.NAMES[int(rows.fim[segment])]
            found.append(entry)
        return found

    def uses(self, source: str, store: str, document: int) -> list[tuple[int, int, int]]:
        """Returns (sample, start, length) of each training segment of a document, sorted; empty if it has none.

        Start and length are in tokens of the document; `store` is the name of its shard.
        """
        if source not in self.sources:
            return []
        number = self.sources.index(source)
        rows = self._train[number]
        index = rows.shards.index(store, document)
        segments = np.flatnonzero(rows.document == index)
        in_rows = np.searchsorted(rows.offsets, segments, side="right") - 1
        samples = np.flatnonzero(self.sample_sources == number)  # element n is the sample with the source's row n
        found = zip(
            samples[in_rows].tolist(), rows.start[segments].tolist(), rows.length[segments].tolist(), strict=True
        )
        return sorted(found)

    def cursors(self, samples: int) -> dict[str, Cursor]:
        """Returns the cursors after the first `samples` samples, also those of sources that the plan does not use."""
        if not 0 <= samples <= self.num_samples:
            raise ValueError(f"{samples} samples cannot be used of plan {self.path}, which has {self.num_samples}")
        found = dict(self._begins)
        for number, source in enumerate(self.description["sources"]):
            shards = self._train[number].shards
            begun = found.get(source["name"], Cursor(0, None, shards.index_checksums()))
            ends = [end["sample"] for end in source["forecast"]["epoch_ends"] if end["sample"] < samples]
            used = self._pieces(number, ends[-1] + 1 if ends else 0, samples)
            found[source["name"]] = begun.after(len(ends), used, shards.lengths)
        return found

    def _pieces(self, source: int, first: int, end: int) -> Pieces:
        """Returns the pieces of a source that samples [first, end) contain."""
        rows = self._train[source]
        mine = self._sample_rows[first:end][self.sample_sources[first:end] == source]  # consecutive rows of the source
        begin, stop = (int(rows.offsets[row]) for row in (mine[0], mine[-1] + 1)) if len(mine) else (0, 0)
        chosen = slice(begin, stop)
        return Pieces(rows.document[chosen], rows.start[chosen], rows.length[chosen].astype(np.int64))

    def _row(self, rows: Segments, row: int, source: int) -> Row:
        """Reads one row of a source's training or held-out rows."""
        size = self.seq_length
        tokens = np.full(size, self.pad_id, dtype=np.int64)
        labels = np.zeros(size, dtype=np.int64)
        loss_mask = np.zeros(size, dtype=bool)
        positions = np.zeros(size, dtype=np.int64)
        segments = np.full(size, -1, dtype=np.int64)
        first, last = int(rows.offsets[row]), int(rows.offsets[row + 1])
        at = 0
        for number, segment in enumerate(range(first, last)):
            ids, following = self._segment(rows, segment, self.sources[source])
            end, labelled = at + len(ids), at + len(following)
            tokens[at:end] = ids
            labels[at:labelled] = following
            loss_mask[at:labelled] = True
            positions[at:end] = self._count[: len(ids)]
            segments[at:end] = number
            at = end
        return Row(tokens, labels, loss_mask, positions, segments, source)

    def _segment(self, rows: Segments, segment: int, source: str) -> tuple[np.ndarray, np.ndarray]:
        """Reads (tokens, labels) of a segment; there is one label fewer if the segment ends its document."""
        index, start, length = (int(array[segment]) for array in (rows.document, rows.start, rows.length))
        store, document = rows.shards.locate(index)
        if rows.fim is not None and rows.fim[segment] and self._fim_symbols is not None:
            piece = self._ids(store, document, start, start + length, source)
            form = int(rows.fim[segment])
            return fim.rearranged(piece, form, self._fim_symbols, self._seed, source, index, start)
        # If the document goes on, its next token is the label of the segment's last position.
        ids = self._ids(store, document, start, min(start + length + 1, int(store.lengths[document])), source)
        return ids[:length], ids[1:]

    def _ids(self, store: Store, document: int, start: int, stop: int, source: str) -> np.ndarray:
        """Reads ids [start, stop) of a document; raises DamagedData for an id outside the vocabulary."""
        ids = store.tokens(document, start, stop)
        # Viewed as unsigned, a negative id is a very large one.
        if len(ids) and int(ids.view(f"u{ids.itemsize}").max()) >= self.vocab_size:
            at = int(np.flatnonzero(ids.view(f"u{ids.itemsize}") >= self.vocab_size)[0])
            raise DamagedData(
                f"source {source}, shard {store.path}, document {document}: token {start + at} is the id "
                f"{int(ids[at])}, and the vocabulary has {self.vocab_size}: the shard is damaged or of another "
                f"tokenizer; {remedy(store.path)}"
            )
        return ids

    def _segments(self, split: str, source: str, entries: list[dict[str, Any]], tokens: Path) -> Segments:
        """Opens the rows of a source, with its stores; `entries` are the stores' entries in plan.json."""
        arrays = {name: self._array(f"{split}.{source}.{name}.npy") for name in SEGMENT_ARRAYS}
        name = f"{split}.{source}.fim.npy"
        forms = self._array(name) if name in self.description["files"] else None
        shards = SourceStores([_open_store(tokens, entry) for entry in entries])
        shards.leave_out(self.gone.get(f"{split}/{source}", ()))
        return Segments(shards, [_checksums(entry) for entry in entries], **arrays, fim=forms)

    def _array(self, name: str) -> np.ndarray:
        """Opens an index array as a memory map; raises DamagedData if it is missing or its checksum does not match."""
        path, expected = self.path / name, self.description["files"][name]
        if not path.is_file():
            raise DamagedData(f"plan {self.path} lacks {name}; {remedy(path)}")
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != expected["sha256"]:
            raise DamagedData(
                f"{path} does not match its checksum in plan.json: it is damaged or of another plan; {remedy(path)}"
            )
        # asarray: a plain array over the same mapped memory is several times as fast to index as a memmap.
        return np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))

    def _check_sample(self, i: int) -> None:
        if not 0 <= i < self.num_samples:
            raise ValueError(
                f"sample {i} is outside the plan's {self.num_samples}; train for fewer steps or a smaller global "
                "batch, or raise mixture.samples and run `trivium data run` again"
            )

    def _source(self, source: str) -> int:
        if source not in self.sources:
            raise ValueError(f"source {source!r} is not in the plan; it has {', '.join(self.sources)}")
        return self.sources.index(source)


def open_plans(folder: Path) -> dict[str, Plan]:
    """Opens the plans of a data run, by the names of their stages, in order of training; one without stages is "".

    Raises ValueError as `Plan.open` does, also if there is no plan.
    """
    if (folder / PLAN_FILE).is_file():
        return {"": Plan.open(folder)}
    found = {path.parent.name: Plan.open(path) for path in folder.glob(f"*/{PLAN_FILE}")}
    if not found:
        raise ValueError(f"there is no plan in {folder}; make it with `trivium data run`")
    return dict(sorted(found.items(), key=lambda item: item[1].first_sample))


def _checksums(entry: dict[str, Any]) -> tuple[str, str]:
    return entry["bin_sha256"], entry["idx_sha256"]


def _kept(folder: Path) -> list[Path]:
    """Lists a folder of a data run and the earlier versions of it that were moved aside (see `earlier`)."""
    return [folder, *sorted(folder.parent.glob(f"{folder.name}.*"))]


def _open_store(tokens: Path, entry: dict[str, Any]) -> Store:
    """Opens the store of a plan's entry, which must have the same size and checksums; the .bin is not read."""
    stores = [Store(folder / entry["path"]) for folder in _kept(tokens) if _is_store(folder / entry["path"], entry)]
    if not stores:
        store = Store(tokens / entry["path"])  # raises if a file is missing
        store.check_index()  # raises if the index is damaged
        raise DamagedData(
            f"token store {store.path} is not the one that the plan was made of; {remedy(store.path)}, or restore it"
        )
    return stores[0]


def _is_store(path: Path, entry: dict[str, Any]) -> bool:
    """Whether the store at `path` is the one that a plan's entry describes."""
    files = {suffix: path.with_name(f"{path.name}{suffix}") for suffix in CONTENT}
    if not all(file.is_file() for file in files.values()) or files[".bin"].stat().st_size != entry["bin_bytes"]:
        return False
    index = hashlib.sha256(files[".idx"].read_bytes()).hexdigest()
    # Documents with other tokens may have the same lengths, so the .bin's checksum in the manifest counts too.
    return index == entry["idx_sha256"] and Store(path).facts()["bin_sha256"] == entry["bin_sha256"]


def _find_tokenizer(model: Path, sha256: str) -> Path:
    """Path of the tokenizer with this SHA-256, at `model` or kept aside; raises ValueError if it is not there."""
    found = [path for folder in _kept(model.parent) if (path := folder / model.name).is_file()]
    for path in found:
        if hashlib.sha256(path.read_bytes()).hexdigest() == sha256:
            return path.resolve()
    if not found:
        raise ValueError(f"the plan's tokenizer {model} does not exist; {remedy(model, _RESTORE)}")
    raise ValueError(f"tokenizer {model} is not the one that the plan was made with; {remedy(model, _RESTORE)}")
