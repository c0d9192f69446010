"""The model that writes completions: on every rank a whole one, or over the ranks of tp and ep its slices.

Groups of ranks that hold one model share the completions of a part. The random numbers of a completion are keyed by the
seed, a hash of its prompt and its number, so ranks, parts and batches do not change a text.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from configs.layout import Layout
from configs.loader import ConfigError
from configs.model import ModelConfig
from configs.sample import SampleConfig
from configs.sampling import SamplingConfig
from configs.train import TrainSection
from launch.environment import ClusterEnvironment
from posttrain.chat.format_interface import Chat
from posttrain.initial_chat_model import InitialChatModel
from posttrain.rejection.prompts import Prompt, Prompts
from posttrain.rejection.samples import DrawnSample
from posttrain.rejection.text_measures import repeated_share
from posttrain.rl.rollout import judge
from pretrain.generation.sampling import SampledModel, generate
from pretrain.model import Decoder, LayerContext
from pretrain.model.adapters import add_adapters
from pretrain.model.initial_weights import load_weights
from pretrain.parallel import groups
from pretrain.parallel.groups import Mesh
from pretrain.parallel.rank_messages import gather_json
from pretrain.parallel.split_decoder import SplitDecoder
from pretrain.precision import choose_dtype
from pretrain.run.initial_model import initial_weights


def layout_of(config: SampleConfig, model: ModelConfig, world_size: int) -> Layout:
    """Returns the layout of sampling. Raises ConfigError if the ranks do not fit it."""
    replicas = max(1, world_size // config.parallel.tp)
    train = TrainSection(steps=1, global_batch_size=replicas, micro_batch_size=1, seq_length=2)
    given = ("train.global_batch_size", "train.micro_batch_size", "train.seq_length", "parallel.cp", "parallel.pp")
    return Layout.of(world_size, config.parallel, model, train, given=given)


@dataclass(frozen=True)
class Writer:
    """A model in memory with its chat format; all ranks of `mesh` call its methods together."""

    decoder: SampledModel
    chat: Chat
    mesh: Mesh

    def samples(self, config: SampleConfig, prompts: Prompts, part: range) -> list[DrawnSample]:
        """Samples and scores the completions of the prompts `part`. The main rank gets all, the others an empty list.

        Collective.
        """
        count, layout = config.sample.completions, self.mesh.layout
        numbers = range(part.start * count, part.stop * count)
        writers = layout.world_size // (layout.tp * layout.ep)
        writer, leads = self.mesh.dp_rank // layout.ep, self.mesh.tp_rank == self.mesh.ep_rank == 0
        own = numbers[len(numbers) * writer // writers : len(numbers) * (writer + 1) // writers]
        found = self._written(config, prompts, own, scores=leads)
        gathered = gather_json([vars(sample) for sample in found] if leads else [], everywhere=False)
        everything = [DrawnSample(**sample) for samples in gathered for sample in samples]
        return sorted(everything, key=lambda sample: (sample.prompt, sample.number))

    def _written(self, config: SampleConfig, prompts: Prompts, numbers: range, scores: bool) -> list[DrawnSample]:
        """Returns the samples `numbers`: completion i % completions of prompt i // completions."""
        if not numbers:
            return []
        options, task, chat = config.sample, prompts.task, self.chat
        chosen = [(prompts.items[i // options.completions], i % options.completions) for i in numbers]
        completions = generate(
            self.decoder,
            [prompt.tokens for prompt, _ in chosen],
            task.max_new_tokens,
            SamplingConfig(
                temperature=options.temperature, top_k=options.top_k, top_p=options.top_p, min_p=options.min_p
            ),
            config.run.seed,
            stop_ids=chat.stop_ids,
            keys=[f"sample/{prompt.key}/{number}" for prompt, number in chosen],
            max_rows=options.batch_size,
        )
        if not scores:
            return []
        judged = judge(task, chat, [prompt.problem for prompt, _ in chosen], completions)
        return [
            DrawnSample(
                prompt.number,
                prompt.problem.id,
                number,
                chat.decode_answer(completion.tokens),
                len(completion.tokens),
                completion.stopped,
                round(repeated_share(completion.tokens), 6),
                score.value,
                score.reason,
                dict(score.parts),
            )
            for (prompt, number), completion, score in zip(chosen, completions, judged, strict=True)
        ]


@contextmanager
def opened_writer(
    config: SampleConfig, initial: InitialChatModel, env: ClusterEnvironment, layout: Layout
) -> Iterator[Writer]:
    """Context manager that joins the ranks and loads the model. Raises ConfigError if its weights are damaged."""
    with groups.joined(env, layout, config.parallel.backend) as mesh:
        dtype = choose_dtype(config.sample.precision, mesh.device)
        try:
            decoder = _decoder(initial, mesh, dtype)
        except ConfigError:
            raise
        except ValueError as error:  # a damaged checkpoint; the message names the file
            raise ConfigError(str(error)) from None
        yield Writer(decoder, initial.chat, mesh)


def _decoder(initial: InitialChatModel, mesh: Mesh, dtype: torch.dtype) -> SampledModel:
    with initial_weights(initial.pin) as tensors:
        weights = {name: tensors.read(name).float() for name in tensors.shapes} | tensors.balance
        adapter = tensors.adapter
    if mesh.layout.tp * mesh.layout.ep > 1:
        return SplitDecoder(initial.model, weights, mesh, dtype, adapter)
    context = LayerContext(dtype=dtype, device=mesh.device)
    decoder = Decoder(initial.model, context=context)
    if adapter is not None:  # of a kind that cannot be merged into the weights
        add_adapters(decoder, adapter, context)
    # The load of experts, which has no part in what a model computes, is in checkpoints alone.
    load_weights(decoder, {**decoder.named_balance(), **weights})
    return decoder.eval()


def said_of(prompts: Sequence[Prompt], completions: int) -> str:
    """Returns a phrase that says how many samples there will be."""
    return f"{len(prompts) * completions:,} samples, {completions} of each of {len(prompts):,} prompts"
