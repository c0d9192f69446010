"""Autoregressive sampling with a key-value cache, on one rank, or on all ranks that split a model.

Each prompt has its own random generator, seeded by (seed, its index or the given key). Its text does not depend on the
prompts beside it: see `pretrain.model.kv_cache`, and `LEAST_ROWS` here. (Exactly so for a dense model in fp32; where
kernels choose another order of summation for other shapes, a draw may fall on the other side of a rounding.) Prompts
that stand next to one another and are equal are computed once. Ranks that split a model all call `generate` with the
same arguments, see `pretrain.parallel.split_decoder`. Beam search and serving are left out.
"""

import hashlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F

from configs.sampling import SamplingConfig
from pretrain.generation.expert_choices import RouterLog
from pretrain.generation.logits_filters import processed
from pretrain.model.kv_cache import KVCache, whole_slots
from pretrain.model.moe.router import Router

ROWS = 256  # texts continued at once, which limits the key-value cache
LEAST_ROWS = 8  # a matrix product with fewer rows takes a kernel that sums in another order
BLOCK = 64  # neighbouring tokens whose probabilities are summed before they are looked at one by one

# Called with the number of a text and its newest token, unless that is a stop token; True ends the text.
Watcher = Callable[[int, int], bool]


class SampledModel(Protocol):
    """A decoder that gives logits of the whole vocabulary: `pretrain.model.Decoder`, or a `SplitDecoder`."""

    def __call__(
        self,
        tokens_BS: torch.Tensor,
        positions_BS: torch.Tensor,
        segments_BS: torch.Tensor | None,
        cache: KVCache | None,
        wanted: torch.Tensor | None,
        /,
    ) -> torch.Tensor: ...

    def new_cache(self, rows: int, max_length: int) -> KVCache: ...

    def parameters(self) -> Iterator[torch.nn.Parameter]: ...

    @property
    def routers(self) -> list[Router]: ...


@dataclass
class Completion:
    """Sampled continuation of a prompt: its tokens and the log-probability of each.

    `stopped` is whether a stop token came, which is then the last of `tokens`, or a watcher ended the text. `experts`
    [P, layers, k], if they were kept, are those that routers chose for the first P tokens of prompt and continuation:
    all but the last, which no pass took in.
    """

    tokens: list[int]
    logprobs: list[float]
    stopped: bool
    experts: np.ndarray | None = None


def generate(
    decoder: SampledModel,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int | Sequence[int],
    sampling: SamplingConfig = SamplingConfig(),  # noqa: B008 (it is frozen)
    seed: int = 0,
    stop_ids: Sequence[int] = (),
    keys: Sequence[str] | None = None,
    pad_id: int = 0,
    max_rows: int = ROWS,
    watch: Watcher | None = None,
    keep_experts: bool = False,
) -> list[Completion]:
    """Samples a continuation of every prompt; `max_new_tokens` is one limit, at least 1, or one for each prompt.

    Log-probabilities are those of the distribution that a token was drawn from, or at temperature 0 of that at
    temperature 1. At most `max_rows` texts are continued at a time; when some end, others begin. `keep_experts` keeps
    the experts that a mixture's routers choose. Raises ValueError if a prompt is empty.
    """
    if not prompts or any(len(prompt) == 0 for prompt in prompts):
        raise ValueError("a prompt has no tokens; give at least the beginning-of-text token")
    texts = _Texts(prompts, max_new_tokens, seed, stop_ids, keys, watch)
    waiting = texts.groups(max_rows)
    sampler = _Sampler(decoder, texts, sampling, pad_id, min(max_rows, len(prompts)))
    if not keep_experts:
        return sampler.run(waiting)
    with RouterLog(decoder.routers) as sampler.log:
        return sampler.run(waiting)


class _Texts:
    """State of all texts, kept on the host: prompts, random numbers, and the tokens drawn so far."""

    def __init__(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int | Sequence[int],
        seed: int,
        stop_ids: Sequence[int],
        keys: Sequence[str] | None,
        watch: Watcher | None,
    ):
        count = len(prompts)
        self.prompts, self.stop_ids, self._watch = prompts, np.array(list(stop_ids), dtype=np.int64), watch
        self.lengths = np.array([len(prompt) for prompt in prompts])  # of the prompts
        self._limits = np.broadcast_to(np.asarray(max_new_tokens), (count,))
        self.longest = int((self.lengths + self._limits).max())
        most = int(self._limits.max())
        self._names = [f"{seed}/{keys[i] if keys else i}" for i in range(count)]
        self._uniforms = np.empty((count, most))
        # Each row is a prompt and what was drawn; the rest of it repeats the prompt's first token.
        self._tokens = np.empty((count, self.longest), dtype=np.int64)
        for row, prompt in zip(self._tokens, prompts, strict=True):
            row[: len(prompt)], row[len(prompt) :] = prompt, prompt[0]
        self._logprobs = np.empty((count, most))
        self._drawn = np.zeros(count, dtype=np.int64)
        self._stopped = np.zeros(count, dtype=bool)
        self._experts: np.ndarray | None = None

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
        last = self.lengths[numbers] + self._drawn[numbers] - 1
        return self._tokens[numbers, last], last

    def so_far(self, numbers: np.ndarray) -> torch.Tensor:
        """Returns prompts and drawn tokens [B, L] of texts; shorter ones are filled up with their first token."""
        length = int((self.lengths[numbers] + self._drawn[numbers]).max())
        return torch.from_numpy(self._tokens[numbers, :length])

    def add(self, numbers: np.ndarray, tokens: np.ndarray, logprobs: np.ndarray) -> np.ndarray:
        """Adds a token to each text; returns which of the texts go on [B]."""
        at = self._drawn[numbers]
        self._tokens[numbers, self.lengths[numbers] + at], self._logprobs[numbers, at] = tokens, logprobs
        self._drawn[numbers] += 1
        stopped = np.isin(tokens, self.stop_ids)
        if self._watch is not None:
            for i in np.flatnonzero(~stopped):
                stopped[i] = self._watch(int(numbers[i]), int(tokens[i]))
        self._stopped[numbers] = stopped
        return ~stopped & (at + 1 < self._limits[numbers])

    def keep_experts(self, numbers: np.ndarray, first: np.ndarray | int, experts_BPLK: np.ndarray) -> None:
        """Keeps the choices of routers for P tokens of each text, from position `first` on."""
        if self._experts is None:
            shape = len(self.prompts), self.longest, *experts_BPLK.shape[2:]
            self._experts = np.full(shape, -1, experts_BPLK.dtype)
        positions = np.reshape(first, (-1, 1)) + np.arange(experts_BPLK.shape[1])
        self._experts[numbers[:, None], positions] = experts_BPLK

    def completions(self) -> list[Completion]:
        found = []
        for i, (prompt, n) in enumerate(zip(self.lengths, self._drawn, strict=True)):
            tokens, logprobs = self._tokens[i, prompt : prompt + n].tolist(), self._logprobs[i, :n].tolist()
            experts = None if self._experts is None else self._experts[i, : prompt + n - 1]
            found.append(Completion(tokens, logprobs, bool(self._stopped[i]), experts))
        return found


class _Sampler:
    """Continues texts, each in a row of the cache. `_numbers` has the text of each row in use, which are the first."""

    def __init__(
        self, decoder: SampledModel, texts: _Texts, sampling: SamplingConfig, pad_id: int, max_rows: int
    ) -> None:
        self.decoder, self.texts, self.sampling, self.pad_id = decoder, texts, sampling, pad_id
        self.max_rows = max_rows
        self.device = next(decoder.parameters()).device
        self._numbers = np.zeros(0, dtype=np.int64)
        self.log: RouterLog | None = None

    @torch.inference_mode()
    def run(self, waiting: deque[range]) -> list[Completion]:
        """Samples all texts, in the order of `waiting`."""
        self._cache = self.decoder.new_cache(max(self.max_rows, LEAST_ROWS), self.texts.longest)
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
        slots = torch.arange(tokens.shape[1]).expand_as(tokens)
        positions = torch.minimum(slots, lengths[:, None] - 1)  # padding has none past the model's context
        segments = torch.where(slots < lengths[:, None], 0, -1)
        last = torch.arange(len(groups)) * tokens.shape[1] + lengths - 1
        last = torch.cat((last, last[:1].expand(max(0, LEAST_ROWS - len(last)))))
        prompts = self.decoder.new_cache(*tokens.shape)
        logits_GV = self._logits(tokens, positions, segments, prompts, last)[: len(groups)]

        numbers = np.concatenate([np.array(group) for group in groups])
        group_of = torch.arange(len(groups)).repeat_interleave(torch.tensor([len(group) for group in groups]))
        if self.log is not None:
            experts = self.log.taken(tokens.shape)
            for row, group in enumerate(groups):
                self.texts.keep_experts(np.array(group), 0, experts[row, None, : lengths[row]])
        self.texts.begin(numbers)
        goes_on = self._draw(numbers, logits_GV, group_of)
        rows = group_of[torch.from_numpy(goes_on)]
        self._cache.copy_rows(len(self._numbers), prompts, rows.to(self.device), lengths[rows])
        self._numbers = np.concatenate((self._numbers, numbers[goes_on]))

    def _continue(self) -> None:
        """Draws the next token of each text, and drops the rows of texts that end."""
        count = len(self._numbers)
        tokens, positions = self.texts.newest(self._numbers)
        self._cache.longest = int(positions.max())
        unused = (0, max(0, LEAST_ROWS - count))  # rows that only fill the batch
        token_B1, position_B1 = (F.pad(torch.from_numpy(x), unused)[:, None] for x in (tokens, positions))
        logits_BV = self._logits(token_B1, position_B1, None, self._cache)[:count, -1]
        if self.log is not None:
            self.texts.keep_experts(self._numbers, positions, self.log.taken(token_B1.shape)[:count])
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
        ids_GL = None
        if self.sampling.repetition_penalty != 1:
            heads = numbers[np.unique(group_B.numpy(), return_index=True)[1]]  # the texts of a group are the same yet
            ids_GL = self.texts.so_far(heads).to(self.device)
        uniform_B = self.texts.uniforms(numbers).to(self.device)
        token, logprob = draw(logits_GV, group_B.to(self.device), self.sampling, uniform_B, ids_GL)
        both = torch.stack((token.double(), logprob.double())).cpu().numpy()  # one transfer
        return self.texts.add(numbers, both[0].astype(np.int64), both[1])


def draw(
    logits_GV: torch.Tensor,
    group_B: torch.Tensor,
    sampling: SamplingConfig,
    uniform_B: torch.Tensor,
    ids_GL: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draws tokens, the b-th from row `group_B[b]` of the logits, by inverting their cumulative distribution.

    The point `uniform_B` is found among the sums over blocks of tokens first, and then within its block. Temperature 0
    takes the most probable token. `ids_GL` are the texts so far, for a repetition penalty. Returns the tokens [B] and
    their log-probabilities [B].
    """
    scores_GV = processed(logits_GV, sampling, ids_GL)
    weights_GV = scores_GV.softmax(-1)  # in one pass; what its sum misses, as all is fp32, is made good by `ends_GC`
    padding = -weights_GV.shape[1] % BLOCK
    blocks_GCW = (F.pad(weights_GV, (0, padding)) if padding else weights_GV).unflatten(1, (-1, BLOCK))
    ends_GC = blocks_GCW.sum(-1).double().cumsum(-1)
    if sampling.temperature == 0:
        token_B = scores_GV.argmax(-1)[group_B]
    else:
        token_B = _invert(blocks_GCW, ends_GC, group_B, uniform_B)
    chosen_B = weights_GV[group_B, token_B].double()
    return token_B, (chosen_B / ends_GC[group_B, -1]).log_()


def _invert(
    blocks_GCW: torch.Tensor, ends_GC: torch.Tensor, group_B: torch.Tensor, uniform_B: torch.Tensor
) -> torch.Tensor:
    """Returns for each point the first token [B] up to which the weights exceed that share of their sum.

    The weights are in blocks, and `ends_GC` are their sums up to the end of each.
    """
    ends_BC = ends_GC[group_B]
    point_B1 = uniform_B[:, None] * ends_BC[:, -1:]
    block_B1 = _first_beyond(ends_BC, point_B1)
    within_BW = blocks_GCW[group_B, block_B1[:, 0]].double().cumsum(-1)
    before_B1 = F.pad(ends_BC, (1, 0)).gather(1, block_B1)
    return (block_B1 * BLOCK + _first_beyond(within_BW, point_B1 - before_B1))[:, 0]


def _first_beyond(ends: torch.Tensor, point: torch.Tensor) -> torch.Tensor:
    """Returns the index of the first of the rising `ends` above the point; a point past the last is just below it."""
    below_last = ends[:, -1:] * (1 - 1e-12)
    return torch.searchsorted(ends, torch.minimum(point, below_last), right=True)
