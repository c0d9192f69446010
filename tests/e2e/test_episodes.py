"""GRPO and PPO of a tiny model that may call the calculator: episodes of several turns, in several layouts, resumed."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from configs.loader import ConfigError, toml, validate
from configs.rl import RLSection
from data_pipeline.tokens.tokenizer import Tokenizer
from posttrain.chat.chat_format import ChatFormat
from posttrain.rl import rollout_file
from posttrain.rl.rollout import Rollout
from posttrain.tasks.tools import calculator, call_in
from pretrain.checkpoint import storage
from tests.e2e.posttrain_configs import rl_config, write_base
from tests.e2e.recorded_turns import turns_of
from tests.parallel.harness import RankError, RanksOf
from tests.parallel.runs import metrics

Run = Callable[..., Path]
ROWS = 160  # tokens; more than the model was trained on and than an episode has


@pytest.fixture(scope="module")
def base(ranks: RanksOf, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with a model that was fine-tuned a little on dialogues in which the calculator is called."""
    base = write_base(ranks, tmp_path_factory.mktemp("episodes"))
    sums = [(a, b) for a in range(10) for b in range(10)]
    turns = [
        [f"Add {a} {b}", f"<calculator>{a}+{b}</calculator>", f"<result>{a + b}</result>", f"{a + b}"] for a, b in sums
    ]
    roles = ("user", "assistant", "user", "assistant")
    dialogues = [
        {"messages": [{"role": r, "content": t} for r, t in zip(roles, texts, strict=True)]} for texts in turns
    ]
    (base / "calls.jsonl").write_text("\n".join(map(json.dumps, dialogues)))
    problems = [{"prompt": texts[0], "answer": texts[-1]} for texts in turns]
    (base / "problems.jsonl").write_text("\n".join(map(json.dumps, problems)))
    task = {"kind": "file", "name": "sums", "files": [str(base / "problems.jsonl")], "max_new_tokens": 32}
    environment = {"tools": ["calculator"], "max_calls": 2}
    own: dict[str, Any] = {"task": task | {"eval_prompts": 4}, "checkpoint": {"every": 1, "keep": 9}}
    of_method: dict[str, dict[str, Any]] = {
        "grpo": {"rl": {"environment": environment}, "grpo": {"group_size": 4}},
        "ppo": {"rl": {"environment": environment, "kl": "none", "epochs": 2}},
    }
    for command, sections in of_method.items():
        config = rl_config(base, command, 3, (16, 8), ROWS, **own, **sections)
        (base / f"{command}_episodes.toml").write_bytes(toml(config))
    options = [f"data.dialogues=['{base}/calls.jsonl']", "task.demonstrations=0", "task.eval_prompts=1"]
    argv = [str(base / "sft.toml"), *options, "train.steps=100"]
    assert set(ranks(2).run("posttrain.sft:main", process_group=False, timeout=300, argv=argv)) == {0}
    return base


@pytest.fixture(scope="module")
def trained(ranks: RanksOf, base: Path) -> Run:
    """Returns the folder of a run of GRPO, or another command, on the given number of ranks."""

    def run(world: int, folder: Path, *options: str, command: str = "grpo") -> Path:
        argv = [str(base / f"{command}_episodes.toml"), f"run.dir={folder}", f"rl.record={folder}/record", *options]
        assert set(ranks(world).run(f"posttrain.{command}:main", process_group=False, timeout=300, argv=argv)) == {0}
        return folder

    return run


@pytest.fixture(scope="module")
def one(trained: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(1, tmp_path_factory.mktemp("one") / "run")


def rollout_of(folder: Path, number: int) -> Rollout:
    return rollout_file.read(folder / "record", number, "").rollout


def steps_of(run: Path) -> list[dict[str, Any]]:
    return [line for line in metrics(run) if "loss" in line]


def test_calls_are_answered_and_results_are_never_learnt(base: Path, one: Path) -> None:
    """Takes each recorded episode apart: only the model's turns are learnt, and a result is that of its call."""
    chat = ChatFormat(Tokenizer.load(base / "tokenizer/tokenizer.model"))
    rollout, replies = rollout_of(one, 0), 0
    for i in range(len(rollout)):
        length, parts = int(rollout.lengths[i]), turns_of(rollout, i, chat)
        ours = [by_model for by_model, tokens in parts for _ in tokens]
        mask = rollout.mask[i][:length]
        np.testing.assert_array_equal(mask, ours[1:])
        tokens = np.array([token for _, part in parts for token in part])
        np.testing.assert_array_equal(rollout.labels[i][:length], np.where(mask, tokens[1:], 0))
        assert (rollout.rollout_logprobs[i][:length] < 0).tolist() == mask.tolist()
        assert not rollout.mask[i][length:].any() and rollout.turns[i] == sum(by_model for by_model, _ in parts)
        for (_, call), (_, reply) in zip(parts[1::2], parts[2::2], strict=False):
            asked = call_in(chat.decode_answer(call), ["calculator"])
            assert asked is not None
            result = chat.encode_text(f"<result>{calculator(asked[1])}</result>")
            assert reply == [chat.ids["<|user|>"], *result, chat.end_id, chat.assistant_id]
            replies += 1
    assert replies > 4, "the model hardly calls the calculator, so nothing is tested"
    last = steps_of(one)[-1]
    assert last["turns"] > 1 and last["logprob_difference"] < 1e-5  # sampler and trainer agree, replies included
    assert set(metrics(one)[-1]["eval"]) == {"sums answers"}
    manifest = storage.read_manifest(storage.latest(one))
    began = storage.read_manifest(manifest["init"]["checkpoint"])["context"]
    longest = max(int(rollout_of(one, number).lengths.max()) for number in range(3))
    assert manifest["context"] == max(began, longest) < ROWS


def assert_same(ours: Path, theirs: Path) -> None:
    for number in range(3):
        found, expected = rollout_of(ours, number), rollout_of(theirs, number)
        for name, array in expected.arrays.items():
            if array.dtype == np.float32:
                np.testing.assert_allclose(found.arrays[name], array, atol=1e-5, rtol=0)
            else:
                np.testing.assert_array_equal(found.arrays[name], array)
    for line, other in zip(steps_of(ours), steps_of(theirs), strict=True):
        assert line["loss"] == pytest.approx(other["loss"], abs=1e-5)
        assert line["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("layout", ["parallel.tp=1", pytest.param("parallel.tp=2", marks=pytest.mark.full)])
def test_episodes_are_the_same_on_two_ranks(trained: Run, one: Path, tmp_path: Path, layout: str) -> None:
    assert_same(trained(2, tmp_path, layout), one)


def test_a_run_with_episodes_goes_on_bit_identically(trained: Run, one: Path, tmp_path: Path) -> None:
    trained(1, tmp_path, "train.steps=1")
    trained(1, tmp_path)
    assert steps_of(tmp_path) == steps_of(one)
    weights = [storage.read_full(storage.latest(run)) for run in (tmp_path, one)]
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())
    with pytest.raises(RankError, match="environment"):
        trained(1, tmp_path, "rl.environment.max_calls=1", "train.steps=4")


def test_ppo_credits_the_models_turns_alone(trained: Run, tmp_path: Path) -> None:
    """Compares advantages with Schulman et al. (2015) over the sampled tokens, as if no reply stood between them."""
    run = trained(2, tmp_path, "train.steps=2", command="ppo")
    rollout, gaps = rollout_of(run, 0), 0
    for i in range(len(rollout)):
        sampled = np.flatnonzero(rollout.mask[i])
        gaps += bool((np.diff(sampled) > 1).any())
        values, advantage, later = rollout.old_values[i][sampled], 0.0, 0.0
        reward, expected = float(np.nan_to_num(rollout.scores[i])), np.zeros(len(sampled))
        for t in reversed(range(len(sampled))):
            advantage = reward + later - values[t] + 0.95 * advantage
            expected[t], later, reward = advantage, values[t], 0.0
        np.testing.assert_allclose(rollout.returns[i][sampled] - values, expected, atol=1e-5)
        assert not rollout.advantages[i][~rollout.mask[i]].any()
    assert gaps > 4, "the model hardly calls the calculator, so nothing is tested"
    whitened = rollout.advantages[rollout.mask]
    assert abs(whitened.mean()) < 1e-4 and whitened.std() == pytest.approx(1, abs=0.01)
    assert all(line["logprob_difference"] < 1e-5 and line["value_grad_norm"] > 0 for line in steps_of(run))


def test_what_does_not_go_with_episodes_is_refused() -> None:
    for other, words in (({"sampler": "split"}, "set rl.sampler=whole"), ({"overlong_buffer": 4}, "overlong_buffer=0")):
        with pytest.raises(ConfigError, match=words):
            validate(RLSection, {"environment": {"tools": ["calculator"]}, **other})
