"""The reward for following instructions: the paper's definitions, the harness's values, and what cannot be checked."""

from typing import Any

import pytest

from posttrain.rewards.instructions import INSTRUCTIONS, instructions
from posttrain.rewards.unscorable import Unscorable

WORDS = "length_constraints:number_words"


def follows(name: str, completion: str, **arguments: Any) -> bool:
    return bool(instructions("", completion, None, {"instruction_id_list": [name], "kwargs": [arguments]}))


EXAMPLES: list[tuple[str, dict[str, Any], str, str]] = [  # arguments, a text that follows, a text that does not
    ("keywords:existence", {"keywords": ["sun", "c++"]}, "Sunny C++ days", "Sunny C days"),
    ("keywords:frequency", {"keyword": "a", "frequency": 2, "relation": "at least"}, "A a", "a"),
    ("keywords:frequency", {"keyword": "a", "frequency": 2, "relation": "less than"}, "a", "A a"),
    ("keywords:forbidden_words", {"forbidden_words": ["art"]}, "party", "Art!"),
    ("keywords:letter_frequency", {"letter": "x", "let_frequency": 2, "let_relation": "at least"}, "xX", "x"),
    ("length_constraints:number_words", {"num_words": 3, "relation": "at least"}, "it's so", "so, so"),
    ("length_constraints:number_words", {"num_words": 3, "relation": "less than"}, "so, so", "one two three"),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, "***\na\n***\nb\n***", "a\n***\n***\nb"),
    (
        "length_constraints:nth_paragraph_first_word",
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "then"},
        "First.\n\n'Then, more",
        "Then\n\nnow",
    ),
    ("detectable_content:number_placeholders", {"num_placeholders": 2}, "[name] at [street]", "[name]"),
    ("detectable_content:postscript", {"postscript_marker": "P.S."}, "Yours. p. s. more", "Yours."),
    ("detectable_content:postscript", {"postscript_marker": "P.P.S"}, "P.P.S more", "P.S. more"),
    ("detectable_format:number_bullet_lists", {"num_bullets": 2}, "* a\n - b", "* a\n** b"),
    ("detectable_format:constrained_response", {}, "So: My answer is no.", "My answer is none."),
    ("detectable_format:number_highlighted_sections", {"num_highlights": 2}, "*a* and *b*", "*a* and * *"),
    (
        "detectable_format:multiple_sections",
        {"section_spliter": "Section", "num_sections": 2},
        "Section 1 a Section 2 b",
        "Section 1",
    ),
    ("detectable_format:json_format", {}, '```json\n{"a": 1}\n```', "{'a': 1}"),
    ("detectable_format:title", {}, "<<Title>>\ntext", "<< >>\ntext"),
    ("combination:two_responses", {}, "one******two", "one******one"),
    ("combination:repeat_prompt", {"prompt_to_repeat": "Say it"}, "say it. It.", "It. Say it."),
    ("startend:end_checker", {"end_phrase": "Is that all?"}, 'Well, "is that all?"', "Is that all? Yes"),
    ("startend:quotation", {}, '"so"', '"'),
    ("change_case:english_capital", {}, "SO, 2!", "SO, so"),
    ("change_case:english_lowercase", {}, "so, 2!", "So"),
    ("punctuation:no_comma", {}, "so; so", "so, so"),
]


@pytest.mark.parametrize(("name", "arguments", "good", "bad"), EXAMPLES)
def test_instructions_follow_the_papers_definitions(name: str, arguments: dict[str, Any], good: str, bad: str) -> None:
    assert follows(name, good, **arguments) and not follows(name, bad, **arguments)
    assert not follows(name, "  ", **arguments)


def test_instructions_agree_with_the_harness() -> None:
    registry = pytest.importorskip("lm_eval.tasks.ifeval.instructions_registry", exc_type=ImportError)
    texts = [text for *_, good, bad in EXAMPLES for text in (good, bad)]
    assert {name for name, *_ in EXAMPLES} == set(INSTRUCTIONS)
    compared = 0
    for name, arguments, *_ in EXAMPLES:
        if name.startswith("change_case") or "c++" in str(arguments):  # a language too there; a keyword is a pattern
            continue
        rule = registry.INSTRUCTION_DICT[name](name)
        rule.build_description(**arguments)
        for text in texts:
            assert follows(name, text, **arguments) == bool(rule.check_following(text)), (name, text)
            compared += 1
    assert compared > 900


def test_instructions_that_cannot_be_checked_are_unscorable() -> None:
    two = {"instruction_id_list": ["punctuation:no_comma", "startend:quotation"], "kwargs": [{}, {"unused": None}]}
    assert instructions("", "no comma", None, two, partial=True) == 0.5
    assert instructions("", "no comma", None, two) == 0
    for record, words in (
        ({}, "no list instruction_id_list in the record"),
        ({"instruction_id_list": ["punctuation:no_comma"], "kwargs": []}, "not one object for each"),
        (
            {"instruction_id_list": ["language:response_language"], "kwargs": [{}]},
            "language:response_language is none of those that",
        ),
        ({"instruction_id_list": ["keywords:existence"], "kwargs": [{"keywords": None}]}, "without keywords"),
        ({"instruction_id_list": ["keywords:existence"], "kwargs": [{"keywords": 3}]}, "wrong arguments"),
        (
            {"instruction_id_list": [WORDS], "kwargs": [{"num_words": 3, "relation": "most"}]},
            "a relation that is neither 'less than' nor 'at least'",
        ),
    ):
        with pytest.raises(Unscorable, match=words):
            instructions("", "text", None, record)
