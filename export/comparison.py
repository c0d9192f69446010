"""Proof that an exported folder is the model: reloaded by transformers and held against Trivium's own decoder
in fp32.

Tensors are compared first, then what transformers did with them, so that a failure names its cause: the
tensor on disk, or else the first layer whose output differs. Leaves out speed and quality.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from configs.export import VerifyConfig
from configs.train import ModelConfig
from export.chat_codec import TextCodec
from export.families import from_hf
from export.hf_tokenizer import first_difference, first_mismatch
from export.tensors import open_tensors
from pretrain.model import Decoder
from pretrain.sampling import generate

# Where tokenizers part ways: spaces, control characters, scripts without spaces, joined emoji, spelled-out
# specials.
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
    """One line of the proof. `measured` says what was found, and where, if it failed."""

    name: str
    passed: bool
    measured: str
    wanted: str


@dataclass(frozen=True)
class Reference:
    """What the folder must be: `weights` as written (rounded, if to bf16), and the decoder made of them.

    `passages` are token ids to compare logits on: held-out text, or the prompts where there is none. `context`
    is the number of tokens that the folder has to claim, and nothing longer is tried.
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
    """The folder as transformers sees it."""

    model: Any
    tokenizer: Any
    loading: dict[str, Any]


def reload(folder: Path) -> Reloaded:
    """Loads model (fp32, CPU) and tokenizer by the Auto classes, from the folder alone."""
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
    """All checks, in the order that makes the first failure the cause."""
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
    """The files hold, bit for bit, the weights of the checkpoint."""
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
    """transformers found a tensor for every parameter, and had none left."""
    wrong = [
        f"{kind.removesuffix('_keys')} {sorted(map(str, hf.loading[kind]))[0]}"
        for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")
        if hf.loading.get(kind)
    ]
    return Check("transformers loads it", not wrong, "; ".join(wrong) or type(hf.model).__name__, "no key left over")


def check_parameters(hf: Reloaded, config: ModelConfig) -> Check:
    count, expected = sum(p.numel() for p in hf.model.parameters()), config.num_parameters()
    return Check("parameters", count == expected, f"{count:,}", f"{expected:,}")


def check_context(hf: Reloaded, reference: Reference, greedy_tokens: int) -> Check:
    """The folder claims the model's context, in both files, and what is compared stays within it."""
    claimed, longest = hf.model.config.max_position_embeddings, max(map(len, reference.passages))
    longest = max(longest, *(len(prompt) + greedy_tokens for prompt in reference.prompts))
    wanted = f"{reference.context:,}, and nothing compared beyond it"
    measured = f"{claimed:,}, compared up to {longest:,}"
    if hf.tokenizer.model_max_length != claimed:
        measured += f", but the tokenizer's model_max_length is {hf.tokenizer.model_max_length:,}"
    right = claimed == hf.tokenizer.model_max_length == reference.context and longest <= claimed
    return Check("context", right, measured, wanted)


def check_logits(hf: Reloaded, reference: Reference, tolerance: float) -> Check:
    """The largest difference of any logit over all passages; on failure, the first layer that differs."""
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
    """Which module's output is the first to differ by more than `tolerance`, and by how much."""
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
    """Both continue every prompt by the same `count` likeliest tokens.

    Where they part and the two candidates' logits are within `tolerance` of each other, neither is wrong:
    such a tie is reported, and the prompt counts up to there.
    """
    from transformers import GenerationConfig

    # The end token does not end this: all `count` tokens are compared. None would be taken for "as the model's own
    # generation config says", so the end token is one that does not exist.
    settings = GenerationConfig(
        max_new_tokens=count, do_sample=False, eos_token_id=-1, pad_token_id=reference.codec.pad_id
    )
    name, wanted, ties = "greedy tokens", f"{count} identical", 0
    for prompt in reference.prompts:
        mine = generate(reference.decoder, [prompt], count, temperature=0.0)[0].tokens
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
    """Special ids, sentencepiece's ids on held-out and odd text, the chat template to the same ids."""
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
    """How a dialogue's ids differ from those of training, in one of the ways to get them from transformers."""
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
