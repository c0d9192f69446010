"""Log-likelihoods of continuations under a model that one process holds, in batches of texts of like lengths.

Nothing here knows tasks or texts: contexts and continuations are token ids.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch

from pretrain.model import Decoder
from pretrain.model.context import ForwardContext

BATCH_TOKENS = 4096  # tokens computed at once, padding included
MOST_LOGITS = 2**28  # in one batch, which is 1 GiB of fp32 numbers

Ids = Sequence[int]


@dataclass(frozen=True)
class Likelihood:
    """Log-probability of a continuation in nats, and whether greedy decoding would write it."""

    logprob: float
    is_greedy: bool


@dataclass
class _Row:
    """A sequence that the model reads once, and the continuations that are scored on it as (number, token ids).

    A continuation is predicted by the last positions of the row. Several share a row if they differ in nothing that the
    model reads, as the answers A, B, C and D to a question do. The first `context` tokens are not predicted.
    """

    inputs: tuple[int, ...]
    context: int
    scored: list[tuple[int, Ids]] = field(default_factory=list)

    @property
    def longest(self) -> int:
        """The number of last positions at which logits are needed."""
        return max(len(ids) for _, ids in self.scored)


def windows(context: Ids, continuation: Ids, max_length: int) -> Iterator[tuple[Ids, Ids]]:
    """Yields (tokens that the model reads, tokens at their end that it predicts); each token is predicted once.

    A context that does not fit loses its beginning. A continuation of more than `max_length` tokens is divided into
    windows of that length, and the last of them, which predicts the rest, is filled up with earlier tokens, as
    lm-evaluation-harness does for the perplexity of long texts.
    """
    if len(continuation) <= max_length:
        yield [*context, *continuation][-max_length - 1 :][:-1], continuation
        return
    whole = [context[-1], *continuation]
    for start in range(0, len(continuation), max_length):
        end = min(start + max_length, len(continuation))
        yield whole[end - max_length : end], continuation[start:end]


def likelihoods(
    decoder: Decoder,
    pairs: Sequence[tuple[Ids, Ids]],
    max_length: int,
    batch_tokens: int = BATCH_TOKENS,
    progress: Callable[[int], None] = lambda _: None,
) -> list[Likelihood]:
    """Returns the likelihood of each (context, continuation) of token ids; an empty continuation is certain.

    `max_length` is the greatest number of tokens that the model reads at once. `progress` is called with the number of
    continuations scored since its last call. Raises ValueError if a context is empty.
    """
    if any(not context for context, _ in pairs):
        raise ValueError("a context has no tokens; begin it with the beginning-of-text or end-of-text token")
    rows: dict[tuple[int, tuple[int, ...]], _Row] = {}
    for number, (context, continuation) in enumerate(pairs):
        for inputs, predicted in windows(context, continuation, max_length) if continuation else ():
            own = len(inputs) - len(predicted) + 1
            key = own if decoder.model_config.has_contexts else 0, tuple(inputs)
            row = rows.setdefault(key, _Row(tuple(inputs), own))
            row.scored.append((number, predicted))
    logprobs, greedy = [0.0] * len(pairs), [True] * len(pairs)
    for batch in _batches(list(rows.values()), batch_tokens, decoder.model_config.vocab_size):
        done = 0
        for row, logits_NV in zip(batch, _logits(decoder, batch), strict=True):
            total_N = logits_NV.logsumexp(-1)
            best_N = logits_NV.argmax(-1)
            for number, ids in row.scored:
                ids_N = torch.tensor(ids, device=logits_NV.device)
                chosen_N = logits_NV[-len(ids) :].gather(1, ids_N[:, None])[:, 0]
                logprobs[number] += float((chosen_N - total_N[-len(ids) :]).double().sum())
                greedy[number] &= bool((best_N[-len(ids) :] == ids_N).all())
                done += 1
        progress(done)
    return [Likelihood(*both) for both in zip(logprobs, greedy, strict=True)]


def _batches(rows: list[_Row], batch_tokens: int, vocab_size: int) -> Iterator[list[_Row]]:
    """Yields rows in batches, the longest first, so that one that needs too much memory fails at the beginning."""
    batch: list[_Row] = []
    logits = 0
    for row in sorted(rows, key=lambda row: (-len(row.inputs), row.inputs)):
        logits += row.longest * vocab_size
        if batch and ((len(batch) + 1) * len(batch[0].inputs) > batch_tokens or logits > MOST_LOGITS):
            yield batch
            batch, logits = [], row.longest * vocab_size
        batch.append(row)
    if batch:
        yield batch


@torch.inference_mode()
def _logits(decoder: Decoder, batch: list[_Row]) -> list[torch.Tensor]:
    """Returns the logits [N, V] in fp32 at the last N positions of each row, N its longest continuation."""
    device = next(decoder.parameters()).device
    length = max(len(row.inputs) for row in batch)
    tokens_BS = torch.tensor([[*row.inputs, *[0] * (length - len(row.inputs))] for row in batch])
    positions_BS = torch.arange(length).expand_as(tokens_BS)
    ends_B1 = torch.tensor([len(row.inputs) for row in batch])[:, None]
    segments_BS = torch.where(positions_BS < ends_B1, 0, -1)
    wanted = [
        torch.arange(number * length + len(row.inputs) - row.longest, number * length + len(row.inputs))
        for number, row in enumerate(batch)
    ]
    moved = (x.to(device) for x in (tokens_BS, positions_BS, segments_BS, torch.cat(wanted)))
    tokens, positions, segments, chosen = moved
    contexts = torch.tensor([row.context for row in batch])
    context = ForwardContext.of(decoder.model_config, positions, segments, contexts_B=contexts)
    logits = decoder(tokens, positions, segments, wanted=chosen, context=context).float()
    return list(logits.split([row.longest for row in batch]))
