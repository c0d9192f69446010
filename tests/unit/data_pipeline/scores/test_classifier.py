"""Tests the quality classifier, trained on real prose and code, and what it refuses."""

import hashlib
import json
import re
import struct
from pathlib import Path

import numpy as np
import pytest

from configs.loader import ConfigError
from data_pipeline.language.identification import model_path
from data_pipeline.scores import classifier
from data_pipeline.scores.classifier import load, main
from tests.demo_corpus import DEMO, write_jsonl

SMALL = ["--slots", "5000", "--max-chars", "2000"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("classifier")
    argv = [str(DEMO / "english.jsonl.gz"), "--bad", str(DEMO / "code.jsonl.gz"), *SMALL]
    for name in ("one.model", "two.model"):
        assert main([*argv, "--out", str(folder / name)]) == 0
    return folder


def test_prose_is_told_from_code_and_twice_the_same(trained: Path) -> None:
    content = (trained / "one.model").read_bytes()
    assert content == (trained / "two.model").read_bytes()
    about = json.loads((trained / "one.model.json").read_text())
    assert about["sha256"] == hashlib.sha256(content).hexdigest()
    assert about["settings"]["slots"] == 5000 and min(about["heldout"]["good"], about["heldout"]["bad"]) >= 10
    assert about["heldout"]["accuracy"] > 0.95  # speeches and Python code are easy to tell apart
    model = load(trained / "one.model")
    good, bad = model("It was the best of times, it was the worst of times."), model("def f(x):\n    return x + 1\n")
    assert 0 <= bad < 0.5 < good <= 1
    assert sorted(path.name for path in trained.iterdir()) == [
        "one.model",
        "one.model.json",
        "two.model",
        "two.model.json",
    ]


def test_heldout_numbers_by_hand() -> None:
    said = {"good": ["x", "x", "x", "y"], "bad": ["x", "y", "y", "y", "y", "y"]}
    found = classifier.measure(lambda text: 0.5 if "x" in text else 0.4, said)
    assert found == {"good": 4, "bad": 6, "accuracy": 0.8, "precision": 0.75, "recall": 0.75}


def test_the_model_by_hand() -> None:
    """Computes a probability by hand: words and pairs are features, weighted by 1 / sqrt(their number)."""
    model = classifier.LinearClassifier(np.arange(1001, dtype=np.float32) / 1000, 2)
    one, two, both = (model.features(text) for text in ("three", "KINGDOMS", "Three kingdoms"))
    assert len(both) == 3 and both[0] == one[0] and both[2] == two[0]
    expected = 1 / (1 + np.exp(-(sum(both / 1000) / np.sqrt(3) + 1)))
    assert model("Three kingdoms") == pytest.approx(expected, rel=1e-5)  # weights are float32


def test_models_of_fasttext_are_taken() -> None:
    model = load(model_path(), "zh")
    assert (
        model("话说天下大势，分久必合，合久必分。\n周末七国分争，并入于秦。")
        > 0.9
        > 0.1
        > model("It was the best of times.")
    )
    with pytest.raises(
        ValueError, match=r"'hq' is not a label of .*; name one that it has: (.+) and 136 more$"
    ) as refused:
        load(model_path(), "hq")
    named = str(refused.value).partition("it has: ")[2].partition(" and ")[0].split(", ")
    assert len(named) == 40
    for label in (named[0], named[-1]):
        load(model_path(), label)


def test_too_few_and_contradictory_examples_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = write_jsonl(tmp_path / "good.jsonl.gz", [{"text": f"good {n}"} for n in range(120)])
    bad = write_jsonl(tmp_path / "bad.jsonl.gz", [{"text": f"{'good' if n < 30 else 'bad'} {n}"} for n in range(150)])
    argv = [str(good), "--bad", str(bad), *SMALL, "--out", str(tmp_path / "new/m.model")]
    with pytest.raises(
        ConfigError, match=r"90 good examples are too few; give at least 100 .* 30 in both\)"
    ) as refused:
        main(argv)
    with pytest.raises(ConfigError, match="is a file of examples, which the model would replace; name another"):
        main([*argv[:-1], str(bad)])
    with pytest.raises(
        ConfigError, match=r"--text-key = 'body', but none of the first 120 records .*; the keys there are text;"
    ):
        main([*argv, "--text-key", "body"])
    with pytest.raises(ConfigError, match=r"GOOD\.files: 'none.jsonl' matches no file"):
        main(["none.jsonl", *argv[1:]])
    assert not (tmp_path / "new").exists()
    for key in ("max-chars", "heldout", "epochs", "rate", "word-ngrams", "slots", "seed"):
        for wrong in ("-1", str(10**12)):
            with pytest.raises(ConfigError, match=rf"--{key} -?[\d.e+]+ is out of range; give a number") as beyond:
                classifier.parse([*argv, f"--{key}", wrong])
            for bound in re.findall(r"from (\S+) to (\S+)$", str(beyond.value))[0]:
                classifier.parse([*argv, f"--{key}", bound])
    least = int(re.findall(r"give at least (\d+)", str(refused.value))[0])
    write_jsonl(good, [{"text": f"good {n}"} for n in range(30, 30 + least)])
    assert main(argv) == 0


def test_records_that_cannot_be_used_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good, bad = tmp_path / "good.jsonl", tmp_path / "bad"
    good.write_text("".join(json.dumps({"text": f"sun {n % 110}"}) + "\n" for n in range(112)) + '{"te\n{"id": 1}\n')
    bad.mkdir()
    for n in range(100):
        (bad / f"{n}.txt").write_text(f"rain {n}")
    argv = [str(good), "--bad", str(bad), *SMALL, "--out"]
    with pytest.raises(ConfigError, match=r"is a folder; name a file in it, such as (\S+)$") as refused:
        main([*argv, str(tmp_path)])
    named = str(refused.value).split()[-1]
    assert main([*argv, named]) == 0 and Path(named).parent == tmp_path
    said = capsys.readouterr().out
    assert "examples: 110 good, 100 bad; left out: 2 unusable, 2 repeated, 0 in both" in said


def unquantised() -> bytes:
    """Returns a fastText model of the word `a` and the label `good`, whose numbers are not quantised."""
    settings = struct.pack("<2i12id", 793712314, 12, 2, 5, 1, 1, 5, 1, 3, 3, 0, 0, 0, 100, 1e-4)
    words = b"".join(
        name + struct.pack("<Bqb", 0, 1, kind) for name, kind in ((b"</s>", 0), (b"a", 0), (b"__label__good", 1))
    )
    vectors = (struct.pack(f"<?2q{2 * rows}f", False, rows, 2, *([0.5] * 2 * rows)) for rows in (2, 1))
    return settings + struct.pack("<3i2q", 3, 2, 1, 3, -1) + words + b"".join(vectors)


def test_models_that_cannot_be_used_are_named(trained: Path, tmp_path: Path) -> None:
    other = tmp_path / "m.model"
    whole = model_path().read_bytes()
    wrong = {
        "is neither a model of": [b"no model"],
        # fastText would read the first two without end, and take numbers that are not there for the others.
        "is a fastText model cut short": [whole[:200], whole[:20_000], whole[:-1000], whole[:-1], whole[:60]],
        "is not a fastText model": [whole[:4] + b"\x0d" + whole[5:]],  # of a version that does not exist
    }
    for said, contents in wrong.items():
        for content in contents:
            other.write_bytes(content)
            with pytest.raises(ValueError, match=rf"{said}.*; name another file$"):
                load(other)
    plain = tmp_path / "plain.model"
    plain.write_bytes(unquantised())
    for right, label in ((trained / "one.model", "good"), (model_path(), "zh"), (plain, "good")):
        assert 0 <= load(right, label)("a") <= 1
    plain.write_bytes(unquantised()[:-1])
    with pytest.raises(ValueError, match="cut short"):
        load(plain)
    with pytest.raises(
        ValueError, match=r"scores\.classifier_label = 'hq' is not a label of .*; set it to '(\w+)'$"
    ) as refused:
        load(trained / "one.model", "hq")
    load(trained / "one.model", str(refused.value).rpartition(" ")[2].strip("'"))


def test_a_manifest_of_another_model_is_mended_in_each_way(trained: Path, tmp_path: Path) -> None:
    model, beside = tmp_path / "m.model", tmp_path / "m.model.json"
    model.write_bytes(model_path().read_bytes())
    beside.write_text((trained / "one.model.json").read_text())
    with pytest.raises(ValueError, match=r"train the classifier again, or remove (\S+)$") as refused:
        load(model, "zh")
    (tmp_path / str(refused.value).rpartition(" ")[2]).unlink()
    load(model, "zh")
    beside.write_text((trained / "one.model.json").read_text())
    assert (
        main([str(DEMO / "english.jsonl.gz"), "--bad", str(DEMO / "code.jsonl.gz"), *SMALL, "--out", str(model)]) == 0
    )
    load(model)
