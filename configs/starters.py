"""Small configs to start from (`trivium config --new pretrain`), which run on the demo's corpus and its results.

Each has all required keys of its schema and a few others that are often changed. The comments are the keys'
descriptions.
"""

from typing import Any

from configs.kinds import schema_of
from configs.reference import sentence, toml_value
from configs.section import Section, section_in

_TITLES = {
    "data": ("A data run: raw files to a tokenizer and a mixture plan.", "trivium data run"),
    "tokenizer": ("A tokenizer, trained on the demo's texts.", "trivium tokenizer train"),
    "pretrain": ("A pretraining run of 2.4 million parameters, on the demo's plan (make demo).", "trivium train"),
    "sft": ("Fine-tuning of the demo's pretrained model (make demo).", "trivium sft"),
    "rm": ("A reward model, from the demo's fine-tuned model (make demo) and pairs.", "trivium rm"),
    "dpo": ("Preferences, learnt by the demo's fine-tuned model (make demo).", "trivium dpo"),
    "ppo": ("Reinforcement learning with a critic on the demo's fine-tuned model (make demo).", "trivium ppo"),
    "grpo": ("Reinforcement learning on the demo's fine-tuned model (make demo).", "trivium grpo"),
    "distill": ("Distillation of the demo's GRPO model into its pretrained one (make demo).", "trivium distill"),
    "sample": ("Rejection sampling from the demo's GRPO model (make demo).", "trivium sample"),
    "recipe": ("A recipe: fine-tuning of the demo's pretrained model (make demo), then GRPO.", "trivium recipe run"),
    "export": ("The demo's pretrained model (make demo) as a Hugging Face directory.", "trivium export"),
    "launch": (
        "Two nodes of 8 GPUs.",
        "trivium launch --on slurm --cluster THIS_FILE train configs/pretrain/llama3_8b.toml",
    ),
}
_TRAINING: dict[str, Any] = {
    "train.micro_batch_size": 8,
    "train.seq_length": 256,
    "optimizer.lr": 1e-3,
    "schedule.warmup_steps": 10,
    "parallel.tp": 1,
    "checkpoint.every": 50,
}
_TASK: dict[str, Any] = {"task.digits": 4, "task.max_new_tokens": 8}
# Values of the keys, by kind of config. A dotted key may contain a name that the user chooses, as in sources.english.
_VALUES: dict[str, dict[str, Any]] = {
    "data": {
        "run.dir": "runs/mine/data",
        "run.workers": 2,
        "sources.english.files": ["data/demo/english.jsonl.gz"],
        "sources.english.format": "jsonl",
        "sources.english.rules": {"en": "prose"},
        "rules.prose.use": ["gopher_quality@paper", "gopher_repetition@paper"],
        "tokenizer.vocab_size": 8192,
        "mixture.seq_length": 256,
        "mixture.samples": 4000,
        "mixture.weights": {"english": 1.0},
    },
    "tokenizer": {
        "out": "runs/mine/tokenizer",
        "text.files": ["data/demo/english.jsonl.gz", "data/demo/code.jsonl.gz"],
        "tokenizer.kind": "byte_bpe",
        "tokenizer.vocab_size": 8000,
        "tokenizer.vocab_multiple": 64,
        "tokenizer.special_tokens": ["<|tool|>"],
        "tokenizer.reserved_tokens": 8,
        "tokenizer.whitespace_runs": 16,
    },
    "pretrain": {
        "run.dir": "runs/mine/pretrain",
        "data.plan": "runs/demo/data/plan",
        "model.vocab_size": 4096,
        "model.num_layers": 4,
        "model.hidden_size": 192,
        "model.ffn_hidden_size": 512,
        "model.num_heads": 6,
        "model.num_kv_heads": 2,
        "model.tie_embeddings": True,
        "train.steps": 100,
        "train.global_batch_size": 16,
        **_TRAINING,
    },
    "sft": {
        "run.dir": "runs/mine/sft",
        "init.run": "runs/demo/pretrain",
        "data.dialogues": ["data/demo/dialogues.jsonl.gz"],
        **_TASK,
        "task.demonstrations": 12000,
        "train.steps": 150,
        "train.global_batch_size": 8,
        **_TRAINING,
    },
    "rm": {
        "run.dir": "runs/mine/rm",
        "init.run": "runs/demo/sft",
        "data.files": ["data/demo/sorting_pairs.jsonl.gz"],
        "reward_model.kind": "preference",
        "reward_model.centring": 0.01,
        "train.steps": 100,
        "train.global_batch_size": 16,
        **_TRAINING,
    },
    "dpo": {
        "run.dir": "runs/mine/dpo",
        "init.run": "runs/demo/sft",
        "data.pairs": ["data/demo/sorting_pairs.jsonl.gz"],
        "preference.loss": "dpo",
        "preference.beta": 0.1,
        "train.steps": 60,
        "train.global_batch_size": 8,
        **_TRAINING,
        "optimizer.lr": 1e-4,
    },
    "ppo": {
        "run.dir": "runs/mine/ppo",
        "init.run": "runs/demo/sft",
        **_TASK,
        "ppo.critic_lr": 1e-3,
        "rl.epochs": 2,
        "rl.kl_coef": 0.01,
        "train.steps": 100,
        "train.global_batch_size": 128,
        **_TRAINING,
        "train.seq_length": 32,
        "optimizer.lr": 3e-4,
    },
    "grpo": {
        "run.dir": "runs/mine/grpo",
        "init.run": "runs/demo/sft",
        **_TASK,
        "grpo.group_size": 16,
        "train.steps": 100,
        "train.global_batch_size": 128,
        **_TRAINING,
        "train.seq_length": 32,
    },
    "distill": {
        "run.dir": "runs/mine/distill",
        "init.run": "runs/demo/pretrain",
        "teacher.run": "runs/demo/grpo",
        **_TASK,
        "task.demonstrations": 12000,
        "distill.loss": "forward_kl",
        "distill.on_policy": 0.0,
        "train.steps": 100,
        "train.global_batch_size": 8,
        **_TRAINING,
    },
    "sample": {
        "run.dir": "runs/mine/samples",
        "init.run": "runs/demo/grpo",
        **_TASK,
        "sample.problems": 256,
        "sample.completions": 8,
        "keep.min_score": 1.0,
        "keep.per_prompt": 1,
    },
    "recipe": {
        "dir": "runs/mine/recipe",
        "ranks": 2,
        "stages.sft.command": "sft",
        "stages.sft.config": "configs/posttrain/demo_sft.toml",
        "stages.sft.set": ["init.run=runs/demo/pretrain"],
        "stages.sft.gates": [{"metric": "sort answers.sampled", "at_least": 0.5}],
        "stages.grpo.command": "grpo",
        "stages.grpo.config": "configs/posttrain/demo_grpo.toml",
        "stages.grpo.set": ["init.run={sft}"],
    },
    "export": {"run": "runs/demo/pretrain", "out": "runs/mine/export", "step": "latest", "dtype": "float32"},
    "launch": {
        "nnodes": 2,
        "nproc_per_node": 8,
        "environment": ["NCCL_SOCKET_IFNAME"],
        "slurm.time": "24:00:00",
        "slurm.gpus_per_node": 8,
        "slurm.options": ["--exclusive"],
    },
}


def starter(kind: str) -> str:
    """Returns a config of this kind as TOML with comments. Raises ConfigError if there is no such kind."""
    schema = schema_of(kind)
    title, command = _TITLES[kind]
    command = command if "THIS_FILE" in command else f"{command} THIS_FILE"
    lines = [f"# {title}", f"# {command} --dry-run", f"# Every key: trivium config --explain {kind}"]
    section = None
    for key, value in _VALUES[kind].items():
        parent, _, name = key.rpartition(".")
        if parent != section:
            lines += ["", *[f"[{parent}]"] * bool(parent)]
            section = parent
        lines += [f"# {_sentence(schema, key.split('.'))}", f"{name} = {toml_value(value)}"]
    return "\n".join(lines)


def _sentence(schema: type[Section], path: list[str]) -> str:
    field = schema.model_fields[path[0]]
    section, named = section_in(field.annotation)
    return _sentence(section, path[1 + named :]) if section and len(path) > 1 + named else sentence(field)
