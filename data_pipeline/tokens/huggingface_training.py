"""Training of tokenizers of Hugging Face's library: byte-level BPE and WordPiece."""

import json
from collections import Counter
from collections.abc import Sequence

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers

from configs.tokenizer import TokenizerKind, TokenizerTraining
from data_pipeline.tokens.huggingface_tokenizer import byte_alphabet
from data_pipeline.tokens.tokenizer import UNK
from data_pipeline.tokens.vocabulary import LEAST_SIZE, runs_of, too_small_for_runs

# Words with the space before them, single digits, runs of other signs, and runs of white space, as in GPT-2; a run of
# spaces before a word leaves the last one to it.
_WORDS = tokenizers.Regex(r"\p{N}| ?[\p{L}\p{M}]+| ?[^\s\p{L}\p{M}\p{N}]+|\s+(?!\S)|\s+")
_INNER = "##"  # begins the pieces of WordPiece that do not begin a word


def train_json(
    sample: list[str], used: int, settings: TokenizerTraining, specials: Sequence[str], padding: Sequence[str]
) -> bytes:
    """Trains on `sample`, which has `used` bytes; returns the content of tokenizer.json.

    `specials` are the control symbols in the order of their ids, `padding` those at the end of the vocabulary. Raises
    ValueError for a vocabulary that is too small for the symbols or too large for the text.
    """
    learn = _byte_bpe if settings.kind == TokenizerKind.BYTE_BPE else _wordpiece
    fast = learn(sample, settings, specials)
    _check_size(fast, settings.vocab_size, used)
    if settings.whitespace_runs:
        fast = _with_runs(fast, settings, specials)
    fast.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in padding])
    return (fast.to_str(pretty=True) + "\n").encode()


def _byte_bpe(sample: list[str], settings: TokenizerTraining, specials: Sequence[str]) -> tokenizers.Tokenizer:
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


def _wordpiece(sample: list[str], settings: TokenizerTraining, specials: Sequence[str]) -> tokenizers.Tokenizer:
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


def _check_size(fast: tokenizers.Tokenizer, wanted: int, used: int) -> None:
    """Raises ValueError if the vocabulary has not the `wanted` size; `used` are the bytes of text it was trained on."""
    if (size := fast.get_vocab_size()) != wanted:
        remedy = f"raise tokenizer.vocab_size to {size}"
        if size < wanted:  # no config allows a size below the least
            remedy = f"lower tokenizer.vocab_size to {size}, or " if size >= LEAST_SIZE else ""
            remedy += "give it more text"
        raise ValueError(
            f"tokenizer.vocab_size = {wanted} cannot be met with {used:,} bytes of text, which give {size} pieces; "
            f"{remedy}"
        )


def _with_runs(
    fast: tokenizers.Tokenizer, settings: TokenizerTraining, specials: Sequence[str]
) -> tokenizers.Tokenizer:
    """Makes each run of spaces or tabs up to `whitespace_runs` one token, in place of the tokens that were learnt last.

    Their merges come after all others. Raises ValueError if the vocabulary has too few tokens to replace.
    """
    described = json.loads(fast.to_str())
    model = described["model"]
    pieces = sorted(model["vocab"], key=model["vocab"].__getitem__)
    runs = runs_of(
        "".join(spelling for spelling, byte in byte_alphabet().items() if byte in b" \t"), settings.whitespace_runs
    )
    missing = [run for run in runs if run not in model["vocab"]]
    replaceable = [piece for piece in pieces if len(piece) > 1 and piece not in runs and piece not in specials]
    if len(replaceable) < len(missing):
        raise ValueError(too_small_for_runs(settings, len(missing) - len(replaceable)))
    gone = set(replaceable[len(replaceable) - len(missing) :])
    merges = [tuple(pair) for pair in model["merges"] if not gone & {*pair, "".join(pair)}]
    known = set(merges)
    divided = [(run[:at], run[at:]) for run in runs for at in range(1, len(run))]
    merges += [pair for pair in divided if pair not in known]
    kept = [piece for piece in pieces if piece not in gone] + missing
    made = tokenizers.Tokenizer(models.BPE({piece: number for number, piece in enumerate(kept)}, merges))
    made.pre_tokenizer, made.decoder = fast.pre_tokenizer, fast.decoder
    made.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in specials])
    return made
