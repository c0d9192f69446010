"""Training of tokenizers: sentencepiece BPE and Unigram, byte-level BPE and WordPiece.

All kinds train on the same sample of text, have the same control symbols under the same ids, and split digits, so that
a number is as many tokens as it has digits. The algorithms are in `sentencepiece_training` and `huggingface_training`.
"""

import hashlib
import heapq
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from configs.files import write_atomic
from configs.tokenizer import TokenizerKind, TokenizerTraining
from data_pipeline.tokens.huggingface_training import train_json
from data_pipeline.tokens.sentencepiece_tokenizer import BPE_KIND, UNIGRAM_KIND
from data_pipeline.tokens.sentencepiece_training import train_model
from data_pipeline.tokens.tokenizer import HUGGINGFACE_FILE, INFO_FILE, SENTENCEPIECE_FILE, SPECIALS
from data_pipeline.tokens.training_text import shard_texts
from data_pipeline.tokens.vocabulary import CHUNK_CHARS, padding, symbols

_KIND_NAMES = {TokenizerKind.BPE: BPE_KIND, TokenizerKind.UNIGRAM: UNIGRAM_KIND}
# sentencepiece's trainer skips a sentence that contains its own marks, so texts are split at them.
_TRAINER_MARKS = re.compile("[\t\0\u2581\u2585]")


def train(
    inputs: Sequence[Path],
    out: Path,
    settings: TokenizerTraining,
    *,
    controls: Sequence[str] = (),
    progress: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Trains on the texts of shards as `train_on_texts` does; also raises ValueError for a missing or damaged shard."""
    return train_on_texts(shard_texts(inputs), out, settings, controls=controls, progress=progress)


def train_on_texts(
    texts: Iterable[str],
    out: Path,
    settings: TokenizerTraining,
    *,
    controls: Sequence[str] = (),
    progress: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Trains on up to `settings.train_bytes` of UTF-8 text and publishes the model in folder `out`.

    The model depends on the texts alone, not on their order. `controls` are control symbols beyond SPECIALS and those
    of `settings`, whose ids follow those of SPECIALS. `progress` is called with the bytes of text read since its last
    call. Returns the content of info.json. Raises ValueError for no text at all, and for a vocabulary that is too small
    for the symbols or too large for the text.
    """
    specials, filling = symbols(settings, controls), padding(settings)
    marks = _TRAINER_MARKS if settings.kind in _KIND_NAMES else None
    sample, used, available = _sample(texts, settings.train_bytes, settings.seed, marks, progress)
    if not sample:
        raise ValueError("there is no text to train a tokenizer on; check what the filters dropped, or name more files")
    if settings.kind in _KIND_NAMES:
        file, model = SENTENCEPIECE_FILE, train_model(sample, used, settings, specials[len(SPECIALS) :], filling)
    else:
        file, model = HUGGINGFACE_FILE, train_json(sample, used, settings, specials, filling)
    ids = {name: number for number, name in enumerate(specials)}
    ids |= {name: number for number, name in enumerate(filling, settings.vocab_size)}
    info = {
        "kind": _KIND_NAMES.get(settings.kind, settings.kind.value),
        "vocab_size": settings.vocab_size + len(filling),
        "special_ids": ids,
        "sha256": hashlib.sha256(model).hexdigest(),
        "trained_on_bytes": used,
        "available_bytes": available,
        "settings": settings.model_dump(
            mode="json", include=set(TokenizerTraining.model_fields) - {"kind", "vocab_size"}
        ),
    }
    out = Path(out)
    write_atomic(out / file, model)
    write_atomic(out / INFO_FILE, (json.dumps(info, indent=1) + "\n").encode())
    return info


def _sample(
    texts: Iterable[str],
    limit: int,
    seed: int,
    marks: re.Pattern[str] | None,
    progress: Callable[[int], None] | None,
) -> tuple[list[str], int, int]:
    """Draws up to `limit` bytes of chunks, those with the lowest hashes of seed and content.

    Returns (chunks by ascending hash, their bytes, bytes of all texts). Takes one pass and memory in proportion to
    `limit`. The draw does not depend on the order of texts.
    """
    chosen: list[tuple[int, str]] = []
    used = available = 0
    bar = 2**64
    for text in texts:
        read = len(text.encode())
        available += read
        for chunk in _chunks(text, marks):
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
    """Yields pieces of `text` of up to CHUNK_CHARS characters, split at line ends if possible, and at all `marks`."""
    for part in marks.split(text) if marks else [text]:
        chunk = ""
        for line in part.splitlines(keepends=True):
            if chunk and len(chunk) + len(line) > CHUNK_CHARS:
                yield chunk
                chunk = ""
            while len(line) > CHUNK_CHARS:
                yield line[:CHUNK_CHARS]
                line = line[CHUNK_CHARS:]
            chunk += line
        if chunk:
            yield chunk
