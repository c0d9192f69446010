"""`trivium rl compare BATCH`: the loss, the gradient and the clipping of one recorded batch under every dialect.

Gradients are by the tokens' log-probabilities, as no model is at hand: they say how hard each dialect pulls at the same
tokens. A batch recorded before the first update has ratios of 1, where nothing clips; --drift shows what would clip
once the policy has moved.
"""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table

from configs.cli import command_parser, entrypoint
from configs.loader import ConfigError
from posttrain.algorithms.dialects import DIALECTS
from posttrain.algorithms.rollout_correction import Correction, rollout_weights
from posttrain.algorithms.token_batch import TokenBatch


@dataclass(frozen=True)
class Compared:
    """Results of one dialect on a batch; `lacks` says why there are none, else it is empty."""

    dialect: str
    source: str
    loss: float = math.nan
    grad_norm: float = math.nan  # of the loss, by all tokens' log-probabilities
    clipped: float = math.nan  # share of the sampled tokens
    live: float = math.nan  # share of the sampled tokens with a gradient
    lacks: str = ""


def compare(batch: TokenBatch, max_length: int | None = None) -> list[Compared]:
    """Computes every dialect on a batch that has rewards and, for some, groups and values.

    `max_length` is the longest completion allowed, in tokens; left out, the longest of the batch.
    """
    longest = max_length or max(1, int(batch.lengths().max()))
    found = []
    for name, dialect in DIALECTS.items():
        logprobs = batch.logprobs.detach().clone().requires_grad_()
        try:
            loss, parts = dialect.loss(batch.but(logprobs=logprobs), longest)
        except ValueError as error:
            found.append(Compared(name, dialect.source, lacks=str(error)))
            continue
        (grad,) = torch.autograd.grad(loss, logprobs)
        tokens = float(batch.mask.sum().clamp(min=1))
        live = float((grad[batch.mask] != 0).sum()) / tokens
        clipped = float(parts.clipped.sum()) / tokens
        found.append(Compared(name, dialect.source, float(loss.detach()), float(grad.norm()), clipped, live))
    return found


def drifted(batch: TokenBatch, nats: float, seed: int = 0) -> TokenBatch:
    """Returns a batch as if the policy had been updated since it was sampled.

    Each log-probability is moved by a normal deviate with standard deviation `nats`, and stays at most 0. The batch's
    own log-probabilities become those of the old policy, if it has none yet.
    """
    noise = torch.randn(batch.logprobs.shape, generator=torch.Generator().manual_seed(seed)) * nats
    old = batch.logprobs if batch.old_logprobs is None else batch.old_logprobs
    return batch.but(logprobs=(batch.logprobs + noise).clamp(max=0.0), old_logprobs=old)


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table of a batch and returns the exit status."""
    parser = command_parser(
        "trivium rl compare",
        "Compares the loss, the gradient and the clipping of one recorded batch under every dialect.",
        "trivium rl compare runs/demo/grpo/rollouts/rollout_000000.safetensors --drift 0.2",
    )
    parser.add_argument("batch", metavar="BATCH", help="a safetensors file: a recorded rollout, or TokenBatch.save's")
    words = "first move each log-probability of the policy at random, by about so much"
    parser.add_argument("--drift", type=float, default=0.0, metavar="NATS", help=words)
    parser.add_argument("--max-length", type=int, metavar="TOKENS", help="the longest completion allowed")
    args = parser.parse_args(argv)
    if not (math.isfinite(args.drift) and args.drift >= 0):
        raise ConfigError(f"--drift {args.drift} is no distance; give 0 or a small number of nats, such as 0.2")
    if args.max_length is not None and args.max_length < 1:
        raise ConfigError(f"--max-length {args.max_length} is no number of tokens; give at least 1, or leave it out")
    try:
        batch = TokenBatch.load(args.batch)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    if not batch.mask.any():
        raise ConfigError(f"{args.batch} has no sampled token: its mask is all False; record another batch")
    if args.drift:
        batch = drifted(batch, args.drift)
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(_table(compare(batch, args.max_length)))
    console.print(_said(batch), soft_wrap=True)
    return 0


def _table(found: Sequence[Compared]) -> Table:
    table = Table("dialect", box=None, pad_edge=False)
    for heading in ("loss", "gradient norm", "clipped", "with gradient"):
        table.add_column(heading, justify="right")
    table.add_column("source")
    for one in found:
        if one.lacks:
            table.add_row(one.dialect, "-", "-", "-", "-", one.lacks)
            continue
        shares = f"{one.clipped:.1%}", f"{one.live:.1%}"
        table.add_row(one.dialect, f"{one.loss:.6f}", f"{one.grad_norm:.6f}", *shares, one.source)
    return table


def _said(batch: TokenBatch) -> str:
    """Returns a line on the batch's size and, if it has them, on how the sampler's log-probabilities differ."""
    text = f"{int(batch.mask.sum())} sampled tokens in {int(batch.num_sequences())} completions"
    if batch.rollout_logprobs is None:
        return text
    weights = rollout_weights(batch, Correction.REPORT).measured[batch.mask]
    return f"{text}; trainer / sampler: mean {float(weights.mean()):.6f}, {weights.min():.4f} to {weights.max():.4f}"


if __name__ == "__main__":
    entrypoint(main)
