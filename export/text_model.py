"""A model in memory that continues texts: whole in one process, or split over the ranks that a launcher started.

It uses a GPU where there is one. Weights of a checkpoint of any layout are read; every rank reads all of them and keeps
its part. `trivium generate` and `trivium chat` are its command lines.
"""

from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from enum import StrEnum
from hashlib import sha256
from typing import Any

import torch

from configs.layout import Layout
from configs.loader import ConfigError
from configs.sampling import SamplingConfig
from configs.sampling_options import sampling_of
from configs.train import ParallelConfig, TrainSection
from export.model_source import ModelSource, open_source
from launch.environment import ClusterEnvironment
from pretrain.generation.sampling import SampledModel, generate
from pretrain.generation.text_codec import TextCodec
from pretrain.generation.text_stream import TextStream
from pretrain.model import build_single
from pretrain.parallel import groups
from pretrain.parallel.split_decoder import SplitDecoder

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
WAIT_MINUTES = 7 * 24 * 60.0  # the longest that ranks wait for a person to type


class Ending(StrEnum):
    """Why a text ended: a stop token, a stop string, as many tokens as were wanted, or the model's context."""

    STOP_TOKEN = "stop_token"
    STOP_STRING = "stop_string"
    LENGTH = "length"
    CONTEXT = "context"


@dataclass(frozen=True)
class TextOptions:
    """Options of continuing texts. `stops` are strings that end a text and are not part of it.

    At most `max_rows` texts are continued at once, which limits the memory that the cache takes.
    """

    sampling: SamplingConfig
    max_new_tokens: int
    seed: int = 0
    stops: tuple[str, ...] = ()
    max_rows: int = 32

    @classmethod
    def of(cls, args: Namespace, max_rows: int = 1) -> "TextOptions":
        """Returns the options of a command line."""
        return cls(sampling_of(args), args.max_new_tokens, args.seed, tuple(args.stop), max_rows)


@dataclass(frozen=True)
class Continuation:
    """The text that follows a prompt, and why it ended; `tokens` go to the one in which a stop token or string ends."""

    text: str
    tokens: list[int]
    ending: Ending


@dataclass(frozen=True)
class TextModel:
    """A decoder with its codec; `context` is its context length in tokens. `mesh` is None in a single process.

    All ranks of the mesh call the same functions with the same arguments.
    """

    decoder: SampledModel
    codec: TextCodec
    context: int
    mesh: groups.Mesh | None = None

    @property
    def is_main(self) -> bool:
        """Whether this is the process that reads and prints."""
        return self.mesh is None or self.mesh.is_main

    def of_main(self, value: Any) -> Any:
        """Returns the main process's value, of JSON's types, on all ranks."""
        return value if self.mesh is None else self.mesh.gather_json(value if self.is_main else None)[0]

    def room(self, prompt: Sequence[int]) -> int:
        """Returns the number of tokens that may follow a prompt. Raises ValueError if there are none."""
        if len(prompt) >= self.context:
            raise ValueError(f"its {len(prompt)} tokens fill the model's context of {self.context} tokens")
        return self.context - len(prompt)

    def continue_texts(
        self,
        prompts: Sequence[list[int]],
        options: TextOptions,
        keys: Sequence[str],
        show: Callable[[str], None] | None = None,
    ) -> list[Continuation]:
        """Continues prompts, each with the random numbers of its key, up to a stop, the wanted length or the context.

        `show` is called with each piece of the first text as soon as it is certain.
        """
        codec = self.codec
        limits = [min(options.max_new_tokens, self.room(prompt)) for prompt in prompts]
        streams = [TextStream(codec.decode, options.stops, prompt) for prompt in prompts]

        def watch(number: int, token: int) -> bool:
            piece = streams[number].push(token)
            if show is not None and number == 0 and piece:
                show(piece)
            return streams[number].stopped

        completions = generate(
            self.decoder,
            prompts,
            limits,
            options.sampling,
            options.seed,
            stop_ids=codec.stop_ids,
            keys=keys,
            pad_id=codec.pad_id,
            max_rows=options.max_rows,
            watch=watch,
        )
        found = []
        for number, (stream, completion, limit) in enumerate(zip(streams, completions, limits, strict=True)):
            rest = stream.finish()
            if show is not None and number == 0 and rest:
                show(rest)
            if stream.stopped:
                ending = Ending.STOP_STRING
            elif completion.stopped:
                ending = Ending.STOP_TOKEN
            else:
                ending = Ending.LENGTH if limit == options.max_new_tokens else Ending.CONTEXT
            found.append(Continuation(stream.text, completion.tokens, ending))
        return found


def keys_of(prompts: Iterable[Sequence[int]], seen: Counter[str]) -> list[str]:
    """Returns the keys of prompts' random numbers: a hash of the prompt, and how often it has come before.

    So a prompt's text depends on the seed, and neither on the prompts beside it nor on their order. `seen` counts from
    call to call.
    """
    keys = []
    for prompt in prompts:
        name = sha256(repr(list(prompt)).encode()).hexdigest()
        keys.append(f"{name}/{seen[name]}")
        seen[name] += 1
    return keys


@contextmanager
def loaded(source: str, step: str, parallel: ParallelConfig, precision: str) -> Iterator[TextModel]:
    """Context manager that loads a model in this process, or its part on this rank, and yields it as a TextModel.

    Raises ConfigError if there is none, it is damaged, or the ranks do not fit it.
    """
    with ExitStack() as stack:
        try:
            opened = open_source(source, step)
            opened.need_logits()
            codec = opened.codec()
            decoder, mesh = stack.enter_context(_built(opened, parallel, DTYPES[precision]))
        except ConfigError:
            raise
        except ValueError as error:  # a damaged checkpoint or another model's weights; the message names the file
            raise ConfigError(str(error)) from None
        yield TextModel(decoder, codec, opened.context, mesh)


@contextmanager
def _built(
    opened: ModelSource, parallel: ParallelConfig, dtype: torch.dtype
) -> Iterator[tuple[SampledModel, groups.Mesh | None]]:
    env = ClusterEnvironment.read()
    layout = _layout(env.world_size, parallel, opened)
    if layout.world_size == 1:
        device = groups.device_of(env.local_rank, torch.cuda.device_count())
        yield build_single(opened.model, opened.read(), dtype, opened.adapter).to(device), None
        return
    mesh = groups.start(env, layout, parallel.backend, timeout_minutes=WAIT_MINUTES)
    try:
        yield SplitDecoder(opened.model, opened.read(), mesh, dtype, opened.adapter), mesh
    finally:
        groups.stop()


def _layout(world_size: int, parallel: ParallelConfig, opened: ModelSource) -> Layout:
    """Returns the layout of generation. Raises ConfigError if it does not fit the model or leaves ranks idle."""
    wanted = parallel.tp * parallel.ep
    if world_size == 1 < wanted:
        raise ConfigError(
            f"parallel.tp * parallel.ep = {parallel.tp} * {parallel.ep} splits the model over {wanted} ranks, and this "
            f"is one process; start `torchrun --nproc-per-node {wanted} -m export.generate` (or export.chat) with the "
            "same arguments, or leave the keys out"
        )
    train = TrainSection(steps=1, global_batch_size=world_size, micro_batch_size=1, seq_length=max(2, opened.context))
    given = ("train.global_batch_size", "train.micro_batch_size", "train.seq_length", "parallel.cp", "parallel.pp")
    layout = Layout.of(world_size, parallel, opened.model, train, given=given)
    if layout.dp != layout.ep:
        remedy, tp = f"start {wanted}", world_size // layout.ep
        with suppress(ConfigError):
            Layout.of(world_size, parallel.model_copy(update={"tp": tp}), opened.model, train, given=given)
            remedy += f", or set parallel.tp={tp}"
        raise ConfigError(
            f"parallel.tp * parallel.ep = {layout.tp} * {layout.ep} is not the {world_size} ranks that were started; "
            f"{remedy}"
        )
    return layout
