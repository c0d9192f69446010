"""Trivium's model for lm-evaluation-harness gives what the harness's own model gives on the exported folder."""

from pathlib import Path
from typing import Any

import pytest

from configs.loader import ConfigError
from posttrain.chat.chat_format import jinja_template
from pretrain.generation.text_codec import TextCodec
from tests.tiny_models import CHINESE, ENGLISH
from tests.unit.export.harness_lm import CONTEXT, NEEDS_LM_EVAL, instances, make_lm

pytestmark = NEEDS_LM_EVAL


@pytest.fixture(scope="module")
def harness(exported: Path) -> Any:
    """The harness's own model, made of the exported folder."""
    pytest.importorskip("accelerate", reason="the harness's own model needs accelerate: pip install '.[dev]'")
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=str(exported), device="cpu", dtype="float32", batch_size=3)


PAIRS = [
    ("It was the age of", " wisdom"),
    ("It was the age of ", "wisdom"),
    ("It was the age of", " foolishness, it was the epoch of belief"),
    ("", "It was"),
    ("   ", " was"),
    ("春眠不觉晓，", "处处闻啼鸟"),
    ("Is it <s> or </s>?", " <|end|>"),
    *[(ENGLISH, choice) for choice in (" A", " B", " C")],
    (ENGLISH * 2, " the end of it"),  # longer than the context
    (CHINESE * 3, CHINESE[:20]),
]


def test_loglikelihoods_are_those_of_the_harness_on_the_exported_model(
    decoder: Any, harness: Any, tokenizer_path: Path
) -> None:
    codec = TextCodec(tokenizer_path)
    ours = make_lm(decoder, codec, CONTEXT, batch_tokens=300)
    # The harness takes a special token that is spelled out in a text for that token; in Trivium it is plain text.
    pairs = [pair for pair in PAIRS if "<" not in "".join(pair)]
    mine = ours.loglikelihood(instances("loglikelihood", pairs))
    theirs = harness.loglikelihood(instances("loglikelihood", pairs), disable_tqdm=True)
    assert len({round(logprob, 3) for logprob, _ in theirs}) == len(pairs) - 1, "all but the first two are different"
    for pair, (logprob, is_greedy), (expected, expected_greedy) in zip(pairs, mine, theirs, strict=True):
        assert logprob == pytest.approx(expected, abs=1e-4), pair
        assert is_greedy == expected_greedy, pair
    assert ours.cut == {"test": sum(len(codec.encode_prompt("".join(pair))) > CONTEXT + 1 for pair in pairs)} != {}


def test_without_a_beginning_token_they_agree_too(
    decoder: Any, harness: Any, tokenizer_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr(harness, "add_bos_token", False)
    ours = make_lm(decoder, TextCodec(tokenizer_path), CONTEXT, add_bos=False)
    pairs = [pair for pair in PAIRS if "<" not in "".join(pair) and pair[0].strip()]
    mine = ours.loglikelihood(instances("loglikelihood", pairs))
    theirs = harness.loglikelihood(instances("loglikelihood", pairs), disable_tqdm=True)
    assert [logprob for logprob, _ in mine] == pytest.approx([logprob for logprob, _ in theirs], abs=1e-4)
    texts = [(ENGLISH,), (ENGLISH * 3,), (CHINESE,), ("a",)]
    mine = make_lm(decoder, TextCodec(tokenizer_path), CONTEXT).loglikelihood_rolling(
        instances("loglikelihood_rolling", texts)
    )
    theirs = harness.loglikelihood_rolling(instances("loglikelihood_rolling", texts), disable_tqdm=True)
    assert mine == pytest.approx(theirs, abs=1e-3)


def test_answers_are_those_of_the_harness(decoder: Any, harness: Any, tokenizer_path: Path, monkeypatch) -> None:
    """Compares texts that both decode, since the exported tokenizer spells broken UTF-8 in another way."""
    settings = {"until": ["\n", "the"], "max_gen_toks": 5, "do_sample": False}
    prompts = [(ENGLISH[i * 9 : i * 9 + 60], settings) for i in range(8)]
    prompts += [("春眠", settings), (ENGLISH * 2, settings), ("It", {**settings, "until": []})]
    requests = instances("generate_until", prompts)
    codec = TextCodec(tokenizer_path)
    both = zip(
        make_lm(decoder, codec, CONTEXT).generate_until(requests),
        harness.generate_until(requests, disable_tqdm=True),
        strict=True,
    )
    sound = [(mine, theirs) for mine, theirs in both if "\ufffd" not in mine + theirs]
    assert len(sound) > 2 and all(mine == theirs for mine, theirs in sound)

    def spelled(ids: Any, **_: Any) -> str:
        # Without control symbols; the harness asks for the text of one id as well.
        return "</s>" if isinstance(ids, int) else " ".join(str(int(i)) for i in ids if i > 7)

    monkeypatch.setattr(codec, "decode", spelled)
    monkeypatch.setattr(harness, "tok_decode", spelled)
    whole = instances(
        "generate_until", [(prompt, {**settings, "until": [], "max_gen_toks": 24}) for prompt, _ in prompts]
    )
    mine = make_lm(decoder, codec, CONTEXT).generate_until(whole)
    assert mine == harness.generate_until(whole, disable_tqdm=True) and len(set(mine)) > 5


def test_special_tokens_are_plain_text_unless_the_chat_template_wrote_them(decoder: Any, tokenizer_path: Path) -> None:
    codec = TextCodec(tokenizer_path, jinja_template())
    plain_text, chat = make_lm(decoder, codec, CONTEXT), make_lm(decoder, codec, CONTEXT, chat=True)
    assert plain_text.tok_encode("<|end|>") == [1, *codec.tokenizer.encode("<|end|>")]
    messages = [{"role": "user", "content": "It <|end|> was"}]
    assert chat.tok_encode(chat.apply_chat_template(messages)) == codec.encode_chat(messages)
    begun = [*messages, {"role": "assistant", "content": "of"}]
    opened = codec.encode_chat(messages) + codec.tokenizer.encode("of")
    assert chat.tok_encode(chat.apply_chat_template(begun, add_generation_prompt=False)) == opened


def test_a_tokenizer_without_a_beginning_token(
    decoder: Any, tokenizer_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Encodes without a beginning token: the end-of-text token stands before an empty context."""
    codec = TextCodec(tokenizer_path)
    monkeypatch.setattr(codec, "bos_id", -1)
    lm = make_lm(decoder, codec, CONTEXT)
    assert lm.tok_encode("It was") == codec.tokenizer.encode("It was") and lm.prefix_token_id == codec.eos_id
    (found,) = lm.loglikelihood(instances("loglikelihood", [("", "It was")]))
    monkeypatch.setattr(codec, "bos_id", codec.eos_id)
    assert make_lm(decoder, codec, CONTEXT).loglikelihood(instances("loglikelihood", [("", "It was")])) == [found]


def test_settings_that_the_sampler_lacks_are_told(decoder: Any, tokenizer_path: Path) -> None:
    model = make_lm(decoder, TextCodec(tokenizer_path), CONTEXT)
    for settings, message in (
        ({"num_beams": 4}, r"task test sets generation_kwargs\.num_beams = 4, which Trivium's sampler does not have"),
        ({"do_sample": True, "temperature": 1.0, "top_p": 2.0}, r"task test, generation_kwargs: top_p = 2 is out of"),
        ({"max_gen_toks": 0}, r"max_gen_toks = 0; give 1 or more"),
    ):
        with pytest.raises(ConfigError, match=message):
            model.generate_until(instances("generate_until", [("It was", settings)]))
