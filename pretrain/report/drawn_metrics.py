"""Metrics of a run as its report and comparisons of runs draw them: which have charts, and one record for each step."""

import json
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

# Order, titles and units of charts; those of other numbers follow, by their keys.
CHARTS = {
    "reward": ("Mean reward", "reward"),
    "loss": ("Training loss", "nats per token"),
    "loss_by_source": ("Training loss by source", "nats per token"),
    "grad_norm": ("Gradient norm, before clipping", "norm"),
    "lr": ("Learning rate", "rate"),
    "tokens_per_s": ("Speed", "tokens per second"),
    "mfu": ("Model FLOPs utilisation", "share of the peak"),
    "memory_bytes": ("Memory of one rank", "bytes"),
    "save_copy_s": ("Wait for a checkpoint's copy", "seconds"),
    "update_ratio": ("Update to weight norm", "ratio"),
    "activation_rms_by_layer": ("Outputs of layers, root mean square", "size"),
    "attention_logit": ("Largest attention logit", "logit"),
    "attention_logit_by_layer": ("Largest attention logit by layer", "logit"),
    "kl_rollout": ("KL divergence from the sampler", "nats per token"),
    "kl_reference": ("KL divergence from the reference, charged", "nats per token"),
    "kl_to_reference": ("KL divergence from the reference", "nats per token"),
}
OTHER_CHARTS = {
    "accuracy": ("Examples judged right", "share"),
    "agreement": ("Tokens that are the likeliest of teacher and student", "share"),
    "clipped": ("Tokens whose gradient a bound took away or limited", "share"),
    "completion_tokens": ("Length of completions, mean", "tokens"),
    "corrected": ("Tokens whose correction weight was out of bounds", "share"),
    "correction_weight": ("Weight for the difference of sampler and trainer, mean", "factor"),
    "drawn_groups": ("Groups of completions sampled for a rollout", "groups"),
    "drawn_prompts": ("Prompts drawn for the pairs of a step", "prompts"),
    "equal_reward_groups": ("Groups whose rewards were all equal, which teach nothing", "share"),
    "kl": ("KTO's reference point", "nats per answer"),
    "logprob_difference": ("Sampler's and trainer's log-probabilities, mean difference", "nats per token"),
    "logps/chosen": ("Log-probability of chosen answers, mean", "nats per answer"),
    "logps/mean": ("Log-probability of answers, mean", "nats per answer"),
    "logps/rejected": ("Log-probability of rejected answers, mean", "nats per answer"),
    "moe_aux_loss": ("Auxiliary loss of routers", "loss"),
    "moe_dropped": ("Choices of experts dropped at the capacity limit", "share"),
    "moe_max_load": ("Tokens of the busiest expert", "times the mean"),
    "mtp_loss": ("Loss of multi-token prediction, head", "nats per token"),
    "orthogonality_penalty": ("Penalty that keeps AdaLoRA's vectors orthonormal", "loss"),
    "pairs": ("Pairs of completions in a step", "pairs"),
    "ptx_loss": ("Loss on pretraining text", "nats per token"),
    "reward_chosen": ("Reward of chosen answers, mean", "reward"),
    "reward_rejected": ("Reward of rejected answers, mean", "reward"),
    "rewards/accuracy": ("Answers that the implicit reward judged right", "share"),
    "rewards/chosen": ("Implicit reward of chosen answers, mean", "reward"),
    "rewards/margin": ("Implicit reward of chosen less rejected answers, mean", "reward"),
    "rewards/mean": ("Implicit reward of answers, mean", "reward"),
    "rewards/rejected": ("Implicit reward of rejected answers, mean", "reward"),
    "student_nll": ("Student's loss on the labels", "nats per token"),
    "teacher_nll": ("Teacher's loss on the labels", "nats per token"),
    "truncated": ("Completions cut at the longest length", "share"),
    "turns": ("Turns of an episode, mean", "turns"),
    "unscorable": ("Completions that could not be scored", "share"),
    "update_norm": ("Norm of a step's update of the weights", "norm"),
    "value_clipped": ("Tokens whose value had moved too far for the critic to learn", "share"),
    "value_error": ("Critic's values, mean distance from the returns", "reward"),
    "value_grad_norm": ("Critic's gradient norm, before clipping", "norm"),
    "value_loss": ("Critic's loss", "loss"),
    "weight_norm": ("Norm of the trained weights", "norm"),
}
HELD_OUT = {  # titles and units of what evaluations measure; others are titled by their keys
    "bits_per_byte": ("Held-out bits per byte", "bits per byte"),
    "greedy": ("Held-out problems, answers of the likeliest tokens", "mean score"),
    "sampled": ("Held-out problems, answers drawn at random", "mean score"),
    "calibration_error": ("Held-out calibration error", "share"),
    "confidence": ("Held-out confidence, by range", "share"),
    "share": ("Held-out decisions in each range of confidence", "share"),
}
HELD_OUT_NOTES = {  # sentences below the table of an evaluation that has the measure
    "bits_per_byte": "Bits per byte are the loss for each byte of text in place of each token, so models with "
    "different tokenizers can be compared.",
    "greedy": "A greedy answer consists of the likeliest tokens, a sampled one of tokens drawn at random. Both columns "
    "are mean scores; where a score is 1 or 0, right or wrong, they are the share of right answers.",
    "calibration_error": "A row that is named by a range of confidence has the decisions of which the model was so "
    "sure: how often it was right, its mean confidence, and their share of all. The calibration error is the mean "
    "distance of accuracy from confidence; 0 is best.",
}
NOT_TOKENS = {"reward", "accuracy", "rewards/accuracy"}  # a run with one of these has no loss in nats per token
NOT_DRAWN = {"step", "tokens", "eval", "loss_spike", "grad_norm_spike", "skipped"}
WITHOUT_NOISE = {"lr", "memory_bytes"}  # drawn without a running mean


def titled(key: str, keys: Collection[str] = ()) -> tuple[str, str]:
    """Returns the title and the unit of the chart of a number, in a run that logged `keys`.

    A name may be followed by a part (reward/sort), by a number (mtp_loss_1), or by _by_layer.
    """
    known = CHARTS | OTHER_CHARTS
    if key in known:
        title, unit = known[key]
    elif (name := key.partition("/")[0]) in known:
        title, unit = f"{known[name][0]}: {key.partition('/')[2]}", known[name][1]
    elif (name := key.rstrip("0123456789").removesuffix("_")) in known:
        title, unit = f"{known[name][0]} {key.rpartition('_')[2]}", known[name][1]
    elif (name := key.removesuffix("_by_layer")) in known:
        title, unit = f"{known[name][0]}, by layer", known[name][1]
    else:
        return key.replace("_", " ").capitalize(), ""
    of_tokens = key.partition("/")[0] not in ("loss", "loss_by_source") or NOT_TOKENS.isdisjoint(keys)
    return title, unit if of_tokens else "loss"


def last_of_each_step(records: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns one record per step in the order of steps; where a step has several, later values replace earlier ones.

    A resumed run repeats the steps after its checkpoint, and evaluations have records of their own.
    """
    merged: dict[int, dict[str, Any]] = {}
    for record in records:
        if "step" in record:
            merged[record["step"]] = {**merged.get(record["step"], {}), **record}
    return [merged[step] for step in sorted(merged)]


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object; an empty one if the file is missing or broken."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
