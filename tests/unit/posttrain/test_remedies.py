"""Remedies in the messages of SFT and GRPO: each is applied and works."""

import json
import random
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest

from configs.sealed import CHECKPOINT
from posttrain import distill
from pretrain.checkpoint.lineage import Pin
from tests.remedies import Run, drawn, follow, refused, remedies, torchrun_environment
from tests.untrained_models import ROW, dry_runs, write_untrained

COMMANDS = ("sft", "grpo")


@pytest.fixture(scope="module")
def base(tokenizer_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_untrained(tmp_path_factory.mktemp("remedies"), tokenizer_file)


@pytest.fixture
def run(base: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Run]:
    return dry_runs(base, monkeypatch)


@pytest.mark.parametrize("command", COMMANDS)
def test_whatever_a_message_suggests_for_a_layout_is_legal_then(base: Path, run: dict[str, Run], command: str) -> None:
    draw = random.Random(11)
    suggested = legal = 0
    for _ in range(24):
        choices: dict[str, Sequence[object]] = {
            "init.run": [base / "dense", base / "dense", base / "moe"],
            "train.global_batch_size": [4, 12, 16, 24, 30, 48],
            "train.micro_batch_size": [1, 2, 3, 4],
            "train.seq_length": [9, 16, 23, 33, 48, 63],
            **{f"parallel.{name}": [1, 1, 2, 3, 4] for name in ("tp", "pp", "cp", "ep", "vpp")},
            "parallel.sp": [True, False, False],
            "parallel.zero": [1, 1, 1, 2, 3],
            "parallel.layers_per_stage": [None, None, None, [1, 3], [2, 1, 1]],
            "task.digits": [3, 4, 6, 20, 32],
            "task.max_new_tokens": [2, 5, 8, 30, 60],
            "task.eval_prompts": [1, 3],
        }
        if command == "grpo":
            choices["grpo.group_size"] = [2, 3, 4, 8]
        else:  # lengths that fit the dialogues, which are read after the layout is checked
            choices["train.seq_length"] = [33, 48, 57, 63]
        ranks = draw.choice([1, 2, 3, 4, 8, 12])
        overrides = drawn(draw, choices)
        found = follow(run[command], ranks, overrides)
        suggested += found
        # Applying the first remedy of each message must lead to a valid config.
        for _ in range(30):
            message = refused(run[command], ranks, overrides)
            if not (first := next(remedies(message), None)):
                legal += not message
                break
            key, value = first
            ranks = int(value) if key == "the number of ranks" else ranks
            overrides = [one for one in overrides if not one.startswith(f"{key}=")]
            overrides += [f"{key}={value}"] if value and key != "the number of ranks" else []
        else:
            raise AssertionError(f"{command}: no end of messages: {message}")
    assert suggested > 12 and legal > 1


@pytest.mark.parametrize(
    ("wrong", "words", "right"),
    [
        (["init.run={dense}/checkpoints/step_1"], "is a checkpoint, not a run", ["init.run="]),
        (["init.run=", "init.checkpoint={dense}"], "is a run, not a checkpoint", ["init.run="]),
        (["init.run=", "init.checkpoint={dense}/checkpoints/step_9"], "does not exist; checkpoints of", ["init.run="]),
        (["init.run=", "init.checkpoint={dense}/step_1"], "dense are step_1: set init.checkpoint", ["init.run="]),
        (["init.run=", "init.checkpoint={dense}/checkpoints"], "is no checkpoint; checkpoints of", ["init.run="]),
        (
            ["init.run=", "init.checkpoint={empty}/step_1"],
            "no folder above it is a run; name one as RUN/checkpoints/step_N",
            None,
        ),
        (["init.run={dense}/checkpoints"], "is the folder of a run's checkpoints; set init.run=", []),
        (["init.run=", "init.checkpoint={hub}"], "is a Hugging Face folder, not a checkpoint", ["init.checkpoint="]),
        (["init.run={empty}/none"], "does not exist; name the folder of a run, which has checkpoints", None),
        (["init.run={empty}"], "has no checkpoint; train first, or name another run", None),
        (["init.run=", "init.checkpoint={empty}"], "it has none yet, so train first", None),
        (["init.run="], "set init.run=RUN for the newest checkpoint", None),
        (["init.checkpoint={dense}/checkpoints/step_1"], "name the model to start from; leave only one", ["init.run="]),
        (["init.tokenizer={empty}"], "leave the key out", None),
        (["init.tokenizer={other}"], "is not the tokenizer that", None),
        (["init.tokenizer={template}"], "has another chat template than the model of init.run", None),
    ],
)
def test_a_model_to_begin_from_is_found_as_the_message_says(
    base: Path, run: dict[str, Run], tmp_path: Path, wrong: list[str], words: str, right: list[str] | None
) -> None:
    """Follows what the message says: `right` are overrides beside its KEY=VALUE, None if it names no value."""
    (tmp_path / "empty/checkpoints").mkdir(parents=True)
    (tmp_path / "other").write_text("no such tokenizer")
    (tmp_path / "template").mkdir()
    (tmp_path / "template/chat_template.jinja").write_text("{{ messages }}")
    shutil.copy(base / "dense/tokenizer.model", tmp_path / "template")
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub/config.json").write_text("{}")
    folders = {"dense": base / "dense", **{name: tmp_path / name for name in ("empty", "other", "hub", "template")}}
    overrides = [one.format(**folders) for one in wrong]
    message = refused(run["grpo"], 1, overrides)
    assert words in message
    if "Hugging Face" in message:
        assert list(remedies(message)) == [("init.hf", str(tmp_path / "hub"))]
        return
    without_value = ("init.tokenizer", "init.run=RUN", "train first", "RUN/checkpoints/step_N", "name the folder")
    if any(words in message for words in without_value):
        right, overrides = [f"init.run={base / 'dense'}"], []
    else:
        right = [*(right or []), *(f"{key}={value}" for key, value in remedies(message) if "/" in value)]
    assert not refused(run["grpo"], 1, [*overrides, *right])


def test_a_run_goes_on_without_the_model_that_it_began_from(
    base: Path, run: dict[str, Run], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own, first = tmp_path / "begun", tmp_path / "dense/checkpoints/step_1"
    for run_dir in (own, tmp_path / "dense"):
        shutil.copytree(base / run_dir.name, run_dir)
    manifest = own / "checkpoints/step_2/manifest.json"
    began = json.loads(manifest.read_text()) | {"init": vars(Pin.of(first))}
    manifest.write_bytes(CHECKPOINT.write(began))
    (first / "manifest.json").write_bytes(
        CHECKPOINT.write(json.loads((first / "manifest.json").read_text()) | {"samples": 3})
    )
    gone = tmp_path / "gone"
    for way, words in (
        (["init.run=", f"init.checkpoint={gone}"], f"init.checkpoint = '{gone}' does not exist"),
        (["init.run=", f"init.hf={gone}"], f"init.hf = '{gone}' does not exist"),
        ([f"init.run={gone}"], f"init.run = '{gone}' has no checkpoint"),
        ([f"init.run={tmp_path / 'dense'}"], f"{first} was written again since, and is ignored"),
    ):
        assert not refused(run["grpo"], 1, [f"run.dir={own}", *way])
        said = f"note: {own} began from {first} and continues from its own weights; {words}"
        assert said in capsys.readouterr().out


def test_a_checkpoint_to_resume_that_is_of_another_kind_of_run_is_told(base: Path, run: dict[str, Run]) -> None:
    step_1 = base / "dense/checkpoints/step_1"
    message = refused(run["grpo"], 1, ["--resume", str(step_1)])
    assert f"--resume {step_1} is of a run that began from random weights" in message or "is of an imported" in message
    ((key, value),) = remedies(message)
    assert f"set {key}={value} in place of init.run" in message
    assert not refused(run["grpo"], 1, ["init.run=", f"{key}={value}"])


def test_a_dry_run_knows_the_names_of_weights(run: dict[str, Run]) -> None:
    for kind in ("lora", "dora", "bottleneck", "prompt", "prefix", "p_tuning_v2"):
        more = ["adapter.virtual_tokens=4"] if kind.startswith("p") else []
        assert not refused(run["sft"], 1, [f"adapter.kind={kind}", *more]), kind
    message = refused(run["sft"], 1, ["train.freeze=['nothing.*']"])
    assert "matches no weight of the model; names are like " in message
    name = message.partition("names are like ")[2].partition(",")[0]
    assert not refused(run["sft"], 1, [f"train.freeze=['{name}']"])


@pytest.mark.parametrize(("command", "rows"), [("sft", ["train.seq_length=8"]), ("grpo", [])])
def test_a_task_that_no_digits_fit_into_a_models_rows_fits_a_model_of_longer_rows(
    base: Path, run: dict[str, Run], command: str, rows: list[str]
) -> None:
    words = "no smaller task.digits fits either, so start from a model that was trained on longer rows"
    assert words in refused(run[command], 1, [f"init.run={base / 'short'}", *rows])
    assert words in refused(run[command], 1, [f"init.run={base / 'short'}", *rows, "task.digits=3"])
    # SFT's own rows were as short as the model's: the next messages name longer ones until all is well.
    said = [message := refused(run[command], 1, [f"init.run={base / 'dense'}", *rows])]
    while message and len(said) < 4:
        longer = [f"{key}={value}" for key, value in remedies(message)]
        said.append(message := refused(run[command], 1, [f"init.run={base / 'dense'}", *longer]))
    assert not message and words not in "".join(said), said


@pytest.mark.parametrize("command", COMMANDS)
def test_a_run_that_continues_is_told_no_other_length_of_rows_than_its_own(
    base: Path, run: dict[str, Run], tmp_path: Path, command: str
) -> None:
    """Follows what the message says to a run that continues: not its row length can change, but a new run's can."""
    begun, draw = f"run.dir={base / 'begun'}", random.Random(5)
    longer = refused(run[command], 1, [begun, "train.seq_length=64"])
    assert list(remedies(longer)) == [("train.seq_length", str(ROW))] and "choose another run.dir" in longer
    assert not refused(run[command], 1, [begun, f"train.seq_length={ROW}"])
    anew = fewer = 0
    for _ in range(25):
        own = {
            "parallel.cp": draw.choice([1, 1, 3]),
            "task.digits": draw.choice([6, 9, 15, 20, 24]),
            "task.max_new_tokens": draw.choice([9, 20, 30, 36]),
            **({"data.max_bad_share": draw.choice([0.1, 1.0])} if command == "sft" else {}),
        }
        overrides = [f"{key}={value}" for key, value in own.items()]
        for _ in range(5):
            message = refused(run[command], 6, [begun, *overrides])
            told = dict(remedies(message))
            assert "train.seq_length" not in told, message
            if length := re.search(r"choose another run\.dir for a run with train\.seq_length=(\d+)", message):
                new = [f"run.dir={tmp_path / 'new'}", *overrides, f"train.seq_length={length[1]}"]
                assert "train.seq_length" not in dict(remedies(refused(run[command], 6, new))), message
                anew += 1
            if not told.get("task.max_new_tokens"):
                break
            overrides = [one for one in overrides if not one.startswith("task.max_new_tokens=")]
            overrides.append(f"task.max_new_tokens={told['task.max_new_tokens']}")
            fewer += 1
        else:
            raise AssertionError(f"no end of messages: {message}")
    assert anew and fewer


@pytest.mark.parametrize(
    ("command", "wrong", "words", "right"),
    [
        ("ppo", ["parallel.zero=2"], r"set parallel\.zero=1$", []),
        (
            "ppo",
            ["ppo.text_plan=none", "ppo.text_rows=2"],
            r"ppo\.text_plan = 'none': there is no plan at .*plan.json;",
            [],
        ),
        ("ppo", ["ppo.critic=none"], "does not exist; name the folder of a run", ["ppo.critic={dense}"]),
        ("ppo", ["ppo.critic={moe}"], r"name a reward model .*, or leave ppo\.critic out$", []),
        ("ppo", ["ppo.dialect=ppo@verl", "rl.correction_low=3"], "is above rl.correction_high = 2.0; swap them", None),
        (
            "grpo",
            ["grpo.dialect=gspo", "parallel.cp=2"],
            r"takes; set parallel\.cp=1, or another dialect",
            ["grpo.dialect=gspo"],
        ),
        ("grpo", ["grpo.dialect=gspo", "parallel.cp=2"], "or another dialect", ["grpo.dialect=dapo", "parallel.cp=2"]),
        (
            "grpo",
            ["grpo.dialect=cispo@minimax", "grpo.clip_low=0.1"],
            "leave it out, or",
            ["grpo.dialect=cispo@minimax"],
        ),
        ("grpo", ["rl.sampler=split", "parallel.pp=2"], r"set rl\.sampler=whole, or", ["parallel.pp=2"]),
        ("grpo", ["rl.sampler=split", "parallel.pp=2"], r"or parallel\.pp=1", ["rl.sampler=split"]),
        ("grpo", ["rl.replay=none"], "has no recorded rollouts; name .*, or leave it out$", []),
        ("grpo", ["rl.replay=none"], "name the folder that a run had as rl.record", ["rl.replay={rollouts}"]),
        (
            "grpo",
            ["rl.record={rollouts}"],
            "has rollouts of another run already; name another",
            ["rl.record={dense}/r"],
        ),
        ("dpo", ["data.pairs=['none']"], r"data\.pairs names none, which is no file; `ls \.` shows", []),
        ("rm", ["data.files=['none/such/file']"], r"which is no file; `ls \.` shows what is there", []),
        ("dpo", ["data.heldout_share=0.9999"], r"are held out; lower data\.heldout_share", ["data.heldout_share=0.5"]),
        ("dpo", ["train.seq_length=16"], r"or set train\.seq_length=(\d+), which takes the longest", None),
        (
            "dpo",
            ["data.pairs=['{same}']", "preference.loss=kto"],
            "add records of the other label",
            ["data.pairs=['{judged}']", "preference.loss=kto"],
        ),
        ("dpo", ["data.pairs=['{judged}']"], "correct or remove them$|were set aside.*correct them", []),
        ("rm", ["train.seq_length=16"], r"or set train\.seq_length=(\d+), which takes the longest", None),
        ("rm", ["data.files=['none']"], r"data\.files names none, which is no file", []),
        (
            "rm",
            ["init.run={values}", "reward_model.kind=process"],
            "with 1 values of each token, .*start from a language",
            [],
        ),
        ("rm", ["init.run={values}", "reward_model.kind=process"], r"or set reward_model\.kind", ["init.run={values}"]),
        ("dpo", ["init.run={values}"], "writes no text; start from a language model", []),
    ],
)
def test_other_commands_start_as_their_messages_say(
    base: Path, run: dict[str, Run], tmp_path: Path, command: str, wrong: list[str], words: str, right: list[str] | None
) -> None:
    """Follows what the message says: `right` are the overrides it asks for, None if it names a value or to swap two."""
    values = base / "values/checkpoints/step_1"
    if not values.exists():
        shutil.copytree(base / "dense", base / "values")
        facts = json.loads((values / "manifest.json").read_text())
        facts["config"]["model"] |= {"head": {"kind": "scalar"}}
        (values / "manifest.json").write_bytes(CHECKPOINT.write(facts))
    names = ("dense", "moe", "values", "rollouts")
    folders = {name: base / name for name in names} | {name: base / f"{name}.jsonl" for name in ("judged", "same")}
    wrong = [one.format(**folders) for one in wrong]
    ranks = 2 if any(one.startswith("parallel.") for one in wrong) else 1
    message = refused(run[command], ranks, wrong)
    found = re.search(words, message)
    assert found, message
    if right is None:
        value = f"train.seq_length={found[1]}" if found.groups() else "rl.correction_low=1"
        right = [*wrong[:-1], value]
    assert not refused(run[command], ranks, [one.format(**folders) for one in right])


def test_a_teacher_of_an_older_checkpoint_than_the_newest_is_told(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher = shutil.copytree(base / "dense", tmp_path / "teacher")
    (teacher / "checkpoints/step_2").mkdir()
    (teacher / "checkpoints/step_2/manifest.json").write_text("{}")
    torchrun_environment(monkeypatch, 1)
    own = [f"teacher.run={teacher}", f"run.dir={tmp_path / 'run'}", "--dry-run"]
    assert distill.main([str(base / "sft.toml"), *own]) == 0
    said = capsys.readouterr().out
    assert f"{teacher}/checkpoints/step_1 is taken" in said and "note: " in said and "step_2/manifest.json" in said
