"""Drafts mixture plans: the source of each sample, and the documents, cut into pieces, that make up each training row.

Every epoch of a source is shuffled, packed, and its rows are shuffled (`epochs`). Sources take turns so that every
prefix of the samples is close to the weights (`weights`). A mixture may go on from an earlier plan: each source begins
where that plan left it (`cursor`), even if weights, sequence length or packing change. `plan_files` writes the draft,
`forecast` computes when each source runs out.
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
from data_pipeline.mixture.forecast import check_enough, forecast_of, packings
from data_pipeline.mixture.packing import Packed
from data_pipeline.mixture.rows import Plan
from data_pipeline.mixture.weights import apportion, mixture_shares, take_turns, unimax_shares
from data_pipeline.tokens.store import SourceStores, Store
from data_pipeline.tokens.tokenizer import Tokenizer

# Keys of PlanConfig in their order in plan.json.
_DESCRIBED = (
    *("seq_length", "samples", "seed", "packing", "weights", "temperature", "unimax", "max_epochs", "epochs", "fim"),
    "fim_spm",
)

Gone = Mapping[
    str, Collection[tuple[str, int]]
]  # removed documents: <split>/<source> -> (name of the store, document in it)


@dataclass(frozen=True)
class PlannedSource:
    """One source of a plan that is being made; `packed` is one epoch in the documents' own order."""

    name: str
    shards: SourceStores
    documents: SourceEpochs
    packed: Packed
    max_epochs: float
    forms: np.ndarray | None  # of fill-in-the-middle, by document (`fim.draw`); None if the source has none


@dataclass(frozen=True)
class PlanDraft:
    """A plan that is complete but not written; `sample_sources` holds the index of each sample's source."""

    settings: dict[str, Any]
    model: Tokenizer
    sources: list[PlannedSource]
    shares: dict[str, float]
    sample_sources: np.ndarray
    cursors: dict[str, Cursor]  # where sources begin, also unused ones; empty without an earlier plan
    gone: dict[str, list[tuple[str, int]]]

    def outlook(self) -> dict[str, Any]:
        """Returns settings, and counts and forecast of each source, for plan.json and `forecast.show`."""
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
            "forecast": forecast_of(source.documents, indices, samples, source.max_epochs),
            "packings": packings(source.documents),
        }


def draft_plan(
    tokens: str | Path,
    tokenizer: str | Path,
    settings: PlanConfig,
    *,
    without: Gone | None = None,
    after: tuple[Plan, int] | None = None,
    key: str = "mixture",
) -> PlanDraft:
    """Lays out a mixture of `settings.samples` rows of `settings.seq_length` tokens; writes nothing.

    `tokens` holds `train/<source>/` and `heldout/<source>/`. Shares in `weights` are scaled to sum to one; shares by
    `temperature` are tokens ** (1 / temperature); those of `unimax` are as even as the caps on epochs allow, with a
    budget of samples * seq_length, padding included. `without` are documents to leave out. `after` is an earlier plan
    and the number of its samples that are used: their tokens do not return before the source's epoch is over, caps on
    epochs count them, and documents that the plan left out stay out. `key` is the config key of the mixture, for
    messages. Raises ValueError for settings of unknown sources, stores of another tokenizer, or too few tokens; the
    message gives the number of tokens and what to change.
    """
    tokens, samples, weights, temperature = Path(tokens), settings.samples, settings.weights, settings.temperature
    if (weights is not None) + (temperature is not None) + settings.unimax != 1:
        raise ValueError("mixture takes exactly one of weights, temperature and unimax; set one, leave out the others")
    model = Tokenizer.load(tokenizer)
    if model.pad_id < 0:
        raise ValueError(
            f"tokenizer {model.origin} has no <pad>, with which rows are filled up; make it with `trivium data run`"
        )
    named = {"weights": weights or {}, "epochs": settings.epochs, "fim": settings.fim}
    cursors = after[0].cursors(after[1]) if after else {}
    gone = _together(without or {}, after[0].gone if after else {})
    sources = []
    opened = _open_sources(tokens / TRAIN, named, gone, key)
    if settings.fim:
        fill.FimSymbols.of(model.special_ids, model.bos_id, model.eos_id)
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
    # UniMax's shares hold for this number of samples and meet caps exactly: its rows are rounded to whole ones first.
    turns = list(shares.values())
    if settings.unimax:
        turns = (apportion(turns, samples) / samples).tolist()
    sample_sources = take_turns(turns, samples)
    counts = np.bincount(sample_sources, minlength=len(sources))
    _check_enough(sources, shares, counts, settings, key)
    described = {name: getattr(settings, name) for name in _DESCRIBED} | {"weights": weights or None}
    return PlanDraft(described, model, sources, shares, sample_sources, cursors, gone)


def _fim_forms(settings: PlanConfig, source: str, documents: int) -> np.ndarray | None:
    """Returns each document's form of fill-in-the-middle; None for a source without fill-in-the-middle."""
    if source not in settings.fim:
        return None
    return fill.draw(settings.seed, source, documents, settings.fim[source], settings.fim_spm)


def _shares(
    sources: list[PlannedSource], samples: int, weights: Mapping[str, float] | None, temperature: float | None
) -> dict[str, float]:
    """Returns each source's share of the samples, by weights, temperature or, if both are None, UniMax."""
    if weights is None and temperature is None:
        return unimax_shares(
            {source.name: source.documents.most_rows(source.max_epochs) for source in sources}, samples
        )
    sizes = {source.name: source.documents.lengths.sum() for source in sources}
    return mixture_shares(sizes, weights, temperature)


def _check_enough(
    sources: list[PlannedSource], shares: Mapping[str, float], counts: np.ndarray, settings: PlanConfig, key: str
) -> None:
    wanted = [
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
    check_enough(wanted, *limits, capped=settings.unimax, weighted=bool(settings.weights), key=key)


def _open_sources(
    folder: Path, named: Mapping[str, Mapping[str, float]], gone: Gone, key: str
) -> dict[str, SourceStores]:
    """Opens the stores of the sources that weights name, or of all sources, without the documents `gone`.

    `named` are the keys of the mixture that hold sources' names; raises ValueError if one of those does not exist.
    """
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
    """Returns the union of several sets of removed documents, sorted."""
    names = sorted({name for part in parts for name in part})
    return {name: sorted({one for part in parts for one in part.get(name, ())}) for name in names}


def check_stores(stores: Iterable[Store], model: Tokenizer) -> None:
    """Raises ValueError if a store was made with another tokenizer."""
    for store in stores:
        if store.facts()["tokenizer_sha256"] != model.sha256:
            raise ValueError(
                f"token store {store.path} was made with another tokenizer than {model.origin}; "
                "tokenize it again, or name its own tokenizer"
            )
