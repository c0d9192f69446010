"""A linear quality classifier over words and word pairs, like that of DCLM (arXiv 2406.11794, section 4.4).

`trivium data train-classifier GOOD... --bad BAD... --out MODEL` trains one from examples: logistic regression over
hashed n-grams by AdaGrad (Duchi et al. 2011), in one thread and a fixed order, so that the same examples give the same
bytes. fastText 0.9.2 itself does not guarantee that: with one thread it leaves nine tenths of its vectors
uninitialized. Models that fastText has trained can be used as well; they get the text in the form in which DCLM gives
it. MODEL.json beside the model holds settings, counts, SHA-256 and the measures on held-out examples. There is no
search for the best settings.
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
from configs.folders import check_writable
from configs.loader import ConfigError
from configs.sources import ANY_LANGUAGE, ExtractConfig, SourceConfig
from data_pipeline.core.hashing import draw
from data_pipeline.reading.keys import check_keys
from data_pipeline.reading.source_reader import find_units, read_file
from data_pipeline.scan.words import Splitter, mix
from data_pipeline.scores.fasttext_file import is_whole
from data_pipeline.scores.ngram_models import words_of

GOOD, BAD = "good", "bad"
LABEL = "__label__"  # prefix of labels in fastText models
_SHOWN = 40  # labels that a message lists
_HINT = "; in JSON lines, the text is looked for under the key that --text-key names"
MIN_EXAMPLES = 100  # least number per class, of which a tenth, held out, still gives a rough measure
_FASTTEXT = (793712314).to_bytes(4, "little")  # first bytes of a fastText model
_PAIR = np.uint64(0x9E3779B97F4A7C15)


@numba.njit(cache=True, nogil=True)
def _features(words: np.ndarray, slots: int, ngrams: int) -> np.ndarray:
    """Returns the slot of each n-gram of 1 to `ngrams` words, int32 [n-grams]; `words` are hashes."""
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
    """Returns the probability of the label "good"; the last weight is the bias."""
    total = 0.0
    for slot in features:
        total += weights[slot]
    return 1 / (1 + np.exp(-(total / np.sqrt(max(len(features), 1)) + weights[-1])))


@numba.njit(cache=True, nogil=True)
def _fit(
    features: np.ndarray, ends: np.ndarray, labels: np.ndarray, epochs: int, rate: float, weights: np.ndarray
) -> None:
    """Fits `weights`, in place, by AdaGrad over the examples in their order.

    Example n has the features `features[ends[n - 1]:ends[n]]` and the label `labels[n]`, 1 for good and 0 for bad.
    """
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
    """Function of a text that returns the probability of the label "good"."""

    def __init__(self, weights: np.ndarray, ngrams: int) -> None:
        self.weights, self.ngrams = weights, ngrams

    def __call__(self, text: str) -> float:
        return float(_probability(self.features(text), self.weights))

    def features(self, text: str) -> np.ndarray:
        """Returns the slots of the text's n-grams, int32 [n-grams]."""
        words, _ = words_of(text, Splitter.words, True)
        return _features(words, len(self.weights) - 1, self.ngrams)


class FastTextClassifier:
    """Function of a text that returns the probability of `label` under a fastText model; lines are joined, as in DCLM.

    The constructor raises ValueError for a file that is not a fastText model, or a model without that label.
    """

    def __init__(self, path: Path, label: str) -> None:
        if not is_whole(path):
            raise ValueError(f"scores.classifier = {str(path)!r} is a fastText model cut short; name another file")
        try:
            self._model = fasttext.load_model(str(path))
        except (ValueError, RuntimeError, MemoryError) as error:
            raise ValueError(
                f"scores.classifier = {str(path)!r} is not a fastText model ({error}); name another file"
            ) from None
        self._label = LABEL + label
        known = [name for name, _ in zip(*self._model.predict("a", k=-1, threshold=-1.0), strict=True)]
        if self._label not in known:
            names = sorted(name.removeprefix(LABEL) for name in known)
            more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
            raise ValueError(
                f"scores.classifier_label = {label!r} is not a label of {path}; name one that it has: "
                f"{', '.join(names[:_SHOWN])}{more}"
            )

    def __call__(self, text: str) -> float:
        labels, scores = self._model.predict(" ".join(text.strip().splitlines()), k=-1, threshold=-1.0)
        return min(float(dict(zip(labels, scores, strict=True)).get(self._label, 0.0)), 1.0)


def load(path: Path, label: str = GOOD) -> LinearClassifier | FastTextClassifier:
    """Reads a model of this module or of fastText; raises ValueError if it is neither or has no label `label`."""
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
            f"scores.classifier = {str(path)!r} is neither a model of trivium data train-classifier nor fastText's; "
            "name another file"
        ) from None
    if label != GOOD:
        raise ValueError(f"scores.classifier_label = {label!r} is not a label of {path}; set it to {GOOD!r}")
    return LinearClassifier(weights, ngrams)


def manifest_path(model: Path) -> Path:
    """Path of the manifest beside a model: MODEL.json."""
    return model.with_name(model.name + ".json")


def manifest_of(model: Path) -> dict[str, Any]:
    """Reads the manifest beside a model; {} if there is none.

    Raises ValueError if the manifest's SHA-256 is that of another file.
    """
    path = manifest_path(model)
    if not path.is_file():
        return {}
    about = json.loads(path.read_text(encoding="utf-8"))
    with model.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != about.get("sha256"):
            raise ValueError(
                f"{path} describes another file than {model}, by its SHA-256; train the classifier again, or remove "
                f"{path.name}"
            )
    return dict(about)


@dataclass
class LabelledTexts:
    """Texts by class, each text once, in the order of the files; `counts` says how many were left out, and why."""

    lines: dict[str, list[str]]
    counts: dict[str, int]


def collect(good: Sequence[str], bad: Sequence[str], text_key: str, max_chars: int) -> LabelledTexts:
    """Reads the examples: the first `max_chars` characters of each record.

    Unusable and repeated texts are left out, and texts that occur in both classes. Raises ConfigError for a pattern
    that matches no file, or JSON lines without `text_key`.
    """
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
    """Yields the texts of all records that the patterns match; counts records without text as unusable."""
    for pattern in patterns:
        lines = ".jsonl" in Path(pattern).suffixes
        source = SourceConfig(
            files=(pattern,),
            format="jsonl" if lines else "text",
            rules={ANY_LANGUAGE: label},
            text_key=text_key if lines else "text",
        )
        units = find_units(label, source, 1, label.upper())
        check_keys(units, ExtractConfig(), lambda *_: "--text-key")
        for unit in units:
            for file in unit.files:
                for record in read_file(file, source, ExtractConfig(), lambda size: None):
                    if record.reason or not record.text.strip():
                        counts["unusable"] += record.count
                    else:
                        yield record.text


def train(examples: LabelledTexts, out: Path, share: float, settings: dict[str, Any]) -> dict[str, Any]:
    """Trains on all examples but a held-out `share` of each class, writes model and manifest, and returns the manifest.

    Raises ConfigError if a class has fewer than MIN_EXAMPLES examples.
    """
    held: dict[str, list[str]] = {}
    rest: list[tuple[float, str, str]] = []
    for label, lines in examples.lines.items():
        if len(lines) < MIN_EXAMPLES:
            raise ConfigError(
                f"{len(lines)} {label} examples are too few; give at least {MIN_EXAMPLES} different ones "
                f"(left out: {_listed(examples.counts)}{_HINT if examples.counts['unusable'] else ''})"
            )
        # A number drawn for each example decides whether it is held out, and the order of training.
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
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(out, content)
    # A kill between the two writes leaves an old manifest beside the new model, which `manifest_of` detects.
    write_atomic(manifest_path(out), (json.dumps(about, indent=1) + "\n").encode())
    return about


def measure(model: Callable[[str], float], held: dict[str, list[str]]) -> dict[str, float]:
    """Measures a model on held-out examples: their numbers, accuracy, and precision and recall of the label "good"."""
    said = {label: [model(line) >= 0.5 for line in lines] for label, lines in held.items()}
    hits, false, missed = sum(said[GOOD]), sum(said[BAD]), said[GOOD].count(False)
    return {
        "good": len(said[GOOD]),
        "bad": len(said[BAD]),
        "accuracy": round((hits + said[BAD].count(False)) / (len(said[GOOD]) + len(said[BAD])), 4),
        "precision": round(hits / (hits + false), 4) if hits + false else 0.0,
        "recall": round(hits / (hits + missed), 4),
    }


def _listed(counts: dict[str, int]) -> str:
    return ", ".join(f"{count:,} {name.replace('_', ' ')}" for name, count in counts.items())


def parse(argv: Sequence[str] | None) -> Namespace:
    """Parses the arguments; raises ConfigError for a number out of range."""
    parser = command_parser(
        "trivium data train-classifier",
        "Trains a quality classifier from good and bad examples, for scores.classifier of a data config.",
        "trivium data train-classifier good/*.jsonl.gz --bad bad.jsonl.zst more_bad/ --out runs/quality.safetensors",
    )
    parser.add_argument("good", metavar="GOOD", nargs="+", help="files of good examples: .jsonl(.gz|.zst), or text")
    parser.add_argument("--bad", metavar="BAD", nargs="+", required=True, help="files of bad examples")
    parser.add_argument("--out", metavar="MODEL", required=True, help="file for the model; MODEL.json goes beside it")
    parser.add_argument("--text-key", default="text", help="key of the text in JSON lines (default text)")
    parser.add_argument("--max-chars", type=int, default=20_000, help="characters used per example (default 20000)")
    parser.add_argument("--heldout", type=float, default=0.1, help="share of each class to measure on (default 0.1)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the held-out draw and the order (default 0)")
    parser.add_argument("--epochs", type=int, default=5, help="passes over the examples (default 5)")
    parser.add_argument("--rate", type=float, default=0.05, help="learning rate (default 0.05)")
    parser.add_argument("--word-ngrams", type=int, default=2, help="longest n-gram, in words (default 2)")
    parser.add_argument("--slots", type=int, default=1 << 20, help="weights of n-grams, 4 bytes each (default 1048576)")
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
    """Runs `trivium data train-classifier`; returns the exit status."""
    args = parse(argv)
    out = Path(args.out)
    if out.is_dir():
        raise ConfigError(f"--out {out} is a folder; name a file in it, such as {out / 'quality.safetensors'}")
    for example in (*args.good, *args.bad):
        if out.exists() and Path(example).exists() and out.samefile(example):
            raise ConfigError(f"--out {out} is a file of examples, which the model would replace; name another")
    check_writable(out.parent, "--out", out)
    examples = collect(args.good, args.bad, args.text_key, args.max_chars)
    names = ("seed", "epochs", "rate", "word_ngrams", "slots")
    try:
        about = train(examples, out, args.heldout, {name: getattr(args, name) for name in names})
    except OSError as error:
        print(f"error: {out} could not be written: {error.strerror}", file=sys.stderr)
        return 1
    found = about["heldout"]
    print(f"examples: {_listed(about['examples'])}; left out: {_listed(about['left_out'])}")
    print(
        f"held out ({found['good']} good, {found['bad']} bad): accuracy {found['accuracy']:.3f}, "
        f"precision {found['precision']:.3f}, recall {found['recall']:.3f}"
    )
    print(f"{out}: {out.stat().st_size / 1e6:.1f} MB, SHA-256 {about['sha256']}")
    return 0


if __name__ == "__main__":
    entrypoint(main)
