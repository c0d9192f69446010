"""A fastText quality classifier (Joulin et al. 2016, as DCLM uses it: Li et al. 2024, arXiv 2406.11794, section 4.4).

`trivium data train-classifier GOOD... --bad BAD... --out MODEL` trains one from examples, deterministically: one
thread, one seed. Beside the model it leaves MODEL.json: settings, counts, SHA-256 and what the held-out examples say.
The score of a document is the probability of the label good. Models of others are taken as well, and shown text as
DCLM shows it. A search for hyperparameters is left out.
"""

import hashlib
import json
import sys
import tempfile
from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import fasttext
import numba
import numpy as np

from configs.data import ANY_LANGUAGE, ExtractConfig, SourceConfig
from configs.loader import ConfigError, command_parser, entrypoint, sync, write_atomic
from data_pipeline.heldout import draw
from data_pipeline.reading.source import find_units, read_file
from data_pipeline.scan.characters import codes_of, kinds_of
from data_pipeline.scan.scores import in_lower_case
from data_pipeline.scan.words import Splitter, split

GOOD, BAD = "good", "bad"
LABEL = "__label__"
PACKAGE = "fasttext-numpy2-wheel"
MIN_EXAMPLES = 100  # of each class; a tenth of them, held out, still says something
WORDS, LINES = "words", "lines"  # how a text is shown to the model


def shown_as_words(text: str) -> str:
    """The words of `text` in lower case between single spaces, each Chinese character and each run of a sign alone.

    fastText reads a line, takes what begins with __label__ for a label, and stops at </s>: none of them is left.
    """
    codes = codes_of(in_lower_case(text))
    starts, ends = split(codes, kinds_of(codes), int(Splitter.words))
    line = _spaced(codes, starts, ends).tobytes().decode("utf-32-le", "replace")
    return line.replace(LABEL, "label ") if LABEL in line else line


@numba.njit(cache=True, nogil=True)
def _spaced(codes: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    found = np.empty(2 * len(codes) + 1, np.uint32)
    size = 0
    for word in range(len(starts)):
        if word:
            found[size] = 32
            size += 1
        for place in range(starts[word], ends[word]):
            found[size] = codes[place]
            size += 1
    return found[:size]


def shown_as_lines(text: str) -> str:
    return " ".join(text.strip().splitlines())


class Classifier:
    """text -> probability of `label`."""

    def __init__(self, path: Path, label: str = GOOD) -> None:
        about = manifest_of(path)
        self._show = shown_as_words if about.get("text") == WORDS else shown_as_lines
        try:
            self._model = fasttext.load_model(str(path))
        except (ValueError, RuntimeError, MemoryError) as error:
            raise ValueError(f"scores.classifier = {str(path)!r} is no fastText model: {error}") from None
        self._label = LABEL + label
        if self._label not in self._model.get_labels():
            known = ", ".join(name.removeprefix(LABEL) for name in self._model.get_labels())
            raise ValueError(f"scores.classifier_label = {label!r} is no label of {path}, which has {known[:200]}")

    def __call__(self, text: str) -> float:
        labels, scores = self._model.predict(self._show(text), k=-1)
        return min(float(dict(zip(labels, scores, strict=True)).get(self._label, 0.0)), 1.0)


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
class Examples:
    """Lines of both classes, each text once, in the order of the files; `counts` says what was left out."""

    lines: dict[str, list[str]]
    counts: dict[str, int]


def collect(good: Sequence[str], bad: Sequence[str], text_key: str, max_chars: int) -> Examples:
    """The first `max_chars` characters of each record. Errors: ConfigError for a pattern that leads to nothing."""
    seen: dict[str, set[str]] = {GOOD: set(), BAD: set()}
    lines: dict[str, list[str]] = {GOOD: [], BAD: []}
    counts = {"unusable": 0, "repeated": 0, "in_both": 0}
    for label, patterns in ((GOOD, good), (BAD, bad)):
        for text in _texts(label, patterns, text_key, counts):
            line = shown_as_words(text[:max_chars])
            if not line or line in seen[label]:
                counts["repeated" if line else "unusable"] += 1
            else:
                seen[label].add(line)
                lines[label].append(line)
    both = seen[GOOD] & seen[BAD]
    counts["in_both"] = len(both)
    return Examples({label: [line for line in mine if line not in both] for label, mine in lines.items()}, counts)


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


def train(examples: Examples, out: Path, share: float, settings: dict[str, Any]) -> dict[str, Any]:
    """Trains on all but a `share` of each class, publishes the model and what stands beside it, which is returned.

    Errors: ConfigError for fewer than MIN_EXAMPLES of a class.
    """
    seed = settings["seed"]
    held: dict[str, list[str]] = {}
    rest: list[tuple[float, str]] = []
    for label, lines in examples.lines.items():
        if len(lines) < MIN_EXAMPLES:
            raise ConfigError(
                f"{len(lines)} {label} examples are too few, {MIN_EXAMPLES} different ones are the least; "
                f"left out: {_said(examples.counts)}"
            )
        # The place of an example in its class's drawn order: held out or not, and where in the training file.
        drawn = sorted((draw(seed, line), line) for line in lines)
        count = max(1, round(share * len(drawn)))
        held[label] = [line for _, line in drawn[:count]]
        rest += [(place, f"{LABEL}{label} {line}\n") for place, line in drawn[count:]]
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as folder:
        text, model_path = Path(folder) / "train.txt", Path(folder) / "model.bin"
        text.write_text("".join(line for _, line in sorted(rest)), encoding="utf-8")
        model = fasttext.train_supervised(str(text), thread=1, verbose=0, minCount=1, **_names(settings))
        model.save_model(str(model_path))
        with model_path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        about = {
            "text": WORDS,
            "labels": [GOOD, BAD],
            "settings": settings | {"heldout": share},
            "examples": {label: len(lines) for label, lines in examples.lines.items()},
            "left_out": examples.counts,
            "heldout": measure(model, held),
            "package": f"{PACKAGE} {version(PACKAGE)}",
            "sha256": sha256,
        }
        sync(model_path)
        model_path.replace(out)
    # A kill between the two leaves an old one beside a new model, which `manifest_of` finds out.
    write_atomic(manifest_path(out), (json.dumps(about, indent=1) + "\n").encode())
    return about


def _names(settings: dict[str, Any]) -> dict[str, Any]:
    """Our settings as fastText calls them."""
    return {{"word_ngrams": "wordNgrams"}.get(name, name): value for name, value in settings.items()}


def measure(model: Any, held: dict[str, list[str]]) -> dict[str, float]:
    """Accuracy over all held-out examples, precision and recall of the label good."""
    said = {
        label: [model.predict(line, k=1)[0][0] == LABEL + GOOD for line in lines] for label, lines in held.items()
    }
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
        "A fastText quality classifier from good and bad examples, for scores.classifier of a data config.",
        "trivium data train-classifier good/*.jsonl.gz --bad bad.jsonl.zst more_bad/ --out runs/quality.bin",
    )
    parser.add_argument("good", metavar="GOOD", nargs="+", help="files of good examples: .jsonl(.gz|.zst), or text")
    parser.add_argument("--bad", metavar="BAD", nargs="+", required=True, help="files of bad examples")
    parser.add_argument("--out", metavar="MODEL", required=True, help="where the model goes; MODEL.json beside it")
    parser.add_argument("--text-key", default="text", help="of JSON lines (default text)")
    parser.add_argument("--max-chars", type=int, default=20_000, help="of an example (default 20000)")
    parser.add_argument("--heldout", type=float, default=0.1, help="share of each class to measure on (default 0.1)")
    parser.add_argument("--seed", type=int, default=0, help="default 0")
    parser.add_argument("--epoch", type=int, default=5, help="default 5")
    parser.add_argument("--lr", type=float, default=0.1, help="learning rate (default 0.1)")
    parser.add_argument("--dim", type=int, default=64, help="size of word vectors (default 64)")
    parser.add_argument("--word-ngrams", type=int, default=2, help="default 2")
    parser.add_argument("--bucket", type=int, default=200_000, help="slots for hashed n-grams (default 200000)")
    args = parser.parse_args(argv)
    for name, low, high in (
        ("max_chars", 1, 10**9), ("heldout", 1e-6, 0.5), ("epoch", 1, 10_000), ("lr", 1e-9, 100), ("dim", 1, 10_000),
        ("word_ngrams", 1, 20), ("bucket", 1, 10**9), ("seed", 0, 2**31 - 1),
    ):  # fmt: skip
        if not low <= getattr(args, name) <= high:
            key = name.replace("_", "-")
            raise ConfigError(f"--{key} {getattr(args, name)} is out of range; give a number from {low} to {high}")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    out = Path(args.out)
    if out.is_dir():
        raise ConfigError(f"--out {out} is a folder; name a file in it, such as {out / 'quality.bin'}")
    examples = collect(args.good, args.bad, args.text_key, args.max_chars)
    names = ("seed", "epoch", "lr", "dim", "word_ngrams", "bucket")
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
