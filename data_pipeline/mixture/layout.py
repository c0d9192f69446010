"""A mixture laid out: which documents, cut where, make up each training row, and which source gives which sample.

Every epoch of a source is shuffled, packed and its rows shuffled (`epochs`); sources take turns so that every prefix
of the samples is near the weights (`weights`). A mixture may go on from an earlier plan: each source begins where that
one left it (`cursor`), whatever changes: weights, sequence length, packing. `plan_files` writes what is laid out,
`forecast` says when each source runs out.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.mixture import fim as fill
from data_pipeline.mixture.cursor import Cursor
from data_pipeline.mixture.epochs import Documents
from data_pipeline.mixture.forecast import check_enough, foreseen, packings
from data_pipeline.mixture.packing import PACKINGS, Packed
from data_pipeline.mixture.rows import Plan
from data_pipeline.mixture.weights import apportion, mixture_shares, take_turns, unimax_shares
from data_pipeline.tokens.store import Shards, Store
from data_pipeline.tokens.tokenizer import Tokenizer

TRAIN, HELDOUT = "train", "heldout"

Gone = Mapping[str, Collection[tuple[str, int]]]  # <split>/<source> -> (name of the store, document in it)


@dataclass(frozen=True)
class Source:
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
    sources: list[Source]
    shares: dict[str, float]
    sample_sources: np.ndarray
    cursors: dict[str, Cursor]  # where sources begin, those at rest too; none of a mixture that goes on from nothing
    gone: dict[str, list[tuple[str, int]]]

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
    without: Gone | None = None,
    after: tuple[Plan, int] | None = None,
    key: str = "mixture",
) -> Draft:
    """A mixture of `samples` rows of `seq_length` tokens; writes nothing.

    `tokens` holds `train/<source>/` and `heldout/<source>/`. Give `weights` (shares by source, scaled to sum
    to one), `temperature` (shares are tokens ** (1 / temperature), over all sources) or `unimax` (over all sources, as
    even as the caps on epochs allow; the budget is samples * seq_length, padding included). `epochs` are the caps of
    single sources in place of `max_epochs`, `fim` the shares of their documents for fill-in-the-middle, `fim_spm` of
    those in SPM form. `without` leaves documents out. `after` is an earlier plan and the number of its samples that are
    used: no token of theirs comes again before its source's epoch is over, caps on epochs count them, and what that
    plan left out stays out. `key` is what messages call the mixture.
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
    cursors = after[0].cursors(after[1]) if after else {}
    gone = _together(without or {}, after[0].gone if after else {})
    sources = []
    opened = _open_sources(tokens / TRAIN, named, gone, key)
    if fim:
        fill.Symbols.of(model.special_ids)
    for name, shards in opened.items():
        check_stores(shards.stores, model)
        forms = fill.draw(seed, name, len(shards.lengths), fim[name], fim_spm) if name in fim else None
        extra = np.zeros(len(shards.lengths), np.int64) if forms is None else fill.SENTINELS * (forms > 0)
        if name in cursors:
            cursors[name].check(name, shards.index_checksums())
            cursors[name] = cursors[name].of_documents(shards.lengths)
        begin = cursors.get(name, Cursor(0, None, ()))
        documents = Documents(name, shards.lengths, extra, seed, seq_length, packing, begin.epoch, begin.left)
        packed = documents.whole()
        if not len(packed):
            raise ValueError(f"source {name} has no tokens under {tokens / TRAIN / name}; leave it out of the mixture")
        sources.append(Source(name, shards, documents, packed, epochs.get(name, max_epochs), forms))
    shares = _shares(sources, samples, weights, temperature)
    # UniMax's shares are of this many samples alone, and meet caps exactly: its rows are counted first.
    turns = list(shares.values())
    if unimax:
        turns = (apportion(turns, samples) / samples).tolist()
    sample_sources = take_turns(turns, samples)
    counts = np.bincount(sample_sources, minlength=len(sources))
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
    _check_enough(sources, shares, counts, settings, key)
    return Draft(settings, model, sources, shares, sample_sources, cursors, gone)


def _shares(
    sources: list[Source], samples: int, weights: Mapping[str, float] | None, temperature: float | None
) -> dict[str, float]:
    if weights is None and temperature is None:
        return unimax_shares(
            {source.name: source.documents.most_rows(source.max_epochs) for source in sources}, samples
        )
    sizes = {source.name: source.documents.lengths.sum() for source in sources}
    return mixture_shares(sizes, weights, temperature)


def _check_enough(
    sources: list[Source], shares: Mapping[str, float], counts: np.ndarray, settings: Mapping[str, Any], key: str
) -> None:
    asked = [
        {
            "name": source.name,
            "share": shares[source.name],
            "samples": int(count),
            "rows_per_epoch": len(source.packed),
            "most_rows": source.documents.most_rows(source.max_epochs),
            "epochs_for": source.documents.epochs_for(int(count)),
            "tokens": int(source.documents.lengths.sum(dtype=np.int64)),
            "documents": len(source.documents.lengths),
        }
        for source, count in zip(sources, counts, strict=True)
    ]
    limits = settings["samples"], settings["seq_length"], settings["max_epochs"], settings["epochs"]
    check_enough(asked, *limits, capped=settings["unimax"], weighted=settings["weights"] is not None, key=key)


def _open_sources(folder: Path, named: Mapping[str, Mapping[str, float]], gone: Gone, key: str) -> dict[str, Shards]:
    """The sources of the weights, or all. `named`: the keys of the mixture, which is under `key`, that name sources."""
    found = sorted(path.name for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
    if not found:
        raise ValueError(f"no token stores under {folder}; run `trivium data run` first")
    for part, names in named.items():
        for name in sorted(set(names) - set(found)):
            raise ValueError(f"{key}.{part}.{name}: there is no such source; tokens hold {', '.join(found)}")
    opened = {name: Shards.in_folder(folder / name) for name in (named["weights"] or found)}
    for name, shards in opened.items():
        shards.leave_out(gone.get(f"{TRAIN}/{name}", ()))
    return opened


def _together(*parts: Gone) -> dict[str, list[tuple[str, int]]]:
    names = sorted({name for part in parts for name in part})
    return {name: sorted({one for part in parts for one in part.get(name, ())}) for name in names}


def check_stores(stores: Iterable[Store], model: Tokenizer) -> None:
    for store in stores:
        if store.facts()["tokenizer_sha256"] != model.sha256:
            raise ValueError(
                f"token store {store.path} was made with another tokenizer than {model.origin}; "
                "tokenize it again, or name its own tokenizer"
            )
