"""Remedies in messages about configs of training, sampling, export and launching: each is applied and works."""

import importlib
from pathlib import Path

import pytest

from configs.kinds import SCHEMAS
from configs.loader import ConfigError, load, toml
from configs.sampling import split_keys
from tests.training_configs import BASES

ADALORA, PREFIX = ["adapter.kind=adalora"], ["adapter.kind=prefix", "adapter.virtual_tokens=2"]
PROMPT, ONLINE = ["adapter.kind=prompt", "adapter.virtual_tokens=2"], ["data=none", "online.completions=2"]
OFFLOAD, ZERO = "parallel.offload_optimizer=true", "parallel.zero=2"
PLAN = "data.dialogues=[]"
UNSCORED = ["task.kind=file", "task.files=['a']", "task.answer_key="]


@pytest.mark.parametrize(
    ("kind", "wrong", "words", "right"),
    [
        (
            "pretrain",
            ["spikes.pass_over=[[9,9]]"],
            r"give the first one and the one after the last, e\.g\. \[640, 648\]",
            [["spikes.pass_over=[[640,648]]"]],
        ),
        (
            "pretrain",
            ["schedule.steps=9"],
            "set schedule.steps=20 or more, leave it out, or set train.steps=9 or less",
            [["schedule.steps=20"], [], ["schedule.steps=9", "train.steps=9"]],
        ),
        (
            "pretrain",
            ["schedule.steps=9", "schedule.warmup_steps=30"],
            "set schedule.steps=30 or more$",
            [["schedule.steps=30", "schedule.warmup_steps=30"]],
        ),
        (
            "pretrain",
            ["train.freeze=['a']", ZERO],
            "set parallel.zero=1, where weights that are not trained need no gradients",
            [["train.freeze=['a']"]],
        ),
        (
            "pretrain",
            ["train.freeze=['a']", OFFLOAD],
            "set parallel.offload_optimizer=false, where",
            [["train.freeze=['a']", "parallel.offload_optimizer=false"]],
        ),
        *(
            ("pretrain", [f"{key}={value}", broken], f"set {key}={off}, or parallel.zero=1 without", remedies)
            for broken in (ZERO, OFFLOAD)
            for key, value, off in (("spikes.action", "skip", "log"), ("checks.every", 9, 0))
            for remedies in [[[f"{key}={off}", broken], [f"{key}={value}"]]]
        ),
        ("pretrain", ["checkpoint.local_dir=a", "checkpoint.local_every=1"], "such as /scratch/checkpoints", [
            ["checkpoint.local_dir=/scratch/checkpoints", "checkpoint.local_every=1"],
        ]),
        (
            "pretrain",
            ["checkpoint.local_dir=/a"],
            "checkpoint.local_every is missing: local checkpoints need both .*; set it",
            [
            ["checkpoint.local_dir=/a", "checkpoint.local_every=1"],
        ]),
        (
            "pretrain",
            ["checkpoint.local_every=1"],
            "checkpoint.local_dir is missing: local checkpoints need both .*; set it",
            [
            ["checkpoint.local_every=1", "checkpoint.local_dir=/a"],
        ]),
        *(
            ("pretrain", [*local, f"checkpoint.every={every}"], f"set checkpoint.every={to}$", [
                [*local, f"checkpoint.every={to}"],
            ])
            for local in [["checkpoint.local_dir=/a", "checkpoint.local_every=7"]]
            for every, to in ((20, 21), (7, 14), (3, 14))
        ),
        ("pretrain", ["checkpoint.every=7", "checkpoint.keep_every=3"], "set checkpoint.keep_every=7$", [
            ["checkpoint.every=7", "checkpoint.keep_every=7"],
        ]),
        ("pretrain", ["tracking.wandb.api_key=abc"], "take it out and set WANDB_API_KEY in the environment", [
            ["tracking.wandb.mode=offline"],
        ]),
        ("pretrain", ["tracking.mlflow.uri=http://me:pw@host"], "take them out and set MLFLOW", [
            ["tracking.mlflow.uri=http://host"],
        ]),
        ("pretrain", ["tracking.mlflow.uri=ftp://host"], "an address like http://host:port", [
            ["tracking.mlflow.uri=http://host:80"],
        ]),
        ("pretrain", ["tracking.mlflow.uri=http://[a"], "no address; write one like http://host:port", [
            ["tracking.mlflow.uri=http://host:80"],
        ]),
        ("pretrain", ["tracking.prometheus.file=a"], "set tracking.prometheus.file=a.prom", [
            ["tracking.prometheus.file=a.prom"],
        ]),
        ("pretrain", ["tracking.prometheus.token=a"], "the key 'token' looks like a secret, .*; take it out$", [
            ["tracking.prometheus.file=a.prom"],
        ]),
        ("sft", ["adapter.rank=4", "train.freeze=['a']"], "leave train.freeze out", [["adapter.rank=4"]]),
        ("sft", ["adapter.base=nf4", "train.compile=true"], "set train.compile=false", [
            ["adapter.base=nf4", "train.compile=false"],
        ]),
        ("sft", ["adapter.rank=4", "adapter.virtual_tokens=2"], "no meaning for .*; leave adapter.virtual_tokens out", [
            ["adapter.rank=4"],
        ]),
        ("sft", [*ADALORA, "adapter.warmup_steps=9", "adapter.budget_steps=8"], "set adapter.budget_steps=10 or more", [
            [*ADALORA, "adapter.warmup_steps=9", "adapter.budget_steps=10"],
        ]),
        (
            "sft",
            [*ADALORA, "adapter.budget_steps=9", "adapter.rank=4", "adapter.target_rank=8"],
            "set adapter.target_rank=4 or less, or adapter.rank=8 or more",
            [
                [*ADALORA, "adapter.budget_steps=9", "adapter.rank=4", "adapter.target_rank=4"],
                [*ADALORA, "adapter.budget_steps=9", "adapter.rank=8", "adapter.target_rank=8"],
            ],
        ),
        ("sft", [*ADALORA, "adapter.warmup_steps=2", "adapter.budget_steps=21"], "budget_steps=20 or less", [
            [*ADALORA, "adapter.warmup_steps=2", "adapter.budget_steps=20"],
        ]),
        (
            "sft",
            [*ADALORA, "adapter.warmup_steps=30", "adapter.budget_steps=31"],
            "set adapter.budget_steps=20 and adapter.warmup_steps=19 or less",
            [[*ADALORA, "adapter.warmup_steps=19", "adapter.budget_steps=20"]],
        ),
        ("sft", [*ADALORA, "adapter.warmup_steps=1", "adapter.budget_steps=9", "spikes.action=skip"], "action=log", [
            [*ADALORA, "adapter.warmup_steps=1", "adapter.budget_steps=9", "spikes.action=log"],
        ]),
        ("sft", [*PREFIX, "parallel.cp=2"], "splits sequences, .* do not support; set parallel.cp=1", [PREFIX]),
        ("sft", [*PROMPT, "parallel.tp=2", "parallel.sp=true"], "set parallel.sp=false", [[*PROMPT, "parallel.tp=2"]]),
        ("sft", ["data.text_plan=a"], "set both, or leave", [["data.text_plan=a", "data.text_weight=0.5"], []]),
        ("sft", [PLAN], "set data.dialogues, or task.demonstrations above 0", [[], [PLAN, "task.demonstrations=9"]]),
        ("dpo", ["online.completions=2"], "set one of the two", [[], [*ONLINE, "task.digits=3"]]),
        ("dpo", ONLINE, "set both, or leave out both", [[*ONLINE, "task.digits=3"], []]),
        ("dpo", [*ONLINE, "task.digits=3", "preference.loss=kto"], "makes pairs; choose another loss", [
            [*ONLINE, "task.digits=3", "preference.loss=ipo"],
        ]),
        ("distill", ["data.plan=a"], "leave out data.plan, or leave out data.dialogues and set task.demon", [
            [], ["data.plan=a", PLAN, "data.heldout_share=0.05"],
        ]),
        ("distill", [PLAN], "set data.dialogues or data.plan, or task.demonstrations above 0, or distill.on_policy=1", [
            [], [PLAN, "data.plan=a"], [PLAN, "task.demonstrations=9"], [PLAN, "distill.on_policy=1", "task.digits=3"],
        ]),
        ("distill", ["distill.on_policy=0.5"], "such as one of kind 'file' with task.answer_key", [
            ["distill.on_policy=0.5", *UNSCORED], ["distill.on_policy=0"],
        ]),
        *(
            ("grpo", [f"rl.sampler={way}", "rl.environment.tools=['calculator']"], "set rl.sampler=whole", [
                ["rl.sampler=whole", "rl.environment.tools=['calculator']"],
            ])
            for way in ("split", "vllm")
        ),
        (
            "grpo",
            ["task.kind=file", "task.files=['a']", "task.rewards.r.kind=exact", "task.rewards.r.weight=0"],
            "have weight = 0, so every score is 0; give one a weight",
            [["task.kind=file", "task.files=['a']", "task.rewards.r.kind=exact", "task.rewards.r.weight=1"]],
        ),
        ("sample", ["sample.temperature=0"], "set sample.completions=1, or a temperature such as 1.0", [
            ["sample.temperature=0", "sample.completions=1"], ["sample.temperature=1.0"],
        ]),
        ("sample", ["keep.min_tokens=5", "keep.max_tokens=3"], "swap", [["keep.min_tokens=3", "keep.max_tokens=5"]]),
        ("sample", ["keep.min_score=1", *UNSCORED], "leave the bound out, or name rewards", [
            UNSCORED, ["keep.min_score=1", *UNSCORED, "task.rewards.r.kind=instructions"],
        ]),
        ("sample", ["parallel.pp=2"], "leave the key out", [[]]),
        ("export", ["base=a"], "set adapter=peft, or leave base out", [["base=a", "adapter=peft"], []]),
        ("export", ["step=newest"], 'set "latest", or the number of a step', [["step=latest"], ["step=3"]]),
        (
            "sft",
            [*ADALORA, "adapter.warmup_steps=1", "adapter.budget_steps=9", "spikes.action=rewind"],
            "from the gradients of all steps; set spikes.action=log",
            [
            [*ADALORA, "adapter.warmup_steps=1", "adapter.budget_steps=9", "spikes.action=log"],
        ]),
        ("grpo", ["grpo.dialect=gdpo", "rl.kl=reward"], "divergence in none of them; set rl.kl=loss", [
            ["grpo.dialect=gdpo", "rl.kl=loss"],
        ]),
        ("sft", ["adapter.targets=['q_proj', 'q_proj']"], "names a layer twice; name each once", [
            ["adapter.targets=['q_proj']"],
        ]),
        ("pretrain", ["model=llama-3-8bb"], "did you mean 'llama-3-8b'. `trivium config --models` lists them", [
            ["model=llama-3-8b"],
        ]),
        ("pretrain", ["model.kinds.a.pattern=causal"], "is not in model.layer_pattern; name it there or remove it", [
            ["model.kinds.a.pattern=causal", "model.layer_pattern=['a']"], [],
        ]),
        ("pretrain", ["model.layer_pattern=['a']"], r"model.kinds has nothing; add a section \[model.kinds.a\]", [
            ["model.layer_pattern=['a']", "model.kinds.a.pattern=causal"],
        ]),
        ("pretrain", ["model.attention.pattern=sliding"], "needs a length; set model.attention.window, for .* 4096", [
            ["model.attention.pattern=sliding", "model.attention.window=4096"],
        ]),
        ("pretrain", ["model.position.kind=learned"], "needs a table; set model.position.max_positions, e.g. to 1024", [
            ["model.position.kind=learned", "model.position.max_positions=1024"],
        ]),
        ("pretrain", ["model.head.kind=scalar", "model.head.softcap=30"], "leave model.head.softcap and", [
            ["model.head.kind=scalar"],
        ]),
        ("launch", ["ssh=[]"], r"""such as \["ssh", "-p", "2222"\]""", [["ssh=['ssh', '-p', '2222']"]]),
        ("launch", ["hosts=['a b']"], r"such as gpu0 or 10\.0\.0\.1", [["hosts=['gpu0', '10.0.0.1']"]]),
        ("launch", ['ssh=["a\\nb"]'], "has a line break or another control character; take it out", [["ssh=['ab']"]]),
        ("launch", ["hosts=['a']", "nnodes=2"], "leave nnodes out", [["hosts=['a']"]]),
        (
            "launch",
            ["nnodes=2", "min_nodes=3"],
            "machines that there are; set min_nodes=2 or less",
            [["nnodes=2", "min_nodes=2"]],
        ),
    ],
)  # fmt: skip
def test_overrides_are_legal_once_they_are_as_the_message_says(
    kind: str, wrong: list[str], words: str, right: list[list[str]], tmp_path: Path
) -> None:
    module, _, name = SCHEMAS[kind].partition(":")
    schema = getattr(importlib.import_module(module), name)
    file = tmp_path / "config.toml"
    file.write_bytes(toml(BASES[kind]))
    with pytest.raises(ConfigError, match=words):
        load(schema, file, wrong)
    for overrides in right:
        load(schema, file, overrides)


def test_generation_splits_a_model_as_the_message_says() -> None:
    with pytest.raises(ConfigError, match=r"parallel\.pp = 2 .* over parallel\.tp and parallel\.ep alone, .*: leave"):
        split_keys(["parallel.pp=2", "parallel.tp=2"])
    assert split_keys(["parallel.tp=2", "parallel.ep=2"]).tp == 2
