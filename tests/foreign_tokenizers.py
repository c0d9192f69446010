"""Small tokenizers as others publish them, made with Hugging Face's tokenizers library, in folders as on the hub."""

import argparse
import json
from pathlib import Path
from typing import Any

from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
_CODE = Path(argparse.__file__).read_text(encoding="utf-8")[:50_000]
TEXTS = [_CODE[i : i + 800] for i in range(0, len(_CODE), 800)] + ["春眠不觉晓，处处闻啼鸟。é ß 😀 < / s > { }"] * 5


def gpt2() -> tuple[Tokenizer, dict[str, Any]]:
    """Byte-level BPE whose one special token ends documents and, by name, begins them; the tokenizer adds none."""
    made = byte_level(["<|endoftext|>"])
    made.post_processor = processors.ByteLevel(trim_offsets=False)
    names = {name: "<|endoftext|>" for name in ("bos_token", "eos_token", "unk_token")}
    return made, {"tokenizer_config.json": names}


def llama3() -> tuple[Tokenizer, dict[str, Any]]:
    """Byte-level BPE that puts <|begin_of_text|> before a text; only generation_config.json names an end."""
    made = byte_level(["<|begin_of_text|>", "<|end_of_text|>"])
    begin = [("<|begin_of_text|>", made.token_to_id("<|begin_of_text|>"))]
    template = processors.TemplateProcessing(single="<|begin_of_text|> $A", special_tokens=begin)
    made.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), template])
    return made, {"generation_config.json": {"eos_token_id": made.token_to_id("<|end_of_text|>")}}


def qwen() -> tuple[Tokenizer, dict[str, Any]]:
    """Byte-level BPE after NFC, with a chat template, a token that is plain text, and ids that no token has."""
    made = byte_level([])
    made.normalizer = normalizers.NFC()
    described = json.loads(made.to_str())
    size = len(described["model"]["vocab"])
    added = [("<|endoftext|>", size + 2, True), ("<|im_end|>", size + 3, True), ("<tool_call>", size + 7, False)]
    made.add_special_tokens(["<|endoftext|>", "<|im_end|>"])
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    described["added_tokens"] = [
        {"id": number, "content": content, "special": special, **flags} for content, number, special in added
    ]
    described["model"]["vocab"] |= {content: number for content, number, _ in added}
    eos = {"content": "<|im_end|>", "lstrip": False}
    config = {"bos_token": None, "eos_token": eos, "pad_token": "<|endoftext|>", "chat_template": TEMPLATE}
    return Tokenizer.from_str(json.dumps(described)), {"tokenizer_config.json": config}


def llama2() -> tuple[Tokenizer, dict[str, Any]]:
    """BPE with byte fallback that puts a space before a text, as sentencepiece's dummy prefix does."""
    specials = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    made = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    made.train_from_iterator(
        (part for text in TEXTS for part in text.splitlines()),
        trainers.BpeTrainer(vocab_size=900, special_tokens=specials, limit_alphabet=90, show_progress=False),
    )
    described = json.loads(made.to_str())
    described["added_tokens"] = described["added_tokens"][:3]  # the bytes are pieces of the model
    made = Tokenizer.from_str(json.dumps(described))
    parts = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    made.decoder = decoders.Sequence(parts)
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return made, {"special_tokens_map.json": {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}}


def t5() -> tuple[Tokenizer, dict[str, Any]]:
    """Unigram without byte fallback, whose model itself would make </s> of a text that spells it."""
    made = Tokenizer(models.Unigram())
    made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=500, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False
    )
    made.train_from_iterator(TEXTS, trainer)
    return made, {"config.json": {"eos_token_id": 1, "pad_token_id": 0}}


def bert() -> tuple[Tokenizer, dict[str, Any]]:
    """WordPiece in lower case that cuts and fills up texts and frames them; nothing names an end."""
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer, made.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece()
    made.train_from_iterator(
        TEXTS, trainers.WordPieceTrainer(vocab_size=600, special_tokens=specials, show_progress=False)
    )
    framed = [(name, made.token_to_id(name)) for name in ("[CLS]", "[SEP]")]
    made.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=framed)
    made.enable_truncation(16)
    made.enable_padding(length=16, pad_token="[PAD]")
    return made, {"tokenizer_config.json": {"pad_token": "[PAD]", "unk_token": "[UNK]"}}


def write(folder: Path, made: Tokenizer, files: dict[str, Any]) -> Path:
    """Writes tokenizer.json and the files beside it to `folder`, and returns it."""
    folder.mkdir(parents=True, exist_ok=True)
    made.save(str(folder / "tokenizer.json"))
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content), encoding="utf-8")
    return folder


def byte_level(specials: list[str]) -> Tokenizer:
    """Returns a byte-level BPE of some code and other text, with these special tokens."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
    )
    made.train_from_iterator(TEXTS, trainer)
    made.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in specials])
    return made


MAKERS = (gpt2, llama3, qwen, llama2, t5, bert)
