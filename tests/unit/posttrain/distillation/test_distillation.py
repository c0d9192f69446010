"""Divergences of distillation: vectors by hand, the chunked computation against autograd, schedule of samples, keys."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from configs.distill import DistillConfig
from configs.loader import ConfigError, validate
from data_pipeline.mixture.rows import Row
from posttrain.distillation.distill_loss import DistillLoss
from posttrain.distillation.distill_source import StudentSampling
from posttrain.distillation.divergence_head import Head, TeacherStates
from posttrain.distillation.divergences import Kind, divergence
from posttrain.distillation.teacher import OpenedTeacher, check_length, check_template
from pretrain.checkpoint.lineage import Lineage, Pin
from pretrain.data.batch_source import collate
from pretrain.model import head_loss
from pretrain.model.batch import Batch
from pretrain.run.initial_model import InitialModel

KINDS: tuple[Kind, ...] = ("forward_kl", "reverse_kl", "jsd")
Q, P = [0.5, 0.5], [0.9, 0.1]  # student and teacher


@pytest.mark.parametrize(
    ("kind", "beta", "expected"),
    [
        ("forward_kl", 0.5, 0.368064),  # .9 ln(.9/.5) + .1 ln(.1/.5)
        ("reverse_kl", 0.5, 0.510826),  # .5 ln(.5/.9) + .5 ln(.5/.1)
        ("jsd", 0.5, 0.101749),  # of both against the mixture .7, .3
        ("jsd", 0.1, 0.033603),  # .1 KL(p || m) + .9 KL(q || m), m = .54, .46
    ],
)
def test_vectors_by_hand(kind: Kind, beta: float, expected: float) -> None:
    student, teacher = torch.tensor([Q]).log() + 3, torch.tensor([P]).log() - 1  # a constant changes nothing
    assert float(divergence(student, teacher, kind, beta)) == pytest.approx(expected, abs=1e-6)
    assert float(divergence(teacher, teacher, kind, beta)) == pytest.approx(0, abs=1e-7)
    # At temperature 2 probabilities are as the square roots: .5, .5 and .75, .25.
    warm = float(divergence(student, teacher, kind, beta, temperature=2.0))
    roots = torch.tensor([[0.75, 0.25]]).log()
    assert warm == pytest.approx(float(divergence(student, roots, kind, beta)), abs=1e-6)


def test_jsd_is_between_the_two_kls() -> None:
    """Compares limits of JSD: divided by beta, the forward KL for small beta; by 1 - beta, the reverse for large."""
    student, teacher = torch.tensor([Q]).double().log(), torch.tensor([P]).double().log()
    small = float(divergence(student, teacher, "jsd", 1e-6)) / 1e-6
    large = float(divergence(student, teacher, "jsd", 1 - 1e-6)) / 1e-6
    assert small == pytest.approx(0.368064, abs=1e-4) and large == pytest.approx(0.510826, abs=1e-4)


def written_out(student: torch.Tensor, teacher: torch.Tensor, kind: Kind, beta: float, t: float) -> torch.Tensor:
    """Returns the divergence with sums written out over probabilities, independently of `divergences`."""
    q, p = (student / t).softmax(-1), (teacher / t).softmax(-1)
    if kind == "forward_kl":
        return (p * (p / q).log()).sum(-1)
    if kind == "reverse_kl":
        return (q * (q / p).log()).sum(-1)
    m = beta * p + (1 - beta) * q
    return beta * (p * (p / m).log()).sum(-1) + (1 - beta) * (q * (q / m).log()).sum(-1)


class FixedTeacher:
    """A teacher that says the same of every batch."""

    def __init__(self, states: TeacherStates, vocab_size: int) -> None:
        self._states, self.vocab_size = states, vocab_size

    def states(self, batch: Batch) -> TeacherStates:
        return self._states


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("softcap", "vocab", "temperature"), [(None, 50, 1.0), (5.0, 47, 0.7)])
def test_chunks_give_the_values_and_gradients_of_whole_logits(
    kind: Kind, softcap: float | None, vocab: int, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compares with whole logits, for a head padded to 50 rows and a teacher of 52 with a softcap of its own."""
    monkeypatch.setattr(head_loss, "LEAST_TOKENS", 4)
    monkeypatch.setattr(head_loss, "CHUNK_CPU", 4 * 50)
    torch.manual_seed(0)
    mask = [[0.0, 1.0, 0.5, 0.0, 1.0, 1.0], [1.0, 0.25, 0.0, 1.0, 0.0, 1.0]]
    rows = np.arange(6), np.arange(6) + 20, np.zeros(6, np.int64), np.zeros(6, np.int64)
    batch = collate([Row(rows[0], rows[1], np.array(weights), rows[2], rows[3], 0) for weights in mask], 0)
    count = len(batch.trained)
    x, weight = torch.randn(count, 8, dtype=torch.float64), torch.randn(50, 8, dtype=torch.float64)
    head = Head(torch.randn(52, 12, dtype=torch.float64), 9.0)
    head.weight[:50, :8] = weight  # of the first three tokens both have the same logits, but for softcaps
    seen = torch.randn(count, 12, dtype=torch.float64)
    seen[:3, :8], seen[:3, 8:] = x[:3], 0
    states = TeacherStates(seen, head)
    tree = {"loss": kind, "beta": 0.3, "temperature": temperature}
    section = validate(DistillConfig, small(distill=tree)).distill
    loss_fn = DistillLoss(section, FixedTeacher(states, 52), vocab)  # type: ignore[arg-type]

    leaves = x.clone().requires_grad_(), weight.clone().requires_grad_()
    loss = loss_fn.head_loss(batch, 0.5, 1)
    got = loss(*leaves, vocab, None, softcap)
    got.backward()

    plain = x.clone().requires_grad_(), weight.clone().requires_grad_()
    logits = plain[0] @ plain[1].t()
    logits = (softcap * (logits / softcap).tanh() if softcap else logits)[:, :vocab]
    teacher = (9 * (states.x @ head.weight.t() / 9).tanh())[:, :vocab]
    weights = batch.loss_mask.flatten()[batch.trained].double()
    per_token = written_out(logits, teacher, kind, 0.3, temperature)
    expected = 0.5 * (per_token * weights).sum()
    expected.backward()
    assert float(got.detach()) == pytest.approx(float(expected.detach()), rel=1e-12)
    for one, other in zip(leaves, plain, strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-9, atol=1e-12)

    labels = batch.labels.flatten()[batch.trained]
    nll = [-(t / temperature).log_softmax(-1)[range(count), labels] for t in (logits.detach(), teacher)]
    agreement = (logits.argmax(-1) == teacher.argmax(-1)).double()
    named = [float((value * weights).sum()) for value in (per_token.detach(), *nll, agreement)]
    sums = loss.sums.tolist()
    assert named[3] >= float(weights[:3].sum()) > 0
    assert [sums[0], *sums[2:]] == pytest.approx(named) and sums[1] == pytest.approx(float(weights.sum()))
    with torch.no_grad():
        again = loss_fn.head_loss(batch, 0.5, 1)
        assert float(again(x, weight, vocab, None, softcap)) == pytest.approx(float(expected))
        assert again.sums.tolist() == pytest.approx(sums)


def test_steps_on_samples_are_spread_evenly() -> None:
    for share, due in ((0.25, 3), (0.5, 6), (1.0, 12), (0.1, 1)):
        sampling = StudentSampling(None, None, share, 1.0, 0, 8)  # type: ignore[arg-type]
        assert sum(sampling.is_due(step) for step in range(12)) == math.floor(12 * share) == due
    quarter = StudentSampling(None, None, 0.25, 1.0, 0, 8)  # type: ignore[arg-type]
    assert [step for step in range(12) if quarter.is_due(step)] == [3, 7, 11]


PROMPTS = {"kind": "file", "files": ["a.jsonl"], "answer_key": ""}
ALL_OWN = {"distill": {"on_policy": 1}}


def small(**more: Any) -> dict[str, Any]:
    batch = {"steps": 1, "global_batch_size": 1, "micro_batch_size": 1, "seq_length": 8}
    tree: dict[str, Any] = {"run": {"dir": "x"}, "init": {"run": "s"}, "teacher": {"run": "t"}, "train": batch}
    return tree | {"optimizer": {"lr": 1.0}, "data": {"dialogues": ["d"]}} | more


@pytest.mark.parametrize(
    ("more", "words", "right"),
    [
        ({"data": {}}, r"distill\.on_policy = 0 leaves steps that need data", [{"data": {"dialogues": ["d"]}}]),
        ({"data": {}}, r"set data\.dialogues or data\.plan, or ", [{"data": {"plan": "p"}}]),
        ({"data": {}}, r"or task\.demonstrations above 0, or", [{"data": {}, "task": {"demonstrations": 1}}]),
        ({"data": {}, "task": PROMPTS}, r"or distill\.on_policy=1$", [{**ALL_OWN, "data": {}, "task": PROMPTS}]),
        (
            {"data": {"plan": "p"}, "task": {"demonstrations": 9}},
            r"leave out data\.plan, or leave out data\.dialogues and set task\.demonstrations=0$",
            [{"data": {}, "task": {"demonstrations": 9}}, {"data": {"plan": "p"}, "task": {"demonstrations": 0}}],
        ),
        (
            {"data": {"plan": "p", "dialogues": ["d"]}},
            r"data\.plan has rows of its own",
            [{"data": {"dialogues": ["d"]}}, {"data": {"plan": "p"}}],
        ),
        (
            {"distill": {"on_policy": 0.5}},
            r"distill\.on_policy = 0\.5 needs prompts.* of kind 'file' with .*, or distill\.on_policy=0$",
            [{"distill": {"on_policy": 0.5}, "task": PROMPTS}, {"distill": {"on_policy": 0}}],
        ),
        (
            {"teacher": {}},
            r"none of teacher\.run, teacher\.checkpoint and teacher\.hf names the teacher",
            [{"teacher": {"run": "a"}}, {"teacher": {"checkpoint": "a/checkpoints/step_1"}}, {"teacher": {"hf": "b"}}],
        ),
        (
            {"teacher": {"run": "a", "hf": "b"}},
            r"teacher\.run = 'a' and teacher\.hf = 'b' name the teacher",
            [{"teacher": {"run": "a"}}, {"teacher": {"hf": "b"}}],
        ),
        (
            {"distill": {"loss": "jsd", "beta": 1.0}},
            r"distill\.beta = 1\.0: .* less than 1$",
            [{"distill": {"loss": "jsd", "beta": 0.9}}],
        ),
    ],
)
def test_settings_that_contradict_each_other_are_legal_once_they_are_as_the_message_says(
    more: dict[str, Any], words: str, right: list[dict[str, Any]]
) -> None:
    with pytest.raises(ConfigError, match=words):
        validate(DistillConfig, small(**more))
    for each in right:
        validate(DistillConfig, small(**each))


def test_a_teacher_of_another_template_is_refused(tmp_path: Path) -> None:
    settings = validate(DistillConfig, small())
    pin = Pin(str(tmp_path / "run/checkpoints/step_1"), 1, "abc")
    for template, fits in (("mine", True), (None, True), ("theirs", False)):
        initial = InitialModel("teacher", pin, None, None, Lineage(chat_template=template))  # type: ignore[arg-type]
        teacher = OpenedTeacher(initial, None)  # type: ignore[arg-type]
        if fits:
            check_template(settings, teacher, "mine")
            continue
        with pytest.raises(ConfigError, match=r"teacher\.run = 't' was trained .* name the teacher's template"):
            check_template(settings, teacher, "mine")
        (tmp_path / "run").mkdir()
        (tmp_path / "run/chat_template.jinja").write_text("theirs")
        with pytest.raises(ConfigError, match=r"set data\.chat_template=.*run/chat_template\.jinja"):
            check_template(settings, teacher, "mine")


def test_a_teacher_that_saw_shorter_texts_is_refused() -> None:
    initial = InitialModel("teacher", None, None, None, Lineage(context=64))  # type: ignore[arg-type]
    teacher = OpenedTeacher(initial, None)  # type: ignore[arg-type]
    check_length(validate(DistillConfig, small()), teacher, 64, "dialogues", "")
    with pytest.raises(ConfigError, match=r"dialogues have up to 65 tokens.* set train\.seq_length=64"):
        check_length(validate(DistillConfig, small()), teacher, 65, "dialogues", "set train.seq_length={context}")
