"""The model card of an exported folder: what the model is, what it was trained on and how, and how well it agrees."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from export.checks import Check
    from export.conversion.table import Family
    from export.model_source import ModelSource

DEGREES = ("tp", "pp", "ep", "cp", "zero")


def model_card(source: "ModelSource", family: "Family", dtype: str, checks: list["Check"]) -> str:
    """Returns README.md of the folder, in Markdown; what is not known about the training is left out."""
    model = source.model
    total, active = model.num_parameters(), model.num_parameters(active=True)
    size = f"{total:,} parameters" + (f", of which a token uses {active:,}" if active != total else "")
    task = "text-generation" if model.has_logits else "text-classification"
    lines = [
        f"---\nlibrary_name: transformers\npipeline_tag: {task}\n---",
        f"# {family.architecture}, {size}",
        "Written and checked by `trivium export`. It loads with transformers' Auto classes, without code of its own.",
        "## Model",
        f"- {model.num_layers} layers, hidden size {model.hidden_size}, {model.num_heads} heads, vocabulary of "
        f"{model.vocab_size:,} tokens\n- context of {source.context:,} tokens\n- weights in {dtype}",
    ]
    if training := [*_data(source), *_training(source)]:
        lines += ["## Training", "\n".join(f"- {line}" for line in training)]
    table = "\n".join(f"| {check.name} | {_cell(check.measured)} | {_cell(check.wanted)} |" for check in checks)
    lines += [
        "## Parity with the trained model",
        "Measured on this folder, loaded with transformers in fp32, against the decoder that trained the model.",
        f"| check | measured | wanted |\n|---|---|---|\n{table}",
    ]
    return "\n\n".join(lines) + "\n"


def _data(source: "ModelSource") -> list[str]:
    """Returns what the data plan says about the sources of text, or nothing if it is gone."""
    from data_pipeline.mixture.rows import Plan

    if source.plan is None:
        return [f"weights imported as {source.architecture}"] if source.architecture else []
    description = Plan.open(source.plan).description
    rows = {entry["name"]: entry["samples"] for entry in description["sources"]}
    whole = sum(rows.values()) or 1
    shares = ", ".join(f"{name} {count / whole:.0%}" for name, count in rows.items())
    return [f"data by share of rows: {shares}"]


def _training(source: "ModelSource") -> list[str]:
    """Returns steps, tokens and layout of the run that wrote the checkpoint."""
    train: dict[str, Any] = source.run_config.get("train", {})
    parallel: dict[str, Any] = source.run_config.get("parallel", {})
    said = []
    if batch := train.get("global_batch_size"):
        said.append(f"{source.step:,} steps of {batch:,} rows")
        if length := train.get("seq_length"):
            said[-1] += f" of {length:,} tokens, {source.step * batch * length:,} tokens in all"
    if parallel:
        said.append("layout " + ", ".join(f"{name} {parallel[name]}" for name in DEGREES if name in parallel))
    if train.get("precision"):
        said.append(f"precision {train['precision']}")
    if source.plan is not None or said:
        said.append(f"checkpoint {Path(source.path).name}")
    return said


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
