"""Log-likelihoods in batches against one forward pass for each text, and windows of texts longer than the context."""

import pytest
import torch

from configs.loader import validate
from configs.sampling import GREEDY
from configs.train import ModelConfig
from pretrain.evaluation.likelihood import likelihoods, windows
from pretrain.generation.sampling import generate
from pretrain.model import Decoder, init_weights
from tests.parallel.matrix import MODELS

MAX = 16


@pytest.fixture(scope="module", params=["dense", "deepseek"])
def decoder(request: pytest.FixtureRequest) -> Decoder:
    decoder = Decoder(validate(ModelConfig, MODELS[request.param]))
    init_weights(decoder, seed=3)
    return decoder.eval()


def alone(decoder: Decoder, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    """Returns the log-likelihood by a forward pass of this one text, and whether each token is the likeliest."""
    whole = torch.tensor([context + continuation])
    with torch.inference_mode():
        logits = decoder(whole[:, :-1], torch.arange(whole.shape[1] - 1)[None])[0, len(context) - 1 :]
    wanted = torch.tensor(continuation)
    chosen = logits.double().log_softmax(-1).gather(1, wanted[:, None])
    return float(chosen.sum()), bool((logits.argmax(-1) == wanted).all())


@pytest.mark.parametrize("batch_tokens", [1, 40, 4096])
def test_batches_of_all_sizes_give_what_each_text_gives_alone(decoder: Decoder, batch_tokens: int) -> None:
    draw = torch.Generator().manual_seed(1)

    def ids(count: int) -> list[int]:
        return torch.randint(0, 64, (count,), generator=draw).tolist()

    question = ids(7)
    pairs = [(ids(n), ids(m)) for n in (1, 3, 8) for m in (1, 2, 8)]
    pairs += [(question, [answer]) for answer in (5, 6, 7)]  # the model reads the same, and so only once
    pairs += [(question[:5], [*question[5:], 9]), (question, [])]
    found = likelihoods(decoder, pairs, MAX, batch_tokens)
    for (context, continuation), one in zip(pairs[:-1], found[:-1], strict=True):
        logprob, is_greedy = alone(decoder, context, continuation)
        assert one.logprob == pytest.approx(logprob, abs=1e-5) and one.is_greedy == is_greedy
    assert (found[-1].logprob, found[-1].is_greedy) == (0.0, True)


def test_what_greedy_decoding_writes_is_greedy(decoder: Decoder) -> None:
    (written,) = generate(decoder, [[1, 2, 3]], 6, GREEDY)
    other = [*written.tokens[:3], (written.tokens[3] + 1) % 64, *written.tokens[4:]]
    found = likelihoods(decoder, [([1, 2, 3], written.tokens), ([1, 2, 3], other)], MAX)
    assert [one.is_greedy for one in found] == [True, False]
    assert found[0].logprob == pytest.approx(sum(written.logprobs), abs=1e-5)


def test_a_long_context_loses_its_beginning(decoder: Decoder) -> None:
    context, continuation = list(range(40)), [50, 51, 52]
    (found,) = likelihoods(decoder, [(context, continuation)], MAX)
    assert found.logprob == pytest.approx(alone(decoder, context[-14:], continuation)[0], abs=1e-5)
    (fits,) = likelihoods(decoder, [(context[:14], continuation)], MAX)
    assert fits.logprob == pytest.approx(alone(decoder, context[:14], continuation)[0], abs=1e-5)


def test_a_long_continuation_is_predicted_window_by_window(decoder: Decoder) -> None:
    """Follows the example of lm-evaluation-harness: the last window is filled up with earlier tokens."""
    assert list(windows(["BOS"], list(range(10)), 4)) == [  # type: ignore[list-item]
        (["BOS", 0, 1, 2], [0, 1, 2, 3]),
        ([3, 4, 5, 6], [4, 5, 6, 7]),
        ([5, 6, 7, 8], [8, 9]),
    ]
    text = [(7 * i) % 64 for i in range(2 * MAX + 3)]
    (found,) = likelihoods(decoder, [([1], text)], MAX)
    parts = [alone(decoder, [1], text[:MAX]), alone(decoder, text[MAX - 1 : MAX], text[MAX : 2 * MAX])]
    parts.append(alone(decoder, text[2 * MAX + 2 - MAX : 2 * MAX], text[2 * MAX :]))
    assert found.logprob == pytest.approx(sum(logprob for logprob, _ in parts), abs=1e-4)


def test_an_empty_context_is_refused(decoder: Decoder) -> None:
    with pytest.raises(ValueError, match=r"a context has no tokens; begin it with the beginning-of-text"):
        likelihoods(decoder, [([], [1])], MAX)
