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

from configs.mixture import PlanConfig
from data_pipeline.core.shards import TRAIN
from data_pipeline.mixture import fim as fill
from data_pipeline.mixture.cursor import Cursor
from data_pipeline.mixture.epochs import SourceEpochs
from data_pipeline.mixture.forecast import check_enough, foreseen, packings
from data_pipeline.mixture.packing import Packed
from data_pipeline.mixture.rows import Plan
from data_pipeline.mixture.weights import apportion, mixture_shares, take_turns, unimax_shares
from data_pipeline.tokens.store import SourceStores, Store
from data_pipeline.tokens.tokenizer import Tokenizer

# The keys of PlanConfig in the order in which plan.json has them.
_DESCRIBED = (
    *("seq_length", "samples", "seed", "packing", "weights", "temperature", "unimax", "max_epochs", "epochs", "fim"),
    "fim_spm",
)

Gone = Mapping[str, Collection[tuple[str, int]]]  # <split>/<source> -> (name of the store, document in it)


@dataclass(frozen=True)
class PlannedSource:
    """One source of a plan under way: `packed` is one epoch of it in the documents' own order."""

    name: str
    shards: SourceStores
    documents: SourceEpochs
    packed: Packed
    max_epochs: float
    forms: np.ndarray | None  # of fill-in-the-middle, by document


@dataclass(frozen=True)
class PlanDraft:
    """A mixture laid out, of which nothing is written yet. `sample_sources`: number of the source of each sample."""

    settings: dict[str, Any]
    model: Tokenizer
    sources: list[PlannedSource]
    shares: dict[str, float]
    sample_sources: np.ndarray
    cursors: dict[str, Cursor]  # where sources begin, those at rest too; none of a mixture that goes on from nothing
    gone: dict[str, list[tuple[str, int]]]

    def outlook(self) -> dict[str, Any]:
        """What plan.json will say of the mixture and each source's training rows, and `forecast.show` prints."""
        return {**self.settings, "sources": [self._outlook(number) for number in range(len(self.sources))]}

    def _outlook(self, number: int) -> dict[str, Any]:
        source, samples = self.sources[number], len(self.sample_sources)
        indices = np.flatnonzero(self.sample_sources == number)
        rows, lengths = len(source.packed), source.documents.lengths
        return {
            "name": source.name,
            "share": self.shares[source.name],
            "samples": len(indices),
            "epochs": round(len(indices) / rows, 6),
            "rows_per_epoch": rows,
            "documents": len(lengths),
            "tokens": int(lengths.sum(dtype=np.int64)),
            "forecast": foreseen(source.documents, indices, samples, source.max_epochs),
            "packings": packings(source.documents),
        }


def lay_out(
    tokens: str | Path,
    tokenizer: str | Path,
    settings: PlanConfig,
    *,
    without: Gone | None = None,
    after: tuple[Plan, int] | None = None,
    key: str = "mixture",
) -> PlanDraft:
    """Lays out a mixture of `settings.samples` rows of `settings.seq_length` tokens; writes nothing.

    `tokens` holds `train/<source>/` and `heldout/<source>/`. Shares in `weights` are scaled to sum to one, shares by
    `temperature` are tokens ** (1 / temperature), those of `unimax` as even as the caps on epochs allow; its budget is
    samples * seq_length, padding included. `without` leaves documents out. `after` is an earlier plan and the number
    of its samples that are used: no token of theirs comes again before its source's epoch is over, caps on epochs
    count them, and what that plan left out stays out. `key` is what messages call the mixture.
    Errors: ValueError for settings of unknown sources, stores of another tokenizer, or too few tokens, which
    says how many there are and what to change.
    """
    tokens, samples, weights, temperature = Path(tokens), settings.samples, settings.weights, settings.temperature
    if (weights is not None) + (temperature is not None) + settings.unimax != 1:
        raise ValueError("mixture takes exactly one of weights, temperature and unimax; set one, leave out the others")
    model = Tokenizer.load(tokenizer)
    if model.pad_id < 0:
        raise ValueError(f"tokenizer {model.origin} has no <pad>; rows are filled up with it")
    named = {"weights": weights or {}, "epochs": settings.epochs, "fim": settings.fim}
    cursors = after[0].cursors(after[1]) if after else {}
    gone = _together(without or {}, after[0].gone if after else {})
    sources = []
    opened = _open_sources(tokens / TRAIN, named, gone, key)
    if settings.fim:
        fill.FimSymbols.of(model.special_ids)
    for name, shards in opened.items():
        check_stores(shards.stores, model)
        forms = _fim_forms(settings, name, len(shards.lengths))
        extra = np.zeros(len(shards.lengths), np.int64) if forms is None else fill.SENTINELS * (forms > 0)
        if name in cursors:
            cursors[name].check(name, shards.index_checksums())
            cursors[name] = cursors[name].of_documents(shards.lengths)
        begin = cursors.get(name, Cursor(0, None, ()))
        documents = SourceEpochs(
            name,
            shards.lengths,
            extra,
            settings.seed,
            settings.seq_length,
            settings.packing,
            begin.epoch,
            begin.left,
        )
        packed = documents.whole()
        if not len(packed):
            raise ValueError(f"source {name} has no tokens under {tokens / TRAIN / name}; leave it out of the mixture")
        cap = settings.epochs.get(name, settings.max_epochs)
        sources.append(PlannedSource(name, shards, documents, packed, cap, forms))
    shares = _shares(sources, samples, weights, temperature)
    # UniMax's shares are of this many samples alone, and meet caps exactly: its rows are counted first.
    turns = list(shares.values())
    if settings.unimax:
        turns = (apportion(turns, samples) / samples).tolist()
    sample_sources = take_turns(turns, samples)
    counts = np.bincount(sample_sources, minlength=len(sources))
    _check_enough(sources, shares, counts, settings, key)
    described = {name: getattr(settings, name) for name in _DESCRIBED} | {"weights": weights or None}
    return PlanDraft(described, model, sources, shares, sample_sources, cursors, gone)


def _fim_forms(settings: PlanConfig, source: str, documents: int) -> np.ndarray | None:
    """The form of fill-in-the-middle of each document of a source, None for a source without."""
    if source not in settings.fim:
        return None
    return fill.draw(settings.seed, source, documents, settings.fim[source], settings.fim_spm)


def _shares(
    sources: list[PlannedSource], samples: int, weights: Mapping[str, float] | None, temperature: float | None
) -> dict[str, float]:
    if weights is None and temperature is None:
        return unimax_shares(
            {source.name: source.documents.most_rows(source.max_epochs) for source in sources}, samples
        )
    sizes = {source.name: source.documents.lengths.sum() for source in sources}
    return mixture_shares(sizes, weights, temperature)


def _check_enough(
    sources: list[PlannedSource], shares: Mapping[str, float], counts: np.ndarray, settings: PlanConfig, key: str
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
    limits = settings.samples, settings.seq_length, settings.max_epochs, settings.epochs
    check_enough(asked, *limits, capped=settings.unimax, weighted=bool(settings.weights), key=key)


def _open_sources(
    folder: Path, named: Mapping[str, Mapping[str, float]], gone: Gone, key: str
) -> dict[str, SourceStores]:
    """The sources of the weights, or all. `named`: the keys of the mixture, which is under `key`, that name sources."""
    found = sorted(path.name for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
    if not found:
        raise ValueError(f"no token stores under {folder}; run `trivium data run` first")
    for part, names in named.items():
        for name in sorted(set(names) - set(found)):
            raise ValueError(f"{key}.{part}.{name}: there is no such source; tokens hold {', '.join(found)}")
    opened = {name: SourceStores.in_folder(folder / name) for name in (named["weights"] or found)}
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
