"""Trivium's tokenizer, a sentencepiece BPE, as a Hugging Face fast tokenizer: same ids for every text.

Writes tokenizer.json, tokenizer_config.json, special_tokens_map.json and (when there is one)
chat_template.jinja, so that `AutoTokenizer.from_pretrained(folder)` works with no network. What is left out:
Unigram models, normalisation other than identity and an added leading space; each is refused, because its
fast twin would not be exact.

One difference is Hugging Face's convention and stays: text that spells a special token (`<|user|>`) becomes
that token unless the caller passes `split_special_tokens=True`; sentencepiece never makes a control symbol
from text.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sentencepiece import sentencepiece_model_pb2

from configs.files import write_atomic
from data_pipeline.tokens.tokenizer import SPACE, Tokenizer

if TYPE_CHECKING:
    import tokenizers

# Generated at import from a serialised description: no type checker sees its classes.
proto: Any = sentencepiece_model_pb2
PIECE = proto.ModelProto.SentencePiece


def read_model(path: str | Path) -> Any:
    """The parsed model. Errors: ValueError where a fast tokenizer could not give the same ids."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"tokenizer model {path} does not exist; run the data pipeline's tokenizer stage")
    model = proto.ModelProto()
    try:
        model.ParseFromString(path.read_bytes())
    except Exception as error:  # protobuf's DecodeError is not a public name in every version
        raise ValueError(f"tokenizer model {path} is not a sentencepiece model: {error}") from None
    spec, normalizer = model.trainer_spec, model.normalizer_spec
    wanted = [
        ("model_type", spec.model_type, proto.TrainerSpec.BPE),
        ("byte_fallback", spec.byte_fallback, True),
        ("treat_whitespace_as_suffix", spec.treat_whitespace_as_suffix, False),
        ("normalizer.name", normalizer.name, "identity"),
        ("add_dummy_prefix", normalizer.add_dummy_prefix, False),
        ("remove_extra_whitespaces", normalizer.remove_extra_whitespaces, False),
        ("escape_whitespaces", normalizer.escape_whitespaces, True),
    ]
    for key, value, expected in wanted:
        if value != expected:
            raise ValueError(
                f"tokenizer model {path} has {key} = {value!r}, export supports {expected!r} only; "
                "train the tokenizer with the pipeline's settings"
            )
    if any(piece.type == PIECE.USER_DEFINED for piece in model.pieces):
        raise ValueError(f"tokenizer model {path} has user-defined pieces; declare them as control symbols instead")
    return model


def special_ids(model: Any) -> dict[str, int]:
    """Unknown and control symbols by name, in id order."""
    return {p.piece: i for i, p in enumerate(model.pieces) if p.type in (PIECE.CONTROL, PIECE.UNKNOWN)}


def merges(model: Any) -> list[tuple[str, str]]:
    """BPE merge rules in rank order.

    sentencepiece keeps no merge list: two neighbours merge when their concatenation is a piece, best score
    first (bpe_model.cc). So each split of a piece into two pieces is a rule, ranked by the piece's score.
    """
    normal = {p.piece: p.score for p in model.pieces if p.type == PIECE.NORMAL}
    ids = {p.piece: i for i, p in enumerate(model.pieces)}
    rules = []
    for piece, score in normal.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in normal and right in normal:
                rules.append((-score, ids[left], ids[right], _spelled(left), _spelled(right)))
    rules.sort()
    return [(left, right) for *_, left, right in rules]


def _spelled(piece: str) -> str:
    """A piece as the text it stands for. Ours have real spaces where sentencepiece has U+2581, so that a real
    U+2581 in a text is no piece and goes by its bytes, as in training.
    """
    return piece.replace(SPACE, " ")


def convert(model: Any, add_bos: bool = True) -> "tokenizers.Tokenizer":
    """The fast tokenizer; with `add_bos`, `encode(text)` puts <s> in front as in training, if add_special_tokens."""
    import tokenizers
    from tokenizers import AddedToken, decoders, models, processors

    vocabulary = {_spelled(p.piece): i for i, p in enumerate(model.pieces)}
    if len(vocabulary) != len(model.pieces):
        raise ValueError("tokenizer model has two pieces of the same text; it is damaged, train it again")
    spec = model.trainer_spec
    fast = tokenizers.Tokenizer(
        models.BPE(vocabulary, merges(model), unk_token=spec.unk_piece, byte_fallback=True, fuse_unk=False)
    )
    # No pre-tokenizer: sentencepiece merges over the whole text, spaces being one more character.
    fast.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    fast.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in special_ids(model)])
    bos = spec.bos_piece if add_bos else ""  # the spelling of transformers' own, which it makes of add_bos_token
    fast.post_processor = processors.TemplateProcessing(
        single=f"{bos}:0 $A:0" if bos else "$A:0",
        pair=f"{bos}:0 $A:0 {bos}:1 $B:1" if bos else "$A:0 $B:1",
        special_tokens=[(bos, spec.bos_id)] if bos else [],
    )
    return fast


def write_tokenizer(
    folder: str | Path, model_path: str | Path, max_length: int, chat_template: str | None = None
) -> None:
    """Writes the tokenizer's files into `folder`; `max_length` is the number of tokens that the model is made for.

    With a chat template, <s> comes from that alone and the tokenizer adds none: the rendered template has one then,
    whoever tokenizes it and with `add_special_tokens` or without.
    """
    folder, model = Path(folder), read_model(model_path)
    spec, specials = model.trainer_spec, special_ids(model)
    names = {"unk_token": spec.unk_piece, "bos_token": spec.bos_piece, "eos_token": spec.eos_piece}
    if spec.pad_id >= 0:
        names["pad_token"] = spec.pad_piece
    others = [name for name in specials if name not in names.values()]
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **names,
        "additional_special_tokens": others,
        "clean_up_tokenization_spaces": False,
        # llama.cpp's converter goes by these, not by tokenizer.json.
        "add_bos_token": chat_template is None,
        "add_eos_token": False,
        "add_prefix_space": False,
        "model_max_length": max_length,
        "model_input_names": ["input_ids", "attention_mask"],
        "padding_side": "left",
    }
    if chat_template is not None:
        # In both files: transformers 5 reads the file, older readers the key.
        config["chat_template"] = chat_template
        write_atomic(folder / "chat_template.jinja", chat_template.encode())
    write_atomic(folder / "tokenizer.json", convert(model, chat_template is None).to_str(pretty=True).encode())
    write_atomic(folder / "tokenizer_config.json", _json(config))
    write_atomic(folder / "special_tokens_map.json", _json({**names, "additional_special_tokens": others}))
    write_atomic(folder / "tokenizer.model", Path(model_path).read_bytes())


def first_difference(fast: Any, tokenizer: Tokenizer, texts: list[str]) -> str | None:
    """None when `fast`, transformers' tokenizer, gives `tokenizer`'s ids for every text; else a miss."""
    if len(fast) != tokenizer.vocab_size:
        return f"vocabulary: {len(fast)} entries, ours has {tokenizer.vocab_size}"
    for i in range(tokenizer.vocab_size):
        piece = _spelled(tokenizer.id_to_piece(i))
        if fast.convert_ids_to_tokens(i) != piece:
            return f"id {i} is {fast.convert_ids_to_tokens(i)!r}, ours {piece!r}"
    for text in texts:
        ours = tokenizer.encode(text)
        theirs = fast.encode(text, add_special_tokens=False, split_special_tokens=True)
        if ours != theirs:
            at = first_mismatch(ours, theirs)
            found = f"{theirs[at : at + 3]}, ours {ours[at : at + 3]}"
            around = tokenizer.decode(ours[max(0, at - 4) : at + 4])
            return f"text {text[:40]!r}: token {at}, near {around!r}: {found}"
        if fast.decode(theirs) != text:
            return f"text {text[:40]!r} decodes to {fast.decode(theirs)[:40]!r}"
    return None


def first_mismatch(a: list[int], b: list[int]) -> int:
    """The first index at which two lists differ; the shorter one's length if it is a prefix."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
