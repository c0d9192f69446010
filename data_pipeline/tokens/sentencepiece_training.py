"""Training of sentencepiece models: BPE and Unigram, both with byte fallback.

A Unigram model's scores are rounded, so that Hugging Face's Unigram gives the same ids. Runs of white space that were
too rare to be learnt are added to a trained model.
"""

import io
import re
from collections.abc import Sequence
from typing import Any

import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from configs.tokenizer import TokenizerKind, TokenizerTraining
from data_pipeline.tokens.tokenizer import BOS, CHAT_CONTROLS, EOS, PAD, SPACE, SPECIALS, UNK
from data_pipeline.tokens.vocabulary import CHUNK_CHARS, LEAST_SIZE, runs_of, too_small_for_runs

proto: Any = sentencepiece_model_pb2  # its classes are generated at import, so type checkers do not know them
PIECE = proto.ModelProto.SentencePiece
_SCORE_STEP = 2**-6


def train_model(
    sample: list[str], used: int, settings: TokenizerTraining, controls: Sequence[str], padding: Sequence[str]
) -> bytes:
    """Trains a sentencepiece model on `sample`, which has `used` bytes; returns the content of tokenizer.model.

    `controls` are the control symbols after SPECIALS, `padding` those at the end of the vocabulary. Raises ValueError
    for a vocabulary that is too small for the symbols or too large for the text.
    """
    written = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sample),
            model_writer=written,
            model_type=settings.kind.value,
            vocab_size=settings.vocab_size,
            character_coverage=settings.character_coverage,
            required_chars=_spelling([*controls, *padding]) if settings.kind == TokenizerKind.UNIGRAM else "",
            max_sentencepiece_length=settings.max_piece_length,
            byte_fallback=True,
            split_digits=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            max_sentence_length=8 * CHUNK_CHARS,
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
    model = proto.ModelProto()
    model.ParseFromString(written.getvalue())
    if settings.kind == TokenizerKind.UNIGRAM:
        _round_scores(model)
    if settings.whitespace_runs:
        _add_runs(model, settings)
    for name in padding:
        model.pieces.add(piece=name, score=0.0, type=PIECE.CONTROL)
    model.trainer_spec.vocab_size = len(model.pieces)
    return model.SerializeToString(deterministic=True)


def _spelling(controls: Sequence[str]) -> str:
    """Returns the characters that spell control symbols and byte pieces, each once.

    Hugging Face's Unigram prefers a piece that spells a control symbol to two unknown characters, so that text may only
    contain known ones where it could spell one.
    """
    return "".join(sorted(set("".join([*SPECIALS, *controls, *(f"<0x{byte:02X}>" for byte in range(256))]))))


def _round_scores(model: Any) -> None:
    """Rounds the scores of a Unigram model's pieces to multiples of _SCORE_STEP.

    sentencepiece sums the scores of a text in float32 and Hugging Face in float64. Sums of rounded scores are exact in
    both, so that both choose the same pieces.
    """
    for piece in model.pieces:
        if piece.type == PIECE.NORMAL:
            piece.score = round(piece.score / _SCORE_STEP) * _SCORE_STEP


def _add_runs(model: Any, settings: TokenizerTraining) -> None:
    """Makes each run of spaces or tabs up to `whitespace_runs` one piece, in place of the least useful other pieces.

    Raises ValueError if the vocabulary has too few pieces to replace.
    """
    normal = {piece.piece: piece.score for piece in model.pieces if piece.type == PIECE.NORMAL}
    runs = runs_of(f"{SPACE}\t", settings.whitespace_runs)
    missing = [run for run in runs if run not in normal]
    replaceable = sorted((piece for piece in normal if len(piece) > 1 and piece not in runs), key=normal.__getitem__)
    if len(replaceable) < len(missing):
        raise ValueError(too_small_for_runs(settings, len(missing) - len(replaceable)))
    gone = set(replaceable[: len(missing)])
    kept = [piece for piece in model.pieces if piece.piece not in gone or piece.type != PIECE.NORMAL]
    del model.pieces[:]
    model.pieces.extend(kept)
    known = {name: score for name, score in normal.items() if name not in gone}
    scores = _unigram_scores(runs, known) if settings.kind == TokenizerKind.UNIGRAM else _bpe_scores(missing, known)
    for piece in model.pieces:
        if piece.type == PIECE.NORMAL:
            piece.score = scores.pop(piece.piece, piece.score)
    for run, score in scores.items():
        model.pieces.add(piece=run, score=score, type=PIECE.NORMAL)


def _bpe_scores(runs: Sequence[str], known: dict[str, float]) -> dict[str, float]:
    """Returns the score of each run, which is its rank among the merges: after all others, shorter runs first."""
    last = min(known.values())
    return {run: last - number for number, run in enumerate(runs, 1)}


def _unigram_scores(runs: Sequence[str], known: dict[str, float]) -> dict[str, float]:
    """Returns the score of each run, which is above that of any pieces that it could be divided into.

    A learnt score stays if it is. Others are just above, so that the pieces of other text hardly change.
    """
    scores, lowest = dict(known), min(known.values())
    for run in runs:
        parts = [
            scores[run[:at]] + scores[run[at:]] for at in range(1, len(run)) if {run[:at], run[at:]} <= set(scores)
        ]
        least = max(parts) + _SCORE_STEP if parts else lowest
        scores[run] = max(scores.get(run, least), least)
    return {run: scores[run] for run in runs}


def _remedy(said: str) -> str:
    """Returns what to do about a refused vocabulary size, from the trainer's message, which has the possible sizes."""
    if "required_chars" in said:  # not even single characters fit
        least = re.search(r"\d+ vs (\d+)", said)
        return f"raise tokenizer.vocab_size{f' to {least[1]}' if least else ''}"
    most = re.search(r"value <= (\d+)", said)
    if most and int(most[1]) < LEAST_SIZE:
        return "give it more text"
    return f"lower tokenizer.vocab_size{f' to {most[1]}' if most else ''}, or give it more text"
