"""Checks of an exported folder, reloaded by transformers, against Trivium's own decoder in fp32.

The tensors on disk are compared first, then the outputs of the reloaded model, so that a failure names its cause: a
tensor, or the first layer whose output differs.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from configs.export import VerifyConfig
from configs.model import ModelConfig
from configs.sampling import GREEDY
from export.chat_codec import TextCodec
from export.families import from_hf
from export.hf_tokenizer import first_difference, first_mismatch
from export.tensors import open_tensors
from pretrain.model import Decoder
from pretrain.sampling import generate

# Texts on which tokenizers often differ: spaces, control characters, scripts without spaces, joined emoji, special
# tokens spelled out.
ODD_TEXTS = [
    "",
    " ",
    "  two  spaces, then a tab\tand a newline\n\n\n  end  ",
    "Call me Ishmael. Some years ago—never mind how long precisely—having little or no money",
    "中文文本，没有空格。\u3000全角空格，「引号」……",
    "def f(x):\n    return {k: v for k, v in x.items() if v != 0x1F}  # ok\n",
    "0123456789 3.14159 1,000,000 ²³ ½ Ⅷ",
    "e\u0301 é ﬁ Å Å \u00a0 \u200b \u200d \ufeff \u2581 \u2028 \x00 \x01 \x7f \r\n",
    "👩‍👩‍👧‍👦 🏳️‍🌈 🇨🇳 \U0010ffff \ufffd \ue000",
    "עברית العربية हिन्दी ไทย 한국어 にほんご Ελληνικά",
    "<s></s><unk><pad> <0x0A> <|user|>hi<|end|> <|assistant|>",
    "aaaaaaaaaaaaaaaaaaaaaaa ababababababa ============ -------- \n\n\n\n\n\n\n",
]


@dataclass(frozen=True)
class Check:
    """Result of one check. `measured` is what was found, and if it failed, where."""

    name: str
    passed: bool
    measured: str
    wanted: str


@dataclass(frozen=True)
class Reference:
    """Model that the exported folder must equal: `weights` as written (bf16 or fp32), and the decoder made of them.

    `passages` are token ids on which logits are compared: held-out text, or the prompts if there is none. `context` is
    the context length, in tokens, that the folder must state; nothing longer is compared.
    """

    config: ModelConfig
    weights: dict[str, torch.Tensor]
    decoder: Decoder
    codec: TextCodec
    context: int
    passages: list[list[int]]
    held_out: bool
    prompts: list[list[int]]


@dataclass(frozen=True)
class Reloaded:
    """Model and tokenizer of the folder as transformers loads them; `loading` is its report on keys."""

    model: Any
    tokenizer: Any
    loading: dict[str, Any]


def reload(folder: Path) -> Reloaded:
    """Loads model (fp32, on the CPU) and tokenizer from the folder with the Auto classes, without network."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, local_files_only=True, output_loading_info=True
    )
    model, loading = loaded
    return Reloaded(model.eval(), AutoTokenizer.from_pretrained(folder, local_files_only=True), loading)


@torch.inference_mode()
def verify(folder: Path, reference: Reference, hf: Reloaded, options: VerifyConfig) -> list[Check]:
    """Returns all checks, ordered so that the first failure is the cause of the others."""
    return [
        check_tensors(folder, reference),
        check_loading(hf),
        check_parameters(hf, reference.config),
        check_context(hf, reference, options.greedy_tokens),
        check_logits(hf, reference, options.tolerance),
        check_greedy(hf, reference, options.greedy_tokens, options.tolerance),
        check_tokenizer(hf, reference),
    ]


def check_tensors(folder: Path, reference: Reference) -> Check:
    """Checks that the files hold the weights of the checkpoint bit for bit."""
    names, read = open_tensors(folder)
    count = 0
    try:
        for name, tensor in from_hf(read, names, reference.config):
            mine = reference.weights[name]
            if tensor.dtype != mine.dtype or not torch.equal(tensor, mine):
                off = (tensor.float() - mine.float()).abs().max().item()
                return Check("tensors on disk", False, f"{name} differs by up to {off:.3g}", "bit-identical")
            count += 1
    except ValueError as error:
        return Check("tensors on disk", False, str(error), "bit-identical")
    return Check("tensors on disk", True, f"{count} tensors bit-identical", "bit-identical")


def check_loading(hf: Reloaded) -> Check:
    """Checks that transformers found a tensor for every parameter and no others."""
    wrong = [
        f"{kind.removesuffix('_keys')} {sorted(map(str, hf.loading[kind]))[0]}"
        for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")
        if hf.loading.get(kind)
    ]
    return Check("transformers loads it", not wrong, "; ".join(wrong) or type(hf.model).__name__, "no key left over")


def check_parameters(hf: Reloaded, config: ModelConfig) -> Check:
    """Checks the number of parameters."""
    count, expected = sum(p.numel() for p in hf.model.parameters()), config.num_parameters()
    return Check("parameters", count == expected, f"{count:,}", f"{expected:,}")


def check_context(hf: Reloaded, reference: Reference, greedy_tokens: int) -> Check:
    """Checks that config and tokenizer state the model's context length, and that nothing longer is compared."""
    claimed, longest = hf.model.config.max_position_embeddings, max(map(len, reference.passages))
    longest = max(longest, *(len(prompt) + greedy_tokens for prompt in reference.prompts))
    wanted = f"{reference.context:,}, and nothing compared beyond it"
    measured = f"{claimed:,}, compared up to {longest:,}"
    if hf.tokenizer.model_max_length != claimed:
        measured += f", but the tokenizer's model_max_length is {hf.tokenizer.model_max_length:,}"
    right = claimed == hf.tokenizer.model_max_length == reference.context and longest <= claimed
    return Check("context", right, measured, wanted)


def check_logits(hf: Reloaded, reference: Reference, tolerance: float) -> Check:
    """Checks the largest difference of a logit over all passages; a failure names the first layer that differs."""
    worst, culprit = 0.0, ""
    for passage in reference.passages:
        tokens = torch.tensor([passage])
        difference = (_ours(reference.decoder, tokens) - hf.model(tokens).logits).abs().max().item()
        if not difference <= worst:  # also true for NaN
            worst, culprit = difference, ""
        if not difference < tolerance:
            culprit = first_layer(hf, reference, tokens, tolerance)
            break
    count = sum(map(len, reference.passages))
    kind = "held-out passages" if reference.held_out else "prompts (no held-out documents)"
    measured = f"{worst:.2e} over {count:,} tokens of {len(reference.passages)} {kind}"
    return Check("logits, max difference", not culprit, culprit or measured, f"< {tolerance:g}")


def first_layer(hf: Reloaded, reference: Reference, tokens: torch.Tensor, tolerance: float) -> str:
    """Returns the first module whose output differs by more than `tolerance`, and by how much, as text."""
    backbone = hf.model.model
    decoder = reference.decoder
    pairs: list[tuple[str, Any, Any]] = [("embedding", decoder.embedding, backbone.embed_tokens)]
    pairs += [(f"layers.{i}", decoder.layers[str(i)], layer) for i, layer in enumerate(backbone.layers)]
    pairs.append(("final_norm", decoder.final_norm, backbone.norm))
    seen: dict[str, list[torch.Tensor]] = {name: [] for name, *_ in pairs}

    def record(name: str, sequence_first: bool) -> Any:
        def hook(module: Any, args: Any, output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            seen[name].append(hidden.transpose(0, 1) if sequence_first else hidden)

        return hook

    handles = []
    for name, mine, theirs in pairs:
        handles.append(mine.register_forward_hook(record(name, sequence_first=True)))
        handles.append(theirs.register_forward_hook(record(name, sequence_first=False)))
    try:
        _ours(decoder, tokens)
        hf.model(tokens)
    finally:
        for handle in handles:
            handle.remove()
    for name, (mine, theirs) in seen.items():
        difference = (mine - theirs).abs().max().item()
        if not difference < tolerance:
            return f"first at the output of {name}, by {difference:.3g}"
    return "lm_head, all layers before it agree"


def check_greedy(hf: Reloaded, reference: Reference, count: int, tolerance: float) -> Check:
    """Checks that both models continue every prompt with the same `count` tokens under greedy decoding.

    If they differ at a token and the logits of the two candidates are within `tolerance`, it is a tie and neither is
    wrong: the tie is reported, and the prompt is compared only up to there.
    """
    from transformers import GenerationConfig

    # All `count` tokens are compared, so generation must not stop at the end token. None would mean the end token of
    # the model's own generation config, so an id that does not exist takes its place.
    settings = GenerationConfig(
        max_new_tokens=count, do_sample=False, eos_token_id=-1, pad_token_id=reference.codec.pad_id
    )
    name, wanted, ties = "greedy tokens", f"{count} identical", 0
    for prompt in reference.prompts:
        mine = generate(reference.decoder, [prompt], count, GREEDY)[0].tokens
        tokens = torch.tensor([prompt])
        output = hf.model.generate(tokens, attention_mask=torch.ones_like(tokens), generation_config=settings)
        theirs = output[0, len(prompt) :].tolist()
        if mine == theirs:
            continue
        at = first_mismatch(mine, theirs)
        text = reference.codec.decode(prompt)[:30]
        if at == min(len(mine), len(theirs)):
            return Check(name, False, f"prompt {text!r}: {len(theirs)} tokens, ours {len(mine)}", wanted)
        logits = hf.model(torch.tensor([prompt + mine[:at]])).logits[0, -1]
        margin = (logits[mine[at]] - logits[theirs[at]]).abs().item()
        if not margin < tolerance:
            return Check(name, False, f"prompt {text!r}: token {at} is {theirs[at]}, ours {mine[at]}", wanted)
        ties += 1
    measured = f"{count} identical on {len(reference.prompts) - ties} prompts"
    return Check(name, True, measured + (f", {ties} up to an exact tie" if ties else ""), wanted)


def check_tokenizer(hf: Reloaded, reference: Reference) -> Check:
    """Checks special ids, sentencepiece's ids on held-out and unusual text, and the ids of the chat template."""
    codec, tokenizer = reference.codec, hf.tokenizer
    texts = [codec.decode(passage) for passage in reference.passages] + ODD_TEXTS
    wanted = "sentencepiece's ids"
    for name in ("bos", "eos"):
        if getattr(tokenizer, f"{name}_token_id") != getattr(codec, f"{name}_id"):
            return Check("tokenizer", False, f"{name}_token_id is {getattr(tokenizer, f'{name}_token_id')}", wanted)
    difference = first_difference(tokenizer, codec.tokenizer, texts)
    if difference is None and codec.chat_template is None and tokenizer("a").input_ids != codec.encode_prompt("a"):
        difference = f"'a' becomes {tokenizer('a').input_ids}, in training {codec.encode_prompt('a')}"
    if difference is None and codec.chat_template is not None:
        difference = _chat_difference(tokenizer, codec)
    chat = ", chat template" if codec.chat_template is not None else ""
    return Check("tokenizer", difference is None, difference or f"identical on {len(texts)} texts{chat}", wanted)


def _chat_difference(tokenizer: Any, codec: TextCodec) -> str | None:
    """Describes how a dialogue's ids differ from training's, by the first of three ways to get them that differs."""
    messages = [{"role": "user", "content": "1 + 1 = <|end|> 你好"}]
    rendered = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    ways = {
        "apply_chat_template": tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False),
        "the rendered template, tokenized": tokenizer(rendered).input_ids,
        "the same with add_special_tokens=False": tokenizer(rendered, add_special_tokens=False).input_ids,
    }
    ours = codec.encode_chat(messages)
    return next((f"{way}: {ids}, ours {ours}" for way, ids in ways.items() if ids != ours), None)


def _ours(decoder: Decoder, tokens: torch.Tensor) -> torch.Tensor:
    return decoder(tokens, torch.arange(tokens.shape[1])[None].expand_as(tokens))
