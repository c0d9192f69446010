"""Converts Trivium's tokenizers to Hugging Face fast tokenizers with the same ids for every text.

Writes tokenizer.json, tokenizer_config.json, special_tokens_map.json and, if there is one, chat_template.jinja, so that
`AutoTokenizer.from_pretrained(folder)` works without network. Sentencepiece models with a normalization other than
identity or an added leading space are refused, since a fast tokenizer would not give the same ids.

AutoTokenizer gives these ids beside the config.json of any family, also where it would make a tokenizer of the family's
own class.

One difference is Hugging Face's convention: text that spells a special token (`<|user|>`) becomes that token unless the
caller passes `split_special_tokens=True`, whereas sentencepiece never makes a control symbol from text.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sentencepiece import sentencepiece_model_pb2

from configs.files import write_atomic
from data_pipeline.tokens.tokenizer import SPACE, Tokenizer

if TYPE_CHECKING:
    import tokenizers

# Its classes are generated at import from a serialized description, so type checkers do not know them.
proto: Any = sentencepiece_model_pb2
PIECE = proto.ModelProto.SentencePiece
# Types of models for which transformers ignores tokenizer_class and builds a tokenizer of its own from tokenizer.json,
# with other ids. With a class beside it, AutoTokenizer keeps to tokenizer.json, also without trust_remote_code.
REBUILT = ("qwen2",)
TOKENIZER_CLASS = '''from transformers import PreTrainedTokenizerFast


class TriviumTokenizer(PreTrainedTokenizerFast):
    """The tokenizer in tokenizer.json, as it is."""
'''
_BYTE_SPACE = "\u0120"  # spells a space in byte-level pieces
_NEVER = 128  # times the lowest score


def read_model(path: str | Path) -> Any:
    """Returns the parsed model. Raises ValueError if a fast tokenizer could not give the same ids."""
    path, model = Path(path), proto.ModelProto()
    try:
        model.ParseFromString(path.read_bytes())
    except Exception as error:  # protobuf's DecodeError is not a public name in every version
        raise ValueError(f"tokenizer model {path} is not a sentencepiece model: {error}") from None
    spec, normalizer = model.trainer_spec, model.normalizer_spec
    wanted = [
        ("byte_fallback", spec.byte_fallback, True),
        ("treat_whitespace_as_suffix", spec.treat_whitespace_as_suffix, False),
        ("normalizer.name", normalizer.name, "identity"),
        ("add_dummy_prefix", normalizer.add_dummy_prefix, False),
        ("remove_extra_whitespaces", normalizer.remove_extra_whitespaces, False),
        ("escape_whitespaces", normalizer.escape_whitespaces, True),
    ]
    if spec.model_type not in (proto.TrainerSpec.BPE, proto.TrainerSpec.UNIGRAM):
        raise ValueError(
            f"tokenizer model {path} is neither BPE nor Unigram; train the tokenizer with the pipeline's settings"
        )
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
    """Returns the ids of unknown and control symbols by name, in order."""
    return {p.piece: i for i, p in enumerate(model.pieces) if p.type in (PIECE.CONTROL, PIECE.UNKNOWN)}


def merges(model: Any) -> list[tuple[str, str]]:
    """Returns the BPE merge rules in order of rank.

    sentencepiece stores no merges: two neighbours merge if their concatenation is a piece, best score first
    (bpe_model.cc). So each split of a piece into two pieces is a rule, ranked by the piece's score.
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
    """Returns a piece with spaces in place of sentencepiece's U+2581.

    So a real U+2581 in a text matches no piece and is encoded as bytes, as in training.
    """
    return piece.replace(SPACE, " ")


def convert(model: Any) -> "tokenizers.Tokenizer":
    """Returns the fast tokenizer of a sentencepiece model."""
    import tokenizers
    from tokenizers import AddedToken, decoders, models

    pieces = [_spelled(p.piece) for p in model.pieces]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    if len(vocabulary) != len(pieces):
        raise ValueError("tokenizer model has two pieces of the same text; it is damaged, train it again")
    spec = model.trainer_spec
    algorithm: Any
    if spec.model_type == proto.TrainerSpec.UNIGRAM:
        # Pieces that sentencepiece never finds in a text, such as <0x0A>, get a score that no best path can contain.
        never = _NEVER * min(p.score for p in model.pieces if p.type == PIECE.NORMAL)
        scored = [
            (name, p.score if p.type == PIECE.NORMAL else never) for name, p in zip(pieces, model.pieces, strict=True)
        ]
        algorithm = models.Unigram(scored, unk_id=spec.unk_id, byte_fallback=True)
    else:
        algorithm = models.BPE(vocabulary, merges(model), unk_token=spec.unk_piece, byte_fallback=True, fuse_unk=False)
    fast = tokenizers.Tokenizer(algorithm)
    # There is no pre-tokenizer: sentencepiece works on the whole text, and a space is a character like others.
    fast.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    fast.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in special_ids(model)])
    return fast


def _add_bos(fast: "tokenizers.Tokenizer", bos: str, bos_id: int) -> None:
    """Sets what `fast` puts in front of a text if add_special_tokens is True: `bos`, or nothing if `bos` is empty."""
    from tokenizers import processors

    # The form is the one that transformers makes from add_bos_token.
    fast.post_processor = processors.TemplateProcessing(
        single=f"{bos}:0 $A:0" if bos else "$A:0",
        pair=f"{bos}:0 $A:0 {bos}:1 $B:1" if bos else "$A:0 $B:1",
        special_tokens=[(bos, bos_id)] if bos else [],
    )


def write_tokenizer(
    folder: str | Path,
    model_path: str | Path,
    max_length: int,
    chat_template: str | None = None,
    model_type: str | None = None,
    as_it_came: bool = False,
) -> None:
    """Writes the tokenizer's files into `folder`; `max_length` is the model's context length in tokens.

    `chat_template` is the model's. With one, only the template writes the symbol that begins a text and the tokenizer
    adds none, so that the ids of a rendered dialogue are those of training whether it is tokenized with
    `add_special_tokens` or without. A tokenizer that was trained elsewhere keeps its file otherwise, and its template
    if the model has none; with `as_it_came`, for a model that was not trained since, it also keeps what it adds. For
    some values of `model_type`, which config.json says, AutoTokenizer needs a file more.
    """
    folder, model_path = Path(folder), Path(model_path)
    own = Tokenizer.load(model_path, complete=False)
    adds_bos = own.bos_id >= 0 and (chat_template is None or (as_it_came and own.foreign))
    chat_template = own.chat_template if chat_template is None else chat_template
    names = own.symbols
    others = [name for name in own.special_ids if name not in names.values()]
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **names,
        "additional_special_tokens": others,
        "clean_up_tokenization_spaces": False,
        # llama.cpp's converter reads these and not tokenizer.json.
        "add_bos_token": adds_bos,
        "add_eos_token": False,
        "add_prefix_space": own.foreign and own.pieces[own.encode("a")[0]].startswith((SPACE, _BYTE_SPACE)),
        "model_max_length": max_length,
        "model_input_names": ["input_ids", "attention_mask"],
        "padding_side": "left",
    }
    if model_type in REBUILT:
        config["auto_map"] = {"AutoTokenizer": [None, "tokenization_trivium.TriviumTokenizer"]}
        write_atomic(folder / "tokenization_trivium.py", TOKENIZER_CLASS.encode())
    if chat_template is not None:
        # Written to both: transformers 5 reads the file, older versions the key.
        config["chat_template"] = chat_template
        write_atomic(folder / "chat_template.jinja", chat_template.encode())
    if model_path.suffix != ".json":
        write_atomic(folder / "tokenizer.model", model_path.read_bytes())
    write_atomic(folder / "tokenizer.json", _fast_file(own, names["bos_token"] if adds_bos else ""))
    write_atomic(folder / "tokenizer_config.json", _json(config))
    write_atomic(folder / "special_tokens_map.json", _json({**names, "additional_special_tokens": others}))


def _fast_file(own: Tokenizer, bos: str) -> bytes:
    """Returns the content of tokenizer.json, which puts `bos` before a text unless it is empty.

    The file of a tokenizer that was trained elsewhere stays as it is if it does that already.
    """
    import tokenizers

    content = Path(own.origin).read_bytes()
    if not own.origin.endswith(".json"):
        fast = convert(read_model(own.origin))
    else:
        fast = tokenizers.Tokenizer.from_buffer(content)
        if own.foreign and fast.truncation is None and fast.padding is None:
            plain, whole = (fast.encode("a", add_special_tokens=add).ids for add in (False, True))
            if whole == [own.bos_id] * bool(bos) + plain:
                return content
        fast.no_truncation()
        fast.no_padding()
    _add_bos(fast, bos, own.bos_id)
    return fast.to_str(pretty=True).encode()


def first_difference(fast: Any, tokenizer: Tokenizer, texts: list[str]) -> str | None:
    """Describes the first difference of `fast`, transformers' tokenizer, from `tokenizer`; None if there is none."""
    entries = max(fast.get_vocab().values()) + 1
    if entries != tokenizer.vocab_size:
        return f"vocabulary: {entries} entries, ours has {tokenizer.vocab_size}"
    for i in range(tokenizer.vocab_size):
        piece = tokenizer.id_to_piece(i)
        known = (piece, _spelled(piece)) if piece else (None, "")  # spelled as in a sentencepiece model
        if fast.convert_ids_to_tokens(i) not in known:
            return f"id {i} is {fast.convert_ids_to_tokens(i)!r}, ours {piece!r}"
    for text in texts:
        if tokenizer.spells_symbol(text):  # it makes text of what the library makes a symbol of
            continue
        ours = tokenizer.encode(text)
        theirs = fast.encode(text, add_special_tokens=False, split_special_tokens=True)
        if ours != theirs:
            at = first_mismatch(ours, theirs)
            found = f"{theirs[at : at + 3]}, ours {ours[at : at + 3]}"
            around = tokenizer.decode(ours[max(0, at - 4) : at + 4])
            return f"text {text[:40]!r}: token {at}, near {around!r}: {found}"
        # One that was trained elsewhere may keep nearly every text, and still make a space of U+2581, as Gemma's does.
        kept = tokenizer.lossless and not tokenizer.foreign
        if fast.decode(theirs, skip_special_tokens=True) != (text if kept else tokenizer.decode(ours)):
            return f"text {text[:40]!r} decodes to {fast.decode(theirs)[:40]!r}"
    return None


def first_mismatch(a: list[int], b: list[int]) -> int:
    """Returns the first index at which two lists differ, or the length of the shorter one if it is a prefix."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
