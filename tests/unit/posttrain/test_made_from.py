"""Inputs of a post-training run beside its config and data: reward models, a critic, and checkpoints of other runs.

Runs and checkpoints here are manifests without weights.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from configs.files import file_sha256
from configs.initial import InitConfig
from configs.loader import ConfigError, plain, validate
from configs.model import ModelConfig
from configs.rewards import RewardConfig
from configs.sealed import CHECKPOINT
from posttrain.initial_chat_model import InitialChatModel
from posttrain.rewards.dialogue_scorer import found_again
from posttrain.rewards.reward_registry import make_rewards
from posttrain.rl.critic import critic_start
from posttrain.rl.reference_policy import check_reference
from pretrain.checkpoint import pruning, storage
from pretrain.checkpoint.lineage import Lineage, Pin
from tests.remedies import remedies

MODEL = {
    "vocab_size": 400,
    "num_layers": 2,
    "hidden_size": 32,
    "ffn_hidden_size": 48,
    "num_heads": 4,
    "num_kv_heads": 2,
}


def checkpoint(run: Path, tokenizer: Path, step: int = 1, model: dict[str, Any] = MODEL, **facts: Any) -> Path:
    """Writes a checkpoint without weights, and the run's tokenizer; returns the checkpoint's folder."""
    path = storage.directory(run, step)
    path.mkdir(parents=True)
    shutil.copy(tokenizer, run / tokenizer.name)
    tree = {"step": step, "files": {}, "config": {"model": model}, "identity": Lineage(tokenizer).identity, **facts}
    (path / "manifest.json").write_bytes(CHECKPOINT.write(tree))
    return path


def opened(run: Path, begun: Path | None = None) -> InitialChatModel:
    """Opens the initial model of a run that starts from `run`, or of the run in `begun` that did."""
    return InitialChatModel.open(InitConfig(run=str(run)), str(begun or "nowhere"), "auto")


@pytest.fixture
def other_tokenizer(tokenizer_file: Path, tmp_path: Path) -> Path:
    """A tokenizer of the same size with two pieces exchanged."""
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString(tokenizer_file.read_bytes())
    one, two = model.pieces[-1], model.pieces[-2]
    one.piece, two.piece = two.piece, one.piece
    other = tmp_path / "swapped_tokenizer" / tokenizer_file.name
    other.parent.mkdir()
    other.write_bytes(model.SerializeToString())
    return other


def test_a_critic_has_the_policys_tokenizer_and_shape(
    tokenizer_file: Path, other_tokenizer: Path, tmp_path: Path
) -> None:
    values = plain(validate(ModelConfig, MODEL).with_values())
    checkpoint(tmp_path / "policy", tokenizer_file)
    policy = opened(tmp_path / "policy")
    assert critic_start(None, policy) == policy.pin
    good = checkpoint(tmp_path / "rm", tokenizer_file, model=values)
    assert critic_start(str(tmp_path / "rm"), policy) == critic_start(str(good), policy) == Pin.of(good)
    wrong = {
        "swapped": (other_tokenizer, values, "has another tokenizer than the policy"),
        "heads": (tokenizer_file, values | {"num_kv_heads": 4}, r"another shape .* model\.num_kv_heads 2 -> 4"),
        "rope": (tokenizer_file, {**MODEL, "position": {"theta": 500.0}}, r"another shape .*theta 10000\.0 -> 500\.0"),
        "classes": (
            tokenizer_file,
            plain(validate(ModelConfig, MODEL).with_values(3)),
            r"another shape .*model\.head\.outputs 1 -> 3",
        ),
    }
    for name, (tokenizer, model, words) in wrong.items():
        checkpoint(tmp_path / name, tokenizer, model=model)
        with pytest.raises(ConfigError, match=f"ppo.critic = .*{words}"):
            critic_start(str(tmp_path / name), policy)
    for missing in ("none", "rm/checkpoints/step_9"):
        with pytest.raises(ConfigError, match=r"ppo\.critic = .* does not exist; name the folder of a run"):
            critic_start(str(tmp_path / missing), policy)


def test_a_critic_that_a_run_goes_on_with_keeps_its_name(tokenizer_file: Path, tmp_path: Path) -> None:
    """Resumes under another name of the critic, whose weights come from the run itself: it is refused."""
    pin = Pin.of(checkpoint(tmp_path / "policy", tokenizer_file))
    run = tmp_path / "ppo"
    config = {"model": MODEL, "init": {"run": str(tmp_path / "policy")}, "train": {}, "ppo": {"critic": "runs/rm"}}
    checkpoint(run, tokenizer_file, config=config, init=vars(pin))
    policy = opened(tmp_path / "policy", run)
    assert critic_start("runs/rm", policy) == pin, "it need not be there any more"
    with pytest.raises(
        ConfigError, match=r"the run's critic began from runs/rm; set ppo\.critic=runs/rm, or"
    ) as raised:
        critic_start("runs/other", policy)
    assert list(remedies(str(raised.value))) == [("ppo.critic", "runs/rm")]


def test_a_reward_model_stays_the_checkpoint_that_a_run_began_with(tokenizer_file: Path, tmp_path: Path) -> None:
    named, key = tmp_path / "rm", "task.rewards.judge.model"
    first = checkpoint(named, tokenizer_file, 10)
    begun = {"model": str(named), "checkpoint": str(first), "sha256": file_sha256(first / "manifest.json")}
    assert found_again(str(named), key, begun) == str(first)
    checkpoint(named, tokenizer_file, 20)
    assert found_again(str(named), key, begun) == str(first), "whatever its run has trained since"
    assert found_again("runs/another", key, begun) == "runs/another"
    moved = Path(shutil.move(named, tmp_path / "moved"))
    assert found_again(str(moved), key, begun | {"model": str(moved)}) == str(moved / "checkpoints/step_10")
    shutil.rmtree(moved / "checkpoints/step_10")
    with pytest.raises(ConfigError, match="is gone or was replaced; restore it, or name a checkpoint") as raised:
        found_again(str(moved), key, begun | {"model": str(moved)})
    ((_, remedy),) = [(k, v) for k, v in [str(raised.value).split("such as ")[1].split("=")]]
    again = remedy.replace("step_N", "step_20")
    assert found_again(again, key, begun | {"model": str(moved)}) == again and Path(again).is_dir()


def test_a_checkpoint_that_another_run_needs_is_not_pruned(tokenizer_file: Path, tmp_path: Path) -> None:
    run, user = tmp_path / "run", tmp_path / "user"
    paths = [checkpoint(run, tokenizer_file, step) for step in (1, 2, 3, 4)]
    user.mkdir()
    for _ in range(2):
        pruning.note_use(paths[1], user)
    pruning.note_use(tmp_path / "a Hugging Face folder", user)  # is none of ours to write in
    assert (paths[1] / pruning.USED_BY).read_text() == f"{user}\n"
    storage.verify(paths[1])
    pruning.prune(run, 4, keep=1)
    assert storage.steps(run) == [2, 4]
    user.rmdir()
    pruning.prune(run, 4, keep=1)
    assert storage.steps(run) == [4], "it is free when the run that needed it is gone"


def test_what_an_adapter_was_trained_on_top_of_is_checked_too(tokenizer_file: Path, tmp_path: Path) -> None:
    """Damages the base of an adapter, which is damage of the model that nothing else would tell."""
    base = checkpoint(tmp_path / "base", tokenizer_file, files={"a": {"bytes": 1, "sha256": "0" * 64}})
    (base / "a").write_bytes(b"x")
    pin = Pin.of(base)
    adapter = checkpoint(tmp_path / "adapter", tokenizer_file, base={**vars(pin), "relative": "../base"})
    storage.verify(adapter)
    with pytest.raises(ConfigError, match=r"no checkpoint of .*/adapter is whole: .*base/.*/a does not match its SHA"):
        opened(tmp_path / "adapter")
    with pytest.raises(
        ConfigError, match=r"rl\.kl .*base/.*/a does not match .*; restore what was there, or set rl\.kl"
    ):
        check_reference(pin)


def test_a_start_from_an_older_checkpoint_than_the_newest_is_told(tokenizer_file: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    old, new = (checkpoint(run, tokenizer_file, step) for step in (1, 2))
    assert opened(run).note is None and opened(run).pin == Pin.of(new)
    (new / "manifest.json").write_text("{}")
    found = opened(run)
    assert found.pin == Pin.of(old) and found.note and f"{old} is taken" in found.note
    assert str(new) in found.note


@pytest.mark.parametrize("key", ["run", "checkpoint"])
def test_a_model_that_was_moved_is_found_where_the_config_names_it(
    tokenizer_file: Path, tmp_path: Path, key: str
) -> None:
    """Moves the model that a run began from: its reference is then read from where the config names it."""
    pin = Pin.of(checkpoint(tmp_path / "policy", tokenizer_file))
    config = {"model": MODEL, "init": {"run": str(tmp_path / "policy")}, "train": {}}
    checkpoint(tmp_path / "grpo", tokenizer_file, config=config, init=vars(pin))
    moved = Path(shutil.move(tmp_path / "policy", tmp_path / "moved"))
    init = InitConfig(**{key: str(moved / "checkpoints/step_1" if key == "checkpoint" else moved)})
    found = InitialChatModel.open(init, str(tmp_path / "grpo"), "auto")
    assert found.pin.checkpoint == str(moved / "checkpoints/step_1") and found.note is None
    check_reference(found.pin)
    tree = json.loads((moved / "checkpoints/step_1/manifest.json").read_text())
    (moved / "checkpoints/step_1/manifest.json").write_bytes(CHECKPOINT.write(tree | {"step": 5}))
    with pytest.raises(ConfigError, match=r"is another model now; restore what was there, or set rl\.kl=none"):
        check_reference(found.pin)


def test_a_function_of_the_user_is_known_by_its_modules_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    settings = {"mine": RewardConfig(kind="function", function="judges:good"), "rule": RewardConfig()}
    found = []
    for text in ("good = 1", "good = 1", "good = 2"):
        Path("judges.py").write_text(text)
        found.append(make_rewards(settings).made_from)
    assert found[0] == found[1] != found[2] and found[0].keys() == {"mine"}
    assert found[0]["mine"]["function"] == "judges:good"
