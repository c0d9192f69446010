"""Remedies in the messages about data configs: each is parsed out of the message, applied, and makes it valid."""

import copy
import re
import tomllib
from collections.abc import Callable
from typing import Any

import pytest

from configs.data import DataConfig
from configs.loader import ConfigError, validate
from configs.sources import RESERVED

BASE = """
[run]
dir = "run"
[sources.prose]
files = ["prose.jsonl"]
format = "jsonl"
rules = { en = "plain" }
[sources.pages]
files = ["pages.warc.gz"]
format = "warc"
rules = { any = "plain" }
[rules.plain]
word_count = { min = 5 }
[mixture]
weights = { prose = 1.0, pages = 1.0 }
"""
GONE = object()

Edits = dict[str, Any]  # dotted key -> its new value, or GONE to delete it
Ways = Callable[[re.Match[str]], list[Edits]]  # the edits that a message offers, each to be applied alone


def edited(tree: dict[str, Any], edits: Edits) -> dict[str, Any]:
    tree = copy.deepcopy(tree)
    for key, value in edits.items():
        *sections, last = key.split(".")
        section = tree
        for name in sections:
            section = section.setdefault(name, {})
        if value is GONE:
            section.pop(last)
        else:
            section[last] = value
    return tree


def ways(*offered: Edits) -> Ways:
    return lambda found: list(offered)


def one_of(key: str, wrap: Callable[[str], Any] = str, *gone: str) -> Ways:
    """Returns edits that set `key` to each name of the list in the message; `{}` in `key` stands for the name."""
    return lambda found: [
        {**dict.fromkeys(gone, GONE), key.format(name): wrap(name)} for name in re.split(r", | and ", found[1])
    ]


def out_of(section: str, source: str) -> Ways:
    """Returns edits that delete a source from each key of `section` that the message names."""
    return lambda found: [{f"{section}{key}.{source}": GONE for key in found[1].split(" and ")}]


CANARY: Edits = {"canaries.one": {"source": "prose", "text": "Some words of a canary.", "reason": "kept"}}
PAGE = {"source": "pages", "text": "Some words of a canary.", "html": True}
STAGE: Edits = {"mixture": {"stages": {"a": {"weights": {"prose": 1.0, "pages": 0.0}, "fim": {"pages": 0.5}}}}}
MISTAKES: list[tuple[Edits, str, Ways]] = [
    # configs.alarms
    (
        {"alarms.stages.score": {"must_drop": True}},
        r"those are: (.+)$",
        one_of("alarms.stages.{}", lambda name: {"must_drop": True}, "alarms.stages.score"),
    ),
    # configs.canaries
    (
        {"canaries.one": {"source": "prose", "text": [], "reason": "kept"}},
        r"give one text at least",
        ways({"canaries.one.text": ["one"]}),
    ),
    (
        {"canaries.one": {"source": "prose", "text": "x", "reason": "near_duplicate"}},
        r"give text = \[ONE, ANOTHER\]",
        ways({"canaries.one.text": ["one", "another"]}),
    ),
    (
        {"canaries.one": {"source": "news", "text": "x", "reason": "kept"}},
        r"known under \[sources\]: (.+)$",
        one_of("canaries.one.source"),
    ),
    (
        {"canaries.one": {"source": "prose", "text": "x", "reason": "word_count_mn"}},
        r"did you mean '(\w+)'\?",
        one_of("canaries.one.reason"),
    ),
    (
        {"canaries.one": {"source": "prose", "text": "x", "reason": "near_duplicat"}},
        r"possible are: (.+)$",
        one_of("canaries.one.reason"),
    ),
    (
        {"canaries.one": {"source": "prose", "text": ["x", "y"], "reason": "near_duplicat"}},
        r"did you mean '(\w+)'\?",
        one_of("canaries.one.reason"),
    ),
    ({"canaries.one": PAGE | {"reason": "rotten"}}, r"possible are: (.+)$", one_of("canaries.one.reason")),
    # configs.cuts
    (
        {"decontaminate": {"files": ["e.jsonl"], "min_words": 20}},
        r"(min_words) = 20 is above ngram = (13).*to ngram or",
        lambda found: [{f"decontaminate.{found[1]}": int(found[2])}, {f"decontaminate.{found[1]}": 2}],
    ),
    (
        {"pii": {"replacements": {"secret": "x", "email": "y"}}},
        r"(set actions = \{.+\}), or leave it out",
        lambda found: [{"pii.actions": tomllib.loads(found[1][4:])["actions"]}, {"pii.replacements.secret": GONE}],
    ),
    # configs.data
    (
        {"run.slurm": {"time": "a day"}},
        r'write hours as "(.+)" or days as "(.+)"',
        lambda found: [{"run.slurm.time": found[1]}, {"run.slurm.time": found[2]}],
    ),
    (
        {"sources.pages.text_key": "body"},
        r"says nothing of format 'warc'; leave it out",
        ways({"sources.pages.text_key": GONE}),
    ),
    (
        {"sources.prose.encoding": "latin-1"},
        r"is for the formats '(text)' and '(code)', not 'jsonl'.*leave it out",
        lambda found: [{"sources.prose.encoding": GONE}, *({"sources.prose.format": found[n]} for n in (1, 2))],
    ),
    (
        {"sources.prose.document_per": "line"},
        r"is for format '(text)', not 'jsonl'; leave it out",
        lambda found: [{"sources.prose.document_per": GONE}, {"sources.prose.format": found[1]}],
    ),
    (
        {"sources.prose.skip_vendored": True},
        r"is for format '(code)', not 'jsonl'; leave it out",
        lambda found: [{"sources.prose.skip_vendored": GONE}, {"sources.prose.format": found[1]}],
    ),
    (
        {"sources.prose.extensions": ["JL"]},
        r"in lower case with its dot, as in '(.+)'",
        lambda found: [{"sources.prose.extensions": [found[1]]}, {"sources.prose.extensions": [".jl"]}],
    ),
    (
        {"sources.prose.files": ["s3://key:secret@bucket/a"]},
        r"give the plain address",
        ways({"sources.prose.files": ["s3://bucket/a"]}),
    ),
    (
        {"dedup": {"verify": 75}},
        r"set for example ([\d.]+), or (false)",
        lambda found: [{"dedup.verify": float(found[1])}, {"dedup.verify": False}],
    ),
    *(
        (
            {f"sources.{name}": {"files": ["a"], "format": "text", "rules": {"en": "plain"}}},
            r"use letters, digits and _",
            ways(
                {
                    f"sources.{name}": GONE,
                    f"sources.{other}": {"files": ["a"], "format": "text", "rules": {"en": "plain"}},
                }
            ),
        )
        for name, other in (("a-b", "a_b"), ("2024-10", "2024_10"), ("a b", "2024"), ("", "_"))
    ),
    *(
        (
            {f"sources.{name}": {"files": ["a"], "format": "text", "rules": {"en": "plain"}}},
            r"choose another name, such as (\w+)$",
            lambda found, name=name: [  # type: ignore[misc]
                {
                    f"sources.{name}": GONE,
                    f"sources.{found[1]}": {"files": ["a"], "format": "text", "rules": {"en": "plain"}},
                }
            ],
        )
        for name in RESERVED
    ),
    (
        {f"canaries.{'é' * 51}": CANARY["canaries.one"]},
        r"has 102 bytes: use (\d+) at most",
        lambda found: [{f"canaries.{'é' * 51}": GONE, f"canaries.{'a' * int(found[1])}": CANARY["canaries.one"]}],
    ),
    (
        {"mixture.stages": {"a" * 101: {}}},
        r"use (\d+) at most",
        lambda found: [{"mixture.stages": {"a" * int(found[1]): {}}}],
    ),
    (
        {"canaries.a-b": CANARY["canaries.one"]},
        r"use letters, digits and _ only",
        ways({"canaries.a-b": GONE, "canaries.1st_ü": CANARY["canaries.one"]}),
    ),
    ({"mixture.stages": {"1-a": {}}}, r"use letters, digits and _ only", ways({"mixture.stages": {"1_a": {}}})),
    ({"sources.prose.rules.en": "plan"}, r"known under \[rules\]: (.+)$", one_of("sources.prose.rules.en")),
    (
        {"mixture.weights.news": 1.0},
        r"known under \[sources\]: (.+)$",
        one_of("mixture.weights.{}", lambda name: 1.0, "mixture.weights.news"),
    ),
    ({"lines": {"sources": ["news"]}}, r"known under \[sources\]: (.+)$", one_of("lines.sources", lambda name: [name])),
    (
        {"mixture.weights": {"prose": 1.0}, "mixture.epochs": {"pages": 2}},
        r"take out the key as well",
        ways({"mixture.epochs.pages": GONE}),
    ),
    *(
        (
            {f"rules.plain.{score}": {"max": 1.0}},
            r"name the model as (\w+\.\w+) = PATH, or leave the rule out",
            lambda found, score=score: [{found[1]: "models/a"}, {f"rules.plain.{score}": GONE}],
        )  # type: ignore[misc]
        for score in ("classifier_score", "unigram_logprob", "perplexity")
    ),
    (
        {"rules.plain.language_share": {"min": 0.5}},
        r"set (\w+\.\w+) = true, or leave the rule out",
        lambda found: [{found[1]: True}, {"rules.plain.language_share": GONE}],
    ),
    # configs.mixture
    (
        {"mixture.unimax": True},
        r"exactly one of (\w+), (\w+) and (\w+) = true; set one and leave out the others",
        ways(
            {"mixture.weights": GONE},
            {"mixture.unimax": GONE},
            {"mixture.unimax": GONE, "mixture.weights": GONE, "mixture.temperature": 1.0},
        ),
    ),
    (
        {"mixture.weights": {}},
        r"names no source; give each source a weight, such as \{ web = 1\.0 \}",
        ways({"mixture.weights": {"prose": 1.0, "pages": 1.0}}),
    ),
    (
        {"decontaminate": {"files": ["a"], "min_words": 20}},
        r"in between would not be looked for; set it to ngram or lower",
        ways({"decontaminate.min_words": 13}),
    ),
    ({"mixture.epochs": {"pages": 0}}, r"is not above 0; give a cap above 0", ways({"mixture.epochs.pages": 0.5})),
    (
        {"mixture.fim": {"pages": 0}},
        r"above 0 and up to 1; give one, or leave the key out",
        ways({"mixture.fim.pages": 1.0}, {"mixture.fim.pages": GONE}),
    ),
    (
        {"mixture.weights.pages": 0, "mixture.epochs": {"pages": 2}},
        r"leave the source out of ([\w. ]+)$",
        out_of("", "pages"),
    ),
    (STAGE, r"leave the source out of ([\w. ]+)$", out_of("", "pages")),
    # configs.rules
    (
        {"rules.plain.hash_ratio": {}},
        r"a rule needs (min), (max) or both; leave the rule out",
        lambda found: [{"rules.plain.hash_ratio": GONE}, {"rules.plain.hash_ratio": {found[1]: 1, found[2]: 1}}],
    ),
    (
        {"rules.plain.hash_ratio": {"min": 2, "max": 1}},
        r"lower min or raise max",
        ways({"rules.plain.hash_ratio.min": 1}, {"rules.plain.hash_ratio.max": 2}),
    ),
    (
        {"rules.plain": {"use": ["gopher_quality@paper"], "word_count": {"max": 10}}},
        r"min = ([\d.]+) is.*raise max \(give",
        lambda found: [
            {"rules.plain.word_count": edits} for edits in ({"max": float(found[1])}, {"min": 5, "max": 10})
        ],
    ),
    ({"rules.plain.without": ["hash_ratio"]}, r"it has (.+)$", one_of("rules.plain.without", lambda name: [name])),
    (
        {"rules.plain": {"without": ["hash_ratio"]}},
        r"it has none, so leave without out",
        ways({"rules.plain.without": GONE}),
    ),
    (
        {"rules.plain.bad_words": {"max": 0}},
        r'name one, or add (without = \["bad_words"\])',
        lambda found: [{"rules.plain.bad_words_file": "list.txt"}, {"rules.plain.without": ["bad_words"]}],
    ),
    (
        {"rules.plain.use": ["gopher_quality@papers"]},
        r"did you mean '(\S+)'\? Known: ",
        one_of("rules.plain.use", lambda name: [name]),
    ),
    (
        {"rules.plain.use": ["nothing"], "rules.plain.bad_words_file": "list.txt"},
        r"Known: (.+)$",
        one_of("rules.plain.use", lambda name: [name]),
    ),
    (
        {"rules.plain.use": ["gopher_quality@paper", "fineweb2_zh", "c4@datatrove", "c4@fineweb"]},
        r"write (\w+) = \.\.\. and (\w+) = \.\.\. and (\w+) = \.\.\. beside use to choose",
        lambda found: [
            {
                f"rules.plain.{found[n]}": {"splitter": "cjk", "stop_words": ["a"], "c4": "paper"}[found[n]]
                for n in (1, 2, 3)
            }
        ],
    ),
]


@pytest.mark.parametrize(("wrong", "said", "offers"), MISTAKES)
def test_what_a_refusal_says_to_do_makes_the_config_right(wrong: Edits, said: str, offers: Ways) -> None:
    tree = edited(tomllib.loads(BASE), wrong)
    with pytest.raises(ConfigError) as refused:
        validate(DataConfig, tree)
    found = re.search(said, str(refused.value))
    assert found, str(refused.value)
    tried = offers(found)
    assert tried
    for edits in tried:
        validate(DataConfig, edited(tree, edits))
