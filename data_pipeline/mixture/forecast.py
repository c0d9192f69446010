"""Forecast of a mixture: when each source runs out, how much more it could give, and what each packing cuts and pads.

It follows from the numbers of rows alone; nothing is trained. `forecast_of` is written to plan.json; `show` prints it.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from data_pipeline.mixture.epochs import SourceEpochs
from data_pipeline.mixture.packing import PACKINGS
from data_pipeline.mixture.weights import most_samples

_ENDS_SHOWN = 4  # ends of epochs in a cell of the table


def forecast_of(documents: SourceEpochs, indices: np.ndarray, samples: int, epochs: float) -> dict[str, Any]:
    """Returns the forecast of a source whose rows are the samples `indices`; the plan has `samples` in all.

    epoch_ends      the sample, counted from 0, that ends each epoch, and the share of the samples (thus of the training
                    steps) that are done by then; epochs are counted from the first plan of a chain
    begun           number of the source's epochs that earlier plans used
    max_epochs      cap on its epochs, those of earlier plans included
    more_possible   by how much its share of the mixture could rise within the cap
    lasts_samples   number of samples of the same mixture at which the cap is reached; None if the source has no share
    """
    ends: list[int] = []
    done = documents.size(0)
    while done <= len(indices):
        ends.append(int(indices[done - 1]))
        done += documents.size(len(ends))
    most = documents.most_rows(epochs)
    return {
        "epoch_ends": [
            {"epoch": epoch, "sample": sample, "fraction": round((sample + 1) / samples, 6)}
            for epoch, sample in enumerate(ends, documents.epoch + 1)
        ],
        "begun": round(documents.begun(), 6),
        "max_epochs": epochs,
        "more_possible": round(max(0, min(most, samples) - len(indices)) / samples, 6),
        "lasts_samples": most * samples // len(indices) if len(indices) else None,
    }


def packings(documents: SourceEpochs) -> dict[str, Any]:
    """Returns rows, padding and shares of cut documents of one epoch under every packing, not only the plan's."""
    found = {}
    for name in PACKINGS:
        packed = documents.whole(name)
        stats = packed.stats(documents.lengths, documents.seq_length, documents.extra)
        found[name] = {"rows": len(packed), **{key: round(value, 6) for key, value in stats.items()}}
    return found


def check_enough(
    sources: Sequence[Mapping[str, Any]],
    samples: int,
    seq_length: int,
    max_epochs: float,
    own: Mapping[str, float],
    capped: bool,
    weighted: bool,
    key: str,
) -> None:
    """Raises ValueError if a source needs more epochs than its cap allows; the message says what to change.

    `sources` hold name, share, samples, rows_per_epoch, most_rows (within the cap), epochs_for (all samples), tokens
    and documents; `own` holds the caps of single sources. `capped` means that shares follow from the caps, as UniMax's
    do, `weighted` that they follow from weights. `key` is the config key of the mixture.
    """
    most = {source["name"]: source["most_rows"] for source in sources}
    short = [source for source in sources if source["samples"] > most[source["name"]]]
    if not short:
        return
    lacks, limits, raises = [], [], []
    for source in short:
        name, rows = source["name"], source["rows_per_epoch"]
        epochs = source["epochs_for"]
        within = "" if most[name] >= rows else f", {most[name]:,} of them left under the cap"
        lacks.append(
            f"{name} is to give {source['samples']:,} rows ({source['share']:.1%}) and has {rows:,} an epoch"
            f"{within} ({source['tokens']:,} tokens in {source['documents']:,} "
            f"documents): at most {math.floor(1000 * most[name] / samples) / 10}% of the mixture, or {epochs} epochs"
        )
        if name in own:
            limits.append(f"{key}.epochs.{name} = {own[name]:g}")
            raises.append(f"{key}.epochs.{name} to {epochs}")
    general = [source["epochs_for"] for source in short if source["name"] not in own]
    if general:
        limits.append(f"{key}.max_epochs = {max_epochs}")
        raises.append(f"{key}.max_epochs to {max(general)}")
    enough = sum(most.values())
    if not capped:
        enough = most_samples([source["share"] for source in sources], list(most.values()))
    remedies = [f"lower {key}.samples to {enough:,}"] if enough else []
    if weighted and len(sources) > len(short):
        remedies.append(f"lower the weight of {' and '.join(source['name'] for source in short)}")
    remedies.append(f"raise {' and '.join(raises)}")
    what = f"{', '.join(remedies)}, or add text"
    raise ValueError(
        f"too few tokens for {key}.samples = {samples:,} rows of {key}.seq_length = {seq_length:,} within "
        f"{' and '.join(limits)}: {'; '.join(lacks)}. {what[0].upper()}{what[1:]}"
    )


def show(plan: Mapping[str, Any], console: Console, stage: str = "") -> None:
    """Prints two tables: how long each source lasts, and the effect of each packing on it."""
    name = f"{plan['samples']:,} rows of {plan['seq_length']} tokens"
    if plan["after"]:
        name += f", after {plan['after']['first_sample']:,} rows of earlier plans"
    table = Table(title=f"Mixture{f' {stage!r}' if stage else ''}: {name}", title_justify="left")
    begun = ["begun"] if plan["after"] else []
    for head in ("source", "share", *begun, "epochs", "cap", "epochs end at", "more possible", "lasts"):
        table.add_column(head, justify="left" if head in ("source", "epochs end at") else "right")
    for source in plan["sources"]:
        forecast = source["forecast"]
        ends = [f"{end['epoch']}: {end['fraction']:.1%}" for end in forecast["epoch_ends"]]
        if len(ends) > _ENDS_SHOWN:
            ends = [*ends[: _ENDS_SHOWN - 1], "...", ends[-1]]
        lasts = "-" if forecast["lasts_samples"] is None else f"{forecast['lasts_samples']:,} rows"
        table.add_row(
            source["name"],
            f"{source['share']:.1%}",
            *([f"{forecast['begun']:.2f}"] if begun else []),
            f"{source['epochs']:.2f}",
            f"{forecast['max_epochs']:g}",
            ", ".join(ends) or "not within the run",
            f"+{forecast['more_possible']:.1%}",
            lasts,
        )
    console.print(table)
    table = Table(title=f"One epoch in rows of {plan['seq_length']} (chosen: {plan['packing']})", title_justify="left")
    table.add_column("source")
    for packing in PACKINGS:
        for head in ("rows", "padding", "documents cut", "cut needlessly"):
            table.add_column(f"{packing}\n{head}", justify="right")
    for source in plan["sources"]:
        cells = []
        for packing in PACKINGS:
            stats = source["packings"][packing]
            cells.append(f"{stats['rows']:,}")
            cells += [f"{stats[key]:.1%}" for key in ("padding_share", "cut_share", "needless_cut_share")]
        table.add_row(source["name"], *cells)
    console.print(table)
