"""Compares languages with fastText's own on real documents and unusual lines; files that are no model are refused."""

import gzip
import json
import random
from pathlib import Path

import fasttext
import pytest

from data_pipeline.language.fasttext_model import FastTextModel
from data_pipeline.language.identification import Identifier, model_path
from tests.demo_corpus import DEMO

MAX_CHARS = 10_000
# Exponentials are rounded once here; C's expf now and then the other way.
ONE_STEP = 1.2e-7


def theirs(model: fasttext.FastText._FastText, text: str) -> tuple[str, float]:
    labels, scores = model.predict(text, k=1)
    return (labels[0].removeprefix("__label__"), scores[0]) if labels else ("", 0.0)


@pytest.mark.parametrize("source", ["english", "chinese", "code"])
def test_labels_of_the_demo_are_fasttexts(source: str) -> None:
    model, identify = fasttext.load_model(str(model_path())), Identifier(model_path(), MAX_CHARS)
    with gzip.open(DEMO / f"{source}.jsonl.gz", "rt", encoding="utf-8") as lines:
        texts = [json.loads(line)["text"] for line in lines]
    expected = [theirs(model, " ".join(text[:MAX_CHARS].split())) for text in texts]
    found = [identify(text) for text in texts]
    assert [label for label, _ in found] == [label for label, _ in expected]
    assert [score for _, score in found] == pytest.approx([min(score, 1.0) for _, score in expected], abs=ONE_STEP)


def test_strange_lines() -> None:
    model, ours = fasttext.load_model(str(model_path())), FastTextModel(model_path())
    draw = random.Random(0)
    lines = ["", " ", "a", "</s>", "one </s> deux trois", "__label__de ein Satz", "__label__", "NUL\0s", "x" * 5000]
    lines += ["tab\tand\x0bvertical\x0cfeed\rreturn", "no\u00a0break\u3000space", "👩‍👩‍👧 e\u0301", "界" * 3000]
    alphabet = "abcdefgh ,.<>_\t\0éßøñ界話あかгдеज्ञ한국😀\u0301"
    lines += ["".join(draw.choices(alphabet, k=draw.randrange(60))) for _ in range(3_000)]
    expected, found = [theirs(model, line) for line in lines], [ours(line) for line in lines]
    assert [label for label, _ in found] == [label for label, _ in expected]
    assert [score for _, score in found] == pytest.approx([score for _, score in expected], abs=ONE_STEP)
    assert len({label for label, _ in found}) > 20


@pytest.mark.parametrize("kept", [0, 4, 100, 60_000, 500_000])
def test_a_file_that_is_no_whole_model_is_named(tmp_path: Path, kept: int) -> None:
    (tmp_path / "a.ftz").write_bytes(model_path().read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"a\.ftz cannot be read as a fastText model: "):
        FastTextModel(tmp_path / "a.ftz")


def test_a_model_of_another_kind_is_named(tmp_path: Path) -> None:
    content = bytearray(model_path().read_bytes())
    content[32] = 3  # softmax, which has no tree of labels
    (tmp_path / "a.ftz").write_bytes(content)
    with pytest.raises(ValueError, match=r"it is not a supervised model with hierarchical softmax and single words$"):
        FastTextModel(tmp_path / "a.ftz")
