"""Episodes of several turns with tools: scripted answers, the tokens that are learnt, and what tools reply."""

from collections.abc import Mapping, Sequence

import pytest

from posttrain.chat.chat_format import ChatFormat
from posttrain.rewards.attempt import Problem, TaskScore
from posttrain.tasks.episode_environment import ToolEnvironment, Transcript, play
from posttrain.tasks.sorting import SortTask
from posttrain.tasks.tools import calculator, python
from pretrain.generation.sampling import Completion
from tests.scripted_answers import Script

TASK = SortTask(3, max_new_tokens=120)


def played(
    chat: ChatFormat, scripts: Mapping[str, Sequence[str]], room: int = 1000, max_calls: int = 2
) -> tuple[dict[str, Transcript], Script]:
    script = Script(chat, scripts)
    problems = [Problem("one", "Sort 321")] * len(scripts)

    def make() -> ToolEnvironment:
        return ToolEnvironment(("calculator", "python"), max_calls)

    episodes = play(TASK, problems, list(scripts), make, chat, script, room)
    return dict(zip(scripts, episodes, strict=True)), script


def test_the_model_reads_what_tools_reply_and_learns_what_it_wrote(chat: ChatFormat) -> None:
    sorts = "<python>print(''.join(sorted('321')))</python>"
    episodes, script = played(
        chat,
        {
            "plain": ["123"],
            "wrong": ["321"],
            "asks": [f"Let me see {sorts}", "<calculator>120+3</calculator>", "123"],
            "greedy": ["<calculator>1</calculator>"] * 3,
            "cut": ["cut off"],
        },
    )
    scores = {name: episode.score for name, episode in episodes.items()}
    assert scores == {
        "plain": TaskScore(1.0, "right"),
        "wrong": TaskScore(0.0, "wrong order"),
        "asks": TaskScore(1.0, "right"),
        "greedy": TaskScore(0.0, "too many calls of tools"),
        "cut": TaskScore(0.0, "truncated"),
    }
    asks = episodes["asks"]
    assert asks.turns == 3
    # What was read and written is the dialogue, as the chat format renders it.
    dialogue = [
        ("user", "Sort 321"),
        ("assistant", f"Let me see {sorts}"),
        ("user", "<result>123</result>"),
        ("assistant", "<calculator>120+3</calculator>"),
        ("user", "<result>123</result>"),
        ("assistant", "123"),
    ]
    tokens, answer = chat.render([{"role": role, "content": text} for role, text in dialogue])  # type: ignore[typeddict-item]
    assert [*asks.prompt, *asks.tokens] == tokens.tolist()
    assert [False] * len(asks.prompt) + asks.learnt == answer.tolist()
    assert asks.logprobs == [-0.5 if learnt else 0.0 for learnt in asks.learnt]
    # Each turn was sampled after exactly the tokens before it, with random numbers of its own.
    turns = [(key, prompt) for key, prompt in script.asked if key.startswith("asks")]
    assert [key for key, _ in turns] == ["asks", "asks/turn1", "asks/turn2"]
    assert all(tokens[: len(prompt)].tolist() == prompt for _, prompt in turns)


def test_sampled_tokens_are_never_tokenized_again(chat: ChatFormat) -> None:
    """Samples a text in other tokens than the tokenizer would choose, as a model may."""
    call = "<calculator>1+1</calculator>"
    spelled = [token for letter in call for token in chat.tokenizer.encode(letter)]
    assert spelled != chat.encode_text(call)

    def sample(prompts: Sequence[list[int]], keys: Sequence[str]) -> list[Completion]:
        tokens = [*(spelled if "turn" not in keys[0] else chat.encode_text("123")), chat.end_id]
        return [Completion(tokens, [0.0] * len(tokens), True)]

    def make() -> ToolEnvironment:
        return ToolEnvironment(["calculator"])

    (episode,) = play(TASK, [Problem("one", "Sort 321")], ["k"], make, chat, sample, 1000)
    assert episode.turns == 2 and episode.tokens[: len(spelled)] == spelled


def test_an_episode_without_room_is_cut(chat: ChatFormat) -> None:
    calls = ["<calculator>1+1</calculator>", "123"]
    episodes, _ = played(chat, {"one": calls})
    used = len(episodes["one"].prompt) + len(episodes["one"].tokens) - len(chat.encode_text("123")) - 1
    assert played(chat, {"one": calls}, room=used + 120)[0]["one"].score == TaskScore(1.0, "right")
    short = played(chat, {"one": calls}, room=used + 119)[0]["one"]
    assert short.score == TaskScore(0.0, "truncated") and short.turns == 1 and not short.stopped
    assert all(short.learnt), "a reply that nothing follows takes no room"


@pytest.mark.parametrize(
    ("expression", "result"),
    [
        ("2*(3+4) - 1", "13"),
        ("7/2", "3.5"),
        ("-7 // 2", "-4"),
        ("1/0", "error: division by zero"),
        ("9" * 30, "error: the number is too large"),
        ("2**99", "error: not an expression of numbers, + - * / // % and parentheses"),
        ("(" * 150, "error: not an expression of numbers, + - * / // % and parentheses"),
        ("open('a')", "error: not an expression of numbers, + - * / // % and parentheses"),
    ],
)
def test_calculator(expression: str, result: str) -> None:
    assert calculator(expression) == result


def test_python_prints_and_fails_in_words() -> None:
    assert python("print('a', 1)\nprint('é')") == "a 1\né"
    assert python("print('before')\n1/0") == "before\nfailed: ZeroDivisionError: division by zero"
    assert python("x = 1") == ""
    assert "may not call socket" in python("import socket\nsocket.socket()")
    assert python("import os\nos._exit(3)").startswith("failed: the program ended itself with status 3")
    assert len(python("print('x' * 10**6)")) == 1000


def test_a_tool_that_there_is_not_is_named() -> None:
    with pytest.raises(ValueError, match="no tool 'search'; the tools are calculator, python"):
        ToolEnvironment(["search"])
