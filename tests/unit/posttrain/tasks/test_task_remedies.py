"""Remedies in messages about tasks and episodes: each fault is made, and what the message says about it is done."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from configs.loader import ConfigError, validate
from configs.sealed import CHECKPOINT
from configs.tasks import TaskConfig
from data_pipeline.tokens.tokenizer import Tokenizer
from posttrain.chat.chat_format import ChatFormat, jinja_template
from posttrain.chat.dialogues import Example
from posttrain.chat.template_format import TemplateFormat
from posttrain.piped_process import PipedProcess, ProcessEnded
from posttrain.rewards.attempt import Attempt, Problem, TaskScore
from posttrain.tasks import verifiers_process
from posttrain.tasks.demonstrations import demonstrations
from posttrain.tasks.episode_environment import check_replies
from posttrain.tasks.sorting import SortTask
from posttrain.tasks.task_mixture import MixtureTask
from posttrain.tasks.verifiable_tasks import make_task
from posttrain.tasks.verifiers_process import EpisodeEnded, VerifiersProcess
from posttrain.tasks.verifiers_task import VerifiersTask
from pretrain.checkpoint.lineage import Lineage
from tests.remedies import refused
from tests.untrained_models import CONTEXT, MODEL, dry_runs, write_untrained

SPOKEN = "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content + '<|end|>' }}{% endfor %}{{ '<|assistant|>' }}"
URGED = SPOKEN.replace("m.content +", "m.content + (' Now.' if loop.last and m.role == 'user' else '') +")


def write_model(folder: Path, tokenizer_file: Path, template: str) -> None:
    """Writes a run with a checkpoint without weights, whose model has a chat template of its own."""
    lineage, checkpoint = Lineage(tokenizer_file, template), folder / "checkpoints/step_1"
    checkpoint.mkdir(parents=True)
    facts = {"step": 1, "files": {}, "config": {"model": MODEL}, "identity": lineage.identity, "context": CONTEXT}
    (checkpoint / "manifest.json").write_bytes(CHECKPOINT.write(facts))
    lineage.keep(folder, lineage.identity)


def test_a_model_that_can_read_no_reply_is_refused_before_training(
    tokenizer_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = write_untrained(tmp_path / "base", tokenizer_file)
    for name, own in (("wrong", URGED), ("right", SPOKEN)):
        write_model(base / name, tokenizer_file, own)
    start = dry_runs(base, monkeypatch)["grpo"]
    tools = ["rl.environment.tools=['calculator']", "task.max_new_tokens=9"]
    message = refused(start, 1, [f"init.run={base / 'wrong'}", *tools])
    assert message == (
        "rl.environment has several turns: the chat template changes earlier turns as a dialogue goes on, so replies "
        "cannot follow what was sampled; start from a model that `trivium sft` has trained with another "
        "data.chat_template"
    )
    assert not refused(start, 1, [f"init.run={base / 'right'}", *tools])
    assert not refused(start, 1, [f"init.run={base / 'wrong'}"])


def test_replies_can_follow_trivium_s_own_format(chat: ChatFormat, tokenizer: Tokenizer) -> None:
    check_replies(chat, "rl.environment")
    check_replies(TemplateFormat(tokenizer, jinja_template()), "rl.environment")
    refusing = "{% if messages|length > 1 %}{{ raise_exception('one turn only') }}{% endif %}" + SPOKEN
    with pytest.raises(ConfigError, match=r"rl\.environment has several turns: one turn only"):
        check_replies(TemplateFormat(tokenizer, refusing), "rl.environment")


def test_a_prompt_has_one_system_message(tmp_path: Path) -> None:
    prompt = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Who?"}]
    (tmp_path / "p.jsonl").write_text(
        "".join(
            json.dumps({"prompt": [*prompt[:1], {**prompt[1], "content": str(i)}], "answer": "1"}) + "\n"
            for i in range(40)
        )
    )
    own = {"kind": "file", "files": [str(tmp_path / "p.jsonl")], "heldout_share": 0.5}
    said = r"40 the prompt has a system message, and so has the task \(first: .*:1, leave task\.system_prompt out\)"
    with pytest.raises(ConfigError, match=said):
        make_task(validate(TaskConfig, own | {"system_prompt": "Be brief."}))
    make_task(validate(TaskConfig, own))


def test_a_demonstration_that_is_no_dialogue_is_corrected(chat: ChatFormat, monkeypatch: pytest.MonkeyPatch) -> None:
    def asked(prompt: str) -> list[Example]:
        problem = Problem("p", prompt, "12", "12", "12")
        monkeypatch.setattr(SortTask, "problem", lambda task, seed, split, index: problem)
        return demonstrations(SortTask(3), chat, 0, "train", 1, 64)

    with pytest.raises(
        ValueError, match=r"the demonstration of p cannot be learnt: message 1 has no reasoning; correct"
    ):
        asked("Sort 21 /think")
    assert len(asked("Sort 21")) == 1


def test_attempts_at_no_problem_of_a_task_have_no_score() -> None:
    attempts = [Attempt(Problem("p", "Sort 21", task=name), "12") for name in ("other", "sort")]
    found = MixtureTask("m", {"sort": (1.0, SortTask(3))}, 4).score(attempts)
    assert found[0] == TaskScore(None, "a task that is not in the mixture") and found[1].value == 1
    alone = VerifiersTask.__new__(VerifiersTask)
    assert alone.score(attempts) == [TaskScore(None, "an answer outside of an episode")] * 2


@pytest.fixture
def taskset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], VerifiersProcess]:
    """Returns a function that makes the process of a taskset, which runs this script."""

    def of(script: str) -> VerifiersProcess:
        (tmp_path / "child.py").write_text(script)
        monkeypatch.setattr(verifiers_process, "CHILD", tmp_path / "child.py")
        return VerifiersProcess("none", {}, 1, 2**30)

    return of


LOADS = """
import os, socket, sys, time
control = socket.socket(fileno=int(sys.argv[1]))
_, (reply,), *_ = socket.recv_fds(control, 2**20, 1)
os.write(reply, b'{"problems": []}\\n')
"""


def test_a_process_of_episodes_that_ends_is_told(taskset: Callable[[str], VerifiersProcess]) -> None:
    process = taskset("import sys\nsys.exit('no memory')")
    words = "its process, when it loaded the problems, ended its process: no memory"
    assert process.load() == {"error": words}
    with pytest.raises(EpisodeEnded, match=f"cannot be loaded any more: {words}"):
        process.begin(0)
    process = taskset(LOADS + "control.close()\ntime.sleep(1)\n")
    assert process.load() == {"problems": []}
    with pytest.raises(EpisodeEnded, match=r"has lost its process: \[Errno"):
        for _ in range(1000):  # until it has closed its end
            process.begin(0)
    process.close()


def test_a_process_that_writes_no_reply_is_told() -> None:
    script = "import os, sys; os.write(int(sys.argv[2]), b'{}\\n')"
    for text in ("words", "{}"):
        process = PipedProcess([sys.executable, "-S", "-c", script.replace("{}", text)], {})
        if text == "{}":
            assert process.exchange({}, 10.0) == {}
        else:
            with pytest.raises(ProcessEnded, match="wrote to the pipe of its replies"):
                process.exchange({}, 10.0)
        process.close()
