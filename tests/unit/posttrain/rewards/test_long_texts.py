"""Rules on what a model writes: they say what the patterns of their papers say, and need no limit of time."""

import math
import random
import re
import time

import pytest

from posttrain.rewards.instructions import instructions
from posttrain.rewards.unscorable import Unscorable
from posttrain.tasks.tools import call_in

LONG = 200_000  # characters of what a model repeats until it is cut
PATTERNS = {  # of IFEval's checkers
    "placeholders": r"\[.*?\]",
    "stars": r"^\s*\*[^\*].*$",
    "dashes": r"^\s*-.*$",
    "title": r"<<[^\n]+>>",
}


def follows(name: str, text: str, **arguments: float) -> bool:
    return bool(instructions("", text, None, {"instruction_id_list": [name], "kwargs": [arguments]}))


def drawn(letters: str, count: int, seed: int) -> list[str]:
    choose = random.Random(seed)
    return ["".join(choose.choices(letters, k=choose.randrange(1, 16))) + "." for _ in range(count)]


def test_formats_are_those_of_the_papers_patterns() -> None:
    for text in drawn("[]x \n", 400, 1):
        count = len(re.findall(PATTERNS["placeholders"], text))
        assert follows("detectable_content:number_placeholders", text, num_placeholders=count), text
        assert not follows("detectable_content:number_placeholders", text, num_placeholders=count + 1), text
    for text in drawn("*- x\n\r", 400, 2):
        count = sum(len(re.findall(PATTERNS[name], text, re.MULTILINE)) for name in ("stars", "dashes"))
        assert follows("detectable_format:number_bullet_lists", text, num_bullets=count), text
    for text in drawn("<> x\n", 400, 3):
        titles = re.findall(PATTERNS["title"], text)
        assert follows("detectable_format:title", text) == any(one.lstrip("<").rstrip(">").strip() for one in titles)


def test_the_last_call_is_that_of_the_pattern() -> None:
    for letters in ("ab", "aab"):
        choose = random.Random(len(letters))
        pieces = [f"<{name}>" for name in letters] + [f"</{name}>" for name in letters] + ["x", "\n"]
        for _ in range(600):
            text = "".join(choose.choices(pieces, k=choose.randrange(9)))
            calls = re.findall(r"<(a|b)>(.*?)</\1>", text, re.DOTALL)
            assert call_in(text, ["a", "b"]) == (calls[-1] if calls else None), text


def test_a_bound_without_end_is_unscorable() -> None:
    with pytest.raises(Unscorable, match=r"wrong arguments of length_constraints:number_paragraphs \(OverflowError\)"):
        follows("length_constraints:number_paragraphs", "text", num_paragraphs=math.inf)


@pytest.mark.full
@pytest.mark.parametrize(
    ("name", "repeated", "arguments"),
    [
        ("detectable_content:number_placeholders", "[", {"num_placeholders": 1}),
        ("detectable_format:number_bullet_lists", "\n", {"num_bullets": 1}),
        ("detectable_format:title", "<", {}),
        ("a tool", "<python>", {}),
    ],
)
def test_a_model_that_repeats_itself_does_not_stop_the_trainer(
    name: str, repeated: str, arguments: dict[str, int]
) -> None:
    """Measures processor time, of which the patterns take minutes for such a text, and these rules milliseconds."""
    text, begun = repeated * (LONG // len(repeated)) + ".", time.process_time()
    assert call_in(text, ["python"]) is None if name == "a tool" else not follows(name, text, **arguments)
    assert time.process_time() - begun < 5
