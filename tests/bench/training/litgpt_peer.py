"""litgpt as a peer: its environment, its model with Trivium's initial weights, and its loss.

litgpt 0.5.13 needs a huggingface-hub below 1.4 and transformers a newer one, so pip installs the two together nowhere.
The hub is used to download models alone, which no step does. So litgpt is installed without its dependencies, those
that its model imports are named here, and the hub is the one that is there.
"""

from pathlib import Path

import torch
from torch import nn

from configs.model import ModelConfig
from tests.bench.environment import environment_of
from tests.bench.training import models

VERSION = "0.5.13"
PACKAGES = (
    "--no-deps",
    f"litgpt=={VERSION}",
    "docstring_parser==0.18.0",
    "jsonargparse==4.41.0",
    "lightning==2.6.6",
    "lightning-utilities==0.15.3",
    "pytorch-lightning==2.6.6",
    "torchmetrics==1.9.0",
    "typeshed_client==2.15.0",
)


def python_with_litgpt(folder: Path) -> Path:
    """Returns the Python of an environment in `folder` that has litgpt. Raises NoPeer if there can be none."""
    return environment_of("litgpt", folder, PACKAGES, "from litgpt.model import GPT")


def model_of(config: ModelConfig, length: int) -> nn.Module:
    """Builds litgpt's GPT in the shape of a LLaMA, with Trivium's weights."""
    from litgpt.model import GPT, Config

    theirs = Config(
        block_size=length,
        vocab_size=config.vocab_size,
        padded_vocab_size=config.vocab_size,
        n_layer=config.num_layers,
        n_embd=config.hidden_size,
        n_head=config.num_heads,
        n_query_groups=config.num_kv_heads,
        head_size=config.dim_per_head,
        intermediate_size=config.ffn_hidden_size,
        rope_base=int(config.position.theta),
        rotary_percentage=1.0,
        norm_class_name="RMSNorm",
        norm_eps=config.norm.eps,
        mlp_class_name="LLaMAMLP",
        parallel_residual=False,
        bias=False,
    )
    model, drawn = GPT(theirs), models.weights(config)
    state = {"transformer.wte": "embedding", "transformer.ln_f": "final_norm", "lm_head": "lm_head"}
    tensors = {f"{name}.weight": drawn[f"{ours}.weight"] for name, ours in state.items()}
    for i in range(config.num_layers):
        layer = {"norm_1": "attention_norm", "norm_2": "mlp_norm", "attn.proj": "attention.o_proj"}
        layer |= {"mlp.fc_1": "mlp.gate_proj", "mlp.fc_2": "mlp.up_proj", "mlp.proj": "mlp.down_proj"}
        for name, ours in layer.items():
            tensors[f"transformer.h.{i}.{name}.weight"] = drawn[f"layers.{i}.{ours}.weight"]
        joined = [drawn[f"layers.{i}.attention.{name}.weight"] for name in ("q_proj", "k_proj", "v_proj")]
        tensors[f"transformer.h.{i}.attn.qkv.weight"] = torch.cat(joined)
    model.load_state_dict(tensors)
    return model


def loss_of(model: nn.Module, tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Computes the loss as litgpt's pretraining does: a compiled model does not contain it."""
    from litgpt.utils import chunked_cross_entropy

    return chunked_cross_entropy(model(tokens), labels, ignore_index=models.NO_LABEL)
