"""Choices of routers on their way from sampled texts into training rows, and those that no model could have made."""

import numpy as np
import pytest
import torch

from configs.loader import ConfigError
from configs.model import ModelConfig
from configs.moe import MoEConfig
from data_pipeline.tokens.tokenizer import Tokenizer
from posttrain.chat.chat_format import ChatFormat
from posttrain.rl.rollout import Rollout, sample
from posttrain.rl.rollout_rows import check_experts, rollout_rows
from posttrain.rl.text_sampler import DecoderSampler
from posttrain.tasks.verifiable_tasks import SortTask
from pretrain.data.batch_source import collate
from pretrain.model import Decoder
from pretrain.model.context import ForwardContext
from tests.tiny_models import wide_decoder

TASK = SortTask(3, max_new_tokens=6)


@pytest.fixture(scope="module")
def decoder(tokenizer: Tokenizer) -> Decoder:
    return wide_decoder(
        tokenizer.vocab_size, MoEConfig(num_experts=8, top_k=2, ffn_hidden_size=24, bias_update_rate=0.01)
    )


@pytest.fixture(scope="module")
def rollout(decoder: Decoder, chat: ChatFormat) -> Rollout:
    return sample(DecoderSampler(decoder), TASK, chat, 0.7, 9, range(8), 4, 32, keep_experts=True)


@torch.no_grad()
def logprobs(decoder: Decoder, rollout: Rollout, replays: bool) -> torch.Tensor:
    """Returns the log-probabilities of all sampled tokens, as a trainer computes them."""
    batch = collate(rollout_rows(rollout, range(len(rollout)), replays_experts=replays))
    context = ForwardContext.of_batch(decoder.model_config, batch)
    logits = decoder(batch.tokens, batch.positions, context=context, wanted=batch.trained) / 0.7
    return logits.log_softmax(-1).gather(1, batch.labels.flatten()[batch.trained][:, None])[:, 0]


def test_choices_that_change_leave_the_samplers_log_probabilities(decoder: Decoder, rollout: Rollout) -> None:
    """Biases the choice of experts and nothing else: with the sampler's experts, log-probabilities stay."""
    sampled = torch.from_numpy(rollout.rollout_logprobs[rollout.mask])
    for replays in (True, False):
        torch.testing.assert_close(logprobs(decoder, rollout, replays), sampled, atol=1e-5, rtol=0)
    biases = [tensor for name, tensor in decoder.named_balance().items() if name.endswith(".bias")]
    torch.manual_seed(0)
    for bias in biases:
        bias.normal_()
    replayed, chosen = (logprobs(decoder, rollout, replays) for replays in (True, False))
    for bias in biases:
        bias.zero_()
    torch.testing.assert_close(replayed, sampled, atol=1e-5, rtol=0)
    assert float((chosen - sampled).abs().max()) > 0.1


def test_choices_go_up_to_the_last_input_and_padding_has_none(rollout: Rollout) -> None:
    assert rollout.experts.shape == (8, 32, 2, 2)
    for experts, length in zip(rollout.experts, rollout.lengths, strict=True):
        assert (experts[:length] >= 0).all() and (experts[length:] == -1).all()
    (row, *_) = rollout_rows(rollout, [3])
    assert row.experts is None  # as a reference or a critic, whose routers are others, gets it


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_layers": 3}, "in 2 layers, and the model chooses 2 of 8 in 3"),
        ({"moe": MoEConfig(num_experts=8, top_k=1)}, "choices of 2 of .* and the model chooses 1 of 8"),
        ({"moe": MoEConfig(num_experts=4, top_k=2)}, "at least 8 experts .* chooses 2 of 4"),
        ({"moe": None}, r"chooses 0 of 0 in 0; set rl\.replay_experts=false"),
    ],
)
def test_choices_of_another_model_are_refused(
    decoder: Decoder, rollout: Rollout, change: dict[str, object], words: str
) -> None:
    check_experts(rollout.experts, 0, decoder.model_config)
    other = decoder.model_config.model_copy(update=change)
    with pytest.raises(ConfigError, match=words):
        check_experts(np.asarray(rollout.experts), 0, ModelConfig.model_validate(other.model_dump()))
