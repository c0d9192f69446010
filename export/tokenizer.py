"""A sentencepiece BPE model as a Hugging Face fast tokenizer: same ids for every text.

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

import sentencepiece
from sentencepiece import sentencepiece_model_pb2 as proto

from configs.loader import write_atomic

if TYPE_CHECKING:
    import tokenizers

SPACE = "\u2581"  # sentencepiece writes a space as this character inside pieces
PIECE = proto.ModelProto.SentencePiece


def read_model(path: str | Path) -> proto.ModelProto:
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
        raise ValueError(
            f"tokenizer model {path} has user-defined pieces; declare them as control symbols instead"
        )
    return model


def special_ids(model: proto.ModelProto) -> dict[str, int]:
    """Unknown and control symbols by name, in id order."""
    return {p.piece: i for i, p in enumerate(model.pieces) if p.type in (PIECE.CONTROL, PIECE.UNKNOWN)}


def merges(model: proto.ModelProto) -> list[tuple[str, str]]:
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
                rules.append((-score, ids[left], ids[right], left, right))
    rules.sort()
    return [(left, right) for *_, left, right in rules]


def convert(model: proto.ModelProto) -> "tokenizers.Tokenizer":
    """The fast tokenizer; `encode(text)` puts <s> in front as in training, if add_special_tokens."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

    vocabulary = {p.piece: i for i, p in enumerate(model.pieces)}
    if len(vocabulary) != len(model.pieces):
        raise ValueError("tokenizer model has two pieces of the same text; it is damaged, train it again")
    spec = model.trainer_spec
    fast = Tokenizer(
        models.BPE(vocabulary, merges(model), unk_token=spec.unk_piece, byte_fallback=True, fuse_unk=False)
    )
    # No pre-tokenizer: sentencepiece merges over the whole text, spaces being one more character.
    fast.normalizer = normalizers.Replace(" ", SPACE)
    fast.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    fast.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in special_ids(model)])
    fast.post_processor = processors.TemplateProcessing(
        single=f"{spec.bos_piece} $A",
        pair=f"{spec.bos_piece} $A $B:1",
        special_tokens=[(spec.bos_piece, spec.bos_id)],
    )
    return fast


def write_tokenizer(
    folder: str | Path, model_path: str | Path, max_length: int, chat_template: str | None = None
) -> None:
    """Writes the tokenizer's files into `folder`; `max_length` is the training sequence length in tokens."""
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
        "model_max_length": max_length,
        "model_input_names": ["input_ids", "attention_mask"],
        "padding_side": "left",
    }
    if chat_template is not None:
        # In both places: transformers 5 reads the file, older readers the key.
        config["chat_template"] = chat_template
        write_atomic(folder / "chat_template.jinja", chat_template.encode())
    write_atomic(folder / "tokenizer.json", convert(model).to_str(pretty=True).encode())
    write_atomic(folder / "tokenizer_config.json", _json(config))
    write_atomic(folder / "special_tokens_map.json", _json({**names, "additional_special_tokens": others}))
    write_atomic(folder / "tokenizer.model", Path(model_path).read_bytes())


def first_difference(fast: Any, model_path: str | Path, texts: list[str]) -> str | None:
    """None when `fast`, a transformers tokenizer, gives sentencepiece's ids for every text; else a miss."""
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model_path))
    if len(fast) != processor.vocab_size():
        return f"vocabulary: {len(fast)} entries, the sentencepiece model has {processor.vocab_size()}"
    for i in range(processor.vocab_size()):
        if fast.convert_ids_to_tokens(i) != processor.id_to_piece(i):
            return (
                f"id {i}: {fast.convert_ids_to_tokens(i)!r}, sentencepiece has {processor.id_to_piece(i)!r}"
            )
    for text in texts:
        ours = processor.encode(text)
        theirs = fast.encode(text, add_special_tokens=False, split_special_tokens=True)
        if ours != theirs:
            at = next(
                (i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b),
                min(len(ours), len(theirs)),
            )
            around = processor.decode(ours[max(0, at - 4) : at + 4])
            found = f"{theirs[at : at + 3]}, ours {ours[at : at + 3]}"
            return f"text {text[:40]!r}: token {at}, near {around!r}: {found}"
        if fast.decode(theirs) != text and processor.decode(ours) == text:
            return f"text {text[:40]!r}: does not decode to itself"
    return None


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
