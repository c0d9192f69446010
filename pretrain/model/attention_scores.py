"""Attention whose scores are more than causal products: contexts, windows and chunks, ALiBi, soft caps, sinks.

A pattern is one predicate, an entry of `PATTERNS`. Everything here is computed document by document and for some
queries at a time, so that a score of every token with every other never exists; queries of long documents are computed
again in the backward pass. Plain causal attention is in `documents.py`, which has faster kernels. Shape letters: see
`decoder.py`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F

from configs.model_parts import WITHOUT_WINDOW, AttentionConfig, AttentionPattern
from pretrain.model.documents import Documents, attend_documents, attend_rows, by_document, shared_heads
from pretrain.model.layers import recomputed

QUERIES = 512  # computed at a time


@dataclass(frozen=True)
class ScoreRule:
    """The way in which scores become weights: the keys that a query sees, the bound on scores, slopes [N], sinks [N].

    A slope times the distance is taken from a score (Press et al. 2022). A sink is one more score in the softmax,
    whose weight goes to nothing. With the pattern `prefix` all tokens see the first `context` tokens of the document.
    """

    pattern: AttentionPattern = "causal"
    window: int | None = None
    softcap: float | None = None
    slopes_N: torch.Tensor | None = None
    sinks_N: torch.Tensor | None = None
    context: int = 0

    @classmethod
    def of(cls, config: AttentionConfig, slopes_N: torch.Tensor | None, sinks_N: torch.Tensor | None) -> "ScoreRule":
        return cls(config.pattern, config.window, config.softcap, slopes_N, sinks_N)

    @property
    def is_masked_only(self) -> bool:
        """Whether the rule chooses keys and leaves scores as they are."""
        return self.softcap is None and self.slopes_N is None and self.sinks_N is None

    def is_plain(self, length: int) -> bool:
        """Whether in rows of this length the rule is plain causal attention."""
        if self.pattern in WITHOUT_WINDOW:
            return self.context <= 1 and self.is_masked_only
        return (self.window or 0) >= length and self.is_masked_only

    def sees(self, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        """Returns whether a token at position `query` of its document sees the one at `key`; shapes must broadcast."""
        return PATTERNS[self.pattern](query, key, self)

    def first_key(self, query: int) -> int:
        """Returns the first position that a token at position `query` may see."""
        if self.pattern == "sliding":
            return max(0, query - (self.window or 0) + 1)
        if self.pattern == "chunked":
            return query // (self.window or 1) * (self.window or 1)
        return 0


def _in_window(query: torch.Tensor, key: torch.Tensor, rule: ScoreRule) -> torch.Tensor:
    return (key <= query) & (key > query - (rule.window or 0))


def _in_chunk(query: torch.Tensor, key: torch.Tensor, rule: ScoreRule) -> torch.Tensor:
    return (key <= query) & (key // (rule.window or 1) == query // (rule.window or 1))


# Whether a token at position `query` of its document sees the one at `key`.
PATTERNS: dict[AttentionPattern, Callable[[torch.Tensor, torch.Tensor, ScoreRule], torch.Tensor]] = {
    "causal": lambda query, key, rule: key <= query,
    "prefix": lambda query, key, rule: (key <= query) | (key < rule.context),
    "sliding": _in_window,
    "chunked": _in_chunk,
}


def alibi_slopes(num_heads: int) -> torch.Tensor:
    """Returns ALiBi's slopes [N]: a geometric series, with every other number of the next one for N no power of two."""
    power = 2 ** math.floor(math.log2(num_heads))
    slopes = [2.0 ** (-8.0 * (head + 1) / power) for head in range(power)]
    slopes += [2.0 ** (-4.0 * (2 * head + 1) / power) for head in range(num_heads - power)]
    return torch.tensor(slopes, dtype=torch.float32)


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    documents: Documents | None,
    rule: ScoreRule,
    virtual: int = 0,
) -> torch.Tensor:
    """Computes attention within each document, [T, B, N, D], from q [T, B, N, D] and k and v [T, B, K, D].

    The first `virtual` keys of a row belong to virtual tokens, which every document of the row sees. Virtual tokens may
    have queries as well (prompt tuning) or not (prefix tuning); then there are `virtual` fewer queries than keys.
    """
    has_contexts = rule.pattern == "prefix" and documents is not None and documents.contexts is not None
    if documents is None or (documents.is_whole and not has_contexts):
        if len(q) == len(k) and rule.is_plain(len(q)):
            return attend_rows(q, k, v, None)
        return _one_document(q, k, v, rule)
    if virtual:
        return _after_virtual_tokens(q, k, v, documents, rule, virtual)
    if rule.is_plain(len(q)) and not has_contexts:
        return attend_documents(q, k, v, documents)
    return by_document(q, k, v, documents, partial(_one_document, rule=rule), with_context=has_contexts)


@torch.compiler.disable  # it would be compiled anew for every length of a document
def _one_document(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rule: ScoreRule, context: int = 0) -> torch.Tensor:
    """Computes attention of a document's tokens to keys, the last of which are their own; others come before.

    The first `context` tokens are its context.
    """
    before, rule = len(k) - len(q), replace(rule, context=context)
    if not before and rule.is_plain(len(q)):
        return attend_rows(q, k, v, None)
    outputs = []
    again = len(q) > QUERIES and torch.is_grad_enabled()
    for start in range(0, len(q), QUERIES):
        end = min(len(q), start + QUERIES)
        first, last = rule.first_key(start + before), max(end + before, context)
        inputs = q[start:end], k[first:last], v[first:last], start + before, first, rule
        outputs.append(recomputed(_some_queries, *inputs) if again else _some_queries(*inputs))
    return torch.cat(outputs)


@torch.compiler.disable  # as above
def _after_virtual_tokens(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, documents: Documents, rule: ScoreRule, count: int
) -> torch.Tensor:
    """Computes attention in a row that begins with `count` virtual tokens.

    Each document sees the virtual tokens and itself. Virtual tokens see one another, if they have queries."""
    first_q, q = q.split((len(q) - len(k) + count, len(k) - count))
    first_k, k = k.split((count, len(k) - count))
    first_v, v = v.split((count, len(v) - count))

    def one(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, row: int) -> torch.Tensor:
        own_k, own_v = (torch.cat((x[:, row : row + 1], own)) for x, own in ((first_k, k), (first_v, v)))
        return _one_document(q, own_k, own_v, rule)

    own = by_document(q, k, v, documents, one, with_row=True)
    return own if not len(first_q) else torch.cat((_one_document(first_q, first_k, first_v, rule), own))


def _some_queries(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, first_query: int, first_key: int, rule: ScoreRule
) -> torch.Tensor:
    """Computes attention of consecutive queries of a document to consecutive keys of it."""
    query = torch.arange(first_query, first_query + len(q), device=q.device)[:, None]
    key = torch.arange(first_key, first_key + len(k), device=q.device)
    if rule.is_masked_only:
        return attend_rows(q, k, v, rule.sees(query, key))
    heads = q.shape[2]
    q, k, v = (x.permute(1, 2, 0, 3) for x in (q, shared_heads(k, heads, dim=2), shared_heads(v, heads, dim=2)))
    return weighted(q, k, v, query, key, rule).permute(2, 0, 1, 3)


def weighted(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, query: torch.Tensor, key: torch.Tensor, rule: ScoreRule
) -> torch.Tensor:
    """Computes attention [B, N, S, D] of q [B, N, S, D] over k and v [B, N, T, D], softmax in fp32 or better.

    `query` and `key` are positions whose difference broadcasts to [B, N, S, T].
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = (q @ k.transpose(2, 3)).to(wide) / math.sqrt(q.shape[-1])
    if rule.softcap is not None:
        scores = rule.softcap * torch.tanh(scores / rule.softcap)
    if rule.slopes_N is not None:
        scores = scores - rule.slopes_N.to(wide)[:, None, None] * (key - query).abs()
    scores = scores.masked_fill(~rule.sees(query, key), float("-inf"))
    if rule.sinks_N is None:
        return scores.softmax(-1).to(v.dtype) @ v
    sinks = rule.sinks_N.to(wide)[:, None, None].expand(len(scores), -1, scores.shape[2], 1)
    return torch.cat((scores, sinks), dim=-1).softmax(-1)[..., :-1].to(v.dtype) @ v


@torch.no_grad()
def largest_logit(
    q: torch.Tensor, k: torch.Tensor, documents: Documents | None, rule: ScoreRule, virtual: int = 0
) -> torch.Tensor:
    """Returns the largest scaled product of a query and a key that it sees, in fp32 or better, as a scalar.

    Arguments are those of `attend`. Keys of virtual tokens do not count, and soft cap and slopes are left out.
    """
    k = k[virtual:]
    q = q[len(q) - len(k) :]
    wide = torch.promote_types(q.dtype, torch.float32)
    largest = torch.full((), -torch.inf, dtype=wide, device=q.device)

    def one(q: torch.Tensor, k: torch.Tensor, _: torch.Tensor, context: int = 0) -> torch.Tensor:
        nonlocal largest
        own = replace(rule, context=context)
        for start in range(0, len(q), QUERIES):
            end = min(len(q), start + QUERIES)
            first, last = own.first_key(start), max(end, context)
            query = torch.arange(start, end, device=q.device)[:, None]
            seen = own.sees(query, torch.arange(first, last, device=q.device))
            keys = shared_heads(k[first:last], q.shape[2], dim=2)
            products = (q[start:end].permute(1, 2, 0, 3) @ keys.permute(1, 2, 3, 0)).to(wide) / math.sqrt(q.shape[-1])
            largest = torch.maximum(largest, products.masked_fill(~seen, -torch.inf).amax())
        return q

    if documents is None:
        one(q, k, k)
    else:
        has_contexts = rule.pattern == "prefix" and documents.contexts is not None
        by_document(q, k, k, documents, one, with_context=has_contexts)
    return largest


def attend_cached(
    q_BND: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, positions_B: torch.Tensor, rule: ScoreRule
) -> torch.Tensor:
    """Computes attention [B, N, D] of one token a row, at `positions_B`, over slots [B, K, T, D] of a cache."""
    slots = torch.arange(keys.shape[2], device=keys.device)
    query = positions_B[:, None, None, None]
    heads = q_BND.shape[1]
    k, v = shared_heads(keys, heads, dim=1), shared_heads(values, heads, dim=1)
    if rule.is_masked_only:
        return F.scaled_dot_product_attention(q_BND[:, :, None], k, v, attn_mask=rule.sees(query, slots))[:, :, 0]
    return weighted(q_BND[:, :, None], k, v, query, slots, rule)[:, :, 0]
