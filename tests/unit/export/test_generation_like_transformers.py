"""Generation against transformers' own `generate`, on tiny models that transformers made and Trivium imported."""

import itertools
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import BPE
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedTokenizerFast,
)

from configs.sampling import GREEDY, SamplingConfig
from export import import_hf
from export.model_source import open_source
from pretrain.generation.logits_filters import processed
from pretrain.generation.sampling import generate
from pretrain.generation.text_stream import TextStream
from pretrain.model import Decoder, build_single

VOCABULARY, PAD = 211, 0
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=4, sliding_window=None)),
}
PROMPTS = [[1, 30, 31, 30], [1, 40, 41, 42, 43, 44, 45, 46, 47], [1]]


@pytest.fixture(scope="module", params=MODELS)
def pair(request, tmp_path_factory) -> tuple[torch.nn.Module, Decoder]:
    folder: Path = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    theirs = MODELS[request.param]().eval()
    theirs.save_pretrained(folder / "hf")
    assert import_hf.main([str(folder / "hf"), str(folder / "ours")]) == 0
    opened = open_source(folder / "ours")
    return theirs, build_single(opened.model, opened.read())


def padded() -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the prompts, padded on the left as transformers wants them, and their mask."""
    longest = max(map(len, PROMPTS))
    tokens = torch.tensor([[PAD] * (longest - len(prompt)) + prompt for prompt in PROMPTS])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in PROMPTS])
    return tokens, mask


def of_transformers(model, **options) -> tuple[list[list[int]], list[torch.Tensor]]:
    """Returns new tokens of each prompt up to the end token, and the processed logits [B, V] of each step."""
    tokens, mask = padded()
    settings = GenerationConfig(
        pad_token_id=PAD, eos_token_id=2, return_dict_in_generate=True, output_scores=True, **options
    )
    out = model.generate(tokens, attention_mask=mask, generation_config=settings)
    new = out.sequences[:, tokens.shape[1] :].tolist()
    return [ids[: ids.index(2) + 1] if 2 in ids else ids for ids in new], list(out.scores)


@pytest.mark.parametrize("penalty", [1.0, 1.3, 0.8])
def test_greedy_tokens_are_the_same(pair, penalty) -> None:
    theirs, _ = of_transformers(pair[0], max_new_tokens=40, do_sample=False, repetition_penalty=penalty)
    sampling = SamplingConfig(repetition_penalty=penalty, temperature=0.0)
    for max_rows in (8, 1):
        ours = generate(pair[1], PROMPTS, 40, sampling, stop_ids=[2], pad_id=PAD, max_rows=max_rows)
        assert [completion.tokens for completion in ours] == theirs
    assert len({tuple(ids) for ids in theirs}) == 3 and max(map(len, theirs)) == 40


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.7, "top_k": 0},
        {"temperature": 1.4, "top_k": 12},
        {"top_k": 0, "top_p": 0.7},
        {"top_k": 0, "min_p": 0.1},
        {"repetition_penalty": 1.4, "temperature": 1.3, "top_k": 60, "top_p": 0.9, "min_p": 0.02},
    ],
    ids=lambda options: "-".join(options),
)
@torch.inference_mode()
def test_tokens_are_drawn_from_the_same_distributions(pair, options) -> None:
    """Follows texts that transformers samples, and compares the distributions at each of their tokens."""
    torch.manual_seed(1)
    texts, scores = of_transformers(pair[0], max_new_tokens=10, do_sample=True, **options)
    sampling = SamplingConfig(**options)
    kept = []
    for row, (prompt, text) in enumerate(zip(PROMPTS, texts, strict=True)):
        ids = torch.tensor([prompt + text])
        logits = pair[1](ids, torch.arange(ids.shape[1])[None])[0]
        for step in range(len(text)):
            end = len(prompt) + step
            ours = processed(logits[end - 1 : end], sampling, ids[:, :end])[0]
            kept.append(int(ours.isfinite().sum()))
            torch.testing.assert_close(ours.softmax(-1), scores[step][row].softmax(-1), rtol=0, atol=2e-5)
    are_filtered = bool(options["top_k"] or options.keys() & {"top_p", "min_p"})
    assert len(kept) > 15 and (min(kept) < VOCABULARY) == are_filtered


def test_sampled_tokens_are_those_that_transformers_may_sample(pair) -> None:
    """Draws many first tokens, and compares how often each comes with the distribution of transformers."""
    options = {"temperature": 1.5, "top_k": 9, "min_p": 0.02}
    _, scores = of_transformers(pair[0], max_new_tokens=1, do_sample=True, **options)
    count = 3000
    drawn = generate(pair[1], [PROMPTS[1]] * count, 1, SamplingConfig(**options), seed=3)
    shares = torch.bincount(torch.tensor([one.tokens[0] for one in drawn]), minlength=VOCABULARY) / count
    expected = scores[0][1].softmax(-1)
    assert set(shares.nonzero().flatten().tolist()) <= set(expected.nonzero().flatten().tolist())
    # Each share has a standard deviation of at most sqrt(0.25 / 3000) = 0.009.
    assert (shares - expected).abs().max() < 0.04


def test_stop_strings_end_texts_at_the_same_tokens(pair) -> None:
    """Takes stop strings of 1 to 6 characters from a greedy text, wherever its tokens begin and end."""
    letters = ["".join(some) for n in (1, 2, 3) for some in itertools.product("abcdef", repeat=n)]
    pieces = ["<pad>", "<s>", "</s>", *letters[: VOCABULARY - 3]]
    backend = Tokenizer(BPE({piece: i for i, piece in enumerate(pieces)}, []))
    backend.decoder = Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", pad_token="<pad>")
    prompt = PROMPTS[0]

    def decode(ids: list[int]) -> str:
        return "".join(pieces[i] for i in ids if i > 2)

    def ours(*stops: str) -> list[int]:
        stream = TextStream(decode, stops, prompt)

        def watch(_: int, token: int) -> bool:
            stream.push(token)
            return stream.stopped

        return generate(pair[1], [prompt], 30, GREEDY, stop_ids=[2], watch=watch)[0].tokens

    def theirs(*stops: str) -> list[int]:
        settings = GenerationConfig(max_new_tokens=30, do_sample=False, eos_token_id=2, pad_token_id=PAD)
        tokens = torch.tensor([prompt])
        out = pair[0].generate(tokens, generation_config=settings, stop_strings=list(stops), tokenizer=tokenizer)
        return out[0, len(prompt) :].tolist()

    whole = decode(ours("never"))
    assert len(whole) > 30
    lengths = set()
    for first, length in ((4, 1), (9, 2), (13, 3), (20, 6), (len(whole) - 5, 4)):
        stop = whole[first : first + length]
        assert ours(stop, "never") == theirs(stop, "never")
        lengths.add(len(ours(stop)))
    assert len(lengths) > 2
