"""Token stores of two small sources, prose and Python, with held-out documents, for tests that only need tokens."""

from pathlib import Path

from configs.tokenizer import TokenizerConfig
from data_pipeline.tokens.store import build
from data_pipeline.tokens.tokenizer import Tokenizer
from data_pipeline.tokens.tokenizer_training import train
from tests.shards import write_shard

ROOT = Path(__file__).resolve().parents[1]
VOCAB = 511
CHINESE = "春眠不觉晓，处处闻啼鸟。夜来风雨声，花落知多少。白日依山尽，黄河入海流。欲穷千里目，更上一层楼。"


def make_tokens(folder: Path) -> tuple[Path, Path]:
    """Returns the folders of token stores and tokenizer. Documents of prose alone have a language."""
    lines = (ROOT / "pretrain/trainer.py").read_text(encoding="utf-8").splitlines(keepends=True)
    code = ["".join(lines[i : i + 12]) for i in range(0, len(lines), 12)]
    prose = [f"{CHINESE}\n{(ROOT / 'LICENSE').read_text()[i : i + 400]}" for i in range(0, 8000, 400)]
    for source, texts in (("code", code), ("prose", prose)):
        for split, part in (("train", texts[:-3]), ("heldout", texts[-3:])):
            languages = ({"language": ("zh", "en")[i % 2]} if source == "prose" else {} for i in range(len(part)))
            records = (
                {"text": text, "id": f"{source}{i}", "metadata": metadata}
                for i, (text, metadata) in enumerate(zip(part, languages, strict=True))
            )
            write_shard(folder / f"{split}.{source}.jsonl.zst", records)
    train(
        [folder / "train.code.jsonl.zst", folder / "train.prose.jsonl.zst"],
        folder / "tokenizer",
        TokenizerConfig(vocab_size=VOCAB),
    )
    tokenizer = Tokenizer.load(folder / "tokenizer")
    for source in ("code", "prose"):
        for split in ("train", "heldout"):
            build(folder / f"{split}.{source}.jsonl.zst", folder / "tokens" / split / source / "00000", tokenizer)
    return folder / "tokens", folder / "tokenizer"
