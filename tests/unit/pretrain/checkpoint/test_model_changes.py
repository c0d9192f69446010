"""Which keys of a model may differ between a checkpoint and the run that goes on from it."""

from typing import Any

from configs.loader import plain, validate
from configs.model import ModelConfig
from pretrain.checkpoint.resume import model_changes

SIZES: dict[str, Any] = {"vocab_size": 64, "num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 48, "num_heads": 4}


def tree(**more: Any) -> dict[str, Any]:
    return plain(validate(ModelConfig, {**SIZES, "num_kv_heads": 4, **more}))


def test_a_checkpoint_that_is_older_than_a_key_had_its_default() -> None:
    now, older = tree(), tree()
    del older["attention"], older["mlp"], older["norm"]["eps"]
    assert model_changes("step_8", older, now, ()) == {}
    normed = tree(attention={"qk_norm": "head"})
    assert model_changes("step_8", older, normed, ()) == {"model.attention.qk_norm": ("none", "head")}
