"""Tasks read from files: what is read, split and set aside, and what is refused before the first step."""

import gzip
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from configs.loader import ConfigError, validate
from configs.tasks import TaskConfig
from posttrain.chat.chat_format import ChatFormat
from posttrain.rewards.attempt import Attempt
from posttrain.rl.rollout import judge
from posttrain.tasks.demonstrations import demonstrations
from posttrain.tasks.file_task import FileTask
from posttrain.tasks.preflight import check_task
from posttrain.tasks.task import available, fraction
from posttrain.tasks.task_mixture import MixtureTask
from posttrain.tasks.verifiable_tasks import make_task
from pretrain.generation.sampling import Completion

ROW = 64
GOOD = [{"prompt": f"Say {i}", "answer": str(i), "level": i % 3} for i in range(60)]


def written(path: Path, records: Sequence[Any]) -> Path:
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    data = "\n".join(lines).encode("utf-8", "surrogatepass")
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def task_of(*files: Path, **more: Any) -> FileTask:
    tree: Mapping[str, Any] = {"kind": "file", "files": [str(file) for file in files], "max_new_tokens": 8, **more}
    task = make_task(validate(TaskConfig, dict(tree)))
    assert isinstance(task, FileTask)
    return task


def test_problems_are_known_by_what_a_reward_sees_and_not_by_where_they_are(tmp_path: Path) -> None:
    """Resumes with other tests of the programs, which is refused, and with a file that was moved, which is not."""
    first = task_of(written(tmp_path / "a.jsonl", GOOD)).facts
    assert task_of(written(tmp_path / "moved.jsonl.gz", GOOD)).facts == first
    for key, value in (("level", 9), ("answer", "x"), ("prompt", "Say so")):
        changed = [record | {key: value} if i == 7 else record for i, record in enumerate(GOOD)]
        assert task_of(written(tmp_path / "b.jsonl", changed)).facts != first, key


def refused(chat: ChatFormat, *files: Path, **more: Any) -> str:
    with pytest.raises(ConfigError) as raised:
        check_task(task_of(*files, **more), chat, ROW)
    return str(raised.value)


def test_every_format_gives_the_same_problems(tmp_path: Path, chat: ChatFormat) -> None:
    plain, packed = written(tmp_path / "a.jsonl", GOOD), written(tmp_path / "b.jsonl.gz", GOOD)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(GOOD), tmp_path / "c.parquet")
    untyped = [{**record, "prompt": str(record["prompt"]).encode()} for record in GOOD]  # a column of bytes, not text
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(untyped), tmp_path / "d.parquet")
    read = [task_of(path) for path in (plain, packed, tmp_path / "c.parquet", tmp_path / "d.parquet")]
    prompts = [[task.problem(1, "train", i).prompt for i in range(100)] for task in read]
    assert prompts[0] == prompts[1] == prompts[2] == prompts[3]
    task = read[0]
    assert task.size("train") + task.size("heldout") == 60 and 2 <= task.size("heldout") <= 14
    one = task.problem(1, "train", 0)
    assert one.messages == [{"role": "user", "content": one.prompt}] and set(one.metadata) == {"level"}
    assert one.answer == one.demonstration == one.solution == str(one.prompt).removeprefix("Say ")
    assert [s.value for s in task.score([Attempt(one, str(one.answer)), Attempt(one, "no")])] == [1, 0]
    assert check_task(task, chat, ROW) == [
        f"file: {task.size('train')} problems to train on, {task.size('heldout')} held out, set aside: none"
    ]


def test_epochs_are_orders_of_all_problems_and_the_splits_never_meet(tmp_path: Path) -> None:
    task = task_of(written(tmp_path / "a.jsonl", GOOD), heldout_share=0.3)
    size = task.size("train")
    epochs = [[task.problem(4, "train", e * size + i).prompt for i in range(size)] for e in range(2)]
    assert epochs[0] != epochs[1] and sorted(epochs[0]) == sorted(epochs[1]) and len(set(epochs[0])) == size
    assert epochs[0] == [task.problem(4, "train", i).prompt for i in range(size)]
    assert [task.problem(5, "train", i).prompt for i in range(size)] != epochs[0]
    heldout = [task.problem(seed, "heldout", i).prompt for seed in (4, 5) for i in range(task.size("heldout"))]
    assert heldout[: len(heldout) // 2] == heldout[len(heldout) // 2 :] and not set(heldout) & set(epochs[0])
    assert all((fraction(str(p)) < 0.3) == (p in heldout) for p in {*heldout, *epochs[0]})
    assert available(task, "heldout", 1000) == task.size("heldout") and available(task, "heldout", 1) == 1
    # The order of the lines decides nothing of the held-out part.
    again = task_of(written(tmp_path / "b.jsonl", GOOD[::-1]), heldout_share=0.3)
    assert [again.problem(1, "heldout", i).prompt for i in range(3)] == heldout[:3]
    assert task.facts == task_of(tmp_path / "a.jsonl", heldout_share=0.3).facts != again.facts


def test_prompts_may_be_messages_and_keys_may_be_paths(tmp_path: Path, chat: ChatFormat) -> None:
    """Reads records like those of verl's parquet files."""
    records = [
        {
            "prompt": [{"role": "user", "content": f"Say {i}"}],
            "reward_model": {"ground_truth": f"well... #### {i} ", "style": "rule"},
        }
        for i in range(60)
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "a.parquet")
    task = task_of(
        tmp_path / "a.parquet",
        answer_key="reward_model.ground_truth",
        answer_pattern="#### (.+)",
        answer_format="<a>{answer}</a>",
        system_prompt="Be brief",
        rewards={"right": {"kind": "regex", "pattern": "<a>(.*)</a>"}},
    )
    check_task(task, chat, ROW)
    one = task.problem(1, "train", 0)
    number = str(one.messages[1]["content"]).removeprefix("Say ")
    assert one.messages[0] == {"role": "system", "content": "Be brief"}
    assert one.answer == number and one.demonstration == f"<a>{number}</a>"
    assert one.metadata["reward_model"]["style"] == "rule"
    shown = demonstrations(task, chat, 1, "train", 3, ROW)
    assert len(shown) == 3 and all(example.answer.any() for example in shown)


BAD: list[tuple[Any, str]] = [
    ('{"prompt": "cut', "bad_json"),
    ("[1]", "no_object"),
    ({"question": "Say it", "answer": "it"}, r"no key 'prompt' \(first: [^,]*:61, its keys are 'question', 'answer'\)"),
    ({"prompt": "Say it", "solution": "it"}, r"no key 'answer' \(first: .*its keys are 'prompt', 'solution'\)"),
    ({"prompt": "  ", "answer": "it"}, "'prompt' is empty"),
    ({"prompt": "Say it", "answer": None}, "'answer' is empty"),
    ({"prompt": "Say it", "answer": math.nan}, "'answer' is empty"),
    ({"prompt": "Say it", "answer": ["it"]}, "that task.rewards.exact cannot judge: the answer is a list"),
    ({"prompt": 3, "answer": "it"}, "'prompt' is neither a text nor a list of messages"),
    ({"prompt": [], "answer": "it"}, "no user message"),
    ({"prompt": [{"role": "assistant", "content": "a"}], "answer": "it"}, "roles out of turn"),
    (
        {"prompt": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "answer": "it"},
        "the last message is not the user's",
    ),
    ({"prompt": "long " * 60, "answer": "it"}, "too long"),
    ({"prompt": "half \ud800 pair", "answer": "it"}, "a prompt that cannot be encoded"),
]


@pytest.mark.parametrize(("record", "reason"), BAD)
def test_a_record_that_cannot_be_used_is_set_aside_and_many_are_refused(
    tmp_path: Path, chat: ChatFormat, record: Any, reason: str
) -> None:
    task = task_of(written(tmp_path / "a.jsonl", [*GOOD, record]))
    (line,) = check_task(task, chat, ROW)
    assert re.search(rf"set aside: 1 {reason}", line), line
    message = refused(chat, tmp_path / "a.jsonl", max_bad_share=0.0)
    assert "1 of 61 problems" in message and "task.max_bad_share = 0.0" in message
    assert re.search(reason, message) and "correct or remove them" in message


def test_answers_that_the_rewards_refuse_are_told_before_the_first_step(tmp_path: Path, chat: ChatFormat) -> None:
    path = written(tmp_path / "a.jsonl", GOOD)
    form = {"right": {"kind": "regex", "pattern": "<a>(.*)</a>"}}
    message = refused(chat, path, rewards=form)
    assert "task.rewards.right refuses the problems' own answers" in message and "in 32 of 32" in message
    assert "set task.answer_format" in message
    check_task(task_of(path, rewards=form, answer_format="<a>{answer}</a>"), chat, ROW)
    # One wrong solution is set aside by a quick reward, as a broken record is.
    wrong = [{**record, "solution": record["answer"]} for record in GOOD]
    wrong[7]["solution"] = "no"
    written(path, wrong)
    (line,) = check_task(task_of(path, solution_key="solution"), chat, ROW)
    assert f"1 whose answer task.rewards.exact refuses (first: {path}:8, 'no' gets 0)" in line
    assert "cannot judge: the problem has no answer" in refused(chat, path, answer_key="")
    # The other remedy: a key that holds what a right completion says.
    said = [{**record, "solution": f"<a>{record['answer']}</a>"} for record in GOOD]
    assert "or task.solution_key to a key that holds one" in message
    check_task(task_of(written(path, said), rewards=form, solution_key="solution"), chat, ROW)


def test_prompts_have_room_once_rows_are_as_long_as_the_message_says(tmp_path: Path, chat: ChatFormat) -> None:
    path = written(tmp_path / "a.jsonl", [{**record, "prompt": "so " * (9 + i)} for i, record in enumerate(GOOD)])
    message = refused(chat, path)
    longest = re.search(rf"or raise train.seq_length: of {ROW} tokens of room the longest takes (\d+)", message)
    assert longest, message
    (line,) = check_task(task_of(path), chat, int(longest[1]))
    assert "too long" not in line
    (line,) = check_task(task_of(path, max_bad_share=0.1), chat, int(longest[1]) - 1)
    assert "too long" in line
    odd = [{"prompt": f"\ud800 {i}", "answer": "1"} for i in range(9)]
    assert refused(chat, written(path, [*GOOD, *odd])).endswith("; correct or remove them")


def test_own_functions_are_tried_before_the_first_step(
    tmp_path: Path, chat: ChatFormat, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    bodies = {"fine": "0.5", "nan": "float('nan')", "text": "'1'", "raises": "metadata['nothing']", "hangs": "wait()"}
    lines = [f"def {name}(prompt, completion, answer, metadata): return {body}" for name, body in bodies.items()]
    Path("own.py").write_text("import time\ndef wait(): time.sleep(1000)\n" + "\n".join(lines))
    path = written(tmp_path / "a.jsonl", GOOD)

    def own(name: str) -> dict[str, Any]:
        return {"rewards": {"own": {"kind": "function", "function": f"own:{name}", "seconds": 0.5}}}

    task = task_of(path, **own("fine"))
    check_task(task, chat, ROW)
    assert task.score([Attempt(task.problem(1, "train", 0), "any")])[0].value == 0.5
    for name, words in (
        ("nan", "returned nan"),
        ("text", "returned str, which is no number"),
        ("raises", "raised KeyError, which says: 'nothing'"),
        ("hangs", "took more than 0.5 s"),
    ):
        message = refused(chat, path, **own(name))
        assert "task.rewards.own gives no number" in message and words in message and f"{path}:" in message


def test_files_and_parts_that_are_missing_are_named(tmp_path: Path, chat: ChatFormat) -> None:
    path, empty = written(tmp_path / "a.jsonl", GOOD), written(tmp_path / "empty.jsonl", [])
    for files, words in (
        ([tmp_path / "no.jsonl"], "task.files names .*no.jsonl, which is no file"),
        ([tmp_path / "*.txt"], r"task.files names .*\*.txt, which is no file"),
        ([empty], "empty.jsonl has no problem; name files with a problem on each line"),
    ):
        with pytest.raises(ConfigError, match=words):
            task_of(*files)
    (tmp_path / "torn.jsonl.gz").write_bytes(gzip.compress(json.dumps(GOOD).encode())[:-20])
    (tmp_path / "torn.parquet").write_bytes(b"PAR1 and nothing")
    for name in ("torn.jsonl.gz", "torn.parquet"):
        with pytest.raises(ConfigError, match=f"{name} in task.files cannot be read to its end"):
            task_of(tmp_path / name)
    two = written(tmp_path / "two.jsonl", GOOD[:2])
    with pytest.raises(ConfigError, match=r"none of the 2 problems .* is held out.* raise task\.heldout_share = 1e-09"):
        task_of(two, heldout_share=1e-9)
    with pytest.raises(
        ConfigError, match=r"all 2 problems .* are held out; add problems, or lower task\.heldout_share"
    ):
        task_of(two, heldout_share=0.999999)
    with pytest.raises(ConfigError, match=r"all 60 problems of .*two\.jsonl, .*a\.jsonl are held out; add problems$"):
        task_of(two, heldout_files=[str(path)])  # a prompt that is in both is held out


def test_repeated_prompts_are_used_once(tmp_path: Path, chat: ChatFormat) -> None:
    task = task_of(written(tmp_path / "a.jsonl", [*GOOD, *GOOD[:9]]))
    assert task.size("train") + task.size("heldout") == 60 and "9 repeated prompts" in str(task)
    held = written(tmp_path / "held.jsonl", GOOD[:20])
    task = task_of(tmp_path / "a.jsonl", heldout_files=[str(held)])
    assert task.size("heldout") == 20 and task.size("train") == 40


def test_a_mixture_draws_by_weight_and_scores_by_each_tasks_own_rewards(tmp_path: Path, chat: ChatFormat) -> None:
    path = written(tmp_path / "a.jsonl", GOOD)
    tasks = {
        "say": {"kind": "file", "files": [str(path)], "weight": 2.0, "rewards": {"right": {}}},
        "sort": {"kind": "sort", "digits": 4},
    }
    task = make_task(validate(TaskConfig, {"kind": "mixture", "max_new_tokens": 8, "tasks": tasks}))
    assert isinstance(task, MixtureTask)
    check_task(task, chat, ROW)
    problems = [task.problem(3, "train", i) for i in range(30)]
    names = [problem.task for problem in problems]
    assert all(abs(names[:n].count("say") - n * 2 / 3) <= 1 for n in range(1, 31))
    sorts = [problem for problem in problems if problem.task == "sort"]
    alone = make_task(TaskConfig(kind="sort", digits=4))
    assert [one.prompt for one in sorts] == [alone.problem(3, "train", i).prompt for i in range(10)]
    scores = task.score([Attempt(problem, str(problem.solution)) for problem in problems])
    assert all(score.value == 1 for score in scores)
    assert scores[0].parts == {"say": 1.0, "say/right": 1.0}
    assert scores[names.index("sort")].parts == {"sort": 1.0}
    size = task.size("heldout")
    assert size is not None
    drawn = [task.problem(3, "heldout", i).id for i in range(size) if task.problem(3, "heldout", i).task == "say"]
    assert len(set(drawn)) == len(drawn) == task.parts["say"].size("heldout")
    message = f"{path}"
    with pytest.raises(ConfigError, match=r"task\.tasks\.say\.rewards\.form refuses .* set task\.tasks\.say\.answer_f"):
        tasks["say"]["rewards"] = {"form": {"kind": "regex", "pattern": "<a>.*</a>"}}
        check_task(make_task(validate(TaskConfig, {"kind": "mixture", "tasks": tasks})), chat, ROW)
    assert message in str(task.parts["say"].problem(1, "train", 0).id)


@pytest.mark.parametrize(
    ("tree", "words"),
    [
        ({"kind": "file"}, "needs files"),
        ({"kind": "sort", "files": ["a"]}, "files = .* says nothing of kind 'sort'"),
        ({"kind": "file", "files": ["a"], "digits": 4}, "digits = 4 says nothing of kind 'file'"),
        ({"kind": "file", "files": ["a"], "answer_format": "x"}, r"lacks \{answer\}"),
        ({"kind": "file", "files": ["a"], "answer_pattern": "x"}, "has no group"),
        ({"kind": "file", "files": ["a"], "rewards": {"a/b": {}}}, "letters, digits and _"),
        ({"kind": "mixture"}, "needs tasks"),
        ({"kind": "sort", "tasks": {"a": {}}}, r"section tasks \(a\) says nothing of kind 'sort'"),
        ({"kind": "countdown", "digits": 9}, r"task\.digits = 9 is outside 3 to 6"),
    ],
)
def test_bad_settings_are_named(tree: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        make_task(validate(TaskConfig, tree))


def test_rollouts_have_each_reward_by_its_name_and_say_why_some_have_none(
    tmp_path: Path, chat: ChatFormat, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("picky.py").write_text(
        "def f(prompt, completion, answer, metadata): return 0.25 if completion == 'a' else None"
    )
    rewards = {
        "form": {"kind": "regex", "pattern": "[ab]", "weight": 2.0},
        "own": {"kind": "function", "function": "picky:f"},
    }
    task = task_of(written(tmp_path / "a.jsonl", GOOD), rewards=rewards)
    texts = ["a", "b", "c", "cut"]
    completions = [
        Completion([*chat.encode_text(text), *[chat.end_id] * (text != "cut")], [], text != "cut") for text in texts
    ]
    scores = judge(task, chat, [task.problem(1, "train", 0)] * 4, completions)
    assert [score.value for score in scores] == [2.25, None, None, 0.0]
    assert [score.parts for score in scores] == [
        {"form": 1.0, "own": 0.25},
        {"form": 1.0},
        {"form": 0.0},
        {"form": 0.0, "own": 0.0},
    ]
    assert task.reward_names == ("form", "own") and task.unscorable == {"own: returned None": 2}
    assert capsys.readouterr().err == "note: unscorable completions for file, 1 so far: own: returned None\n"
