"""Tiny models with random weights, as export and import see them, and a small real tokenizer with hard strings."""

import argparse
import contextlib
import random
from pathlib import Path

import sentencepiece
import torch

from configs.loader import plain
from configs.model import ModelConfig
from configs.model_parts import NormConfig, PositionConfig
from configs.moe import MoEConfig
from export.conversion.tensor_shapes import parameters
from export.model_source import ModelSource, Weights
from pretrain.checkpoint import storage
from pretrain.checkpoint.lineage import Lineage
from pretrain.model import Decoder, init_weights

CONTROLS = ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
CHINESE = "春眠不觉晓，处处闻啼鸟。夜来风雨声，花落知多少。白日依山尽，黄河入海流。欲穷千里目，更上一层楼。"
# With a backslash and indented lines, as in code, which tokenizers have to keep.
ENGLISH = (
    "\\ It was the best of times, it was the worst of times, it was the age of wisdom, it was the age of\n"
    "    foolishness, it was the epoch of belief, it was the epoch of incredulity, it was the season of Light, it\n"
    "    was the season of Darkness, it was the spring of hope, it was the winter of despair, we had everything\n"
    "    before us.\n"
)


def train_tokenizer(folder: Path) -> Path:
    """Trains a byte-fallback BPE tokenizer with the data pipeline's settings on prose, poems and Python."""
    code = Path(argparse.__file__).read_text(encoding="utf-8")
    texts = [code[i : i + 1500] for i in range(0, 60_000, 1500)] + [CHINESE, ENGLISH] * 20
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=800,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=3,
        control_symbols=CONTROLS,
        num_threads=1,
        minloglevel=3,
    )
    return folder / "tokenizer.model"


def tiny(moe: bool = False, tie: bool = False, vocab_size: int = 800) -> ModelConfig:
    """Returns a model config whose values are not the defaults, so that a test fails if a conversion loses one."""
    return ModelConfig(
        vocab_size=vocab_size,
        num_layers=3,
        hidden_size=32,
        ffn_hidden_size=48,
        num_heads=4,
        num_kv_heads=2,
        head_dim=12,
        norm=NormConfig(eps=3e-5),
        position=PositionConfig(theta=5000.0),
        tie_embeddings=tie,
        moe=MoEConfig(num_experts=4, top_k=2) if moe else None,
    )


def wide_decoder(vocab_size: int, moe: MoEConfig | None = None) -> Decoder:
    """Returns a decoder of two layers whose distribution over the vocabulary is far from uniform."""
    config = ModelConfig(
        vocab_size=vocab_size,
        num_layers=2,
        hidden_size=32,
        ffn_hidden_size=64,
        num_heads=4,
        num_kv_heads=2,
        init_std=0.3,
        moe=moe,
    )
    model = Decoder(config)
    init_weights(model, seed=1)
    return model.eval()


def random_weights(config: ModelConfig, seed: int = 0) -> dict[str, torch.Tensor]:
    """Draws weights large enough that a change of any one changes the logits."""
    generator = torch.Generator().manual_seed(seed)
    weights = {name: torch.randn(shape, generator=generator) * 0.3 for name, shape in parameters(config).items()}
    return {name: tensor + 1.0 if "norm" in name else tensor for name, tensor in weights.items()}


def write_imported(folder: Path, config: ModelConfig, tokenizer: Path, template: str | None = None) -> Path:
    """Writes a model with random weights as `trivium import` would, with a context of 128 tokens."""
    lineage = Lineage(tokenizer, template, 128, imported={"source": "a test"})
    final, pieces = storage.directory(folder, 0), {}
    for name, tensor in random_weights(config).items():
        shape = tuple(tensor.shape)
        piece = storage.Piece(name, shape, (0,) * len(shape), shape, 0, tensor.numel())
        pieces[name] = (piece, {"weight": tensor.flatten()})
    temporary = storage.temporary_name(final)
    temporary.mkdir(parents=True)
    part = storage.write_pieces(temporary, "weights_00001.safetensors", pieces)
    state = {"step": 0, "identity": lineage.identity, "context": 128, **lineage.facts}
    storage.publish(temporary, final, [part], state | {"config": {"model": plain(config)}}, kinds=("weight",))
    lineage.keep(folder, lineage.identity)
    return folder


def make_source(
    config: ModelConfig, weights: dict[str, torch.Tensor], tokenizer: Path, template: str | None = None
) -> ModelSource:
    return ModelSource(
        path=Path("runs/test/checkpoints/step_3"),
        step=3,
        model=config,
        weights=lambda: contextlib.nullcontext(
            Weights({name: tuple(tensor.shape) for name, tensor in weights.items()}, weights.__getitem__)
        ),
        identify=lambda: "0" * 64,
        context=128,
        tokenizer=tokenizer,
        chat_template=template,
    )


def odd_strings(count: int, pieces: list[str], seed: int = 0) -> list[str]:
    """Draws strings that are hard for tokenizers: random pieces, repeated characters, arbitrary code points."""
    draw = random.Random(seed)

    def code_point() -> str:
        low, high = draw.choice([(0, 127), (0, 0x3000), (0x4E00, 0x9FFF), (0x1F300, 0x1F700), (0xE000, 0x110000)])
        return chr(draw.randrange(low, high))

    strings = []
    for i in range(count):
        if i % 3 == 0:
            strings.append("".join(draw.choice(pieces) for _ in range(draw.randrange(1, 40))))
        elif i % 3 == 1:
            letters = draw.sample("abei \n=-_.()\"'\t,0123不花", 3)
            strings.append("".join(draw.choice(letters) for _ in range(draw.randrange(1, 120))))
        else:
            strings.append("".join(code_point() for _ in range(draw.randrange(1, 40))))
    return strings
