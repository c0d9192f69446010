"""Tests perplexity and unigram probability by hand, and against plain Python and other libraries on real text."""

import gzip
import json
import math
import re
from collections import Counter
from pathlib import Path

import pytest

from data_pipeline.scan.words import Splitter
from data_pipeline.scores.ngram_models import UNSEEN, Arpa, Unigrams
from tests.demo_corpus import demo_records
from tests.unit.data_pipeline.scores.arpa import SMALL


def small(tmp_path: Path, text: str = SMALL, name: str = "small.arpa") -> Path:
    path = tmp_path / name
    path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    return path


@pytest.mark.parametrize(
    ("text", "logprobs"),
    [
        # <s> a; <s> a b; the trigram "a b </s>" is missing: backoff of "a b", and b </s>.
        ("a b", [-0.4, -0.2, -0.25 - 0.5]),
        # "<s> b" is missing: backoff of <s>, and b. "b a" is missing: backoff of b, and a. Backoff of a, and </s>.
        ("b a", [-0.5 - 0.8, -0.3 - 0.7, -0.2 - 0.9]),
        # An unknown word: backoffs of "<s> a" and a, and <unk>, after which there is no backoff.
        ("a zebra", [-0.4, -0.1 - 0.2 - 1.0, -0.9]),
        # Two sentences, put into lower case; the blank line between them is not a sentence.
        ("A\n\n B ", [-0.4, -0.1 - 0.2 - 0.9, -0.5 - 0.8, -0.5]),
    ],
)
@pytest.mark.parametrize("name", ["small.arpa", "small.arpa.gz"])
def test_perplexity_by_hand(tmp_path: Path, name: str, text: str, logprobs: list[float]) -> None:
    # Tables hold float32, which has seven digits.
    assert Arpa(small(tmp_path, name=name))(text) == pytest.approx(10 ** (-sum(logprobs) / len(logprobs)), rel=1e-6)


def test_a_model_without_unk_and_one_of_single_words(tmp_path: Path) -> None:
    text = "\\data\\\nngram 1=3\n\n\\1-grams:\n-99\t<s>\n-0.5\t</s>\n-0.3\ta\n\n\\end\\\n"
    model = Arpa(small(tmp_path, text))
    assert model("a") == pytest.approx(10 ** (0.8 / 2), rel=1e-6)
    assert model("x") == pytest.approx(10 ** (100.5 / 2), rel=1e-6)  # KenLM gives -100 if there is no <unk>
    assert model(" \n ") == 1.0


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("ngram 2=3", "ngram 2=4", "has 3 2-grams where its header says 4; check that it is complete"),
        ("ngram 2=3", "ngram 3=3", "should be 'ngram 2=COUNT'"),
        ("-0.6\ta b", "0.6\ta b", r"small.arpa:15: '0.6\\ta b\\t-0.25' should be a log10 probability"),
        ("<s> a b", "<s> a c", "should be a log10 probability, 3 words of"),
        ("\\data\\", "hello", "small.arpa:1"),
    ],
)
def test_damage_is_named(tmp_path: Path, old: str, new: str, said: str) -> None:
    if old == "\\data\\":
        path, said = small(tmp_path, "hello\n" * 5), "is not an ARPA file"
    else:
        path = small(tmp_path, SMALL.replace(old, new))
    with pytest.raises(ValueError, match=said):
        Arpa(path)
    assert Arpa(small(tmp_path))("a b") > 1


def words(text: str) -> list[str]:
    return text.lower().split()


def estimate(texts: list[str], order: int) -> dict[tuple[str, ...], tuple[float, float]]:
    """Makes a model of a text's n-grams with made-up weights; some lower-order n-grams are missing, as SRILM prunes."""
    counts: Counter[tuple[str, ...]] = Counter()
    for text in texts:
        for line in text.splitlines():
            tokens = ["<s>", *words(line), "</s>"]
            for n in range(1, order + 1):
                counts.update(tuple(tokens[at : at + n]) for at in range(len(tokens) - n + 1))
    kept = {gram: count for gram, count in counts.items() if len(gram) == 1 or (count > 1 and sum(map(len, gram)) % 7)}
    total = sum(counts.values())
    model = {gram: (math.log10(n / total), -0.01 * (sum(map(ord, gram[-1])) % 90)) for gram, n in kept.items()}
    return model | {("<unk>",): (-7.0, 0.0)}


def brute_force(model: dict[tuple[str, ...], tuple[float, float]], order: int, text: str) -> float:
    total, count = 0.0, 0
    for line in text.split("\n"):
        if not line.split():
            continue
        tokens = ["<s>", *(word if (word,) in model else "<unk>" for word in words(line)), "</s>"]
        for at in range(1, len(tokens)):
            gram = tuple(tokens[max(0, at - order + 1) : at + 1])
            while gram not in model:
                total += model.get(gram[:-1], (0.0, 0.0))[1]
                gram = gram[1:]
            total, count = total + model[gram][0], count + 1
    return float(10 ** (-total / count))


def arpa_of(model: dict[tuple[str, ...], tuple[float, float]], order: int) -> str:
    lines = ["\\data\\", *(f"ngram {n}={sum(len(gram) == n for gram in model)}" for n in range(1, order + 1))]
    for n in range(1, order + 1):
        lines.append(f"\n\\{n}-grams:")
        lines += [
            f"{prob!r}\t{' '.join(gram)}" + (f"\t{backoff!r}" if n < order else "")
            for gram, (prob, backoff) in model.items()
            if len(gram) == n
        ]
    return "\n".join([*lines, "\n\\end\\\n"])


@pytest.mark.parametrize("order", [2, 3, 5])
def test_perplexity_is_that_of_plain_python_on_real_text(tmp_path: Path, order: int) -> None:
    texts = [record["text"][:4000] for record in demo_records("english")]
    model = estimate(texts[::2], order)
    scorer = Arpa(small(tmp_path, arpa_of(model, order)), Splitter.spaces)
    found = [scorer(text) for text in texts]
    # Tables hold float32: relative errors of 6e-8 in log-probabilities of about 4, which are exponents of ten.
    assert found == pytest.approx([brute_force(model, order, text) for text in texts], rel=2e-6)
    assert max(found) > 2 * min(found)


@pytest.mark.parametrize("order", [2, 3, 5])
@pytest.mark.parametrize("source", ["english", "chinese"])
def test_perplexity_is_kenlms_on_real_text(tmp_path: Path, order: int, source: str) -> None:
    kenlm = pytest.importorskip("kenlm", reason="kenlm is not installed; it is compiled by: pip install '.[kenlm]'")
    texts = [record["text"][:4000] for record in demo_records(source)]
    if source == "chinese":  # one word per character, as in CCNet's Chinese models
        texts = ["\n".join(" ".join(line) for line in text.splitlines()) for text in texts]
    model = estimate(texts[::2], order)
    for gram in sorted(model, key=len):  # KenLM needs every n-gram's context, not its end
        if len(gram) > 1 and gram[:-1] not in model:
            del model[gram]
    if source == "english" and order > 2:
        assert any(gram[1:] not in model for gram in model if len(gram) > 1)
    path = small(tmp_path, arpa_of(model, order))
    ours, theirs = Arpa(path, Splitter.spaces), kenlm.Model(str(path))
    assert theirs.order == order

    def perplexity(text: str) -> float:
        sentences = [" ".join(words(line)) for line in text.split("\n") if line.split()]
        scores = [score for one in sentences for score, _, _ in theirs.full_scores(one, bos=True, eos=True)]
        return float(10 ** (-sum(scores) / len(scores)))

    found = [ours(text) for text in texts]
    # Both use float32: relative errors of 6e-8 in log-probabilities of about 4, which are exponents of ten.
    assert found == pytest.approx([perplexity(text) for text in texts], rel=2e-6)
    assert max(found) > 1.2 * min(found)


def test_unigrams_by_hand_and_as_datatrove(tmp_path: Path) -> None:
    tsv, table = tmp_path / "f.tsv", tmp_path / "f.json"
    tsv.write_text("the\t60\ncat\t30\nThe\t10\n", encoding="utf-8-sig")
    table.write_text(json.dumps({"the": 70, "cat": 30}))
    for path in (tsv, table):
        model = Unigrams(path)
        assert model("The cat") == pytest.approx((math.log10(0.7) + math.log10(0.3)) / 2, rel=1e-6)
        assert model("Cat, dog") == pytest.approx((math.log10(0.3) + 2 * math.log10(UNSEEN)) / 3, rel=1e-6)
        assert model(" ") == 0.0
    assert Unigrams(tsv, lower=False)("The cat") == pytest.approx((math.log10(0.1) + math.log10(0.3)) / 2, rel=1e-6)


def test_unigrams_agree_with_datatroves_filter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compares scores of real documents with datatrove's, which are natural logarithms, where words are split alike."""
    from datatrove.data import Document
    from datatrove.pipeline.filters import unigram_log_probs

    texts = [record["text"][:4000] for record in demo_records("english")]
    counts = Counter(word for text in texts[::2] for word in words(text))
    path = tmp_path / "f.tsv"
    path.write_text("".join(f"{word}\t{count}\n" for word, count in counts.items()), encoding="utf-8")
    total = sum(counts.values())
    monkeypatch.setattr(unigram_log_probs, "split_into_words", lambda text, language: text.split())
    monkeypatch.setattr(
        unigram_log_probs.UnigramLogProbFilter,
        "get_frequencies",
        lambda self: {word: count / total for word, count in counts.items()},
    )
    theirs = unigram_log_probs.UnigramLogProbFilter()
    model = Unigrams(path, Splitter.spaces)
    expected = [float(theirs.get_logprob(Document(text, "0"))) / math.log(10) for text in texts]
    assert [model(text) for text in texts] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("line", ["the", "the\tmany", "the\t0", "the\t1\t2", "the\tnan"])
def test_a_bad_table_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "f.tsv"
    path.write_text(f"cat\t2\n{line}\n")
    with pytest.raises(ValueError, match=re.escape(f"{path}, entry 2:") + ".* should be a word and a count above 0$"):
        Unigrams(path)
    path.write_text("cat\t2\nthe\t1\n")
    Unigrams(path)


def test_a_table_is_read_once_it_is_as_the_message_says(tmp_path: Path) -> None:
    table, lines = tmp_path / "f.json", tmp_path / "f.tsv"
    for wrong in ("[1]", "{"):
        table.write_text(wrong)
        with pytest.raises(ValueError, match=r"f\.json is not a JSON object of the form (\{word: count\})$") as said:
            Unigrams(table)
    table.write_text(str(said.value)[-13:].replace("word", '"word"').replace("count", "7"))
    lines.write_text("")
    with pytest.raises(ValueError, match=r"contains no words; each line should be a word, a tab and a count$"):
        Unigrams(lines)
    lines.write_text("word\t7\n")
    assert Unigrams(table)("word") == Unigrams(lines)("word") == 0.0


@pytest.mark.parametrize("damage", ["cut", "changed", "wrong sum"])
def test_damaged_gzip_is_named(tmp_path: Path, damage: str) -> None:
    whole = small(tmp_path, name="small.arpa.gz").read_bytes()
    changed = {
        "cut": whole[:-20],
        "changed": whole[:40] + b"\xff" * 20 + whole[60:],
        "wrong sum": whole[:-8] + bytes(8),
    }
    for name, model in (("small.arpa.gz", Arpa), ("small.tsv.gz", Unigrams), ("small.json.gz", Unigrams)):
        (tmp_path / name).write_bytes(changed[damage])
        with pytest.raises(ValueError, match=rf"{name} is damaged, and cannot be read to its end \(.*\); restore it"):
            model(tmp_path / name)
