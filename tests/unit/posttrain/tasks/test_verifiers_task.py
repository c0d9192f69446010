"""Environments of the package verifiers: episodes that are scored as by verifiers itself, faults, and refusals."""

import re
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

from configs.loader import ConfigError
from configs.tasks import VerifiersConfig
from posttrain.chat.chat_format import ChatFormat
from posttrain.rewards.attempt import TaskScore
from posttrain.tasks.episode_environment import Transcript, play
from posttrain.tasks.preflight import check_task
from posttrain.tasks.verifiers_task import VerifiersTask, _env
from tests.scripted_answers import Script
from tests.verifiers_game import FILE, SOURCE, TASKSET, messages_in, own_scores, own_tasks

PYTHON = "the package verifiers (in extra `verifiers`) is not installed"


@pytest.fixture(scope="module")
def game(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VerifiersTask]:
    """A task of guesses; its module is on Python's path while tests run."""
    pytest.importorskip("verifiers", reason=PYTHON)
    folder = tmp_path_factory.mktemp("game")
    (folder / FILE).write_text(SOURCE)
    sys.path.insert(0, str(folder))
    task = VerifiersTask("game", VerifiersConfig(taskset=TASKSET, seconds=120.0, heldout_share=0.3), 20)
    yield task
    task.process.close()
    sys.path.remove(str(folder))
    sys.modules.pop(Path(FILE).stem, None)


def played(task: VerifiersTask, chat: ChatFormat, *answers: str) -> Transcript:
    """Returns an episode of the first training problem in which the model says `answers` in turn."""
    script = Script(chat, {"one": answers})
    return play(task, [task.problem(0, "train", 0)], ["one"], task.environment, chat, script, 1000)[0]


def test_an_episode_is_scored_as_by_verifiers_itself(game: VerifiersTask, chat: ChatFormat) -> None:
    problem = game.problem(0, "train", 0)
    own = own_tasks()[problem.id]
    right, wrong = own.data.secret, str((int(own.data.secret) + 1) % 10)
    for answers in ([right], [wrong, right], [wrong, wrong, f"It is {right}"], [wrong, wrong, wrong]):
        episode = played(game, chat, *answers)
        messages = messages_in(chat, [*episode.prompt, *episode.tokens])
        assert [text for role, text in messages if role == "assistant"] == answers
        assert messages[:2] == [("system", "Be quick"), ("user", own.data.prompt)]
        assert all(text.startswith("No, try ") for role, text in messages[2:] if role == "user")
        assert episode.score is not None
        assert (episode.score.value, episode.score.parts) == own_scores(own, messages)
        assert episode.turns == len(answers)
    assert game.reward_weights == {"found": 1.0, "quick": 0.25}


def test_only_what_the_model_wrote_is_learnt(game: VerifiersTask, chat: ChatFormat) -> None:
    episode = played(game, chat, "x", "y", "z")
    tokens, answer = chat.render(
        [{"role": role, "content": text} for role, text in messages_in(chat, [*episode.prompt, *episode.tokens])]  # type: ignore[typeddict-item]
    )
    assert [*episode.prompt, *episode.tokens] == tokens.tolist()
    assert [False] * len(episode.prompt) + episode.learnt == answer.tolist()


def test_what_an_environment_draws_is_the_same_each_time(game: VerifiersTask, chat: ChatFormat) -> None:
    assert played(game, chat, "x", "y", "z").tokens == played(game, chat, "x", "y", "z").tokens


@pytest.mark.parametrize(
    ("answers", "reason"),
    [
        (["x", "y", "raise"], "raised TaskError"),
        (["x", "y", "nan"], "returned nan"),
        (["x", "y", "text"], "raised TaskError"),
        (["x", "y", "hang"], "took more than 1 s"),
        (["wait"], "took more than 1 s"),
        (["x", "y", "exit"], "ended its process"),
    ],
)
def test_faults_are_unscorable_with_a_reason(
    game: VerifiersTask, chat: ChatFormat, monkeypatch: pytest.MonkeyPatch, answers: list[str], reason: str
) -> None:
    if "more than" in reason:
        monkeypatch.setattr(game, "settings", game.settings.model_copy(update={"seconds": 1.0}))
    score = played(game, chat, *answers).score
    assert score is not None and (score.value, score.reason) == (None, reason)
    if "raise" in answers:
        assert "a fault in the reward" in score.detail


def test_an_episode_that_is_cut_is_ended(game: VerifiersTask, chat: ChatFormat) -> None:
    assert played(game, chat, "cut short").score == TaskScore(0.0, "truncated", {"found": 0.0, "quick": 0.0})


def test_the_process_is_started_again_after_it_has_ended(game: VerifiersTask, chat: ChatFormat) -> None:
    process = game.process._process
    assert process is not None
    process.kill()
    process.wait()
    score = played(game, chat, "x", "y", "z").score
    assert score is not None and score.value == 0.25 / 3


def test_a_task_is_tried_before_training(game: VerifiersTask, chat: ChatFormat) -> None:
    assert check_task(game, chat, 200) == [f"game: {game}"]
    assert game.facts["verifiers"]["taskset"] == TASKSET and game.made_from["function"] == TASKSET


TOOLS = """
class Search(vf.Toolset[vf.ToolsetConfig]):
    @vf.tool
    def find(self, text: str) -> str:
        return text

class OneTask(vf.Task[vf.TaskData]):
    @classmethod
    def toolsets(cls, config):
        return [Search(vf.ToolsetConfig())]
"""
PLAIN = "class OneTask(vf.Task[vf.TaskData]):\n    NEEDS_CONTAINER = {container}\n"
TWO = """
class TwoConfig(vf.EnvConfig):
    black: vf.AgentConfig = vf.AgentConfig()
    white: vf.AgentConfig = vf.AgentConfig()

class TwoEnv(vf.Env[TwoConfig]):
    async def run(self, task, agents):
        await agents.black.run(task)
"""
HARNESS = """
class Own(vf.Harness[vf.HarnessConfig]):
    async def launch(self, *args, **kwargs):
        pass
"""
ONE = """
class Ones(vf.Taskset[OneTask]):
    def load(self):
        yield OneTask(vf.TaskData(prompt="1", image={image}), self.config.task)
"""


@pytest.mark.parametrize(
    ("parts", "names", "image", "env", "reason"),
    [
        ([TOOLS], [], None, {}, "its problems have tools"),
        ([PLAIN.format(container=True)], [], None, {}, "its problems need a container"),
        ([PLAIN.format(container=False)], [], "ubuntu", {}, "problem 0 needs a container (image 'ubuntu')"),
        (
            [PLAIN.format(container=False), TWO],
            ["TwoEnv"],
            None,
            {},
            "it has 2 agents (black, white), and one model is trained; use one",
        ),
        ([PLAIN.format(container=False), HARNESS], ["Own"], None, {}, "its agent is a program of its own"),
        (
            [PLAIN.format(container=False)],
            [],
            None,
            {"agent": {"model": "gpt"}},
            "its config sets env.agent.model, which the trainer decides",
        ),
        (
            [PLAIN.format(container=False)],
            [],
            None,
            {"taskset": {"task": {"judges": [{"id": "reference", "name": "judge"}]}}},
            "it is scored by a judge",
        ),
    ],
)
def test_environments_that_cannot_be_played_are_refused(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    parts: list[str],
    names: list[str],
    image: str | None,
    env: dict[str, object],
    reason: str,
) -> None:
    pytest.importorskip("verifiers", reason=PYTHON)
    from posttrain.tasks import verifiers_child

    monkeypatch.setitem(sys.modules, verifiers_child.HARNESS, verifiers_child)
    name = f"ones_{abs(hash(reason))}"
    source = ["import verifiers.v1 as vf", f"__all__ = {['Ones', *names]}", *parts, ONE.format(image=repr(image))]
    (tmp_path / f"{name}.py").write_text("\n".join(source))
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(verifiers_child.Refused, match=re.escape(reason)):
        verifiers_child.load({"taskset": name, "env": env, "max_problems": 5})


def test_a_taskset_is_played_once_it_is_where_the_message_says(
    game: VerifiersTask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = r"; tasksets are looked for in the working directory and among installed packages \(memory is task\.veri"
    with pytest.raises(
        ConfigError, match=rf"task\.verifiers\.taskset = 'later-game' cannot be played: ModuleNotFound.*{words}"
    ):
        VerifiersTask("none", VerifiersConfig(taskset="later-game"), 20)
    (tmp_path / "later_game.py").write_text(SOURCE)
    monkeypatch.chdir(tmp_path)
    task = VerifiersTask("later", VerifiersConfig(taskset="later-game", seconds=120.0, heldout_share=0.3), 20)
    task.process.close()


def test_a_taskset_that_scores_nothing_in_its_time_gets_more(
    game: VerifiersTask, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(game, "settings", game.settings.model_copy(update={"seconds": 0.0001}))
    words = (
        r"scores none of its first problems, answered with 'no answer' \(first: .*\); mend it, or raise task\.verifiers"
    )
    with pytest.raises(ConfigError, match=words + r"\.seconds = 0\.0001 or task\.verifiers\.memory_mb = 4096"):
        game.try_out()
    monkeypatch.setattr(game, "settings", game.settings.model_copy(update={"seconds": 120.0}))
    game.try_out()


@pytest.mark.parametrize("version", ["", "0.1.14"])
def test_the_package_is_needed_in_its_version(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    def installed(package: str) -> str:
        if not version:
            raise PackageNotFoundError(package)
        return version

    monkeypatch.setattr("importlib.metadata.version", installed)
    said = f"is {version}, whose interface is another one" if version else "is not installed"
    with pytest.raises(ConfigError, match=f"needs version 0.4 of the package verifiers, which {said}; run: pip"):
        VerifiersTask("game", VerifiersConfig(taskset=TASKSET), 20)


@pytest.mark.parametrize(
    ("text", "reason", "mended"),
    [
        ("env = 3", r"has an env that is no table; only the table \[env\] is read, leave it out", ""),
        ("[other]\n[env]", r"has other; only the table \[env\] is read, leave it out", "[env]"),
        (
            '[env.taskset]\nid = "chess"',
            r"has env\.taskset\.id = 'chess', .*; leave the id out of the file",
            "[env.taskset]",
        ),
        ("[env", "cannot be read: .*; correct it", "[env]"),
    ],
)
def test_a_config_of_verifiers_is_read_once_it_is_as_the_message_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, reason: str, mended: str
) -> None:
    monkeypatch.setattr("importlib.metadata.version", lambda package: "0.4.0")
    (tmp_path / "env.toml").write_text(text)
    config = VerifiersConfig(taskset=TASKSET, config=str(tmp_path / "env.toml"))
    with pytest.raises(ConfigError, match=reason):
        VerifiersTask("game", config, 20)
    (tmp_path / "env.toml").write_text(mended)
    assert set(_env(config, "task.verifiers")) <= {"taskset"}
