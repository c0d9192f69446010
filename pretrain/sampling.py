"""Autoregressive sampling with a key-value cache, on one rank that holds the whole model.

Each prompt has its own random generator, seeded by (seed, its index or the given key). Its text does not depend on the
prompts beside it: see `pretrain.model.kv_cache`, and `LEAST_ROWS` here. (Exactly so for a dense model in fp32; where
kernels choose another order of summation for other shapes, a draw may fall on the other side of a rounding.) Prompts
that stand next to one another and are equal are computed once. Beam search and serving are left out.
"""

import hashlib
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch
import torch.nn.functional as F

from pretrain.model.decoder import Decoder
from pretrain.model.kv_cache import KVCache, whole_slots

ROWS = 256  # texts continued at once, which limits the key-value cache
LEAST_ROWS = 8  # a matrix product with fewer rows takes a kernel that sums in another order
BLOCK = 64  # neighbouring tokens whose probabilities are summed before they are looked at one by one


@dataclass
class Completion:
    """Sampled continuation of a prompt: its tokens and the log-probability of each.

    `stopped` is whether a stop token came, which is then the last of `tokens`.
    """

    tokens: list[int]
    logprobs: list[float]
    stopped: bool


def generate(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    temperature: float = 1.0,
    seed: int = 0,
    stop_ids: Sequence[int] = (),
    top_p: float = 1.0,
    keys: Sequence[str] | None = None,
    pad_id: int = 0,
    max_rows: int = ROWS,
) -> list[Completion]:
    """Samples a continuation of every prompt; temperature 0 takes the most probable token.

    Log-probabilities are those after the temperature and before `top_p` is applied. At most `max_rows` texts are
    continued at a time; when some end, others begin. Raises ValueError if a prompt is empty.
    """
    if not prompts or any(len(prompt) == 0 for prompt in prompts):
        raise ValueError("a prompt has no tokens; give at least the beginning-of-text token")
    texts = _Texts(prompts, max_new_tokens, seed, stop_ids, keys)
    waiting = texts.groups(max_rows)
    return _Sampler(decoder, texts, temperature, top_p, pad_id, min(max_rows, len(prompts))).run(waiting)


class _Texts:
    """State of all texts, kept on the host: prompts, random numbers, and the tokens drawn so far."""

    def __init__(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        seed: int,
        stop_ids: Sequence[int],
        keys: Sequence[str] | None,
    ):
        count = len(prompts)
        self.prompts, self.stop_ids = prompts, np.array(list(stop_ids), dtype=np.int64)
        self.lengths = np.array([len(prompt) for prompt in prompts])  # of the prompts
        self._names = [f"{seed}/{keys[i] if keys else i}" for i in range(count)]
        self._uniforms = np.empty((count, max_new_tokens))
        self._tokens = np.empty((count, max_new_tokens), dtype=np.int64)
        self._logprobs = np.empty((count, max_new_tokens))
        self._drawn = np.zeros(count, dtype=np.int64)
        self._stopped = np.zeros(count, dtype=bool)

    def groups(self, most: int) -> deque[range]:
        """Returns runs of texts, at most `most` each, that have the same prompt."""
        found: deque[range] = deque()
        for _, numbers in groupby(range(len(self.prompts)), key=lambda i: self.prompts[i]):
            run = list(numbers)
            found += (range(first, min(first + most, run[-1] + 1)) for first in range(run[0], run[-1] + 1, most))
        return found

    def begin(self, numbers: np.ndarray) -> None:
        """Draws the random numbers of texts, in fp64 from [0, 1), each a function of seed and key."""
        for i in numbers:
            digest = hashlib.sha256(self._names[i].encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
            torch.rand(self._uniforms.shape[1], generator=generator, out=torch.from_numpy(self._uniforms[i]))

    def uniforms(self, numbers: np.ndarray) -> torch.Tensor:
        """Returns the random numbers [B] of the next tokens."""
        return torch.from_numpy(self._uniforms[numbers, self._drawn[numbers]])

    def newest(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns the newest tokens [B] of texts and their positions [B]."""
        last = self._drawn[numbers] - 1
        return self._tokens[numbers, last], self.lengths[numbers] + last

    def add(self, numbers: np.ndarray, tokens: np.ndarray, logprobs: np.ndarray) -> np.ndarray:
        """Adds a token to each text; returns which of the texts go on [B]."""
        at = self._drawn[numbers]
        self._tokens[numbers, at], self._logprobs[numbers, at] = tokens, logprobs
        self._drawn[numbers] += 1
        stopped = self._stopped[numbers] = np.isin(tokens, self.stop_ids)
        return ~stopped & (at + 1 < self._tokens.shape[1])

    def completions(self) -> list[Completion]:
        return [
            Completion(self._tokens[i, :n].tolist(), self._logprobs[i, :n].tolist(), bool(self._stopped[i]))
            for i, n in enumerate(self._drawn)
        ]


class _Sampler:
    """Continues texts, each in a row of the cache. `_numbers` has the text of each row in use, which are the first."""

    def __init__(
        self, decoder: Decoder, texts: _Texts, temperature: float, top_p: float, pad_id: int, max_rows: int
    ) -> None:
        self.decoder, self.texts, self.temperature, self.top_p, self.pad_id = decoder, texts, temperature, top_p, pad_id
        self.max_rows = max_rows
        self.device = next(decoder.parameters()).device
        self._numbers = np.zeros(0, dtype=np.int64)

    @torch.inference_mode()
    def run(self, waiting: deque[range]) -> list[Completion]:
        """Samples all texts, in the order of `waiting`."""
        longest = int(self.texts.lengths.max()) + self.texts._tokens.shape[1]
        self._cache = self.decoder.new_cache(max(self.max_rows, LEAST_ROWS), longest)
        while waiting or len(self._numbers):
            free = self.max_rows - len(self._numbers)
            if waiting and free >= max(len(waiting[0]), self.max_rows // 4):
                self._start(waiting, free)
            if len(self._numbers):
                self._continue()
        return self.texts.completions()

    def _start(self, waiting: deque[range], free: int) -> None:
        """Computes the prompts of as many groups as fit, and draws the first token of each of their texts."""
        groups: list[range] = []
        while waiting and len(waiting[0]) <= free:
            groups.append(waiting.popleft())
            free -= len(groups[-1])
        lengths = torch.tensor([self.texts.lengths[group[0]] for group in groups])
        tokens = torch.full((len(groups), whole_slots(int(lengths.max()))), self.pad_id)
        for row, group in enumerate(groups):
            tokens[row, : lengths[row]] = torch.tensor(self.texts.prompts[group[0]])
        positions = torch.arange(tokens.shape[1]).expand_as(tokens)
        segments = torch.where(positions < lengths[:, None], 0, -1)
        last = torch.arange(len(groups)) * tokens.shape[1] + lengths - 1
        last = torch.cat((last, last[:1].expand(max(0, LEAST_ROWS - len(last)))))
        prompts = self.decoder.new_cache(*tokens.shape)
        logits_GV = self._logits(tokens, positions, segments, prompts, last)[: len(groups)]

        numbers = np.concatenate([np.array(group) for group in groups])
        group_of = torch.arange(len(groups)).repeat_interleave(torch.tensor([len(group) for group in groups]))
        self.texts.begin(numbers)
        goes_on = self._draw(numbers, logits_GV, group_of)
        rows = group_of[torch.from_numpy(goes_on)].to(self.device)
        self._cache.copy_rows(len(self._numbers), prompts, rows)
        self._numbers = np.concatenate((self._numbers, numbers[goes_on]))

    def _continue(self) -> None:
        """Draws the next token of each text, and drops the rows of texts that end."""
        count = len(self._numbers)
        tokens, positions = self.texts.newest(self._numbers)
        self._cache.longest = int(positions.max())
        unused = (0, max(0, LEAST_ROWS - count))  # rows that only fill the batch
        token_B1, position_B1 = (F.pad(torch.from_numpy(x), unused)[:, None] for x in (tokens, positions))
        logits_BV = self._logits(token_B1, position_B1, None, self._cache)[:count, -1]
        goes_on = self._draw(self._numbers, logits_BV, torch.arange(count))
        kept = int(goes_on.sum())
        holes, movers = np.flatnonzero(~goes_on[:kept]), kept + np.flatnonzero(goes_on[kept:])
        if len(movers):
            self._cache.move_rows(*(torch.from_numpy(x).to(self.device) for x in (movers, holes)))
            self._numbers[holes] = self._numbers[movers]
        self._numbers = self._numbers[:kept]

    def _logits(
        self,
        tokens_BS: torch.Tensor,
        positions_BS: torch.Tensor,
        segments_BS: torch.Tensor | None,
        cache: KVCache,
        wanted: torch.Tensor | None = None,
    ) -> torch.Tensor:
        on_device = (None if x is None else x.to(self.device) for x in (tokens_BS, positions_BS, segments_BS))
        tokens, positions, segments = on_device
        assert tokens is not None and positions is not None
        logits = self.decoder(tokens, positions, segments, cache, None if wanted is None else wanted.to(self.device))
        return logits.float()

    def _draw(self, numbers: np.ndarray, logits_GV: torch.Tensor, group_B: torch.Tensor) -> np.ndarray:
        """Adds a token to each text, drawn from the logits of its group; returns which of the texts go on."""
        token, logprob = draw(
            logits_GV,
            group_B.to(self.device),
            self.temperature,
            self.top_p,
            self.texts.uniforms(numbers).to(self.device),
        )
        both = torch.stack((token.double(), logprob.double())).cpu().numpy()  # one transfer
        return self.texts.add(numbers, both[0].astype(np.int64), both[1])


def draw(
    logits_GV: torch.Tensor, group_B: torch.Tensor, temperature: float, top_p: float, uniform_B: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draws tokens, the b-th from row `group_B[b]` of the logits, by inverting their cumulative distribution.

    The point `uniform_B` is found among the sums over blocks of tokens first, and then within its block. Temperature 0
    takes the most probable token. Returns the tokens [B] and their log-probabilities [B].
    """
    greatest_G = logits_GV.amax(-1, keepdim=True)
    weights_GV = logits_GV - greatest_G
    weights_GV = (weights_GV.div_(temperature) if temperature else weights_GV).exp_()
    total_G = weights_GV.sum(-1, dtype=torch.float64)
    if temperature == 0:
        token_B = logits_GV.argmax(-1)[group_B]
    else:
        kept_GV = _nucleus(weights_GV, top_p) if top_p < 1.0 else weights_GV
        token_B = _invert(kept_GV, group_B, uniform_B)
    chosen_B = logits_GV[group_B, token_B] - greatest_G[group_B, 0]
    return token_B, chosen_B.double() / (temperature or 1.0) - total_G.log()[group_B]


def _invert(weights_GV: torch.Tensor, group_B: torch.Tensor, uniform_B: torch.Tensor) -> torch.Tensor:
    """Returns for each point the first token [B] up to which the weights exceed that share of their sum."""
    blocks_GCW = F.pad(weights_GV, (0, -weights_GV.shape[1] % BLOCK)).unflatten(1, (-1, BLOCK))
    ends_BC = blocks_GCW.sum(-1).double().cumsum(-1)[group_B]
    point_B1 = uniform_B[:, None] * ends_BC[:, -1:]
    block_B1 = _first_beyond(ends_BC, point_B1)
    within_BW = blocks_GCW[group_B, block_B1[:, 0]].double().cumsum(-1)
    before_B1 = F.pad(ends_BC, (1, 0)).gather(1, block_B1)
    return (block_B1 * BLOCK + _first_beyond(within_BW, point_B1 - before_B1))[:, 0]


def _first_beyond(ends: torch.Tensor, point: torch.Tensor) -> torch.Tensor:
    """Returns the index of the first of the rising `ends` above the point; a point past the last is just below it."""
    below_last = ends[:, -1:] * (1 - 1e-12)
    return torch.searchsorted(ends, torch.minimum(point, below_last), right=True)


def _nucleus(weights_GV: torch.Tensor, top_p: float) -> torch.Tensor:
    """Sets the weights to 0 of all but the likeliest tokens that together reach the share `top_p`."""
    ordered, index = weights_GV.double().sort(-1, descending=True)
    sums = ordered.cumsum(-1)
    beyond = sums - ordered >= top_p * sums[:, -1:]  # the first token past the threshold stays
    return weights_GV.masked_fill(torch.zeros_like(beyond).scatter(1, index, beyond), 0.0)
