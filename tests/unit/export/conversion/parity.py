"""Checks of one family: a tiny random model that transformers makes is imported and exported again.

`check_both_ways` compares logits at all positions, every gradient, every tensor and the config; families call it with
sizes of which no two are equal, so that a tensor in a wrong form does not fit by chance.
"""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from configs.model import ModelConfig
from configs.sampling import GREEDY
from export.conversion.walk import convert
from export.hf_config import to_hf_config
from export.hf_folder import HFFolder, open_hf_folder
from export.hf_writer import reader_as, write_weights
from export.import_hf import import_directory
from export.model_source import ModelSource, open_source
from export.tensors import TensorFolder, scan_tensors
from pretrain.generation.sampling import generate
from pretrain.model import Decoder, build_single
from pretrain.model.batch import Batch
from pretrain.model.documents import Documents
from pretrain.model.head_loss import HeadLoss
from pretrain.model.losses import NextToken

LENGTH = 40
TOKENS = torch.randint(0, 96, (2, LENGTH), generator=torch.Generator().manual_seed(1))
LOGITS, GRADIENTS = 1e-4, 1e-4  # the largest difference of a logit; of a gradient as a share of its norm


def random_model(model_type: str, dtype: torch.dtype = torch.float32, **keys: Any) -> Any:
    """Returns a model of transformers whose every tensor is random, biases and norms too."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **keys), dtype=dtype)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            tensor.copy_(torch.randn(tensor.shape) * 0.2 + (1.0 if "norm" in name and "bias" not in name else 0.0))
    return model.eval()


def check_both_ways(tmp_path: Path, model: Any, tokens: torch.Tensor = TOKENS) -> ModelSource:
    """Imports the model, compares everything, exports it again, and returns what was imported."""
    model.save_pretrained(tmp_path / "hf", max_shard_size="60KB")
    import_directory(tmp_path / "hf", tmp_path / "ours")
    source, opened = open_source(tmp_path / "ours"), open_hf_folder(tmp_path / "hf")
    decoder = build_single(source.model, source.read())
    theirs = model.float()(tokens).logits
    ours = _logits(decoder, tokens)
    assert (ours - theirs).abs().max() < LOGITS
    _compare_gradients(tmp_path / "gradients", opened, model, decoder, (ours, theirs), tokens)
    written = export_again(source, tmp_path / "back")
    assert set(written.files) == set(opened.tensors.files)
    for name in written.files:
        first, again = opened.tensors.read(name), written.read(name)
        assert first.dtype == again.dtype, name
        assert torch.equal(first, again), name
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "back", dtype=torch.float32, local_files_only=True).eval()
    assert type(back) is type(model)
    with torch.no_grad():
        assert (back(tokens).logits - theirs).abs().max() < 1e-6
    return source


def export_again(source: ModelSource, folder: Path) -> TensorFolder:
    """Writes weights and config.json of an imported model into a folder, and returns its tensors."""
    import json

    from export.conversion.family_registry import family_of

    folder.mkdir()
    family = family_of(source.model, source.architecture)
    with source.weights() as weights:
        read = reader_as("auto", family, source.model, weights)
        write_weights(family, source.model, weights, read, 1.0, folder)
        raw = to_hf_config(source.model, source.context, "float32", 1, 2, None, source.architecture)
        (folder / "config.json").write_text(json.dumps(raw | weights.kept_keys))
    return scan_tensors(folder)


def exported_logits(config: ModelConfig, weights: dict[str, torch.Tensor], folder: Path) -> torch.Tensor:
    """Returns the logits of transformers' model of a folder written from Trivium's weights."""
    from tests.tiny_models import make_source

    export_again(make_source(config, weights, Path("no tokenizer")), folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()
    with torch.no_grad():
        return model(TOKENS).logits


def _logits(decoder: Decoder, tokens: torch.Tensor) -> torch.Tensor:
    return decoder(tokens, torch.arange(tokens.shape[1])[None].expand_as(tokens))


def _compare_gradients(
    folder: Path,
    opened: HFFolder,
    model: Any,
    decoder: Decoder,
    logits: tuple[torch.Tensor, torch.Tensor],
    tokens: torch.Tensor,
) -> None:
    """Compares the gradients of the loss, under the names that transformers saves tensors by.

    transformers joins some tensors in memory; so its gradients take the place of the weights and are saved.
    """
    for side in logits:
        F.cross_entropy(side[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
    mine = {name: parameter.grad for name, parameter in decoder.named_global_parameters()}
    mine |= {name: torch.zeros_like(tensor) for name, tensor in decoder.named_balance().items()}
    weights = {name: parameter.data.clone() for name, parameter in model.named_parameters()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.grad if parameter.grad is not None else torch.zeros_like(parameter))
    model.save_pretrained(folder)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights[name])
    theirs = scan_tensors(folder)
    # Some gradients are nothing but rounding, as that of a bias of keys: they are compared with the norm of all.
    least = 1e-3 * torch.stack([theirs.read(name).norm() for name in theirs.files]).norm()
    for name, ours in convert(opened.fit.walked, lambda name: mine[name], opened.model, "theirs"):
        if any("balance" in part for entry in opened.fit.walked if name in entry.theirs for part in entry.ours):
            continue
        other = theirs.read(name)
        assert (ours - other).norm() < GRADIENTS * (other.norm() + least), name


def loss_of_modules(source: ModelSource, tokens: torch.Tensor) -> list[float]:
    """Returns the mean loss of each module on one text in a row."""
    decoder = build_single(source.model, source.read())
    row = torch.arange(tokens.shape[1])[None]
    mask = (row < tokens.shape[1] - 1).float()
    batch = Batch(
        tokens=tokens,
        labels=torch.roll(tokens, -1, 1),
        loss_mask=mask,
        positions=row,
        segments=torch.zeros_like(row),
        sources=torch.zeros(1, dtype=torch.int64),
        trained=mask.flatten().nonzero()[:, 0],
        documents=Documents.of(torch.zeros_like(row)),
        lengths=torch.full_like(row, tokens.shape[1]),
    ).with_ahead(source.model.head.mtp_depth)
    loss = HeadLoss(batch, NextToken(), 1.0, 1, 1.0)
    decoder(tokens, row, wanted=batch.trained, loss=loss)
    return [float(own.sums[0] / own.sums[1]) for own in loss.modules]


PROMPTS = [[7, 3, 9, 11, 5], [2], list(range(20, 43))]


def check_greedy(model: Any, source: ModelSource, count: int = 20) -> None:
    """Compares greedy tokens, by our cache in one batch of prompts and by transformers prompt by prompt."""
    settings = GenerationConfig(do_sample=False, max_new_tokens=count, pad_token_id=0, eos_token_id=None)
    model.generation_config = settings
    theirs = [model.generate(torch.tensor([prompt]))[0, len(prompt) :].tolist() for prompt in PROMPTS]
    ours = generate(build_single(source.model, source.read(), torch.float32), PROMPTS, count, GREEDY, stop_ids=[])
    assert [completion.tokens for completion in ours] == theirs
    assert len({token for text in theirs for token in text}) > 10
