"""The interface of what continues prompts during training, and Trivium's own sampler behind it.

The other implementation is `posttrain.rl.vllm_sampler`. Scores, records and checks of rollouts know the interface only.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from configs.sampling import SamplingConfig
from pretrain.generation.expert_choices import choices_shape
from pretrain.generation.sampling import Completion, SampledModel, generate


class TextSampler(Protocol):
    """Continues prompts with the weights that it was given last."""

    @property
    def choices(self) -> tuple[int, int]:
        """(L, k): the layers whose routers' choices it can keep, and the choices of each; (0, 0) if there are none."""
        ...

    def continued(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        sampling: SamplingConfig,
        seed: int,
        stop_ids: Sequence[int],
        keys: Sequence[str],
        keep_experts: bool = False,
    ) -> list[Completion]:
        """Returns a completion of each prompt, whose random numbers depend on `seed` and the prompt's key alone.

        Log-probabilities are those of the distribution that a token was drawn from, at temperature 0 at temperature 1.
        """
        ...


@dataclass(frozen=True)
class DecoderSampler:
    """Trivium's own sampler, `pretrain.generation.sampling`, in the process of the trainer."""

    decoder: SampledModel

    @property
    def choices(self) -> tuple[int, int]:
        return choices_shape(self.decoder)

    def continued(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        sampling: SamplingConfig,
        seed: int,
        stop_ids: Sequence[int],
        keys: Sequence[str],
        keep_experts: bool = False,
    ) -> list[Completion]:
        return generate(
            self.decoder,
            prompts,
            max_new_tokens,
            sampling,
            seed,
            stop_ids=stop_ids,
            keys=keys,
            keep_experts=keep_experts,
        )
