"""A mixture plan: which documents, cut where, make up each training row, and which source gives which sample.

Every epoch of a source is shuffled by (seed, source, epoch), packed (see `packing`) and its rows shuffled;
sources take turns so that every prefix of the samples is near the weights. The plan is plan.json and a few
index arrays over token stores, no copy of tokens; `rows.Plan` reads it. Left out: stages (annealing, long
context) and UniMax.
"""

import hashlib
import json
import os
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from configs.loader import write_atomic
from data_pipeline.packing import PACKINGS, Packed
from data_pipeline.store import Shards, Store
from data_pipeline.tokenizer import Tokenizer

FORMAT, VERSION = "trivium-plan", 1
PLAN_FILE, TOKEN_BYTES = "plan.json", "token_bytes.npy"
SAMPLE_SOURCES, SAMPLE_ROWS = "sample_sources.npy", "sample_rows.npy"
SEGMENT_ARRAYS = ("document", "start", "length", "offsets")
TRAIN, HELDOUT = "train", "heldout"


@dataclass(frozen=True)
class _Source:
    """One source of a plan under way: `packed` is one epoch of it in the documents' own order."""

    name: str
    share: float
    samples: int
    shards: Shards
    packed: Packed

    @property
    def epochs(self) -> int:
        return -(-self.samples // len(self.packed))


def build_plan(
    tokens: str | Path,
    tokenizer: str | Path,
    out: str | Path,
    *,
    seq_length: int,
    samples: int,
    seed: int,
    weights: Mapping[str, float] | None = None,
    temperature: float | None = None,
    packing: str = "best_fit",
    max_epochs: int = 4,
    without: Mapping[str, Collection[tuple[str, int]]] | None = None,
) -> dict[str, Any]:
    """Writes a plan of `samples` rows of `seq_length` tokens into folder `out`; returns what plan.json says.

    `tokens` holds `train/<source>/` and `heldout/<source>/`. Give `weights` (shares by source, scaled to sum
    to one) or `temperature` (shares are tokens ** (1 / temperature), over all sources). `without` leaves documents
    out: <split>/<source> -> (name of the store, document in it).
    Errors: ValueError for weights of unknown sources, stores of another tokenizer, or too few tokens, which
    says how many there are and what to change.
    """
    tokens, out = Path(tokens), Path(out)
    if packing not in PACKINGS:
        raise ValueError(f"mixture.packing = {packing!r} is unknown; choose one of {', '.join(PACKINGS)}")
    if samples < 1 or max_epochs < 1:
        raise ValueError(f"mixture.samples = {samples} and mixture.max_epochs = {max_epochs} must be at least 1")
    model = Tokenizer.load(tokenizer)
    if model.pad_id < 0:
        raise ValueError(f"tokenizer {model.origin} has no <pad>; rows are filled up with it")
    gone = without or {}
    opened = _open_sources(tokens / TRAIN, weights, gone)
    shares = mixture_shares({name: shards.lengths.sum() for name, shards in opened.items()}, weights, temperature)
    counts = apportion(list(shares.values()), samples)
    sources = []
    for (name, shards), count in zip(opened.items(), counts, strict=True):
        _check_stores(shards.stores, model)
        packed = PACKINGS[packing](shards.lengths, seq_length)
        if not len(packed):
            raise ValueError(f"source {name} has no tokens under {tokens / TRAIN / name}; leave it out of the mixture")
        sources.append(_Source(name, shares[name], int(count), shards, packed))
    _check_enough(sources, samples, max_epochs)

    files: dict[str, Any] = {}
    sample_sources = interleave(counts)
    arrays: dict[str, np.ndarray] = {TOKEN_BYTES: model.token_bytes, SAMPLE_SOURCES: sample_sources.astype(np.uint16)}
    arrays[SAMPLE_ROWS] = _running_counts(sample_sources)
    described = []
    for source in sources:
        used = _epochs(source, seq_length, seed, packing)
        arrays |= _segment_arrays(f"{TRAIN}.{source.name}", used)
        heldout_folder = tokens / HELDOUT / source.name
        heldout = Shards.in_folder(heldout_folder) if heldout_folder.is_dir() else Shards([])
        heldout.leave_out(gone.get(f"{HELDOUT}/{source.name}", ()))
        _check_stores(heldout.stores, model)
        held_rows = PACKINGS[packing](heldout.lengths, seq_length)
        arrays |= _segment_arrays(f"{HELDOUT}.{source.name}", held_rows)
        described.append(_describe(source, used, heldout, held_rows, seq_length, tokens))
    out.mkdir(parents=True, exist_ok=True)
    for name, array in arrays.items():
        files[name] = _save(out / name, array)
    trained = sum(source["trained_tokens"] for source in described)
    plan = {
        "format": FORMAT,
        "version": VERSION,
        "seq_length": seq_length,
        "samples": samples,
        "seed": seed,
        "packing": packing,
        "weights": dict(weights) if weights else None,
        "temperature": temperature,
        "max_epochs": max_epochs,
        "padding_share": round(1 - trained / (samples * seq_length), 6),
        "tokens": os.path.relpath(tokens, out),
        "tokenizer": {
            "model": os.path.relpath(model.origin, out),
            "sha256": model.sha256,
            "vocab_size": model.vocab_size,
            "special_ids": model.special_ids,
            "pad_id": model.pad_id,
        },
        "sources": described,
        "files": files,
    }
    write_atomic(out / PLAN_FILE, (json.dumps(plan, indent=1, ensure_ascii=False) + "\n").encode())
    return plan


def mixture_shares(
    tokens: Mapping[str, int], weights: Mapping[str, float] | None, temperature: float | None
) -> dict[str, float]:
    """Shares by source, summing to one; a temperature above 1 evens out the sources' sizes."""
    if weights is not None and temperature is None:
        raw = dict(weights)
    elif temperature is not None and weights is None:
        raw = {name: float(size) ** (1 / temperature) for name, size in tokens.items()}
    else:
        raise ValueError("mixture takes exactly one of weights and temperature; set one, leave out the other")
    bad = [name for name, value in raw.items() if not value > 0]
    if bad:
        raise ValueError(f"source {bad[0]} has weight {raw[bad[0]]}, expected above 0; leave it out of the mixture")
    total = sum(raw.values())
    return {name: raw[name] / total for name in tokens}


def apportion(shares: Iterable[float], samples: int) -> np.ndarray:
    """Whole numbers nearest to shares * samples that sum to `samples` (largest remainders)."""
    exact = np.array(list(shares), dtype=np.float64) * samples
    counts = np.floor(exact).astype(np.int64)
    largest = np.argsort(-(exact - counts), kind="stable")
    counts[largest[: samples - int(counts.sum())]] += 1
    return counts


def interleave(counts: np.ndarray) -> np.ndarray:
    """Source of each sample, evenly spread: the k-th of a source's n samples falls at time (k + 1/2) / n."""
    source = np.repeat(np.arange(len(counts)), counts)
    times = np.concatenate([(np.arange(n) + 0.5) / n for n in counts if n])
    return source[np.lexsort((source, times))]


def _running_counts(sources: np.ndarray) -> np.ndarray:
    """How many earlier samples have the same source: the row, in its source, of each sample."""
    rows = np.empty(len(sources), dtype=np.int64)
    for number in np.unique(sources):
        places = np.flatnonzero(sources == number)
        rows[places] = np.arange(len(places))
    return rows


def _open_sources(
    folder: Path, weights: Mapping[str, float] | None, gone: Mapping[str, Collection[tuple[str, int]]]
) -> dict[str, Shards]:
    found = sorted(path.name for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
    if not found:
        raise ValueError(f"no token stores under {folder}; run `trivium data run` first")
    unknown = sorted(set(weights or {}) - set(found))
    if unknown:
        raise ValueError(f"mixture.weights.{unknown[0]}: there is no such source; tokens hold {', '.join(found)}")
    opened = {name: Shards.in_folder(folder / name) for name in (weights or found)}
    for name, shards in opened.items():
        shards.leave_out(gone.get(f"{TRAIN}/{name}", ()))
    return opened


def _check_stores(stores: Iterable[Store], model: Tokenizer) -> None:
    for store in stores:
        if store.facts()["tokenizer_sha256"] != model.sha256:
            raise ValueError(
                f"token store {store.path} was made with another tokenizer than {model.origin}; "
                "tokenize it again, or name its own tokenizer"
            )


def _check_enough(sources: list[_Source], samples: int, max_epochs: int) -> None:
    short = [source for source in sources if source.epochs > max_epochs]
    if not short:
        return
    lacks = []
    for source in short:
        rows = len(source.packed)
        lacks.append(
            f"{source.name} is to give {source.samples:,} rows ({source.share:.1%}) and has {rows:,} an epoch "
            f"({int(source.shards.lengths.sum(dtype=np.int64)):,} tokens in {len(source.shards.lengths):,} "
            f"documents): at most {max_epochs * rows / samples:.1%} of the mixture, or {source.epochs} epochs"
        )
    most = min(int(max_epochs * len(source.packed) / source.share) for source in sources)
    raise ValueError(
        f"too few tokens for mixture.samples = {samples:,} within mixture.max_epochs = {max_epochs}: "
        f"{'; '.join(lacks)}. Lower mixture.samples to {most:,}, lower the weight of "
        f"{' and '.join(source.name for source in short)}, raise mixture.max_epochs to "
        f"{max(source.epochs for source in short)}, or add text"
    )


def _epochs(source: _Source, seq_length: int, seed: int, packing: str) -> Packed:
    """The first `samples` rows of the source's epochs."""
    parts: list[Packed] = []
    missing = source.samples
    lengths = source.shards.lengths
    for epoch in range(source.epochs):
        order = _generator(seed, source.name, epoch, "documents").permutation(len(lengths))
        packed = PACKINGS[packing](lengths[order], seq_length)
        packed = Packed(order[packed.document], packed.start, packed.length, packed.offsets)
        # Neighbouring rows are of one document or of like lengths: training must not see them in a run.
        rows = _generator(seed, source.name, epoch, "rows").permutation(len(packed))[:missing]
        parts.append(packed.take(rows))
        missing -= len(rows)
    if not parts:
        return source.packed.take(np.zeros(0, np.int64))
    ends = np.cumsum([0, *(int(part.offsets[-1]) for part in parts)])
    return Packed(
        np.concatenate([part.document for part in parts]),
        np.concatenate([part.start for part in parts]),
        np.concatenate([part.length for part in parts]),
        np.concatenate([[0], *(part.offsets[1:] + end for part, end in zip(parts, ends, strict=False))]),
    )


def _generator(seed: int, source: str, epoch: int, what: str) -> np.random.Generator:
    key = hashlib.sha256(json.dumps([seed, source, epoch, what]).encode()).digest()
    return np.random.Generator(np.random.PCG64(int.from_bytes(key[:16], "little")))


def _segment_arrays(prefix: str, packed: Packed) -> dict[str, np.ndarray]:
    dtypes = {"document": np.int64, "start": np.int64, "length": np.int32, "offsets": np.int64}
    return {f"{prefix}.{name}.npy": getattr(packed, name).astype(dtypes[name]) for name in SEGMENT_ARRAYS}


def _describe(
    source: _Source, used: Packed, heldout: Shards, held_rows: Packed, seq_length: int, tokens: Path
) -> dict[str, Any]:
    lengths = source.shards.lengths
    epoch = {key: round(value, 6) for key, value in source.packed.stats(lengths, seq_length).items()}
    return {
        "name": source.name,
        "share": source.share,
        "samples": source.samples,
        "epochs": round(source.samples / len(source.packed), 6),
        "rows_per_epoch": len(source.packed),
        "documents": len(lengths),
        "tokens": int(lengths.sum(dtype=np.int64)),
        "trained_tokens": int(used.length.sum(dtype=np.int64)),
        **epoch,
        "stores": [_store_entry(store, tokens) for store in source.shards.stores],
        "heldout": {
            "rows": len(held_rows),
            "documents": len(heldout.lengths),
            "tokens": int(heldout.lengths.sum(dtype=np.int64)),
            "stores": [_store_entry(store, tokens) for store in heldout.stores],
        },
    }


def _store_entry(store: Store, tokens: Path) -> dict[str, Any]:
    facts = store.facts()
    return {
        "path": store.path.relative_to(tokens).as_posix(),
        "documents": len(store),
        "bin_bytes": store.file(".bin").stat().st_size,
        **{key: facts[key] for key in ("bin_sha256", "idx_sha256", "text_bytes")},
    }


def _save(path: Path, array: np.ndarray) -> dict[str, Any]:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w+b") as file:
            np.save(file, array, allow_pickle=False)
            file.flush()
            os.fsync(file.fileno())
            file.seek(0)
            entry = {"sha256": hashlib.file_digest(file, "sha256").hexdigest(), "bytes": file.tell()}
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return {**entry, "dtype": array.dtype.name, "shape": list(array.shape)}
