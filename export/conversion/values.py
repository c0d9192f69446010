"""Families with a scalar head in place of the output head: transformers' classes ...ForSequenceClassification.

They differ from their families in the head alone: `score.weight` is Trivium's `value_head.weight`, and the number of
labels is the number of its outputs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from configs.model import ModelConfig
from export.conversion.config_keys import Custom, Draft
from export.conversion.table import Family, Rule

HEAD, THEIR_HEAD = "value_head.weight", "score.weight"
LANGUAGE_MODEL, CLASSIFIER = "ForCausalLM", "ForSequenceClassification"
# Families whose class with a scalar head reads the last token before padding, as Trivium does.
WITH_CLASSIFIER = ("llama", "mistral", "mixtral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe")


def with_values(family: Family) -> Family:
    """Returns the family of the same models with a scalar head."""
    rules = tuple(rule for rule in family.rules if "lm_head.weight" not in rule.our_names)
    return replace(
        family,
        architecture=family.architecture.replace(LANGUAGE_MODEL, CLASSIFIER),
        rules=(*rules, Rule(HEAD, THEIR_HEAD)),
        keys=(*family.keys, Custom(_read, _write)),
        kept_keys=(*family.kept_keys, "id2label", "label2id", "problem_type"),
    )


def _read(draft: Draft) -> None:
    labels = draft.value("id2label")
    draft.put("head.kind", "scalar")
    draft.put("head.outputs", len(labels) if isinstance(labels, Mapping) else draft.value("num_labels", 2, 2))
    draft.put("tie_embeddings", False)  # the embedding has no head that could be tied to it


def _write(config: ModelConfig) -> dict[str, Any]:
    return labelled([f"LABEL_{i}" for i in range(config.head.outputs)])


def labelled(names: Sequence[str]) -> dict[str, Any]:
    """Returns the keys of config.json that give the outputs their names; their number is the number of labels."""
    return {
        "id2label": {str(number): name for number, name in enumerate(names)},
        "label2id": {name: number for number, name in enumerate(names)},
    }


def is_classifier(raw: Mapping[str, Any]) -> bool:
    """Whether config.json is of a model with a scalar head."""
    named = raw.get("architectures") or [""]
    return isinstance(named, list) and str(named[0]).endswith(CLASSIFIER)
