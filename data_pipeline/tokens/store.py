"""Token stores: Megatron's `.bin` and `.idx`, a parquet table and a manifest; one store per shard of documents.

`.bin` holds the ids of all documents, each as <s> text </s>, or without <s> if
the tokenizer begins no document so. `.idx` (magic MMIDIDX, version 1) holds their lengths and
byte offsets, so that megatron-core's IndexedDataset can read the store. `.parquet` holds, for each document index, the
document's id, file, position, bytes and scores. `.json` holds the checksums of the other three files and of the
tokenizer, counts, and a checksum of these values. A store is written under temporary names and renamed when it is
complete. Several sequences per document and modes, which the format allows, are not supported.
"""

import bisect
import hashlib
import json
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from configs.sealed import STORE
from data_pipeline.core.checked_parquet import read_parquet, readable
from data_pipeline.core.integrity import DamagedData, file_sha256, read_sealed, remedy, seal

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
DTYPES: dict[int, np.dtype] = {
    4: np.dtype(np.int32),
    8: np.dtype(np.uint16),
}  # by the codes of megatron-core's DType
UINT16_VOCAB = 65_500  # megatron-core's own limit for uint16
CONTENT = (".bin", ".idx", ".parquet")
MANIFEST = ".json"
SUFFIXES = (*CONTENT, MANIFEST)
_HEADER = struct.Struct("<9sQBQQ")
_BATCH_CHARS = 1_000_000
_OWN_COLUMNS = ("file", "position", "bytes", "scores")

SCHEMA = pa.schema(
    [
        ("document", pa.int64()),  # index in the store
        ("id", pa.string()),
        ("file", pa.string()),  # name of its input file
        ("position", pa.int64()),  # its line or byte offset there
        ("start", pa.int64()),  # index of its first token in the .bin
        ("length", pa.int32()),  # in tokens, with those that begin and end it
        ("bytes", pa.int64()),  # of its text in UTF-8
        ("scores", pa.map_(pa.string(), pa.float64())),
        ("metadata", pa.string()),  # its other metadata, as JSON
    ]
)


class Encoder(Protocol):
    """The interface of a tokenizer that `build` uses."""

    vocab_size: int
    bos_id: int
    eos_id: int
    sha256: str
    origin: str

    def encode_arrays(self, texts: list[str]) -> list[np.ndarray]:
        """Returns the int32 ids of each text."""
        ...


def store_dtype(vocab_size: int) -> np.dtype:
    """Returns the type of a store's ids, uint16 if the vocabulary fits, else int32."""
    return DTYPES[8] if vocab_size < UINT16_VOCAB else DTYPES[4]


@dataclass(frozen=True)
class WrittenStore:
    """Counts of a new store; `text_bytes` are UTF-8 bytes, `tokens` include those that begin and end documents."""

    documents: int
    tokens: int
    text_bytes: int


def build(
    documents: str | Path, out: str | Path, tokenizer: Encoder, progress: Callable[[int], None] | None = None
) -> WrittenStore:
    """Tokenizes one file of documents into the store `<out>.bin`, `<out>.idx`, `<out>.parquet` and `<out>.json`.

    `progress` is called with the bytes of text encoded since its last call. Raises ValueError for a damaged file, for
    text that cannot be encoded, and for a tokenizer without a token that ends a document.
    """
    out = Path(out)
    if tokenizer.eos_id < 0:
        raise ValueError(
            f"tokenizer {tokenizer.origin} has no token that ends a document, and a store puts one after each; set "
            "tokenizer.end_of_document"
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = {suffix: out.with_name(f".{out.name}{suffix}.{os.getpid()}.tmp") for suffix in SUFFIXES}
    try:
        written, checksums = _write(documents, temporary, tokenizer, progress)
        # The index comes last: a store exists once its .idx does.
        for suffix in (".bin", ".parquet", MANIFEST, ".idx"):
            with temporary[suffix].open("rb") as file:
                os.fsync(file.fileno())
            os.replace(temporary[suffix], out.with_name(out.name + suffix))
        for suffix, sha256 in checksums.items():
            seal(out.with_name(out.name + suffix), sha256)
    finally:
        for path in temporary.values():
            path.unlink(missing_ok=True)
    return written


def _write(
    documents: str | Path,
    paths: dict[str, Path],
    tokenizer: Encoder,
    progress: Callable[[int], None] | None,
) -> tuple[WrittenStore, dict[str, str]]:
    """Writes a store to `paths`, by suffix; returns its counts and the SHA-256 of each file but the manifest."""
    from data_pipeline.core.shards import read_records  # here, since a rank reads stores and need not load datatrove

    dtype = store_dtype(tokenizer.vocab_size)
    bos, eos = np.array([tokenizer.bos_id] * (tokenizer.bos_id >= 0), np.int64), np.array([tokenizer.eos_id])
    lengths: list[int] = []
    start = text_bytes = 0
    checksum = hashlib.sha256()
    with (
        paths[".bin"].open("wb") as tokens,
        pq.ParquetWriter(paths[".parquet"], SCHEMA, compression="zstd", write_page_checksum=True) as table,
    ):
        for batch in _batches(read_records(documents)):
            rows = []
            for record, ids in zip(batch, _encode(batch, tokenizer, documents), strict=True):
                content = np.concatenate([bos, ids, eos], dtype=dtype, casting="unsafe").tobytes()
                tokens.write(content)
                checksum.update(content)
                length = len(bos) + len(ids) + 1
                rows.append(_table_row(record, len(lengths), start, length))
                lengths.append(length)
                start += length
            table.write_table(pa.Table.from_pylist(rows, schema=SCHEMA))
            size = sum(row["bytes"] for row in rows)
            text_bytes += size
            if progress:
                progress(size)
    index = _index(np.array(lengths, dtype=np.int64), dtype)
    paths[".idx"].write_bytes(index)
    checksums = {
        ".bin": checksum.hexdigest(),
        ".idx": hashlib.sha256(index).hexdigest(),
        ".parquet": file_sha256(paths[".parquet"]),
    }
    facts = {
        **{f"{suffix[1:]}_sha256": sha256 for suffix, sha256 in checksums.items()},
        "tokenizer_sha256": tokenizer.sha256,
        "vocab_size": tokenizer.vocab_size,
        "documents": len(lengths),
        "tokens": start,
        "text_bytes": text_bytes,
    }
    paths[MANIFEST].write_bytes(STORE.write(facts))
    return WrittenStore(len(lengths), start, text_bytes), checksums


def _batches(records: Iterator[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """Yields lists of records with about _BATCH_CHARS characters of text in all."""
    batch: list[dict[str, Any]] = []
    size = 0
    for record in records:
        batch.append(record)
        size += len(record["text"])
        if size >= _BATCH_CHARS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _encode(batch: list[dict[str, Any]], tokenizer: Encoder, origin: str | Path) -> list[np.ndarray]:
    """Encodes the texts of a batch; raises ValueError with file and ids if one of them is not valid Unicode."""
    try:
        return tokenizer.encode_arrays([record["text"] for record in batch])
    except ValueError as error:
        first, last = batch[0].get("id"), batch[-1].get("id")
        raise ValueError(f"{origin}, documents {first!r} to {last!r}: {error}") from None


def _table_row(record: dict[str, Any], document: int, start: int, length: int) -> dict[str, Any]:
    """Returns a document's row in the store's table."""
    metadata = dict(record.get("metadata") or {})
    own = {name: metadata.pop(name, None) for name in _OWN_COLUMNS}
    return {
        "document": document,
        "id": str(record.get("id", document)),
        "file": own["file"],
        "position": own["position"],
        "start": start,
        "length": length,
        "bytes": len(record["text"].encode()),
        "scores": list((own["scores"] or {}).items()),
        "metadata": json.dumps(metadata, ensure_ascii=False, sort_keys=True),
    }


def _index(lengths: np.ndarray, dtype: np.dtype) -> bytes:
    """Returns the content of an .idx file for documents of one sequence each."""
    code = next(code for code, known in DTYPES.items() if known == dtype)
    pointers = np.zeros(len(lengths), dtype=np.int64)
    np.cumsum(lengths[:-1] * dtype.itemsize, out=pointers[1:])
    documents = np.arange(len(lengths) + 1, dtype=np.int64)
    header = _HEADER.pack(MAGIC, VERSION, code, len(lengths), len(documents))
    return b"".join([header, lengths.astype(np.int32).tobytes(), pointers.tobytes(), documents.tobytes()])


class Store:
    """An opened store, read through a memory map; `lengths`, int32 [documents], are the tokens of each document."""

    def __init__(self, path: str | Path) -> None:
        """Opens the store `<path>.bin` etc.; raises DamagedData if a file is missing or malformed."""
        self.path = Path(path)
        missing = [suffix for suffix in CONTENT if not self.file(suffix).is_file()]
        if missing:
            raise DamagedData(
                f"token store {self.path} has no {' and no '.join(missing)} file; {remedy(self.path)}, or correct the "
                "path"
            )
        self.index_sha256, self.dtype, self.lengths, self._starts = self._read_index()
        self.num_tokens = int(self.lengths.sum(dtype=np.int64))
        expected, found = self.num_tokens * self.dtype.itemsize, self.file(".bin").stat().st_size
        if expected != found:
            raise DamagedData(
                f"token store {self.file('.bin')} has {found:,} bytes, its index expects {expected:,}: "
                f"it was cut or belongs to another index; {remedy(self.path)}"
            )
        mapped = np.memmap(self.file(".bin"), self.dtype, "r") if found else np.zeros(0, self.dtype)
        self._tokens = np.asarray(mapped)  # slicing a plain array is several times as fast
        self._ids: list[str] | None = None
        self._languages: list[str] | None = None

    def file(self, suffix: str) -> Path:
        """Path of the store's file with this suffix."""
        return self.path.with_name(self.path.name + suffix)

    def __len__(self) -> int:
        return len(self.lengths)

    def tokens(self, document: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Returns ids [start, stop) of a document as a view of the file; the bounds must lie within the document."""
        first = int(self._starts[document])
        length = int(self.lengths[document])
        return self._tokens[first + start : first + (length if stop is None else stop)]

    def facts(self) -> dict[str, Any]:
        """Returns the manifest's checksums and counts; raises DamagedData if it is missing or changed."""
        if self.file(MANIFEST).is_file():
            return read_sealed(STORE, self.file(MANIFEST))
        with readable(self.file(".parquet")):
            metadata = pq.read_metadata(self.file(".parquet")).metadata or {}
        if b"trivium" not in metadata:  # earlier versions kept them there
            raise DamagedData(f"token store {self.path} has no {MANIFEST} file; {remedy(self.path)}")
        return json.loads(metadata[b"trivium"])

    def document_id(self, document: int) -> str:
        """Returns the id of a document, read from the table at the first call."""
        if self._ids is None:
            self._ids = read_parquet(self.file(".parquet"), ["id"])["id"].to_pylist()
        return self._ids[document]

    def language(self, document: int) -> str:
        """Returns the identified language of a document, "" if it is not known; reads the table at the first call."""
        if self._languages is None:
            column = read_parquet(self.file(".parquet"), ["metadata"])["metadata"]
            self._languages = [str(json.loads(text).get("language") or "") for text in column.to_pylist()]
        return self._languages[document]

    def check_index(self) -> None:
        """Raises DamagedData if the SHA-256 of the index is not the one in the manifest."""
        if self.index_sha256 != self.facts()["idx_sha256"]:
            raise DamagedData(
                f"token store {self.file('.idx')} does not match its checksum: it is damaged or of another run; "
                f"{remedy(self.path)}"
            )

    def _read_index(self) -> tuple[str, np.dtype, np.ndarray, np.ndarray]:
        """Reads (SHA-256 of the .idx, type of ids, tokens of each document, index of each one's first token)."""
        path = self.file(".idx")
        content = path.read_bytes()
        if len(content) < _HEADER.size or not content.startswith(MAGIC):
            raise DamagedData(f"{path} is no token index (it does not start with {MAGIC!r}); {remedy(path)}")
        _, version, code, sequences, documents = _HEADER.unpack_from(content)
        if version != VERSION or code not in DTYPES:
            known = ", ".join(f"{key} ({value.name})" for key, value in DTYPES.items())
            raise DamagedData(
                f"{path} has version {version} and dtype code {code}; what can be read is version {VERSION} "
                f"with dtype codes {known}; {remedy(path)}"
            )
        if documents != sequences + 1 or len(content) != _HEADER.size + 12 * sequences + 8 * documents:
            raise DamagedData(
                f"{path} has {len(content):,} bytes for {sequences:,} sequences and {documents - 1:,} documents: "
                f"it was cut, or its documents have several sequences, which is not supported; {remedy(path)}"
            )
        lengths = np.frombuffer(content, np.int32, sequences, _HEADER.size)
        pointers = np.frombuffer(content, np.int64, sequences, _HEADER.size + 4 * sequences)
        return hashlib.sha256(content).hexdigest(), DTYPES[code], lengths, pointers // DTYPES[code].itemsize


class SourceStores:
    """The stores of one source, addressed as one: document indices continue from store to store."""

    def __init__(self, stores: Sequence[Store]) -> None:
        self.stores = list(stores)
        self.lengths = np.concatenate([np.zeros(0, np.int32), *(store.lengths for store in stores)])
        self._first = np.cumsum([0, *(len(store) for store in stores)]).tolist()

    @classmethod
    def in_folder(cls, folder: str | Path) -> "SourceStores":
        """Opens all stores in a folder, sorted by name; raises ValueError if there is none or one is damaged."""
        paths = sorted(path.with_suffix("") for path in Path(folder).glob("[!.]*.idx"))
        if not paths:
            raise ValueError(f"no token store in {folder}; run `trivium data run`, or correct the path")
        stores = [Store(path) for path in paths]
        for store in stores:
            store.check_index()
        return cls(stores)

    def index_checksums(self) -> tuple[str, ...]:
        """Returns the SHA-256 of each store's index."""
        return tuple(store.index_sha256 for store in self.stores)

    def locate(self, document: int) -> tuple[Store, int]:
        """Returns (store, index of the document in it)."""
        number = bisect.bisect_right(self._first, document) - 1
        return self.stores[number], document - self._first[number]

    def leave_out(self, documents: Iterable[tuple[str, int]]) -> None:
        """Sets the lengths of documents, given as (store, index in it), to 0, so that packing takes nothing of them."""
        for store, document in documents:
            self.lengths[self.index(store, document)] = 0

    def index(self, store: str, document: int) -> int:
        """Returns a document's index among all stores; raises ValueError if the source has no store of that name."""
        names = [one.path.name for one in self.stores]
        if store not in names:
            raise ValueError(f"there is no token store {store!r} here; there are {', '.join(names)}")
        return self._first[names.index(store)] + document
