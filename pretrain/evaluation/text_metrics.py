"""ROUGE (Lin 2004) and BLEU for Chinese as metrics of lm-evaluation-harness, which has BLEU, chrF and TER itself.

A task names them in its metric_list: `rouge1`, `rouge2`, `rougeL` and `rougeLsum` are F-measures from 0 to 100, and
`bleu_zh` is BLEU over Chinese characters. ROUGE's words are runs of letters and digits of any script, and each Chinese
or Japanese character and Korean syllable; the package's own tokenizer drops everything but a to z and digits.
"""

import re
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

ROUGE = ("rouge1", "rouge2", "rougeL", "rougeLsum")
BLEU_ZH = "bleu_zh"
NAMES = (*ROUGE, BLEU_ZH)
GRADED = (*NAMES, "bleu", "chrf", "chrf++", "ter")  # metrics that are a number for each answer, not right or wrong
GENERATION = "generate_until"
# Scripts without spaces between words: kana, CJK ideographs, Hangul syllables.
_ALONE = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff\U00020000-\U0003134f"
_WORD = re.compile(rf"[{_ALONE}]|[^\W_{_ALONE}]+")


class AnyScript:
    """Tokenizer for the package rouge_score: words in lower case, and characters of scripts without spaces."""

    def tokenize(self, text: str) -> list[str]:
        return _WORD.findall(text.lower())


@cache
def register() -> None:
    """Registers the metrics with the harness; safe to call again."""
    import sacrebleu
    from lm_eval.api.registry import register_aggregation, register_metric

    for name in ROUGE:
        register_metric(metric=name, higher_is_better=True, output_type=GENERATION, aggregation="mean")(_rouge(name))

    def bleu_zh(items: Sequence[tuple[Any, str]]) -> float:
        references, predictions = zip(*items, strict=True)
        return sacrebleu.corpus_bleu(list(predictions), [list(map(str, references))], tokenize="zh").score

    def pair(items: Sequence[Any]) -> Sequence[Any]:
        return items

    register_aggregation(BLEU_ZH)(bleu_zh)
    register_metric(metric=BLEU_ZH, higher_is_better=True, output_type=GENERATION, aggregation=BLEU_ZH)(pair)


def _rouge(name: str) -> Callable[..., float]:
    """Returns the function of one ROUGE measure."""

    def score(references: Sequence[Any], predictions: Sequence[str]) -> float:
        return 100.0 * _scorer(name).score(str(references[0]), predictions[0])[name].fmeasure

    return score


@cache
def _scorer(name: str) -> Any:
    from rouge_score.rouge_scorer import RougeScorer  # takes seconds, so only when a task needs it

    return RougeScorer([name], tokenizer=AnyScript())
