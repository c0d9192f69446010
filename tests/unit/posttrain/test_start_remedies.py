"""Remedies in what post-training says as it starts: each is done word for word, and the start goes on then."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from configs.layout import Layout
from configs.loader import ConfigError, validate
from configs.method_layout import check_text_rows
from configs.model import ModelConfig
from configs.sealed import CHECKPOINT
from configs.train import ParallelConfig, TrainSection
from posttrain import rehearse
from tests.remedies import GONE, refused, ways
from tests.untrained_models import MODEL, dry_runs, write_untrained

HEADS = {"nope_head_dim": 4, "rope_head_dim": 4, "v_head_dim": 4}
LATENT: dict[str, Any] = {"attention": {"latent": {"kv_rank": 8, **HEADS}}, "num_kv_heads": 8}
DELTA = {"num_key_heads": 2, "num_value_heads": 4, "key_head_dim": 4, "value_head_dim": 4}
MODELS: dict[str, dict[str, Any]] = {
    "latent": LATENT,
    "latent_moe": LATENT | {"moe": {"num_experts": 4}},
    "delta": {"attention": {"delta": DELTA}, "layer_pattern": ["d", "a"], "kinds": {"d": {"delta": True}, "a": {}}},
    "learned": {"position": {"kind": "learned", "max_positions": 50}},
    "contexts": {"attention": {"pattern": "prefix"}},
    "padded": {"vocab_size": 404},
    "values": {"head": {"kind": "scalar"}},
    "narrow": {},
    "flat": {"num_layers": 1},
}
NARROW = 30  # tokens that the model "narrow" was trained on at a time, fewer than some dialogues have
PREFIX = ["adapter.kind=prefix", "adapter.virtual_tokens=4"]
PROMPT = ["adapter.kind=prompt", "adapter.virtual_tokens=4"]
NF4 = ["adapter.base=nf4", "adapter.rank=2"]
ONLINE = ["data=none", "online.completions=2", "task.digits=3", "train.seq_length=128"]
STUDENT = ["distill.on_policy=0.5", "task.digits=3", "task.demonstrations=0"]
TEACHER = ["teacher.run={}/narrow"]
PROMPTS = ["task.digits=none", "task.kind=file", "task.prompt_key=prompt"]
UNSOLVED = [*PROMPTS, "task.files=['{}/pairs.jsonl']", "task.answer_key="]
SOLVED = [*PROMPTS, "task.files=['{}/pairs.jsonl']", "task.answer_key=chosen"]
STALE = ["rl.staleness=1", "rl.correction=truncate", "checkpoint.every=1"]
BEGUN, OTHER = "run.dir={}/begun", "init.checkpoint={}"
TRAIN = {"steps": 1, "global_batch_size": 4, "micro_batch_size": 2, "seq_length": 8}
JUDGES = """
def silent(prompt, completion, answer, metadata):
    return None


def fair(prompt, completion, answer, metadata):
    return 1.0
"""
JUDGED = ["task.rewards.r.kind=function", "task.rewards.r.function"]
SAMPLE = ["task.digits=3", "sample.problems=4"]


@pytest.fixture(scope="module")
def base(tokenizer_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_untrained(tmp_path_factory.mktemp("starts"), tokenizer_file, **MODELS)
    manifest = folder / "narrow/checkpoints/step_1/manifest.json"
    manifest.write_bytes(CHECKPOINT.write(json.loads(manifest.read_text()) | {"context": NARROW}))
    for name, line in (("judged", '{"prompt": "a", "chosen": "b"}'), ("empty", "")):
        (folder / f"{name}_too.jsonl").write_text(f"{line}\n")
    (folder / "judges.py").write_text(JUDGES)
    shutil.copytree(folder / "dense", folder / "bare")
    (folder / "bare/tokenizer.model").unlink()
    shutil.copytree(folder / "dense", folder / "nameless")
    manifest = folder / "nameless/checkpoints/step_1/manifest.json"
    facts = CHECKPOINT.read(manifest.read_bytes(), manifest)
    del facts["identity"]["tokenizer"]
    manifest.write_bytes(CHECKPOINT.write(facts))
    (folder / "nameless/tokenizer.model").unlink()
    return folder


@pytest.mark.parametrize(
    ("command", "ranks", "wrong", "number"),
    [
        ("sft", 1, ["init.run={}/delta", *PREFIX], 1),
        ("sft", 1, ["init.run={}/moe", *PROMPT], 1),
        ("sft", 1, ["init.run={}/latent_moe", *PROMPT], 1),
        ("sft", 1, ["init.run={}/latent_moe", *PREFIX], 1),
        ("sft", 1, ["init.run={}/contexts", *PROMPT], 1),
        ("sft", 1, ["init.run={}/learned", *PROMPT], 1),
        ("sft", 1, ["init.run={}/learned", "train.seq_length=64"], 1),
        ("dpo", 2, [*ONLINE, "online.sampler=split", "parallel.zero=3"], 2),
        ("dpo", 2, [*ONLINE[:-1], "online.sampler=split"], 1),
        ("distill", 2, [*STUDENT, "distill.sampler=split", "parallel.pp=2"], 2),
        ("distill", 1, [*STUDENT, "distill.sampler=split", *NF4], 1),
        ("grpo", 1, ["rl.sampler=split", *NF4], 1),
        ("distill", 2, ["teacher.run={}/padded", "parallel.tp=2"], 1),
        ("distill", 2, ["teacher.run={}/flat", "parallel.pp=2"], 1),
        ("distill", 1, [*TEACHER, "data.max_bad_share=0.9"], 1),
        (
            "distill",
            1,
            [*TEACHER, "data.dialogues=[]", "distill.on_policy=1", "task.demonstrations=0", "task.max_new_tokens=34"],
            1,
        ),
        ("grpo", 1, ["rl.overlong_buffer=4", "rl.environment.tools=['calculator']"], 1),
        ("grpo", 1, ["grpo.dialect=gdpo", "rl.kl=reward"], 1),
        ("sample", 1, ["task.digits=3"], 1),
    ],
)
def test_a_command_starts_with_what_its_message_sets(
    command: str, ranks: int, wrong: list[str], number: int, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Applies each way that a message offers; `number` of them are offered."""
    run = dry_runs(base, monkeypatch)[command]
    wrong = [one.format(base) for one in wrong]
    offered = ways(message := refused(run, ranks, wrong))
    assert len(offered) == number, message
    for way in offered:
        kept = [one for one in wrong if one.partition("=")[0] not in way]
        kind = way.get("adapter.kind")
        kept = [one for one in kept if kind != "lora" or not one.startswith("adapter.virtual_tokens")]
        added = [f"{key}={str(value).lower()}" for key, value in way.items() if value is not GONE]
        assert not refused(run, ranks, [*kept, *added]), message


@pytest.mark.parametrize(
    ("command", "wrong", "words", "right"),
    [
        (
            "sft",
            ["init.run={}/latent", *PREFIX],
            "makes both from latent vectors .*; set adapter.kind=prompt or lora",
            [["init.run={}/latent", *PROMPT]],
        ),
        (
            "sft",
            ["init.run={}/latent", *PREFIX],
            "set adapter.kind=prompt or lora",
            [["init.run={}/latent", "adapter.kind=lora"]],
        ),
        ("sft", ["init.run={}/contexts", *PREFIX], "which do not go with them; set adapter.kind=lora", []),
        ("rm", ["init.run={}/contexts"], "start from a model with another pattern", [["init.run={}/dense"]]),
        ("distill", ["teacher.run={}/short"], "leave the longer ones out, or choose another teacher", [[]]),
        (
            "distill",
            ["data.dialogues=[]", "task.kind=file", "task.files=['{}/pairs.jsonl']", "task.answer_key="],
            "set data.dialogues or data.plan, or distill.on_policy=1$",
            [[]],
        ),
        ("distill", ["teacher.run={}/values"], "is a reward model.*start from a language model", [[]]),
        (
            "distill",
            ["teacher.run={}/nameless"],
            "nothing says which tokenizer the teacher was trained with; set teacher.tokenizer to its folder$",
            [["teacher.run={}/nameless", "teacher.tokenizer={}/dense"]],
        ),
        ("distill", ["teacher.run={}/bare"], "is missing; restore it", [["teacher.run={}/dense"]]),
        ("sft", ["data.chat_template={}/gone"], "name a Jinja template's file, or leave it out", [[]]),
        (
            "sft",
            ["--profile", "x"],
            r"--profile 8-10, or one step, such as --profile 10$",
            [
                ["--profile", "8-10"],
                ["--profile", "10"],
            ],
        ),
        ("sft", ["--profile", "9-20"], "give others, such as --profile 8-10$", [["--profile", "8-10"]]),
        ("sft", ["--show", "0"], "such as --show 3", [["--show", "3"]]),
        ("sft", ["data.dialogues=['{}/empty_too.jsonl']"], "has no dialogues; name files with one on each line", [[]]),
        ("dpo", ["data.pairs=['{}/empty_too.jsonl']"], "has no pairs; name files with one on each line", [[]]),
        (
            "dpo",
            [*ONLINE, "preference.loss=kto"],
            "and [[]online] makes pairs; choose another loss",
            [[*ONLINE, "preference.loss=dpo"]],
        ),
        (
            "dpo",
            ["data=none", "online.completions=2", *UNSOLVED],
            "set task.answer_key, or name rewards",
            [
                ["data=none", "online.completions=2", *SOLVED, "train.seq_length=128"],
            ],
        ),
        ("sft", [*PROMPTS, "task.files=['{}/empty_too.jsonl']"], "name files with a problem on each line", [SOLVED]),
        ("sft", UNSOLVED, "set task.answer_key to the key that holds the answer, or name rewards", [SOLVED]),
        (
            "grpo",
            [*SOLVED, "task.answer_format=no {{answer}}"],
            "set task.answer_format to what .*, or task.sol",
            [
                [*SOLVED, "task.answer_format={{answer}}"],
                [*SOLVED, "task.answer_format=no {{answer}}", "task.solution_key=chosen"],
            ],
        ),
        (
            "grpo",
            [*SOLVED, "task.rewards.r.kind=regex", "task.rewards.r.pattern=(z)"],
            "correct task.rewards.r or",
            [
                [*SOLVED, "task.rewards.r.kind=regex", "task.rewards.r.pattern=(.+)"],
            ],
        ),
        ("sft", [*SOLVED, "task.heldout_share=0.999"], "add problems, or lower task.heldout_share", [SOLVED]),
        (
            "sft",
            [*SOLVED, "task.heldout_share=0.0001"],
            "so nothing could be measured; raise task.heldout_share .*, or name task.heldout_files",
            [
                [*SOLVED, "task.heldout_share=0.3"],
                [*SOLVED, "task.heldout_files=['{}/judged_too.jsonl']"],
            ],
        ),
        (
            "grpo",
            [*SOLVED, "task.max_new_tokens=44"],
            "lower task.max_new_tokens, or raise train.seq_length: of 48 tokens of room the longest takes 52",
            [
                [*SOLVED, "task.max_new_tokens=20"],
                [*SOLVED, "task.max_new_tokens=44", "train.seq_length=52"],
            ],
        ),
        (
            "grpo",
            [*SOLVED, "task.max_new_tokens=60"],
            "or start from a model that was trained on longer texts: of 48 tokens of room the longest takes 68",
            [
                [*SOLVED, "task.max_new_tokens=20"],
            ],
        ),
        (
            "grpo",
            ["--rollouts-only", "0", "rl.record={}/r"],
            "is no number of rollouts; give 1 or more",
            [
                ["--rollouts-only", "1", "rl.record={}/r"],
            ],
        ),
        (
            "grpo",
            ["--rollouts-only", "2"],
            "writes them into rl.record, and .*; set rl.record=FOLDER",
            [
                ["--rollouts-only", "2", "rl.record={}/r"],
            ],
        ),
        (
            "grpo",
            ["--rollouts-only", "2", "rl.record={}/r", "rl.replay={}/rollouts"],
            "rl.replay = .*; leave rl.replay out",
            [
                ["--rollouts-only", "2", "rl.record={}/r"],
            ],
        ),
        (
            "grpo",
            [*STALE, "rl.record={}/r"],
            "add --rollouts-only and the number of rollouts, or name rl.rep",
            [
                [*STALE, "rl.record={}/r", "--rollouts-only", "2"],
            ],
        ),
        (
            "grpo",
            ["spikes.action=rewind"],
            "samples while it trains cannot; set spikes.action=skip",
            [
                ["spikes.action=skip"],
            ],
        ),
        (
            "sft",
            ["train.freeze=['*']"],
            "matches every weight, and nothing is left to train",
            [["train.freeze=['embed*']"]],
        ),
        (
            "distill",
            ["data.dialogues=[]", "data.plan={}/gone"],
            "make it with `trivium data run`, or correct the path",
            [],
        ),
        (
            "grpo",
            [BEGUN, "--resume", "no"],
            "choose another run.dir, remove .*, or leave --resume out to go on",
            [
                ["run.dir={}/new", "--resume", "no"],
                [BEGUN],
            ],
        ),
        (
            "grpo",
            [BEGUN, "init.run={}/moe"],
            "does not hold; name the run that does, or choose another run.dir",
            [
                [BEGUN, "init.run={}/dense"],
                ["run.dir={}/new", "init.run={}/moe"],
            ],
        ),
        (
            "grpo",
            [BEGUN, "init.run=", f"{OTHER}/moe/checkpoints/step_1"],
            "is another; name the first, or choose another",
            [
                [BEGUN, "init.run=", f"{OTHER}/dense/checkpoints/step_1"],
            ],
        ),
        (
            "grpo",
            ["--resume", "{}/begun"],
            "is a run, not a checkpoint; name one of its checkpoints, e.g. .*step_2$",
            [
                ["--resume", "{}/begun/checkpoints/step_2"],
            ],
        ),
        (
            "grpo",
            ["--resume", "{}/gone"],
            "there is no such checkpoint; give auto, no, or a path like RUN/checkpoints",
            [
                ["--resume", "auto"],
                ["--resume", "no"],
            ],
        ),
        (
            "grpo",
            [*SOLVED, JUDGED[0], f"{JUDGED[1]}=judges:silent"],
            "gives no number for any of the first 4 problems .*; correct it, so that it returns a number within",
            [[*SOLVED, JUDGED[0], f"{JUDGED[1]}=judges:fair"]],
        ),
        (
            "grpo",
            ["--resume", "{}/dense/checkpoints/step_1"],
            "this run begins from a model; leave --resume out, and to begin from that one set init.checkpoint=",
            [["init.run=", "init.checkpoint={}/dense/checkpoints/step_1"]],
        ),
        ("sample", ["run.dir={}/dense", *SAMPLE], "choose another folder for the samples", [SAMPLE]),
        (
            "sample",
            ["keep.min_rewards.x=1", *SAMPLE],
            "has no rewards by name; set keep.min_score",
            [
                ["keep.min_score=1", *SAMPLE],
            ],
        ),
        ("sample", ["keep.min_rewards.x=1", *SOLVED], "has the rewards exact", [["keep.min_rewards.exact=1", *SOLVED]]),
        (
            "grpo",
            [*SOLVED, "task.rewards.r.kind=reward_model", "task.rewards.r.model={}/dense"],
            "is a language model, which scores nothing; name a run of `trivium rm`",
            [],
        ),
    ],
)
def test_a_command_starts_once_its_message_was_followed(
    command: str, wrong: list[str], words: str, right: list[list[str]], base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = dry_runs(base, monkeypatch)[command]
    monkeypatch.chdir(base)
    message = refused(run, 1, [one.format(base) for one in wrong])
    assert re.search(words, message), message
    for overrides in right:
        assert not refused(run, 1, [one.format(base) for one in overrides])


def test_a_layout_is_refused_and_started_as_the_message_says(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    message = refused(dry_runs(base, monkeypatch)["distill"], 2, [f"teacher.run={base}/padded", "parallel.tp=2"])
    assert message.endswith("would split at different tokens; set parallel.tp=1")
    message = refused(dry_runs(base, monkeypatch)["distill"], 2, [f"teacher.run={base}/flat", "parallel.pp=2"])
    assert message.startswith(f"teacher.run = '{base}/flat' does not fit the layout: ")
    split = ["distill.sampler=split", "parallel.pp=2"]
    message = refused(dry_runs(base, monkeypatch)["distill"], 2, [*STUDENT, *split])
    assert "samples with the slices of tensor and expert parallel alone" in message
    layout = Layout.of(2, ParallelConfig(), validate(ModelConfig, MODEL), validate(TrainSection, TRAIN))
    with pytest.raises(
        ConfigError, match=r"data-parallel rank; set a multiple of 4, such as ppo.text_rows=4"
    ) as raised:
        check_text_rows(3, layout, 2)
    check_text_rows(int(str(raised.value).rpartition("=")[2]), layout, 2)


def test_a_rehearsal_takes_all_micro_batches_as_its_message_says(base: Path, capfd: pytest.CaptureFixture[str]) -> None:
    argv = [str(base / "ppo.toml"), "--world=1", "--device=cpu", "ppo.text_plan=x", "ppo.text_rows=2"]
    with pytest.raises(ConfigError, match=r"adds others that may differ; leave --micro-batches out, and all are run$"):
        rehearse.main([*argv, "--micro-batches=1"])
    assert rehearse.main(argv) == 0 and "calls of 1 ranks fit together" in capfd.readouterr().out
