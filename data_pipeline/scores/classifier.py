"""A quality classifier over words and word pairs, linear as the one of DCLM (arXiv 2406.11794, section 4.4).

`trivium data train-classifier GOOD... --bad BAD... --out MODEL` trains one from examples: logistic regression over
hashed n-grams by AdaGrad (Duchi et al. 2011), in one thread and a fixed order, so that the same examples give the same
bytes. fastText 0.9.2 itself cannot promise that: with one thread it leaves nine tenths of its vectors as it finds them
in memory. Models that fastText has trained are taken as well, and shown text as DCLM shows it. Beside the model stands
MODEL.json: settings, counts, SHA-256 and what the held-out examples say. A search for settings is left out.
"""

import hashlib
import json
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fasttext
import numba
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from configs.cli import command_parser, entrypoint
from configs.files import write_atomic
from configs.loader import ConfigError
from configs.sources import ANY_LANGUAGE, ExtractConfig, SourceConfig
from data_pipeline.documents.heldout import draw
from data_pipeline.reading.source_reader import find_units, read_file
from data_pipeline.scan.words import Splitter, mix
from data_pipeline.scores.ngram_models import words_of

GOOD, BAD = "good", "bad"
LABEL = "__label__"  # of fastText
MIN_EXAMPLES = 100  # of each class; a tenth of them, held out, still says something
_FASTTEXT = (793712314).to_bytes(4, "little")  # what a fastText model begins with
_PAIR = np.uint64(0x9E3779B97F4A7C15)


@numba.njit(cache=True, nogil=True)
def _features(words: np.ndarray, slots: int, ngrams: int) -> np.ndarray:
    """int32, the slot of each n-gram of 1 to `ngrams` words."""
    found = np.empty(len(words) * ngrams, np.int32)
    size = 0
    for start in range(len(words)):
        key = np.uint64(0)
        for index in range(start, min(start + ngrams, len(words))):
            key = mix(key * _PAIR + words[index])
            found[size] = key % np.uint64(slots)
            size += 1
    return found[:size]


@numba.njit(cache=True, nogil=True)
def _probability(features: np.ndarray, weights: np.ndarray) -> float:
    """Of the label good; the last weight is the bias."""
    total = 0.0
    for slot in features:
        total += weights[slot]
    return 1 / (1 + np.exp(-(total / np.sqrt(max(len(features), 1)) + weights[-1])))


@numba.njit(cache=True, nogil=True)
def _fit(
    features: np.ndarray, ends: np.ndarray, labels: np.ndarray, epochs: int, rate: float, weights: np.ndarray
) -> None:
    """AdaGrad over the examples in their order; example n is features[ends[n - 1]:ends[n]]."""
    squares = np.full(len(weights), 1e-8, np.float32)
    for _ in range(epochs):
        for example in range(len(labels)):
            mine = features[ends[example - 1] if example else 0 : ends[example]]
            error = _probability(mine, weights) - labels[example]
            step = error / np.sqrt(max(len(mine), 1))
            for slot in mine:
                squares[slot] += step * step
                weights[slot] -= rate * step / np.sqrt(squares[slot])
            squares[-1] += error * error
            weights[-1] -= rate * error / np.sqrt(squares[-1])


class LinearClassifier:
    """text -> probability of the label good."""

    def __init__(self, weights: np.ndarray, ngrams: int) -> None:
        self.weights, self.ngrams = weights, ngrams

    def __call__(self, text: str) -> float:
        return float(_probability(self.features(text), self.weights))

    def features(self, text: str) -> np.ndarray:
        words, _ = words_of(text, Splitter.words, True)
        return _features(words, len(self.weights) - 1, self.ngrams)


class FastTextClassifier:
    """text -> probability of `label`; lines are joined, as DCLM does."""

    def __init__(self, path: Path, label: str) -> None:
        try:
            self._model = fasttext.load_model(str(path))
        except (ValueError, RuntimeError, MemoryError) as error:
            raise ValueError(f"scores.classifier = {str(path)!r} is no fastText model: {error}") from None
        self._label = LABEL + label
        known = [name for name, _ in zip(*self._model.predict("a", k=-1, threshold=-1.0), strict=True)]
        if self._label not in known:
            names = ", ".join(sorted(name.removeprefix(LABEL) for name in known))
            raise ValueError(f"scores.classifier_label = {label!r} is no label of {path}, which has {names[:200]}")

    def __call__(self, text: str) -> float:
        labels, scores = self._model.predict(" ".join(text.strip().splitlines()), k=-1, threshold=-1.0)
        return min(float(dict(zip(labels, scores, strict=True)).get(self._label, 0.0)), 1.0)


def load(path: Path, label: str = GOOD) -> LinearClassifier | FastTextClassifier:
    """Errors: ValueError for what is no model, or a model without `label`."""
    manifest_of(path)
    with path.open("rb") as file:
        if file.read(4) == _FASTTEXT:
            return FastTextClassifier(path, label)
    try:
        with safe_open(path, "numpy") as stored:
            ngrams = int(stored.metadata()["word_ngrams"])
            weights = stored.get_tensor("weights")
    except (SafetensorError, KeyError, TypeError, ValueError):
        raise ValueError(
            f"scores.classifier = {str(path)!r} is neither a model of trivium data train-classifier nor fastText's"
        ) from None
    if label != GOOD:
        raise ValueError(f"scores.classifier_label = {label!r} is no label of {path}, whose score is of {GOOD}")
    return LinearClassifier(weights, ngrams)


def manifest_path(model: Path) -> Path:
    return model.with_name(model.name + ".json")


def manifest_of(model: Path) -> dict[str, Any]:
    """What stands beside a model; empty beside one of others. Errors: ValueError when it is about another file."""
    path = manifest_path(model)
    if not path.is_file():
        return {}
    about = json.loads(path.read_text(encoding="utf-8"))
    with model.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != about.get("sha256"):
            raise ValueError(f"{path} is about another file than {model}; train the classifier again, or remove it")
    return dict(about)


@dataclass
class LabelledTexts:
    """Texts of both classes, each text once, in the order of the files; `counts` says what was left out."""

    lines: dict[str, list[str]]
    counts: dict[str, int]


def collect(good: Sequence[str], bad: Sequence[str], text_key: str, max_chars: int) -> LabelledTexts:
    """The first `max_chars` characters of each record. Errors: ConfigError for a pattern that leads to nothing."""
    seen: dict[str, set[str]] = {GOOD: set(), BAD: set()}
    lines: dict[str, list[str]] = {GOOD: [], BAD: []}
    counts = {"unusable": 0, "repeated": 0, "in_both": 0}
    for label, patterns in ((GOOD, good), (BAD, bad)):
        for text in _texts(label, patterns, text_key, counts):
            line = text[:max_chars].strip()
            if not line or line in seen[label]:
                counts["repeated" if line else "unusable"] += 1
            else:
                seen[label].add(line)
                lines[label].append(line)
    both = seen[GOOD] & seen[BAD]
    counts["in_both"] = len(both)
    return LabelledTexts({label: [line for line in mine if line not in both] for label, mine in lines.items()}, counts)


def _texts(label: str, patterns: Sequence[str], text_key: str, counts: dict[str, int]) -> Iterator[str]:
    for pattern in patterns:
        lines = ".jsonl" in Path(pattern).suffixes
        source = SourceConfig(
            files=(pattern,),
            format="jsonl" if lines else "text",
            rules={ANY_LANGUAGE: label},
            text_key=text_key if lines else "text",
        )
        for unit in find_units(label, source, 1):
            for file in unit.files:
                for record in read_file(file, source, ExtractConfig(), lambda size: None):
                    if record.reason or not record.text.strip():
                        counts["unusable"] += record.count
                    else:
                        yield record.text


def train(examples: LabelledTexts, out: Path, share: float, settings: dict[str, Any]) -> dict[str, Any]:
    """Trains on all but a `share` of each class, publishes the model and what stands beside it, which is returned.

    Errors: ConfigError for fewer than MIN_EXAMPLES of a class.
    """
    held: dict[str, list[str]] = {}
    rest: list[tuple[float, str, str]] = []
    for label, lines in examples.lines.items():
        if len(lines) < MIN_EXAMPLES:
            raise ConfigError(
                f"{len(lines)} {label} examples are too few, {MIN_EXAMPLES} different ones are the least; "
                f"left out: {_said(examples.counts)}"
            )
        # The index of an example in its class's drawn order: held out or not, and when it is trained on.
        drawn = sorted((draw(settings["seed"], line), line) for line in lines)
        count = max(1, round(share * len(drawn)))
        held[label] = [line for _, line in drawn[:count]]
        rest += [(index, line, label) for index, line in drawn[count:]]
    rest.sort()
    model = LinearClassifier(np.zeros(settings["slots"] + 1, np.float32), settings["word_ngrams"])
    found = [model.features(line) for _, line, _ in rest]
    labels = np.array([label == GOOD for _, _, label in rest], np.float64)
    ends = np.cumsum([len(one) for one in found])
    _fit(np.concatenate(found), ends, labels, settings["epochs"], settings["rate"], model.weights)
    content = save({"weights": model.weights}, {"word_ngrams": str(model.ngrams)})
    about = {
        "settings": settings | {"heldout": share},
        "examples": {label: len(lines) for label, lines in examples.lines.items()},
        "left_out": examples.counts,
        "heldout": measure(model, held),
        "sha256": hashlib.sha256(content).hexdigest(),
    }
    write_atomic(out, content)
    # A kill between the two leaves an old one beside a new model, which `manifest_of` finds out.
    write_atomic(manifest_path(out), (json.dumps(about, indent=1) + "\n").encode())
    return about


def measure(model: Callable[[str], float], held: dict[str, list[str]]) -> dict[str, float]:
    """Accuracy over all held-out examples, precision and recall of the label good."""
    said = {label: [model(line) >= 0.5 for line in lines] for label, lines in held.items()}
    hits, false, missed = sum(said[GOOD]), sum(said[BAD]), said[GOOD].count(False)
    return {
        "good": len(said[GOOD]),
        "bad": len(said[BAD]),
        "accuracy": round((hits + said[BAD].count(False)) / (len(said[GOOD]) + len(said[BAD])), 4),
        "precision": round(hits / (hits + false), 4) if hits + false else 0.0,
        "recall": round(hits / (hits + missed), 4),
    }


def _said(counts: dict[str, int]) -> str:
    return ", ".join(f"{count:,} {name.replace('_', ' ')}" for name, count in counts.items())


def parse(argv: Sequence[str] | None) -> Namespace:
    parser = command_parser(
        "trivium data train-classifier",
        "A quality classifier from good and bad examples, for scores.classifier of a data config.",
        "trivium data train-classifier good/*.jsonl.gz --bad bad.jsonl.zst more_bad/ --out runs/quality.safetensors",
    )
    parser.add_argument("good", metavar="GOOD", nargs="+", help="files of good examples: .jsonl(.gz|.zst), or text")
    parser.add_argument("--bad", metavar="BAD", nargs="+", required=True, help="files of bad examples")
    parser.add_argument("--out", metavar="MODEL", required=True, help="where the model goes; MODEL.json beside it")
    parser.add_argument("--text-key", default="text", help="of JSON lines (default text)")
    parser.add_argument("--max-chars", type=int, default=20_000, help="of an example (default 20000)")
    parser.add_argument("--heldout", type=float, default=0.1, help="share of each class to measure on (default 0.1)")
    parser.add_argument("--seed", type=int, default=0, help="default 0")
    parser.add_argument("--epochs", type=int, default=5, help="default 5")
    parser.add_argument("--rate", type=float, default=0.05, help="learning rate (default 0.05)")
    parser.add_argument("--word-ngrams", type=int, default=2, help="default 2")
    parser.add_argument("--slots", type=int, default=1 << 20, help="for hashed n-grams, 4 bytes each (default 1048576)")
    args = parser.parse_args(argv)
    for name, low, high in (
        ("max_chars", 1, 10**9), ("heldout", 1e-6, 0.5), ("epochs", 1, 10_000), ("rate", 1e-9, 100),
        ("word_ngrams", 1, 20), ("slots", 1, 2**31 - 2), ("seed", 0, 2**31 - 1),
    ):  # fmt: skip
        if not low <= getattr(args, name) <= high:
            key = name.replace("_", "-")
            raise ConfigError(f"--{key} {getattr(args, name)} is out of range; give a number from {low} to {high}")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    out = Path(args.out)
    if out.is_dir():
        raise ConfigError(f"--out {out} is a folder; name a file in it, such as {out / 'quality.safetensors'}")
    examples = collect(args.good, args.bad, args.text_key, args.max_chars)
    names = ("seed", "epochs", "rate", "word_ngrams", "slots")
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        about = train(examples, out, args.heldout, {name: getattr(args, name) for name in names})
    except OSError as error:
        print(f"error: {out} could not be written: {error.strerror}", file=sys.stderr)
        return 1
    found = about["heldout"]
    print(f"examples: {_said(about['examples'])}; left out: {_said(about['left_out'])}")
    print(
        f"held out ({found['good']} good, {found['bad']} bad): accuracy {found['accuracy']:.3f}, "
        f"precision {found['precision']:.3f}, recall {found['recall']:.3f}"
    )
    print(f"{out}: {out.stat().st_size / 1e6:.1f} MB, SHA-256 {about['sha256']}")
    return 0


if __name__ == "__main__":
    entrypoint(main)
