"""Checks of an exported folder, reloaded by transformers, against Trivium's own decoder in fp32.

The tensors on disk are compared first, then the outputs of the reloaded model, so that a failure names its cause: a
tensor, or the first layer whose output differs.
"""

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from configs.export import VerifyConfig
from configs.sampling import GREEDY
from export.conversion.table import longest_row
from export.conversion.walk import KEPT, convert, entries, fit
from export.hf_tokenizer import first_difference, first_mismatch
from export.reloading import Reference, Reloaded
from export.rounding import MARGIN, allowed, first_layer, in_fp64, outputs_of
from export.tensors import scan_tensors
from pretrain.generation.sampling import generate
from pretrain.generation.text_codec import TextCodec
from pretrain.model import Decoder

FAR_LOGITS = 64  # tokens at the end of the long text

# Texts on which tokenizers often differ: spaces, control characters, scripts without spaces, joined emoji, special
# tokens spelled out.
CONTROL = "<|end|>"  # the token of Trivium's tokenizers that ends a turn
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


@torch.inference_mode()
def verify(folder: Path, reference: Reference, hf: Reloaded, options: VerifyConfig) -> list[Check]:
    """Returns all checks, ordered so that the first failure is the cause of the others."""

    def outputs() -> list[Check]:
        if not reference.config.has_logits:
            return [check_scores(hf, reference, options.tolerance)]
        greedy = check_greedy(hf, reference, options.greedy_tokens, options.tolerance)
        return [check_logits(hf, reference, options), greedy]

    return [
        check_tensors(folder, reference),
        check_loading(hf, reference),
        check_parameters(hf, reference),
        check_context(hf, reference, options.greedy_tokens),
        *outputs(),
        check_tokenizer(hf, reference),
    ]


def check_tensors(folder: Path, reference: Reference) -> Check:
    """Checks that the files hold the weights of the checkpoint bit for bit, one tensor after another."""
    name, wanted = "tensors on disk", "bit-identical"
    found = scan_tensors(folder)
    fitted = fit(reference.family, reference.config, found.shapes)
    if found.problems or fitted.problems:
        return Check(name, False, "; ".join(found.problems + fitted.problems), wanted)
    count = 0
    for ours, tensor in convert(fitted.walked, lambda name: found.read(fitted.names[name]), reference.config, "ours"):
        if ours.startswith(KEPT):
            continue
        mine = reference.read(ours)
        if tensor.dtype != mine.dtype or not torch.equal(tensor, mine):
            off = (tensor.float() - mine.float()).abs().max().item()
            return Check(name, False, f"{ours} differs by up to {off:.3g}", wanted)
        count += 1
    return Check(name, True, f"{count} tensors bit-identical", wanted)


def check_loading(hf: Reloaded, reference: Reference) -> Check:
    """Checks that transformers found a tensor for every parameter and no others, but for layers that are left out."""
    kept = [re.compile(pattern) for pattern in reference.family.kept]
    first = reference.compared.num_layers
    beyond = {f".{layer}." for layer in range(first, reference.config.num_layers)}

    def is_further_layer(name: str) -> bool:
        layer = re.search(r"layers\.(\d+)\.", name)
        has_some = bool(reference.family.further_layers)
        return has_some and layer is not None and int(layer[1]) >= reference.config.num_layers

    def expected(kind: str, name: str) -> bool:
        later = first < reference.config.num_layers and any(part in name for part in beyond)
        return kind == "unexpected_keys" and (
            later or any(pattern.fullmatch(name) for pattern in kept) or is_further_layer(name)
        )

    wrong = []
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        names = [name for name in sorted(map(str, hf.loading.get(kind) or ())) if not expected(kind, name)]
        if names:
            wrong.append(f"{kind.removesuffix('_keys')} {names[0]}")
    return Check("transformers loads it", not wrong, "; ".join(wrong) or type(hf.model).__name__, "no key left over")


def check_parameters(hf: Reloaded, reference: Reference) -> Check:
    """Checks the number of elements of all tensors that transformers has in memory."""
    walked = entries(reference.family, reference.compared)
    expected = sum(math.prod(shape) for entry in walked for shape in entry.theirs.values())
    tensors = {tensor.data_ptr(): tensor.numel() for tensor in hf.model.state_dict().values()}
    count = sum(tensors.values())
    return Check("parameters", count == expected, f"{count:,}", f"{expected:,}")


def check_context(hf: Reloaded, reference: Reference, greedy_tokens: int) -> Check:
    """Checks that config and tokenizer state the model's context length, and that nothing longer is compared."""
    stated, longest = longest_row(reference.config, reference.context), max(map(len, reference.passages))
    claimed = getattr(hf.model.config, reference.family.positions[0]) if reference.family.positions[0] else stated
    longest = max(longest, *(len(prompt) + greedy_tokens for prompt in reference.prompts))
    wanted = f"{stated:,}, and nothing compared beyond it"
    measured = f"{claimed:,}, compared up to {longest:,}"
    of_tokenizer = hf.tokenizer.model_max_length if hf.tokenizer else reference.context
    if of_tokenizer != reference.context:
        measured += f", but the tokenizer's model_max_length is {of_tokenizer:,}"
    right = claimed == stated and of_tokenizer == reference.context >= longest
    return Check("context", right, measured, wanted)


def check_logits(hf: Reloaded, reference: Reference, options: VerifyConfig) -> Check:
    """Checks the largest difference of a logit over all passages, and at the end of one long text made of them.

    A failure names the first layer that differs.
    """
    worst, culprit, bound = 0.0, "", options.tolerance
    far = _far_text(reference, options.far_tokens)
    for passage in [*reference.passages, *far]:
        tokens = torch.tensor([passage])
        # The last tokens of a long text see the farthest positions, and their logits alone fit into memory.
        last = min(len(passage), FAR_LOGITS) if passage in far else len(passage)
        wanted = torch.arange(len(passage) - last, len(passage))
        ours = outputs_of(reference.decoder, tokens, wanted)
        difference = (ours - hf.model(tokens, logits_to_keep=last).logits[0]).abs().max().item()
        if not difference <= worst:  # also true for NaN
            worst, culprit = difference, ""
        if not difference < bound:
            bound = max(bound, allowed(ours, outputs_of(in_fp64(reference.decoder), tokens, wanted), options.tolerance))
        if not difference < bound:
            culprit = first_layer(hf, reference, tokens, options.tolerance)
            break
    count = sum(map(len, reference.passages))
    kind = "held-out passages" if reference.held_out else "prompts (no held-out documents)"
    measured = f"{worst:.2e} over {count:,} tokens of {len(reference.passages)} {kind}"
    measured += f", and at the end of {len(far[0]):,} tokens" if far else ""
    if (first := reference.compared.num_layers) < reference.config.num_layers:
        measured += f", through the first {first} of {reference.config.num_layers} layers"
    return Check("logits, max difference", not culprit, culprit or measured, _limit(bound, options.tolerance))


def check_scores(hf: Reloaded, reference: Reference, tolerance: float) -> Check:
    """Checks a reward model's values on the last token of each text: text by text, and of all in one padded batch.

    A failure names the first layer that differs.
    """
    name, wanted = "scores, max difference", f"< {tolerance:g}"
    texts = [*reference.passages, *reference.prompts]
    rows = [torch.tensor([text]) for text in texts]
    ours = torch.cat([outputs_of(reference.decoder, row, torch.tensor([row.shape[1] - 1])) for row in rows])
    apart = (ours - torch.cat([hf.model(row).logits for row in rows])).abs().amax(-1)
    worst, bound = apart.max().item(), tolerance
    if not worst < tolerance:
        row = rows[int(apart.argmax())]
        exact = outputs_of(in_fp64(reference.decoder), row, torch.tensor([row.shape[1] - 1]))
        bound = allowed(ours[int(apart.argmax())], exact, tolerance)
        wanted = _limit(bound, tolerance)
        if not worst < bound:
            return Check(name, False, first_layer(hf, reference, row, tolerance), wanted)
    pad = hf.model.config.pad_token_id
    if pad is None:
        return Check(name, True, f"{worst:.2e} over {len(texts)} texts, one at a time (no token for padding)", wanted)
    batch = torch.full((len(texts), max(map(len, texts))), pad)
    for row, text in zip(batch, texts, strict=True):
        row[: len(text)] = torch.tensor(text)
    mask = torch.arange(batch.shape[1]) < torch.tensor([[len(text)] for text in texts])
    padded = (ours - hf.model(batch, attention_mask=mask.long()).logits).abs().max().item()
    if not padded < bound:
        return Check(name, False, f"{padded:.2e} in a batch padded with token {pad}, {worst:.2e} one by one", wanted)
    return Check(name, True, f"{max(worst, padded):.2e} over {len(texts)} texts, one by one and in a batch", wanted)


def _limit(bound: float, tolerance: float) -> str:
    return f"< {bound:.2g}" + (f", {MARGIN:g} times what fp32 rounds here" if bound > tolerance else "")


def _allowed_at_end(decoder: Decoder, tokens: torch.Tensor, tolerance: float) -> float:
    last = torch.tensor([tokens.shape[1] - 1])
    return allowed(outputs_of(decoder, tokens, last), outputs_of(in_fp64(decoder), tokens, last), tolerance)


def _far_text(reference: Reference, length: int) -> list[list[int]]:
    """Returns one text of up to `length` tokens that repeats all passages; [] if a passage is as long as it."""
    length = min(length, reference.context)
    if length <= max(map(len, reference.passages)):
        return []
    joined = [token for passage in reference.passages for token in passage]
    return [(joined * (length // len(joined) + 1))[:length]]


def check_greedy(hf: Reloaded, reference: Reference, count: int, tolerance: float) -> Check:
    """Checks that both models continue every prompt with the same `count` tokens under greedy decoding.

    If they differ at a token and rounding explains how far the logits of the two candidates are apart, it is a tie and
    neither is wrong: the tie is reported, and the prompt is compared only up to there.
    """
    from transformers import GenerationConfig

    codec = reference.codec
    # What is not set here would be taken from the model's own config, and change which tokens are greedy.
    hf.model.generation_config = GenerationConfig()
    # All `count` tokens are compared, so generation must not stop at the end token. None would mean the end token of
    # the model's own generation config, so an id that does not exist takes its place.
    settings = GenerationConfig(
        max_new_tokens=count, do_sample=False, eos_token_id=-1, pad_token_id=codec.pad_id if codec else 0
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
        text = codec.decode(prompt)[:30] if codec else str(prompt[:8])
        if at == min(len(mine), len(theirs)):
            return Check(name, False, f"prompt {text!r}: {len(theirs)} tokens, ours {len(mine)}", wanted)
        tokens = torch.tensor([prompt + mine[:at]])
        logits = hf.model(tokens).logits[0, -1]
        margin = (logits[mine[at]] - logits[theirs[at]]).abs().item()
        if not margin < tolerance and not margin < _allowed_at_end(reference.decoder, tokens, tolerance):
            return Check(name, False, f"prompt {text!r}: token {at} is {theirs[at]}, ours {mine[at]}", wanted)
        ties += 1
    measured = f"{count} identical on {len(reference.prompts) - ties} prompts"
    return Check(name, True, measured + (f", {ties} up to an exact tie" if ties else ""), wanted)


def check_tokenizer(hf: Reloaded, reference: Reference) -> Check:
    """Checks special ids, ids on held-out and unusual text, and the ids of the chat template."""
    codec, tokenizer = reference.codec, hf.tokenizer
    if codec is None:
        return Check("tokenizer", True, "copied as it came", "the imported files")
    texts = [codec.decode(passage) for passage in reference.passages] + ODD_TEXTS
    wanted = "Trivium's ids"
    for name in ("bos", "eos"):
        theirs = getattr(tokenizer, f"{name}_token")
        if theirs != codec.tokenizer.symbols.get(f"{name}_token"):
            return Check("tokenizer", False, f"{name}_token is {theirs}", wanted)
    difference = first_difference(tokenizer, codec.tokenizer, texts)
    if difference is None and codec.chat_template is None and tokenizer("a").input_ids != codec.encode_prompt("a"):
        difference = f"'a' becomes {tokenizer('a').input_ids}, in training {codec.encode_prompt('a')}"
    if difference is None and codec.chat_template is not None:
        difference = _chat_difference(tokenizer, codec, reference.as_it_came)
    chat = ", chat template" if codec.chat_template is not None else ""
    if chat and _leaves_control_tokens(tokenizer, codec):
        chat += f", where transformers takes {CONTROL} in a message for the token"
    return Check("tokenizer", difference is None, difference or f"identical on {len(texts)} texts{chat}", wanted)


def _leaves_control_tokens(tokenizer: Any, codec: TextCodec) -> bool:
    """Tells whether the chat template writes a control token in a message as it is, unlike Trivium's own template.

    Transformers then reads it as that token, where Trivium reads plain text.
    """
    if CONTROL not in codec.tokenizer.added_ids:
        return False
    spelled = f"1{CONTROL}1"
    messages = codec.chat.question(spelled)
    return spelled in tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)


def _chat_difference(tokenizer: Any, codec: TextCodec, as_it_came: bool) -> str | None:
    """Describes how a dialogue's ids differ from training's, by the first of three ways to get them that differs.

    With `as_it_came` the tokenizer may add its own beginning to the rendered dialogue, as published ones do.
    """
    spelled = CONTROL if not _leaves_control_tokens(tokenizer, codec) else "2"
    messages = codec.chat.question(f"1 + 1 = {spelled} 你好")
    rendered = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    ways = {
        "apply_chat_template": tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False),
        "the rendered template, tokenized": tokenizer(rendered).input_ids,
        "the same with add_special_tokens=False": tokenizer(rendered, add_special_tokens=False).input_ids,
    }
    ours = codec.encode_chat(messages)
    if as_it_came and codec.bos_id >= 0 and ways["the rendered template, tokenized"] == [codec.bos_id, *ours]:
        del ways["the rendered template, tokenized"]
    return next((f"{way}: {ids}, ours {ours}" for way, ids in ways.items() if ids != ours), None)
