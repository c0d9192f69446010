"""Methods of parameter-efficient tuning against PEFT, with the same weights on the same base."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from configs.adapters import AdapterConfig
from configs.loader import validate
from export.hf_folder import FolderTensors, open_hf_folder
from export.peft.adapter import Base, OwnAdapter, PeftAdapter, PeftError
from export.peft.forms import form_of_config, form_of_kind
from pretrain.model import Decoder, LayerContext, init_weights
from pretrain.model.adapters import add_adapters, is_adapter
from pretrain.model.adapters.adalora import most_important, smooth

TOKENS, VIRTUAL, SIZE, LAYERS = 3, 4, 6, 2
FIRST, SECOND = [5, 9, 2, 30], [7, 1, 1, 28, 11, 3]  # the documents of a row


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny LLaMA with grouped key-value heads."""
    torch.manual_seed(5)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
    )
    folder = tmp_path_factory.mktemp("llama")
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def tuned(base: Path, adapter: dict[str, Any]) -> Decoder:
    """Builds Trivium's decoder with the base's weights and drawn adapters."""
    opened, config = open_hf_folder(base), validate(AdapterConfig, adapter)
    tensors, decoder = FolderTensors(opened), Decoder(opened.model)
    add_adapters(decoder, config, LayerContext(), 0.3)
    init_weights(decoder, seed=2)
    with torch.no_grad():
        for name, parameter in decoder.named_global_parameters():
            if name in tensors.shapes:
                parameter.copy_(tensors.read(name))
            elif parameter.ndim == 1:  # biases would begin at zero
                parameter.normal_(std=0.3)
            else:
                parameter.mul_(10)
    return decoder.eval()


def packed(decoder: Decoder) -> list[torch.Tensor]:
    """Returns the logits of the two documents, which lie in one row."""
    lengths = len(FIRST), len(SECOND)
    segments = torch.tensor([[0] * lengths[0] + [1] * lengths[1]])
    positions = torch.tensor([[*range(lengths[0]), *range(lengths[1])]])
    return list(decoder(torch.tensor([FIRST + SECOND]), positions, segments)[0].split(lengths))


def put(ours: Any, theirs: nn.Linear) -> None:
    theirs.weight.copy_(ours.weight)
    theirs.bias.copy_(ours.bias)


def written(decoder: Decoder, adapter: AdapterConfig, base: Path, folder: Path) -> Path:
    """Writes the adapters in PEFT's format."""
    opened = open_hf_folder(base)
    tensors = {name: p.detach() for name, p in decoder.named_global_parameters() if is_adapter(name)}
    form = form_of_kind(adapter.kind)
    theirs = form.write(OwnAdapter(adapter, tensors), Base(opened.family, opened.model, FolderTensors(opened).read))
    (folder / "adapter_config.json").write_text(json.dumps(theirs.config))
    save_file(dict(theirs.tensors), folder / "adapter_model.safetensors")
    return folder


def fill_prompt(decoder: Decoder, theirs: Any) -> None:
    ours: Any = decoder.adapter["prompt"]
    theirs.embedding.weight.copy_(ours.embedding)
    if not isinstance(ours.encoder, nn.Identity):
        if hasattr(theirs, "lstm_head"):
            theirs.lstm_head.load_state_dict(ours.encoder.lstm.state_dict())
        for own, other in zip(ours.encoder.layers, theirs.mlp_head[::2], strict=True):
            put(own, other)


def fill_prefix(decoder: Decoder, theirs: Any) -> None:
    own: list[Any] = [block.attention.adapter["prefix"] for block in decoder.blocks.values()]
    if "prefix" in decoder.adapter:
        encoder: Any = decoder.adapter["prefix"]
        theirs.embedding.weight.copy_(encoder.embedding)
        put(encoder.hidden, theirs.transform[0])
        theirs.transform[2].weight.copy_(torch.cat([x for p in own for x in (p.key_weight, p.value_weight)]))
        theirs.transform[2].bias.copy_(torch.cat([x for p in own for x in (p.key_bias, p.value_bias)]))
    else:
        theirs.embedding.weight.copy_(torch.cat([x for p in own for x in (p.keys, p.values)], 1))


COMMON: dict[str, Any] = {"task_type": "CAUSAL_LM", "num_virtual_tokens": VIRTUAL}
ENCODED = {**COMMON, "encoder_hidden_size": SIZE}
CASES: list[tuple[dict[str, Any], str, dict[str, Any], Callable[[Decoder, Any], None]]] = [
    ({"kind": "prompt"}, "PromptTuningConfig", COMMON, fill_prompt),
    (
        {"kind": "p_tuning", "encoder": "mlp", "encoder_size": SIZE},
        "PromptEncoderConfig",
        {**ENCODED, "encoder_reparameterization_type": "MLP"},
        fill_prompt,
    ),
    (
        {"kind": "p_tuning", "encoder": "lstm", "encoder_size": SIZE},
        "PromptEncoderConfig",
        {**ENCODED, "encoder_reparameterization_type": "LSTM", "encoder_num_layers": 2},
        fill_prompt,
    ),
    (
        {"kind": "prefix", "encoder_size": SIZE},
        "PrefixTuningConfig",
        {**ENCODED, "prefix_projection": True},
        fill_prefix,
    ),
    ({"kind": "p_tuning_v2"}, "PrefixTuningConfig", COMMON, fill_prefix),
]


@pytest.mark.parametrize(
    ("adapter", "config", "keys", "fill"), CASES, ids=[f"{a['kind']}-{a.get('encoder', '')}" for a, *_ in CASES]
)
@torch.no_grad()
def test_virtual_tokens_before_packed_documents_are_pefts_before_single_ones(
    base: Path,
    tmp_path: Path,
    adapter: dict[str, Any],
    config: str,
    keys: dict[str, Any],
    fill: Callable[[Decoder, Any], None],
) -> None:
    """Compares with PEFT, by the same modules and by the folder that it loads, also after reading it again."""
    decoder = tuned(base, {"virtual_tokens": VIRTUAL, **adapter})
    model = LlamaForCausalLM.from_pretrained(base)
    plain = model(torch.tensor([SECOND])).logits[0]
    wrapped = peft.get_peft_model(model, getattr(peft, config)(**keys)).eval()
    fill(decoder, wrapped.prompt_encoder["default"])
    for document, ours in zip((FIRST, SECOND), packed(decoder), strict=True):
        ids = torch.tensor([document])
        theirs = wrapped(ids, attention_mask=torch.ones_like(ids)).logits[0, -len(document) :]
        assert torch.allclose(ours, theirs, atol=1e-5)
    assert not torch.allclose(ours, plain, atol=1e-2)

    own = validate(AdapterConfig, {"virtual_tokens": VIRTUAL, **adapter})
    folder = written(decoder, own, base, tmp_path)
    loaded = peft.PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), str(folder)).eval()
    again = loaded(ids, attention_mask=torch.ones_like(ids)).logits[0, -len(SECOND) :]
    assert torch.allclose(ours, again, atol=1e-5)

    found, opened = json.loads((folder / "adapter_config.json").read_text()), open_hf_folder(base)
    theirs = PeftAdapter(found, load_file(folder / "adapter_model.safetensors"))
    whole = Base(opened.family, opened.model, FolderTensors(opened).read)
    read = form_of_config(found).read(theirs, whole)
    same = Decoder(opened.model)
    add_adapters(same, read.config, LayerContext())
    for name, parameter in same.named_global_parameters():
        parameter.copy_(read.tensors[name] if is_adapter(name) else whole.read(name))
    assert torch.allclose(packed(same.eval())[1], ours, atol=1e-5)
    narrow = PeftAdapter(found, {"prompt_embeddings": theirs.tensors["prompt_embeddings"][:, 1:]})
    with pytest.raises(PeftError, match="it is an adapter of another base"):
        form_of_config(found).read(narrow, whole)


@torch.no_grad()
def test_adalora_computes_and_prunes_as_peft(base: Path, tmp_path: Path) -> None:
    """Compares two steps of gradients; PEFT divides by r + 1e-5 where Trivium divides by r."""
    rank, beta = 4, 0.7
    keys = {
        "kind": "adalora",
        "rank": rank,
        "alpha": 8.0,
        "budget_steps": 5,
        "beta": beta,
        "targets": ["q_proj", "v_proj"],
    }
    decoder = tuned(base, keys)
    config = peft.AdaLoraConfig(
        task_type="CAUSAL_LM",
        init_r=rank,
        target_r=2,
        lora_alpha=8,
        total_step=10,
        beta1=beta,
        beta2=beta,
        target_modules=["q_proj", "v_proj"],
    )
    wrapped = peft.get_peft_model(LlamaForCausalLM.from_pretrained(base), config).eval()
    pairs: list[tuple[Any, Any]] = []
    for index, block in decoder.blocks.items():
        for name in ("q_proj", "v_proj"):
            ours: Any = getattr(block.attention, name).adapter
            theirs: Any = getattr(wrapped.base_model.model.model.layers[index].self_attn, name)
            pairs += [
                (ours.a, theirs.lora_A["default"]),
                (ours.b, theirs.lora_B["default"]),
                (ours.lambdas, theirs.lora_E["default"]),
            ]
            ours.lambdas.normal_()
    for own, other in pairs:
        other.copy_(own.view_as(other))
    ids = torch.tensor([SECOND])
    logits = decoder(ids, torch.arange(len(SECOND))[None])
    assert torch.allclose(logits, wrapped(ids).logits, atol=1e-4)
    folder = written(decoder, validate(AdapterConfig, keys), base, tmp_path)
    loaded = peft.PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), str(folder)).eval()
    assert torch.allclose(logits, loaded(ids).logits, atol=1e-5)

    allocator = wrapped.base_model.rankallocator
    smoothed = [(torch.zeros_like(own), torch.zeros_like(own)) for own, _ in pairs]
    for _ in range(2):
        for (own, other), both in zip(pairs, smoothed, strict=True):
            other.grad = torch.randn_like(other)
            smooth(*both, (own * other.grad.view_as(own)).abs(), beta)
        allocator.update_ipt(wrapped.base_model)
    elements = [sensitivity * uncertainty for sensitivity, uncertainty in smoothed]
    scores = [
        q.mean(1) + p.mean(0) + own for q, p, own in zip(elements[::3], elements[1::3], elements[2::3], strict=True)
    ]
    kept = most_important(torch.cat(scores), 7)
    pattern = allocator.mask_to_budget(wrapped.base_model, 7)
    theirs_kept = torch.tensor([value for values in pattern.values() for value in values])
    assert int(kept.sum()) == 7
    assert torch.equal(kept, theirs_kept)
