"""A mixture plan: which documents, cut where, make up each training row, and which source gives which sample.

Every epoch of a source is shuffled, packed and its rows shuffled (`epochs`); sources take turns so that every prefix
of the samples is near the weights (`weights`). The plan is plan.json and a few index arrays over token stores, no copy
of tokens; `rows.Plan` reads it, `forecast` says when each source runs out.
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
from data_pipeline import fim as fill
from data_pipeline.epochs import Documents
from data_pipeline.forecast import check_enough, foreseen, packings
from data_pipeline.packing import PACKINGS, Packed
from data_pipeline.store import Shards, Store
from data_pipeline.tokenizer import Tokenizer
from data_pipeline.weights import apportion, interleave, mixture_shares, running_counts, unimax_shares

FORMAT, VERSION = "trivium-plan", 1
PLAN_FILE, TOKEN_BYTES = "plan.json", "token_bytes.npy"
SAMPLE_SOURCES, SAMPLE_ROWS = "sample_sources.npy", "sample_rows.npy"
SEGMENT_ARRAYS = ("document", "start", "length", "offsets")
TRAIN, HELDOUT = "train", "heldout"


@dataclass(frozen=True)
class _Source:
    """One source of a plan under way: `packed` is one epoch of it in the documents' own order."""

    name: str
    shards: Shards
    documents: Documents
    packed: Packed
    max_epochs: float
    forms: np.ndarray | None  # of fill-in-the-middle, by document


@dataclass(frozen=True)
class Draft:
    """A mixture laid out, of which nothing is written yet. `sample_sources`: number of the source of each sample."""

    settings: dict[str, Any]
    model: Tokenizer
    sources: list[_Source]
    shares: dict[str, float]
    sample_sources: np.ndarray

    def outlook(self) -> dict[str, Any]:
        """What plan.json will say of the mixture and each source's training rows, and `forecast.show` prints."""
        return {**self.settings, "sources": [self._outlook(number) for number in range(len(self.sources))]}

    def _outlook(self, number: int) -> dict[str, Any]:
        source, samples = self.sources[number], len(self.sample_sources)
        places = np.flatnonzero(self.sample_sources == number)
        rows, lengths = len(source.packed), source.documents.lengths
        return {
            "name": source.name,
            "share": self.shares[source.name],
            "samples": len(places),
            "epochs": round(len(places) / rows, 6),
            "rows_per_epoch": rows,
            "documents": len(lengths),
            "tokens": int(lengths.sum(dtype=np.int64)),
            "forecast": foreseen(source.documents, places, samples, source.max_epochs),
            "packings": packings(source.documents),
        }


def lay_out(
    tokens: str | Path,
    tokenizer: str | Path,
    *,
    seq_length: int,
    samples: int,
    seed: int,
    weights: Mapping[str, float] | None = None,
    temperature: float | None = None,
    unimax: bool = False,
    packing: str = "best_fit",
    max_epochs: int = 4,
    epochs: Mapping[str, float] | None = None,
    fim: Mapping[str, float] | None = None,
    fim_spm: float = 0.5,
    without: Mapping[str, Collection[tuple[str, int]]] | None = None,
) -> Draft:
    """A mixture of `samples` rows of `seq_length` tokens; writes nothing.

    `tokens` holds `train/<source>/` and `heldout/<source>/`. Give `weights` (shares by source, scaled to sum
    to one), `temperature` (shares are tokens ** (1 / temperature), over all sources) or `unimax` (over all sources, as
    even as the caps on epochs allow; the budget is samples * seq_length, padding included). `epochs` are the caps of
    single sources in place of `max_epochs`, `fim` the shares of their documents for fill-in-the-middle, `fim_spm` of
    those in SPM form. `without` leaves documents out: <split>/<source> -> (name of the store, document in it).
    Errors: ValueError for settings of unknown sources, stores of another tokenizer, or too few tokens, which
    says how many there are and what to change.
    """
    tokens, epochs, fim = Path(tokens), dict(epochs or {}), dict(fim or {})
    if packing not in PACKINGS:
        raise ValueError(f"mixture.packing = {packing!r} is unknown; choose one of {', '.join(PACKINGS)}")
    if samples < 1 or max_epochs < 1:
        raise ValueError(f"mixture.samples = {samples} and mixture.max_epochs = {max_epochs} must be at least 1")
    if (weights is not None) + (temperature is not None) + unimax != 1:
        raise ValueError("mixture takes exactly one of weights, temperature and unimax; set one, leave out the others")
    model = Tokenizer.load(tokenizer)
    if model.pad_id < 0:
        raise ValueError(f"tokenizer {model.origin} has no <pad>; rows are filled up with it")
    named = {"weights": weights or {}, "epochs": epochs, "fim": fim}
    sources = []
    opened = _open_sources(tokens / TRAIN, named, without or {})
    if fim:
        fill.Symbols.of(model.special_ids)
    for name, shards in opened.items():
        _check_stores(shards.stores, model)
        forms = fill.draw(seed, name, len(shards.lengths), fim[name], fim_spm) if name in fim else None
        extra = np.zeros(len(shards.lengths), np.int64) if forms is None else fill.SENTINELS * (forms > 0)
        documents = Documents(name, shards.lengths, extra, seed, seq_length, packing)
        packed = documents.whole()
        if not len(packed):
            raise ValueError(f"source {name} has no tokens under {tokens / TRAIN / name}; leave it out of the mixture")
        sources.append(_Source(name, shards, documents, packed, epochs.get(name, max_epochs), forms))
    shares = _shares(sources, samples, weights, temperature)
    counts = apportion(list(shares.values()), samples)
    settings = {
        "seq_length": seq_length,
        "samples": samples,
        "seed": seed,
        "packing": packing,
        "weights": dict(weights) if weights else None,
        "temperature": temperature,
        "unimax": unimax,
        "max_epochs": max_epochs,
        "epochs": epochs,
        "fim": fim,
        "fim_spm": fim_spm,
    }
    _check_enough(sources, shares, counts, settings)
    return Draft(settings, model, sources, shares, interleave(counts))


def build_plan(
    tokens: str | Path,
    tokenizer: str | Path,
    out: str | Path,
    *,
    without: Mapping[str, Collection[tuple[str, int]]] | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Writes the plan that `lay_out` makes of the same settings into folder `out`; returns what plan.json says.

    Errors: ValueError as `lay_out`; nothing is written then.
    """
    tokens, out = Path(tokens), Path(out)
    draft = lay_out(tokens, tokenizer, without=without, **settings)
    plan, model = draft.outlook(), draft.model
    arrays: dict[str, np.ndarray] = {
        TOKEN_BYTES: model.token_bytes,
        SAMPLE_SOURCES: draft.sample_sources.astype(np.uint16),
        SAMPLE_ROWS: running_counts(draft.sample_sources),
    }
    described, filled = [], 0
    for source, outlook in zip(draft.sources, plan.pop("sources"), strict=True):
        used = source.documents.rows(outlook["samples"])
        arrays |= _segment_arrays(f"{TRAIN}.{source.name}", used)
        if source.forms is not None:
            arrays[f"{TRAIN}.{source.name}.fim.npy"] = source.forms[used.document]
        filled += int(used.length.sum(dtype=np.int64)) + int(source.documents.extra[used.document].sum())
        heldout_folder = tokens / HELDOUT / source.name
        heldout = Shards.in_folder(heldout_folder) if heldout_folder.is_dir() else Shards([])
        heldout.leave_out((without or {}).get(f"{HELDOUT}/{source.name}", ()))
        _check_stores(heldout.stores, model)
        held_rows = PACKINGS[plan["packing"]](heldout.lengths, plan["seq_length"])
        arrays |= _segment_arrays(f"{HELDOUT}.{source.name}", held_rows)
        described.append(outlook | _describe(source, used, heldout, held_rows, tokens))
    out.mkdir(parents=True, exist_ok=True)
    files = {name: _save(out / name, array) for name, array in arrays.items()}
    plan = {
        "format": FORMAT,
        "version": VERSION,
        **plan,
        "padding_share": round(1 - filled / (plan["samples"] * plan["seq_length"]), 6),
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


def _shares(
    sources: list[_Source], samples: int, weights: Mapping[str, float] | None, temperature: float | None
) -> dict[str, float]:
    if weights is None and temperature is None:
        return unimax_shares(
            {source.name: source.documents.most_rows(source.max_epochs) for source in sources}, samples
        )
    sizes = {source.name: source.documents.lengths.sum() for source in sources}
    return mixture_shares(sizes, weights, temperature)


def _check_enough(
    sources: list[_Source], shares: Mapping[str, float], counts: np.ndarray, settings: Mapping[str, Any]
) -> None:
    asked = [
        {
            "name": source.name,
            "share": shares[source.name],
            "samples": int(count),
            "rows_per_epoch": len(source.packed),
            "most_rows": source.documents.most_rows(source.max_epochs),
            "tokens": int(source.documents.lengths.sum(dtype=np.int64)),
            "documents": len(source.documents.lengths),
        }
        for source, count in zip(sources, counts, strict=True)
    ]
    check_enough(asked, settings["samples"], settings["max_epochs"], settings["epochs"], capped=settings["unimax"])


def _open_sources(
    folder: Path, named: Mapping[str, Mapping[str, float]], gone: Mapping[str, Collection[tuple[str, int]]]
) -> dict[str, Shards]:
    """The sources of the weights, or all. `named`: the mixture's keys that name sources."""
    found = sorted(path.name for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
    if not found:
        raise ValueError(f"no token stores under {folder}; run `trivium data run` first")
    for key, names in named.items():
        for name in sorted(set(names) - set(found)):
            raise ValueError(f"mixture.{key}.{name}: there is no such source; tokens hold {', '.join(found)}")
    opened = {name: Shards.in_folder(folder / name) for name in (named["weights"] or found)}
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


def _segment_arrays(prefix: str, packed: Packed) -> dict[str, np.ndarray]:
    dtypes = {"document": np.int64, "start": np.int64, "length": np.int32, "offsets": np.int64}
    return {f"{prefix}.{name}.npy": getattr(packed, name).astype(dtypes[name]) for name in SEGMENT_ARRAYS}


def _describe(source: _Source, used: Packed, heldout: Shards, held_rows: Packed, tokens: Path) -> dict[str, Any]:
    """What is known of a source once its rows are there, beside what was foreseen."""
    documents = source.documents
    stats = source.packed.stats(documents.lengths, documents.seq_length, documents.extra)
    told: dict[str, Any] = {"trained_tokens": int(used.length.sum(dtype=np.int64))}
    if source.forms is not None:
        forms = source.forms[used.document]
        told["fim_pieces"] = {name: int((forms == form).sum()) for form, name in fill.NAMES.items()}
    return {
        **told,
        **{key: round(value, 6) for key, value in stats.items()},
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
