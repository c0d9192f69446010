"""Training of tokenizers: sentencepiece BPE and Unigram, byte-level BPE and WordPiece.

All kinds train on the same sample of text, have the same control symbols under the same ids, and split digits, so that
a number is as many tokens as it has digits.
"""

import hashlib
import heapq
import io
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import sentencepiece
import tokenizers
from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers

from configs.data import TokenizerConfig, TokenizerKind
from configs.files import write_atomic
from data_pipeline.core.shards import read_records
from data_pipeline.tokens.sentencepiece_tokenizer import BPE_KIND, UNIGRAM_KIND
from data_pipeline.tokens.tokenizer import (
    BOS,
    CHAT_CONTROLS,
    EOS,
    HUGGINGFACE_FILE,
    INFO_FILE,
    PAD,
    SENTENCEPIECE_FILE,
    SPECIALS,
    UNK,
)

_KIND_NAMES = {TokenizerKind.BPE: BPE_KIND, TokenizerKind.UNIGRAM: UNIGRAM_KIND}
_LEAST_SIZE = 300  # the smallest tokenizer.vocab_size that a config allows
_CHUNK_CHARS = 1000  # training reads chunks of documents of about this size, split at line ends
# sentencepiece's trainer skips a sentence that contains its own marks, so texts are split at them.
_TRAINER_MARKS = re.compile("[\t\0\u2581\u2585]")
# Words with the space before them, single digits, runs of other signs, and runs of white space, as in GPT-2; a run of
# spaces before a word leaves the last one to it.
_WORDS = tokenizers.Regex(r"\p{N}| ?[\p{L}\p{M}]+| ?[^\s\p{L}\p{M}\p{N}]+|\s+(?!\S)|\s+")
_SCORE_STEP = 2**-6
_INNER = "##"  # begins the pieces of WordPiece that do not begin a word


def train(
    inputs: Sequence[Path],
    out: Path,
    settings: TokenizerConfig,
    *,
    controls: Sequence[str] = (),
    progress: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Trains on up to `settings.train_bytes` of UTF-8 text from JSONL files and publishes the model in folder `out`.

    The model depends on the texts alone, not on their order or their distribution over files. `controls` are control
    symbols beyond SPECIALS, whose ids follow theirs. `progress` is called with the bytes of text read since its last
    call. Returns the content of info.json. Raises ValueError for missing or damaged files, for no text at all, and
    for a vocabulary that is too small for the symbols or too large for the text.
    """
    specials = (*SPECIALS, *controls)
    if settings.vocab_size < (least := len(specials) + 256 + 1):
        raise ValueError(
            f"tokenizer.vocab_size = {settings.vocab_size} is too small: {len(specials)} control symbols, 256 "
            f"bytes and one piece take {least}"
        )
    marks = _TRAINER_MARKS if settings.kind in _KIND_NAMES else None
    sample, used, available = _sample(inputs, settings.train_bytes, settings.seed, marks, progress)
    if not sample:
        raise ValueError(f"no text to train a tokenizer on in {len(inputs)} files; check what the filters dropped")
    if settings.kind in _KIND_NAMES:
        file, model = SENTENCEPIECE_FILE, _sentencepiece(sample, used, settings, controls)
    else:
        learn = _byte_bpe if settings.kind == TokenizerKind.BYTE_BPE else _wordpiece
        file, model = HUGGINGFACE_FILE, _file_of(learn(sample, settings, specials), settings.vocab_size, used)
    info = {
        "kind": _KIND_NAMES.get(settings.kind, settings.kind.value),
        "vocab_size": settings.vocab_size,
        "special_ids": {name: number for number, name in enumerate(specials)},
        "sha256": hashlib.sha256(model).hexdigest(),
        "trained_on_bytes": used,
        "available_bytes": available,
        "settings": {
            "seed": settings.seed,
            "train_bytes": settings.train_bytes,
            "character_coverage": settings.character_coverage,
            "max_piece_length": settings.max_piece_length,
        },
    }
    out = Path(out)
    write_atomic(out / file, model)
    write_atomic(out / INFO_FILE, (json.dumps(info, indent=1) + "\n").encode())
    return info


def _sentencepiece(sample: list[str], used: int, settings: TokenizerConfig, controls: Sequence[str]) -> bytes:
    """Trains a sentencepiece model on `sample`, which has `used` bytes; returns the content of tokenizer.model."""
    written = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sample),
            model_writer=written,
            model_type=settings.kind.value,
            vocab_size=settings.vocab_size,
            character_coverage=settings.character_coverage,
            required_chars=_spelling(controls) if settings.kind == TokenizerKind.UNIGRAM else "",
            max_sentencepiece_length=settings.max_piece_length,
            byte_fallback=True,
            split_digits=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            max_sentence_length=8 * _CHUNK_CHARS,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=3,
            unk_piece=UNK,
            bos_piece=BOS,
            eos_piece=EOS,
            pad_piece=PAD,
            control_symbols=[*CHAT_CONTROLS, *controls],
            num_threads=1,  # the order of equal counts must not depend on threads
            minloglevel=2,
        )
    except RuntimeError as error:
        said = " ".join(str(error).split())
        raise ValueError(
            f"sentencepiece cannot make tokenizer.vocab_size = {settings.vocab_size} pieces from {used:,} bytes of "
            f"text; {_remedy(said)} (it says: {said})"
        ) from None
    return _round_scores(written.getvalue()) if settings.kind == TokenizerKind.UNIGRAM else written.getvalue()


def _spelling(controls: Sequence[str]) -> str:
    """Returns the characters that spell control symbols and byte pieces, each once.

    Hugging Face's Unigram prefers a piece that spells a control symbol to two unknown characters, so that text may only
    contain known ones where it could spell one.
    """
    return "".join(sorted(set("".join([*SPECIALS, *controls, *(f"<0x{byte:02X}>" for byte in range(256))]))))


def _round_scores(model: bytes) -> bytes:
    """Returns a Unigram model whose scores are multiples of _SCORE_STEP.

    sentencepiece sums the scores of a text in float32 and Hugging Face in float64. Sums of rounded scores are exact in
    both, so that both choose the same pieces.
    """
    proto: Any = sentencepiece_model_pb2  # its classes are generated at import, so type checkers do not know them
    parsed = proto.ModelProto()
    parsed.ParseFromString(model)
    for piece in parsed.pieces:
        if piece.type == proto.ModelProto.SentencePiece.NORMAL:
            piece.score = round(piece.score / _SCORE_STEP) * _SCORE_STEP
    return parsed.SerializeToString(deterministic=True)


def _byte_bpe(sample: list[str], settings: TokenizerConfig, specials: Sequence[str]) -> tokenizers.Tokenizer:
    """Trains byte-level BPE, as GPT-2's, on `sample`."""
    fast = tokenizers.Tokenizer(models.BPE())
    in_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    fast.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(_WORDS, behavior="isolated"), in_bytes])
    fast.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=settings.vocab_size,
        special_tokens=list(specials),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        max_token_length=settings.max_piece_length,
        show_progress=False,
    )
    fast.train_from_iterator(sample, trainer)
    return fast


def _wordpiece(sample: list[str], settings: TokenizerConfig, specials: Sequence[str]) -> tokenizers.Tokenizer:
    """Trains WordPiece, as BERT's for cased text, on `sample`.

    The library's own trainer numbers pieces like ##a in the order of a randomly seeded hash table, so that its models
    differ from run to run. Here these pieces are given to it in order, as if they were special.
    """
    fast = tokenizers.Tokenizer(models.BPE())
    fast.normalizer = normalizers.BertNormalizer(clean_text=False, strip_accents=False, lowercase=False)
    parts = [pre_tokenizers.BertPreTokenizer(), pre_tokenizers.Digits(individual_digits=True)]
    fast.pre_tokenizer = pre_tokenizers.Sequence(parts)
    counts, inner = Counter[str](), set[str]()
    for text in sample:
        for word, _ in fast.pre_tokenizer.pre_tokenize_str(fast.normalizer.normalize_str(text)):
            counts.update(word)
            inner.update(word[1:])
    characters = _covering(counts, settings.character_coverage)
    followers = [_INNER + one for one in characters if one in inner]
    trainer = trainers.BpeTrainer(
        vocab_size=settings.vocab_size,
        special_tokens=[*specials, *followers],
        initial_alphabet=characters,
        limit_alphabet=len(characters),
        continuing_subword_prefix=_INNER,
        show_progress=False,
    )
    fast.train_from_iterator(sample, trainer)
    made = tokenizers.Tokenizer(models.WordPiece(fast.get_vocab(), unk_token=UNK, continuing_subword_prefix=_INNER))
    made.normalizer, made.pre_tokenizer = fast.normalizer, fast.pre_tokenizer
    made.decoder = decoders.WordPiece(prefix=_INNER, cleanup=False)
    made.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in specials])
    return made


def _covering(counts: Counter[str], coverage: float) -> list[str]:
    """Returns, sorted, the most frequent characters that together make up this share of a text."""
    chosen: list[str] = []
    left = coverage * counts.total()
    for one, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
        if left <= 0:
            break
        chosen.append(one)
        left -= count
    return sorted(chosen)


def _file_of(fast: tokenizers.Tokenizer, wanted: int, used: int) -> bytes:
    """Returns the content of tokenizer.json; raises ValueError if the vocabulary has not the `wanted` size.

    `used` is the number of bytes of text that it was trained on.
    """
    if (size := fast.get_vocab_size()) != wanted:
        remedy = f"raise tokenizer.vocab_size to {size}"
        if size < wanted:  # no config allows a size below the least
            remedy = f"lower tokenizer.vocab_size to {size}, or " if size >= _LEAST_SIZE else ""
            remedy += "give it more text"
        raise ValueError(
            f"tokenizer.vocab_size = {wanted} cannot be met with {used:,} bytes of text, which give {size} pieces; "
            f"{remedy}"
        )
    return (fast.to_str(pretty=True) + "\n").encode()


def _remedy(said: str) -> str:
    """Returns what to do about a refused vocabulary size, from the trainer's message, which has the possible sizes."""
    if "required_chars" in said:  # not even single characters fit
        least = re.search(r"\d+ vs (\d+)", said)
        return f"raise tokenizer.vocab_size{f' to {least[1]}' if least else ''}"
    most = re.search(r"value <= (\d+)", said)
    if most and int(most[1]) < _LEAST_SIZE:
        return "give it more text"
    return f"lower tokenizer.vocab_size{f' to {most[1]}' if most else ''}, or give it more text"


def _sample(
    inputs: Sequence[Path],
    limit: int,
    seed: int,
    marks: re.Pattern[str] | None,
    progress: Callable[[int], None] | None,
) -> tuple[list[str], int, int]:
    """Draws up to `limit` bytes of chunks, those with the lowest hashes of seed and content.

    Returns (chunks by ascending hash, their bytes, bytes of all texts). Takes one pass and memory in proportion to
    `limit`. The draw does not depend on files and their order.
    """
    chosen: list[tuple[int, str]] = []
    used = available = 0
    bar = 2**64
    for path in inputs:
        for document in read_records(path):
            read = len(document["text"].encode())
            available += read
            for chunk in _chunks(document["text"], marks):
                digest = hashlib.blake2b(chunk.encode(), digest_size=8, key=seed.to_bytes(8, "little")).digest()
                drawn = int.from_bytes(digest, "little")
                if drawn >= bar:
                    continue
                heapq.heappush(chosen, (-drawn, chunk))
                used += len(chunk.encode())
                # No later chunk with a higher hash than a removed one gets in, or the order of reading would matter.
                while used > limit or (chosen and -chosen[0][0] >= bar):
                    highest, put_out = heapq.heappop(chosen)
                    used -= len(put_out.encode())
                    bar = -highest
            if progress:
                progress(read)
    return [chunk for _, chunk in sorted(chosen, reverse=True)], used, available


def _chunks(text: str, marks: re.Pattern[str] | None) -> Iterator[str]:
    """Yields pieces of `text` of up to _CHUNK_CHARS characters, split at line ends if possible, and at all `marks`."""
    for part in marks.split(text) if marks else [text]:
        chunk = ""
        for line in part.splitlines(keepends=True):
            if chunk and len(chunk) + len(line) > _CHUNK_CHARS:
                yield chunk
                chunk = ""
            while len(line) > _CHUNK_CHARS:
                yield line[:_CHUNK_CHARS]
                line = line[_CHUNK_CHARS:]
            chunk += line
        if chunk:
            yield chunk
