"""Warns early that a run lacks documents of a source, a held-out part of it, or text for a mixture plan.

Warnings are printed after the dedup, documents and tokens stages, as soon as their counts show a shortfall. They never
end a run: the plan stage, which knows the exact number of rows, does that.
"""

from collections.abc import Mapping
from typing import Any

from configs.data import DataConfig
from configs.mixture import PlanConfig
from data_pipeline.core.canary_naming import is_canary
from data_pipeline.core.ledger import SourceTally, Tally

_BYTES_A_TOKEN = 4.0  # estimate, used until tokens are counted: prose in a language that the tokenizer was trained on
_SURE = 0.8  # warn if there is less than this share of what is needed: then the warning is likely to be right

COUNTED = ("dedup", "documents", "tokens")


def short_sources(documents: Tally, extract: Tally, config: DataConfig) -> list[str]:
    """Returns a sentence for each source without documents to train on, or with too few to hold one out.

    `documents` and `extract` are the tallies of those stages.
    """
    none = SourceTally()
    return [
        sentence
        for name in config.sources
        for sentence in _source_shortfalls(
            name, documents.sources.get(name, none), extract.sources.get(name, none), config
        )
    ]


def short_plans(stage: str, tally: Tally, config: DataConfig) -> list[str]:
    """Returns a sentence for each source of which a plan needs more tokens than there are.

    `tally` is that of `stage`, one of COUNTED.
    """
    return [
        sentence
        for name, plan in (config.mixture.plans() if config.mixture else {}).items()
        for sentence in _plan_shortfalls(f"mixture.stages.{name}" if name else "mixture", plan, stage, tally)
    ]


def _source_shortfalls(name: str, counts: SourceTally, extract: SourceTally, config: DataConfig) -> list[str]:
    held_out = counts.notes.get("held out", 0)
    train = counts.kept.documents - held_out
    if not train:
        read = extract.came_in.documents
        if not read:
            why = f"no record was read from its files: name others by sources.{name}.files, or correct its format"
        elif not extract.kept.documents:
            why = f"none of its {read:,} records could be used: see extract/rejected and extract/drops for why"
        else:
            why = (
                "stages after extract dropped it all: see the drops of each stage, and change the rule or key behind "
                "them, or add files"
            )
        return [f"source {name} has no document left to train on, so it has no part in the mixture; {why}"]
    if not held_out and config.heldout.share:
        return [
            f"source {name} has {train} {'document' if train == 1 else 'documents'} left, too few to hold one out: it "
            "is trained on and not evaluated; give it more files if it should be"
        ]
    return []


def _plan_shortfalls(key: str, plan: PlanConfig, stage: str, tally: Tally) -> list[str]:
    sources = {name: counts for name, counts in tally.sources.items() if not is_canary(name)}
    tokens = {name: count for name, counts in sources.items() if (count := _tokens(counts, stage))}
    most = {name: count * plan.epochs.get(name, plan.max_epochs) for name, count in tokens.items()}
    whole = plan.samples * plan.seq_length
    needs = {f"source {name}": (most[name], share * whole) for name, share in _shares(plan, tokens).items()}
    if plan.unimax:
        needs = {"the run": (sum(most.values()), whole)}
    about = "" if stage == "tokens" else "about "
    return [
        f"{who} has {about}{int(has):,} tokens for {key} after {stage}, all allowed epochs included, but "
        f"{key}.samples = {plan.samples:,} rows of {key}.seq_length = {plan.seq_length:,} need {int(wanted):,} of "
        f"them: the plan stage will probably refuse that; lower {key}.samples, raise {_caps(key, plan, who)}, or add "
        "text"
        for who, (has, wanted) in needs.items()
        if has < _SURE * wanted
    ]


def _caps(key: str, plan: PlanConfig, who: str) -> str:
    """Names the config keys, with values, that limit how often a source's tokens, or all of the run's, repeat."""
    own = {f"source {name}": f"{key}.epochs.{name} = {cap:g}" for name, cap in plan.epochs.items()}
    general = f"{key}.max_epochs = {plan.max_epochs}"
    return own.get(who, general) if plan.weights or not plan.unimax else " and ".join([general, *own.values()])


def _tokens(counts: SourceTally, stage: str) -> float:
    """Number of a source's training tokens; estimated from its bytes before the tokens stage."""
    if stage == "tokens":
        return counts.notes.get("tokens", 0)
    return (counts.passed_on.bytes - counts.notes.get("held-out bytes", 0)) / _BYTES_A_TOKEN


def _shares(plan: PlanConfig, tokens: Mapping[str, Any]) -> dict[str, float]:
    """Share of the plan for each source that has tokens; empty for UniMax, whose shares depend on the rows."""
    if plan.weights is not None:
        raw = {name: weight for name, weight in plan.weights.items() if name in tokens}
    elif plan.temperature is not None:
        raw = {name: count ** (1 / plan.temperature) for name, count in tokens.items()}
    else:
        raw = {}
    return {name: value / sum(raw.values()) for name, value in raw.items()}
