"""The gated delta rule (Yang, Kautz and Hatamizadeh 2024, arXiv 2412.06464), and the convolution before it.

A head has a state S, a matrix of [key, value] elements that is zero before a document. A token with query q, key k and
value v first decays it by a factor α in (0, 1], then moves what S has at k towards v by a share β of the difference,
and reads at q (equation 10 of the paper, whose S is ours transposed):

    S ← α S,    S ← S + k δᵀ with δ = β (v - Sᵀ k),    output Sᵀ q

`step` does this for one token. `by_chunks` computes the same for `CHUNK` tokens at a time with matrix products, in the
paper's WY form (its section 3.3): within a chunk the δ of all tokens are the solution of one triangular system, and
only S goes from chunk to chunk. Everything is computed in fp32 or better.

Shape letters here: T tokens, B rows, K key heads, R value heads that share a key head, P elements of a key, V elements
of a value, W the width of the convolution, N chunks, C tokens of a chunk.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

CHUNK = 64  # tokens; the triangular systems grow with its square, and the states between chunks become fewer
_EPS = 1e-6  # of the length of queries and keys


@dataclass(frozen=True)
class RuleInputs:
    """Inputs of the rule for each token: q and k [T, B, K, P], v [T, B, K, R, V], log α and β [T, B, K, R]."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    log_decay: torch.Tensor
    beta: torch.Tensor

    def normalized(self) -> "RuleInputs":
        """Returns the inputs with queries and keys of length one, and queries divided by the root of their size."""
        q, k = (x * torch.rsqrt(x.square().sum(-1, keepdim=True) + _EPS) for x in (self.q, self.k))
        return RuleInputs(q * q.shape[-1] ** -0.5, k, self.v, self.log_decay, self.beta)


def convolved(x: torch.Tensor, weight: torch.Tensor, documents_TB: torch.Tensor | None) -> torch.Tensor:
    """Computes a causal convolution of each channel over its own document, [T, B, K, channels].

    `x` is [T, B, K, channels] and `weight` [K, channels, W], whose last element is that of the token itself.
    `documents_TB` numbers the documents of each row; None means that a row is one.
    """
    y, length = x * weight[..., -1], len(x)
    for back in range(1, weight.shape[-1]):
        earlier = F.pad(x, (0, 0) * (x.ndim - 1) + (back, 0))[:length]
        if documents_TB is not None:
            earlier = earlier * (documents_TB == _shifted(documents_TB, back))[..., None, None]
        y = y + earlier * weight[..., -1 - back]
    return y


def _shifted(documents_TB: torch.Tensor, by: int) -> torch.Tensor:
    """Returns the number of the document of the token so many before each; -1 where there is none."""
    return F.pad(documents_TB, (0, 0, by, 0), value=-1)[: len(documents_TB)]


def step(inputs: RuleInputs, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Computes one token a row, T = 1, after `state` [B, K, R, P, V].

    Returns outputs [1, B, K, R, V] and the next state.
    """
    inputs = inputs.normalized()
    q, k, v = inputs.q[0, :, :, None], inputs.k[0, :, :, None], inputs.v[0]
    state = state * inputs.log_decay[0].exp()[..., None, None]
    found = (state * k[..., None]).sum(-2)
    delta = inputs.beta[0][..., None] * (v - found)
    state = state + k[..., None] * delta[..., None, :]
    return (state * q[..., None]).sum(-2)[None], state


def by_chunks(inputs: RuleInputs, documents_TB: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Computes whole rows; the state is zero before each document.

    Returns outputs [T, B, K, R, V] and the state [B, K, R, P, V] after the last token. `documents_TB` as in
    `convolved`.
    """
    length, rows = inputs.v.shape[:2]
    size = min(CHUNK, length)
    inputs = inputs.normalized()
    q, k = (_chunks(x[:, :, :, None], size) for x in (inputs.q, inputs.k))  # [B, K, 1, N, C, P]
    v, beta = _chunks(inputs.v, size), _chunks(inputs.beta[..., None], size)  # [B, K, R, N, C, V or 1]
    documents_BNC = _document_chunks(documents_TB, length, rows, size, q.device)
    of_pair, from_state, to_state = _decays(_chunks(inputs.log_decay[..., None], size), documents_BNC)

    # δ = solved_v - solved_k S, where S is the state before the chunk (the paper's U and W).
    system = beta * (k @ k.mT) * of_pair
    right = torch.cat((beta * v, beta * from_state * k), -1)
    solved = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)
    solved_v, solved_k = solved.split((v.shape[-1], k.shape[-1]), -1)
    scores, q, k = (q @ k.mT) * of_pair, q * from_state, (k * to_state).mT
    outputs, state, *_ = _from_chunk_to_chunk(solved_v, solved_k, scores, q, k, from_state[..., -1:, :])
    return outputs.flatten(3, 4).permute(3, 0, 1, 2, 4)[:length], state


# An operator of its own: the compiler would write the loop out, and work for minutes on rows of a thousand tokens.
@torch.library.custom_op("trivium::delta_rule", mutates_args=())
def _from_chunk_to_chunk(
    solved_v: torch.Tensor,
    solved_k: torch.Tensor,
    scores: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    decay: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Carries the state through the chunks, of which `q` reads it, `k` moves it by δ, and `decay` [..., 1, 1] is left.

    Returns outputs [B, K, R, N, C, V] and the last state, and for the backward pass the states before all chunks and δ.
    """
    outputs, state, states, deltas = _empty_outputs(solved_v, solved_k, scores, q, k, decay)
    state.zero_()
    for n in range(solved_v.shape[3]):
        states[:, :, :, n] = state
        delta = solved_v[:, :, :, n] - solved_k[:, :, :, n] @ state
        deltas[:, :, :, n] = delta
        outputs[:, :, :, n] = q[:, :, :, n] @ state + scores[:, :, :, n] @ delta
        state.mul_(decay[:, :, :, n]).add_(k[:, :, :, n] @ delta)
    return outputs, state, states, deltas


@_from_chunk_to_chunk.register_fake
def _empty_outputs(
    solved_v: torch.Tensor,
    solved_k: torch.Tensor,
    scores: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    decay: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    size_k, size_v, heads = q.shape[-1], solved_v.shape[-1], solved_v.shape[:3]
    states = solved_v.new_empty(*solved_v.shape[:4], size_k, size_v)
    outputs, deltas = (solved_v.new_empty(solved_v.shape) for _ in range(2))
    return outputs, solved_v.new_empty(*heads, size_k, size_v), states, deltas


@torch.library.custom_op("trivium::delta_rule_backward", mutates_args=())
def _backward_through_chunks(
    grad: torch.Tensor,
    grad_of_state: torch.Tensor,
    solved_k: torch.Tensor,
    scores: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    decay: torch.Tensor,
    states: torch.Tensor,
    deltas: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Computes the gradients of all inputs from those of outputs and of the last state, from the last chunk back."""
    gradients = _empty_gradients(grad, grad_of_state, solved_k, scores, q, k, decay, states, deltas)
    of_solved_v, of_solved_k, of_scores, of_q, of_k, of_decay = gradients
    of_state = grad_of_state
    for n in reversed(range(grad.shape[3])):
        own, state, delta = (x[:, :, :, n] for x in (grad, states, deltas))
        of_delta = scores[:, :, :, n].mT @ own + k[:, :, :, n].mT @ of_state
        of_solved_v[:, :, :, n] = of_delta
        of_solved_k[:, :, :, n] = -of_delta @ state.mT
        of_scores[:, :, :, n] = own @ delta.mT
        of_q[:, :, :, n] = own @ state.mT
        of_k[:, :, :, n] = of_state @ delta.mT
        of_decay[:, :, :, n] = (of_state * state).sum((-2, -1), keepdim=True)
        of_state = of_state * decay[:, :, :, n] + q[:, :, :, n].mT @ own - solved_k[:, :, :, n].mT @ of_delta
    return gradients


@_backward_through_chunks.register_fake
def _empty_gradients(
    grad: torch.Tensor,
    grad_of_state: torch.Tensor,
    solved_k: torch.Tensor,
    scores: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    decay: torch.Tensor,
    states: torch.Tensor,
    deltas: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    of_v, of_solved_k, of_scores, of_q, of_k, of_decay = (
        x.new_empty(x.shape) for x in (deltas, solved_k, scores, q, k, decay)
    )
    return of_v, of_solved_k, of_scores, of_q, of_k, of_decay


def _keep(ctx: Any, inputs: tuple[torch.Tensor, ...], output: tuple[torch.Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)  # what is kept for the backward pass has no gradient
    ctx.save_for_backward(*inputs[1:], *output[2:])


def _backward(ctx: Any, grad: torch.Tensor, grad_of_state: torch.Tensor | None, *_: Any) -> tuple[torch.Tensor, ...]:
    saved = ctx.saved_tensors  # once only: where activations are recomputed, a second look raises CheckpointError
    if grad_of_state is None:
        *_, states, _ = saved
        grad_of_state = torch.zeros_like(states[:, :, :, 0])
    backward: Callable[..., tuple[torch.Tensor, ...]] = _backward_through_chunks
    return backward(grad, grad_of_state, *saved)


_from_chunk_to_chunk.register_autograd(_backward, setup_context=_keep)


def _chunks(x: torch.Tensor, size: int) -> torch.Tensor:
    """Cuts [T, B, K, R, ...] into chunks, [B, K, R, N, C, ...]; zeros fill the last one and change no state."""
    x = F.pad(x, (0, 0) * (x.ndim - 1) + (0, -len(x) % size))
    return x.unflatten(0, (-1, size)).permute(2, 3, 4, 0, 1, 5)


def _document_chunks(
    documents_TB: torch.Tensor | None, length: int, rows: int, size: int, device: torch.device
) -> torch.Tensor:
    """Returns the documents of all tokens in chunks, [B, N, C]; what fills the last chunk is of the last document."""
    if documents_TB is None:
        return torch.zeros(rows, -(-length // size), size, dtype=torch.long, device=device)
    filled = torch.cat((documents_TB, documents_TB[-1:].expand(-length % size, -1)))
    return filled.unflatten(0, (-1, size)).permute(2, 0, 1)


def _decays(log_decay: torch.Tensor, documents_BNC: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns products of the decays in chunks [..., C, 1], zero from one document to another.

    They are those between pairs of tokens [..., C, C], from the state before the chunk to a token [..., C, 1], and from
    a token to the state after the chunk [..., C, 1]. The logarithms of each pair are summed by themselves: differences
    of sums from the beginning would lose what is small beside all that came before.
    """
    size, before = log_decay.shape[-2], documents_BNC[..., :1]
    before = torch.cat((before[:, :1], documents_BNC[:, :-1, -1:]), 1)  # the document that the state before is of
    lower = torch.ones(size, size, dtype=torch.bool, device=log_decay.device).tril()
    sums = log_decay.masked_fill(~lower.tril(-1), 0.0).cumsum(-2)
    pairs = (documents_BNC[..., None] == documents_BNC[..., None, :]) & lower
    of_pair = sums.exp() * pairs[:, None, None]
    from_state = log_decay.cumsum(-2).exp() * (documents_BNC == before)[:, None, None, :, :, None]
    return of_pair, from_state, of_pair[..., -1, :, None]
