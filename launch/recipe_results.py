"""Results of a recipe stage, read from its files: texts for the table, and measurements for gates."""

import json
from pathlib import Path
from typing import Any

from configs.loader import Failure


def describe_data(output: Path) -> tuple[str, str]:
    """Returns (documents read, documents kept with training tokens and rows) of a data run, as texts."""
    stages = {stage["name"]: stage["total"] for stage in read_json(output / "ledger.json").get("stages", [])}
    plan = read_json(output / "plan" / "plan.json")
    if not stages or not plan:
        return "", ""
    came_in, kept = next(iter(stages.values()))["in"], stages["documents"]["kept"]
    tokens = sum(source["tokens"] for source in plan["sources"])
    return (
        f"{came_in['documents']:,} documents, {came_in['bytes'] / 1e6:.1f} MB",
        f"{kept['documents']:,} documents kept, {tokens / 1e6:.2f}M tokens\n"
        f"{plan['samples']:,} rows of {plan['seq_length']}",
    )


def describe_baselines(output: Path) -> tuple[str, str]:
    """Returns (size of the held-out text, how it was measured) of a baselines stage, as texts."""
    measured = read_json(output / "baselines.json")
    size = sum(values["bytes"] for values in measured.get("sources", {}).values())
    titles = ", ".join(measured.get("titles", {}).values())
    return (f"{size / 1e3:.0f} kB of held-out text", f"bits a byte, below: {titles}") if size else ("", "")


def describe_training(output: Path) -> tuple[str, str]:
    """Returns (steps and tokens, first and last loss or reward and held-out results) of a training run, as texts."""
    records = read_jsonl(output / "metrics.jsonl")
    steps = [record for record in records if "loss" in record]
    evals = [record for record in records if "eval" in record]
    if not steps:
        return "", ""
    first, last = steps[0], steps[-1]
    out = [f"loss {first['loss']:.2f} → {last['loss']:.2f}"]
    if "reward" in last:  # of GRPO's loss, only its gradient means anything
        out = [f"reward {first['reward']:.2f} → {last['reward']:.2f}"]
    results, before = evals[-1]["eval"] if evals else {}, evals[0]["eval"] if len(evals) > 1 else {}
    answers = [got[measure] for got in results.values() for measure in ("greedy", "sampled") if measure in got]
    # The sum of several rewards, or what a reward model gives, is no share of right answers.
    is_share = not any(" answers, " in source for source in results) and all(0 <= value <= 1 for value in answers)
    said = "answered right" if is_share else "mean score"
    for measure, title in (
        ("bits_per_byte", "held-out bits a byte"),
        ("accuracy", "held-out accuracy"),
        ("greedy", f"{said}, greedy"),
        ("sampled", f"{said}, sampled"),
    ):
        # Of several rewards of a task only those for accuracy are in the table, and no ranges of confidence; the
        # stage's report has all.
        changes = [
            f"{source.partition(' answers, ')[2] or source} "
            + (f"{before[source][measure]:.2f} → " if measure in before.get(source, {}) else "")
            + f"{measures[measure]:.2f}"
            for source, measures in results.items()
            if measure in measures and "confidence" not in measures
            if " answers, " not in source or source.endswith("accuracy")
        ]
        if changes:
            out.append(f"{title}: {', '.join(changes)}")
    return f"{last['step']:,} steps, {last['tokens'] / 1e6:.2f}M tokens", "\n".join(out)


def describe_samples(output: Path) -> tuple[str, str]:
    """Returns (samples and prompts, dialogues kept and mean score) of a stage of rejection sampling, as texts."""
    record = read_json(output / "sample.json")
    if not record:
        return "", ""
    measured = record["measures"]
    out = f"{measured['kept']:,} kept, of {measured['prompts_kept']:,} prompts"
    score = f"\nmean score {measured['score']:.2f}" if "score" in measured else ""
    return f"{measured['samples']:,} samples of {measured['prompts']:,} prompts", out + score


def describe_export(output: Path) -> tuple[str, str]:
    """Returns (checkpoint, results of the comparison with transformers) of an export, as texts."""
    record = read_json(output / "trivium_export.json")
    checks = [
        f"{name}: {measured}"
        for name, measured in record.get("checks", {}).items()
        if name.startswith(("logits", "greedy"))
    ]
    checkpoint = record.get("checkpoint")
    return Path(checkpoint).name if checkpoint else "", "\n".join(checks)


def measurement(output: Path, metric: str) -> float:
    """Returns a value that a stage measured.

    Of a training run it is NAME.MEASURE of its last evaluation, or a value of its last step; of rejection sampling, a
    value of "measures" in sample.json.

    Raises KeyError, with the metrics that there are, if it measured no such thing.
    """
    records = read_jsonl(output / "metrics.jsonl")
    evaluations = [record["eval"] for record in records if "eval" in record]
    steps = [record for record in records if "loss" in record]
    known = {f"{name}.{key}": value for name, got in (evaluations or [{}])[-1].items() for key, value in got.items()}
    known |= read_json(output / "sample.json").get("measures", {})
    known |= {key: value for key, value in (steps or [{}])[-1].items() if isinstance(value, int | float)}
    if metric not in known:
        raise KeyError(", ".join(sorted(known)) or "nothing")
    return float(known[metric])


def read_json(path: Path) -> dict[str, Any]:
    """Returns the object in a JSON file, an empty one if there is no file. Raises Failure if the file is damaged."""
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_bytes())
        if isinstance(found, dict):
            return found
    except ValueError:
        pass
    raise Failure(f"{path} is damaged; remove {path.parent} and run the recipe again to repeat its stage")


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Returns the objects of a file with one on each line; lines that are damaged or not whole are left out."""
    found = []
    for line in path.read_bytes().splitlines() if path.is_file() else []:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict):
            found.append(record)
    return found
