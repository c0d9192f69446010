"""Compares the tensors that a layout computed with those of one rank, each with the bound that rounding sets."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from configs.train import PretrainConfig
from pretrain.proof.bounds import COMPANION, MARGIN, UNIT_ROUNDOFF, Bounds, adam_step_bound, companion_of
from pretrain.proof.step_reader import RecordedStep
from pretrain.proof.verdict import RelativeError, Verdict

FIRST = ("embedding", "position_embedding")  # what the names of things before the first layer begin with
NO_DIGIT = 0.5  # relative error of a gradient of which no digit is correct
NORM_ERROR = 1e-6  # relative, between the reported norm and that of the gathered gradients


def compare(one: Path, other: Path, name: str, ranks: int, config: PretrainConfig, seconds: float) -> Verdict:
    """Compares the step that the layout `name` recorded in folder `other` with the reference in folder `one`."""
    reference, companion, found = RecordedStep(one), RecordedStep(one / COMPANION), RecordedStep(other)
    precision = reference.facts["precision"]
    bounds = Bounds.of(config, precision)
    verdict = Verdict(name, ranks, seconds, precision)
    numbers = {"loss": bounds.loss(), "heldout": bounds.loss(), "grad_norm": bounds.gradient(0)}
    for number, derived in numbers.items():
        expected, allowed = reference.facts[number], _allowed_number(number, derived, reference, companion, precision)
        error = RelativeError(number, abs(found.facts[number] / expected - 1), allowed)
        verdict.add("loss" if number == "heldout" else number, error)
    for sentence in _inexact(found.facts):
        verdict.fail(sentence)
    if (steps := found.facts["optimizer_steps"]) != (expected := reference.facts["optimizer_steps"]):
        verdict.fail(f"the optimizer has taken {steps} steps, and on one rank {expected}")
    missing = _without_copies(reference.keys) ^ _without_copies(found.keys)
    if missing:
        verdict.fail(f"only one of the two has {sorted(missing)[:3]}")
    errors = []
    for key in in_order(reference.keys & found.keys, config.model.num_layers):
        (expected,) = reference.copies(key)
        scale = float(expected.norm()) or 1.0
        difference = max(float((copy - expected).norm()) for copy in found.copies(key)) / scale
        errors.append(RelativeError(key, difference, _allowed(key, expected, reference, companion, bounds, config)))
    verdict.add_tensors(errors)
    return verdict


def _inexact(facts: dict[str, Any]) -> Iterator[str]:
    """Yields a sentence for each fact that does not hold exactly, as it would in any precision."""
    for step, gathered in enumerate(facts["gathered_norms"]):
        norms = [of_rank[step] for of_rank in facts["norms"]]
        error = max(abs(norm / gathered - 1) for norm in norms) if gathered else max(norms)
        if not error <= NORM_ERROR:
            yield (
                f"grad_norm of step {step + 1}: the gathered gradients have norm {gathered:.9g}, and a rank reports "
                f"{max(norms, key=lambda norm: abs(norm - gathered)):.9g}"
            )
        if len(set(norms)) > 1:
            yield f"grad_norm of step {step + 1}: ranks report {len(set(norms))} values, {sorted(set(norms))[:4]}"
    copies = facts["differing_copies"]
    if copies:
        yield f"copies: after {len(facts['norms'][0])} steps ranks differ in {len(copies)} tensors: {copies[:3]}"


def margin(error: float, precision: str) -> float:
    """Returns the error to allow where a precision and its companion differ by `error`, which the coarser one made."""
    unit = UNIT_ROUNDOFF[precision]
    return MARGIN * error * unit / max(unit, UNIT_ROUNDOFF[companion_of(precision)])


def _without_copies(keys: set[str]) -> set[str]:
    """Leaves out the tied output head: only a last pipeline stage has this copy of the embedding."""
    return {key for key in keys if not key.endswith("/lm_head.weight")}


def _allowed(
    key: str,
    expected: torch.Tensor,
    reference: RecordedStep,
    companion: RecordedStep,
    bounds: Bounds,
    config: PretrainConfig,
) -> float:
    """Returns the relative error of tensor `key` that rounding explains."""
    kind, _, name = key.partition("/")
    layer = _layer(name, config.model.num_layers)
    if kind == "forward":
        return max(bounds.forward(layer), _own_error(key, expected, companion, bounds.precision))
    if kind == "backward":
        return max(bounds.backward(layer), _own_error(key, expected, companion, bounds.precision))
    master = min(UNIT_ROUNDOFF["fp32"], UNIT_ROUNDOFF[bounds.precision])  # the state is fp32 under bf16
    if kind == "state.balance":
        return 2 * UNIT_ROUNDOFF["fp32"]  # made of whole numbers of tokens, and fp32 in any precision
    (gradient,) = reference.copies(f"grad/{name}")
    derived = bounds.gradient(max(layer, 0)) * _cancelled(name, gradient, companion)
    error = max(derived, _own_error(f"grad/{name}", gradient, companion, bounds.precision))
    if kind == "grad":
        return error
    error += _allowed_number("grad_norm", bounds.gradient(0), reference, companion, bounds.precision)  # by clipping
    if kind != "state":  # moments are proportional to the clipped gradient, or to its square
        # The square of 1 + error differs from 1 by more than twice the error where a gradient is rounding alone.
        return (error if kind == "state.exp_avg" else 2 * error + error**2) + 8 * master
    norm, clip = reference.facts["grad_norm"], reference.facts["clip_grad"]
    clipped = gradient * min(1.0, clip / norm) if norm else gradient
    step = adam_step_bound(clipped, error, config.optimizer, config.optimizer.lr)
    return 2 * master + float(step.norm()) / (float(expected.norm()) or 1.0)


def allowed_weight(
    name: str, reference: RecordedStep, companion: RecordedStep, bounds: Bounds, config: PretrainConfig
) -> float:
    """Returns the relative error that rounding explains in a weight after the first step."""
    (expected,) = reference.copies(f"state/{name}")
    return _allowed(f"state/{name}", expected, reference, companion, bounds, config)


def _cancelled(name: str, gradient: torch.Tensor, companion: RecordedStep) -> float:
    """Returns how much larger the error of a norm weight's gradient is than that of its terms, see `bounds`."""
    size = float(gradient.norm())
    return max(1.0, companion.facts["norm_terms"].get(name, 0.0) / size) if size else 1.0


def _allowed_number(
    name: str, derived: float, reference: RecordedStep, companion: RecordedStep, precision: str
) -> float:
    """Returns the relative error that rounding explains in a number of the step, such as the norm of all gradients."""
    expected = reference.facts[name]
    own = abs(companion.facts[name] / expected - 1) if expected else 0.0
    return max(derived, margin(own, precision))


def _own_error(key: str, expected: torch.Tensor, companion: RecordedStep, precision: str) -> float:
    """Returns MARGIN times the error that the reference itself makes in a tensor, or more if that is all of it."""
    if key not in companion.keys:
        return 0.0
    (exact,) = companion.copies(key)
    error = float((exact - expected).norm()) / (float(expected.norm()) or 1.0)
    is_noise = error >= NO_DIGIT and precision != companion_of("fp32")  # in fp64 the companion's digits are at fault
    return margin(error, precision) * (MARGIN if is_noise else 1.0)


def _layer(name: str, num_layers: int) -> int:
    """Returns the layer that a tensor belongs to: -1 for the embedding, the last layer for what follows the layers."""
    if name.startswith("layers."):
        return int(re.split(r"[./]", name)[1])
    return -1 if name.startswith(FIRST) else num_layers - 1


def in_order(keys: set[str], num_layers: int) -> Iterator[str]:
    """Sorts tensors as a step computes them: forward, backward, gradients in backward order, then the state."""

    def order(key: str) -> tuple[int, float, int, str]:
        kind, _, name = key.partition("/")
        layer: float = _layer(name, num_layers) + (0.5 if not name.startswith(("layers.", *FIRST)) else 0.0)
        inside = next((i for i, part in enumerate((".attention", ".router", ".mlp", ".moe")) if part in name), 4)
        passes = ("forward", "backward", "grad", "state").index(kind.partition(".")[0])
        if kind in ("backward", "grad"):
            layer, inside = -layer, -inside
        return passes, layer, inside, key

    return iter(sorted(keys, key=order))
