"""Where a model comes from: a run directory, one of its checkpoints, or an imported folder, seen as one
thing.

Finds the model's config, weights, tokenizer, chat template and data plan. Leaves out building the decoder.
"""

import hashlib
import json
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from configs.loader import ConfigError, validate
from configs.train import ModelConfig
from export.tensors import open_tensors

CHAT_TEMPLATE = "chat_template.jinja"
IMPORTED = "model.toml"


@dataclass(frozen=True)
class Source:
    """A model at rest. `read` gives its weights, by Trivium's names, with checksums verified.

    `identity` is the sha256 of the checkpoint's manifest: it changes whenever any weight does.
    """

    path: Path
    step: int
    model: ModelConfig
    read: Callable[[], dict[str, torch.Tensor]]
    identity: str
    seq_length: int
    tokenizer: Path | None
    plan: Path | None
    chat_template: str | None

    def need_tokenizer(self) -> Path:
        if self.tokenizer is None:
            raise ConfigError(
                f"{self.path} does not say which tokenizer it was trained with "
                "(data.plan or data.tokenizer), and has no tokenizer.model"
            )
        return self.tokenizer


def open_source(path: str | Path, step: int | str = "latest") -> Source:
    """Reads everything but the weights. Errors: ConfigError where nothing usable is at `path`."""
    path = Path(path)
    if not path.is_dir():
        raise ConfigError(f"{path} does not exist; name a run directory, a checkpoint or an imported model")
    if (path / IMPORTED).is_file():
        return _imported(path)
    if path.parent.name == "checkpoints":
        return _checkpoint(path, path.parent.parent)
    if not (path / "checkpoints").is_dir():
        raise ConfigError(f"{path} has no checkpoints folder and no {IMPORTED}; train first, or name another run")
    if step == "latest":
        from pretrain.checkpoint import latest

        return _checkpoint(latest(path), path)
    checkpoint = path / "checkpoints" / f"step_{step}"
    if not checkpoint.is_dir():
        saved = sorted(int(p.name[5:]) for p in (path / "checkpoints").glob("step_*") if p.name[5:].isdigit())
        raise ConfigError(f"step = {step} has no checkpoint in {path}; saved steps are {saved or 'none'}")
    return _checkpoint(checkpoint, path)


def _checkpoint(checkpoint: Path, run: Path) -> Source:
    from pretrain.checkpoint import read_full, read_manifest

    manifest = read_manifest(checkpoint)
    lineage = _lineage(manifest["config"])
    config = lineage[0]
    model = next((c["model"] for c in lineage if "model" in c), None)
    if model is None:
        raise ConfigError(f"neither {checkpoint} nor the runs it began from have a [model] section")
    plan = next((Path(c["data"]["plan"]) for c in lineage if c.get("data", {}).get("plan")), None)
    canonical = json.dumps(manifest, sort_keys=True, default=str).encode()
    return Source(
        path=checkpoint,
        step=int(manifest["step"]),
        model=validate(ModelConfig, model, origin=f"{checkpoint}, [model]"),
        read=lambda: read_full(checkpoint),
        identity=hashlib.sha256(canonical).hexdigest(),
        seq_length=int(config["train"]["seq_length"]),
        tokenizer=_tokenizer(config, plan),
        plan=plan,
        chat_template=_chat_template(run, "init" in config),
    )


def _imported(path: Path) -> Source:
    tree = tomllib.loads((path / IMPORTED).read_text(encoding="utf-8"))
    model = validate(ModelConfig, tree["model"], origin=str(path / IMPORTED))
    names, read = open_tensors(path)
    tokenizer = path / "tokenizer.model"
    return Source(
        path=path,
        step=0,
        model=model,
        read=lambda: {name: read(name).float() for name in sorted(names)},
        identity=hashlib.sha256((path / IMPORTED).read_bytes()).hexdigest(),
        seq_length=int(tree["import"]["max_positions"]),
        tokenizer=tokenizer if tokenizer.is_file() else None,
        plan=None,
        chat_template=_template(path),
    )


def _lineage(config: dict[str, Any]) -> list[dict[str, Any]]:
    """The config of a run, of the run it began from (`init.run`), and so on, as far as they are still there."""
    lineage = [config]
    while "init" in lineage[-1]:
        file = Path(lineage[-1]["init"]["run"]) / "config.toml"
        if not file.is_file():
            break
        lineage.append(tomllib.loads(file.read_text(encoding="utf-8")))
    return lineage


def _tokenizer(config: dict[str, Any], plan: Path | None) -> Path | None:
    """A post-training run names its tokenizer; a pretraining run's is that of its plan."""
    named = config.get("init", {}).get("tokenizer") or config.get("data", {}).get("tokenizer")
    if named:
        return Path(named) / "tokenizer.model" if Path(named).is_dir() else Path(named)
    if plan is None:
        return None
    from data_pipeline.mixture.rows import Plan

    if not plan.is_dir():
        raise ConfigError(f"the run's data.plan = {plan} does not exist; its tokenizer is found through it")
    return Plan.open(plan).tokenizer_path


def _chat_template(run: Path, trained_on_dialogues: bool) -> str | None:
    """The template that post-training leaves in its run directory."""
    template = _template(run)
    if template is None and trained_on_dialogues:
        raise ConfigError(
            f"{run} was trained on dialogues and has no {CHAT_TEMPLATE}; run its training command again, which "
            "writes it"
        )
    return template


def _template(folder: Path) -> str | None:
    file = folder / CHAT_TEMPLATE
    return file.read_text(encoding="utf-8") if file.is_file() else None
