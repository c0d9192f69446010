"""Continued pretraining from models of transformers with a foreign tokenizer: losses, layouts, resume and refusals."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from configs.loader import ConfigError
from configs.mixture import PlanConfig
from configs.sealed import CHECKPOINT
from configs.tokenizer import TokenizerConfig
from data_pipeline.mixture.plan_files import build_plan
from data_pipeline.mixture.rows import Plan
from data_pipeline.tokens.foreign import adopt
from data_pipeline.tokens.store import build
from data_pipeline.tokens.tokenizer import Tokenizer
from export import huggingface, import_hf
from export.model_source import open_source
from pretrain import inspection, train
from pretrain.checkpoint import storage
from tests.foreign_tokenizers import TEXTS, gpt2, llama3, write
from tests.parallel.harness import RanksOf
from tests.shards import write_shard
from tests.training_configs import write_training_config

SEQ_LENGTH, BATCH, PADDING = 48, 4, 5  # PADDING: rows of the embedding without a token
RunOf = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with a random LLaMA of transformers (hub), its import (ours), and a plan of its tokenizer's tokens."""
    folder = tmp_path_factory.mktemp("initial")
    made, _ = llama3()  # which puts a token before a text; only the model's files name an end
    ends = made.token_to_id("<|end_of_text|>")
    config = transformers.LlamaConfig(
        vocab_size=made.get_vocab_size() + PADDING, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, eos_token_id=ends, bos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(1.0 if parameter.ndim == 1 else 0.0, 0.15)
    model.save_pretrained(folder / "hub")
    write(folder / "hub", made, {})
    assert import_hf.main([str(folder / "hub"), str(folder / "ours")]) == 0
    tokens_of(folder, TokenizerConfig(file=str(folder / "hub")))
    return folder


def tokens_of(folder: Path, tokenizer: TokenizerConfig) -> None:
    """Writes a tokenizer, tokens and a plan into a folder, as a data run does."""
    adopt(tokenizer, folder / "tokenizer")
    records = [{"text": text, "id": str(number), "metadata": {}} for number, text in enumerate(TEXTS[:40])]
    shard = write_shard(folder / "prose.jsonl.zst", records)
    build(shard, folder / "tokens/train/prose/00000", Tokenizer.load(folder / "tokenizer"))
    settings = PlanConfig(seq_length=SEQ_LENGTH, samples=24, seed=1, weights={"prose": 1.0}, max_epochs=9)
    build_plan(folder / "tokens", folder / "tokenizer", folder / "plan", settings)


def config(base: Path, run_dir: Path, **init: str) -> Path:
    """Writes the config of two steps from the model that `init` names; it has no [model]."""
    return write_training_config(
        run_dir.with_suffix(".toml"),
        run_dir,
        2,
        (BATCH, 2),
        SEQ_LENGTH,
        init=init,
        data={"plan": str(base / "plan")},
        optimizer={"lr": 0.01, "weight_decay": 0.0},
        eval={"rows": 0},
    )


@pytest.fixture
def start(ranks: RanksOf, base: Path, tmp_path: Path) -> RunOf:
    """Runner of `trivium train` on ranks from the model that init names; returns its metrics by step."""

    def start(name: str, world: int, *overrides: str, steps: int = 2, **init: str) -> dict[str, Any]:
        path = config(base, tmp_path / name, **init)
        args = [str(path), f"train.steps={steps}", *overrides]
        answers = ranks(world).run("tests.parallel.workers.plans:train_command", process_group=False, args=args)
        assert all(answer["status"] == 0 for answer in answers), answers
        lines = map(json.loads, (tmp_path / name / "metrics.jsonl").read_text().splitlines())
        losses = {line["step"]: line["loss"] for line in lines if "loss" in line}
        return {"losses": losses, "said": answers[0]["said"]}

    return start


def transformers_loss(base: Path, hub: Path) -> float:
    """Returns the mean loss of transformers' model in `hub` over the documents in the rows of the first step."""
    model = transformers.AutoModelForCausalLM.from_pretrained(hub, local_files_only=True).eval()
    plan, total, count = Plan.open(base / "plan"), 0.0, 0
    for row in map(plan.row, range(BATCH)):
        for segment in range(int(row.segments.max()) + 1):
            here = row.segments == segment
            with torch.no_grad():
                logits = model(torch.tensor(row.tokens[here])[None]).logits[0].double()
            mask, labels = torch.tensor(row.loss_mask[here]), torch.tensor(row.labels[here])
            losses = torch.nn.functional.cross_entropy(logits, labels, reduction="none")[mask]
            total, count = total + float(losses.sum()), count + int(mask.sum())
    return total / count


def test_training_goes_on_from_the_loss_of_transformers_at_any_layout(base: Path, start: RunOf, tmp_path: Path) -> None:
    one = start("one", 1, hf=str(base / "hub"))["losses"]
    assert abs(one[1] - transformers_loss(base, base / "hub")) < 1e-5
    assert abs(one[2] - one[1]) > 1e-3, "a step changes the weights"
    split = start("split", 2, "parallel.tp=2", run=str(base / "ours"))["losses"]
    staged = start("staged", 2, "parallel.pp=2", checkpoint=str(base / "ours/checkpoints/step_0"))["losses"]
    for other in (split, staged):
        assert all(abs(other[step] - one[step]) < 1e-5 for step in one), (one, other)
    # What was trained is a run like others: with the tokenizer, its roles, the class and the end of the imported model.
    source, manifest = open_source(tmp_path / "split"), storage.read_manifest(tmp_path / "split/checkpoints/step_2")
    assert manifest["init"]["checkpoint"] == str(base / "ours/checkpoints/step_0")
    assert source.codec().stop_ids == [Tokenizer.load(base / "tokenizer").eos_id]
    assert (source.architecture, source.context) == ("LlamaForCausalLM", 64)
    out = tmp_path / "out.toml"
    out.write_text(f'run = "{tmp_path / "split"}"\nout = "{tmp_path / "hf"}"\nprompts = ["def"]\nsample_tokens = 4\n')
    assert huggingface.main([str(out), "verify.greedy_tokens=8"]) == 0
    saved = json.loads((tmp_path / "hf/config.json").read_text())
    assert saved["vocab_size"] == json.loads((base / "hub/config.json").read_text())["vocab_size"]
    roles = tmp_path / "split/tokenizer_config.json"
    roles.write_text(roles.read_text().replace("<|end_of_text|>", "<|begin_of_text|>"))
    with pytest.raises(ValueError, match=r"tokenizer_config\.json is not the one that the model was trained with"):
        open_source(tmp_path / "split")


def test_experts_and_the_bias_that_chooses_them_are_a_start_too(base: Path, start: RunOf, tmp_path: Path) -> None:
    """Starts a run that differs from its initial model in keys of training alone, some of which add state."""
    plain = transformers.AutoConfig.from_pretrained(base / "hub", local_files_only=True).to_dict()
    sizes = {key: plain[key] for key in ("vocab_size", "eos_token_id", "max_position_embeddings")}
    config = transformers.DeepseekV3Config(
        **sizes, hidden_size=40, intermediate_size=56, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, kv_lora_rank=10, q_lora_rank=14, qk_nope_head_dim=6, qk_rope_head_dim=8, v_head_dim=5,
        n_routed_experts=6, num_experts_per_tok=2, moe_intermediate_size=24, n_shared_experts=1, n_group=1,
        topk_group=1, first_k_dense_replace=1,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.DeepseekV3ForCausalLM(config)
    with torch.no_grad():
        model.model.layers[1].mlp.gate.e_score_correction_bias.copy_(torch.randn(6) * 0.3)
    model.save_pretrained(tmp_path / "hub")
    shutil.copy(base / "hub/tokenizer.json", tmp_path / "hub")
    trained = ["model.moe.aux_loss=global_batch", "model.moe.aux_loss_coef=0.01", "model.moe.bias_update_rate=0.002"]
    one = start("one", 1, *trained, hf=str(tmp_path / "hub"))["losses"]
    split = start("split", 2, "parallel.ep=2", *trained, hf=str(tmp_path / "hub"))["losses"]
    assert abs(one[1] - transformers_loss(base, tmp_path / "hub")) < 1e-5
    assert all(abs(split[step] - one[step]) < 1e-5 for step in one), (one, split)
    saved = storage.Reader(tmp_path / "one/checkpoints/step_2").balance["layers.1.moe.balance.bias"]
    assert (saved - model.model.layers[1].mlp.gate.e_score_correction_bias).abs().max() < 0.005, "two small updates"
    # The same model with a module of multi-token prediction that is new, and what it has learnt without the module.
    more = start("more", 2, "parallel.pp=2", "model.head.mtp_depth=1", run=str(tmp_path / "one"))
    assert "layers.2 is not in" in more["said"] and "begins with random values" in more["said"]
    lines = map(json.loads, (tmp_path / "more/metrics.jsonl").read_text().splitlines())
    assert next(lines)["mtp_loss_1"] > more["losses"][1], "it knows nothing yet"
    bare = start("bare", 1, "model.head.mtp_depth=0", run=str(tmp_path / "more"))["losses"]
    assert abs(bare[1] - more["losses"][2]) < 1
    assert (
        open_source(tmp_path / "more").model.head.mtp_depth == 1 > open_source(tmp_path / "bare").model.head.mtp_depth
    )


def test_a_run_goes_on_without_the_folder_that_it_began_from(base: Path, start: RunOf, tmp_path: Path) -> None:
    shutil.copytree(base / "hub", tmp_path / "hub")
    straight = start("straight", 1, hf=str(tmp_path / "hub"))["losses"]
    assert start("stopped", 1, steps=1, hf=str(tmp_path / "hub"))["losses"][1] == straight[1]
    (tmp_path / "hub").rename(tmp_path / "moved")
    moved = start("stopped", 1, "--dry-run", hf=str(tmp_path / "moved"))
    assert f"from {tmp_path / 'moved'}" in moved["said"] and "note" not in moved["said"]
    gone = start("stopped", 1, hf=str(tmp_path / "hub"))
    assert "hub' does not exist" in gone["said"] and gone["losses"] == straight
    file = tmp_path / "moved/model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\0")
    with pytest.raises(ConfigError, match=r"began from .*hub, and init\.hf = .* is another; name the first, or choose"):
        train.main([str(config(base, tmp_path / "stopped", hf=str(tmp_path / "moved"))), "--dry-run"])


def test_what_does_not_fit_the_model_is_refused_with_a_remedy(base: Path, tmp_path: Path) -> None:
    from_hf = [str(config(base, tmp_path / "run", hf=str(base / "hub"))), "--dry-run"]

    def refused(*overrides: str) -> str:
        with pytest.raises(ConfigError) as error:
            train.main([*from_hf, *overrides])
        assert not (tmp_path / "run").exists()
        return str(error.value)

    said = refused("model.num_layers=3", "model.hidden_size=64")
    assert said.startswith(f"[model] is not the model of init.hf = '{base / 'hub'}': model.")
    assert "model.num_layers 2 -> 3" in said and "model.hidden_size 32 -> 64" in said and "; leave [model] out" in said
    assert train.main(from_hf) == 0
    remedy = re.findall(r"model\.[\w.]+=\S+", said.partition("or set ")[2])
    assert train.main([*from_hf, "model.num_layers=3", "model.hidden_size=64", *remedy]) == 0
    assert train.main([*from_hf, "model.position.theta=50000.0"]) == 0, "for longer rows"
    assert "preset" not in refused("model=llama-7b")
    ours = str(base / "ours")
    for overrides, words in (
        ([f"init.run={base / 'hub'}", "init.hf="], "is a Hugging Face folder, not a run; set init.hf="),
        ([f"init.hf={ours}"], "is a run or an imported model, not a Hugging Face folder; set init.run="),
        ([f"init.run={ours}"], "name the model to start from; leave only one of them"),
        (["init.hf="], "none of init.run, init.checkpoint and init.hf names"),
        (["init.hf=nowhere"], "does not exist; name a Hugging Face model directory"),
    ):
        assert words in refused(*overrides), overrides
    assert train.main([*from_hf, "init.hf=", f"init.run={ours}"]) == 0
    other = write(tmp_path / "gpt2", *gpt2())
    tokens_of(tmp_path, TokenizerConfig(file=str(other)))
    said = refused(f"data.plan={tmp_path / 'plan'}")
    assert "was made with the tokenizer" in said and f"set tokenizer.file={base / 'hub'} in the data config" in said
    (tmp_path / "bare").mkdir()
    for file in ("config.json", "model.safetensors"):
        shutil.copy(base / "hub" / file, tmp_path / "bare")
    said = refused(f"init.hf={tmp_path / 'bare'}")
    remedy = re.findall(r"set (init\.tokenizer=\S+)", said)
    assert train.main([*from_hf, f"init.hf={tmp_path / 'bare'}", *remedy]) == 0
    assert "is not the tokenizer that" in refused(f"init.tokenizer={other}")


def test_an_imported_model_is_no_run_to_train_in(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(base / "ours", tmp_path / "ours")
    path = str(config(base, tmp_path / "new", run=str(base / "ours")))
    with pytest.raises(ConfigError, match=r"of an imported model; choose another run\.dir"):
        train.main([path, "--dry-run", f"run.dir={tmp_path / 'ours'}"])
    reward = tmp_path / "ours/checkpoints/step_0/manifest.json"
    manifest = storage.read_manifest(reward.parent)
    manifest["config"]["model"]["head"] = {"kind": "scalar"}
    reward.write_bytes(CHECKPOINT.write(manifest))
    with pytest.raises(ConfigError, match="is a reward model, which writes no text; start from a language model"):
        train.main([path, "--dry-run", f"init.run={tmp_path / 'ours'}", "model.head.kind=language_model"])
    assert inspection.main([str(base / "ours")]) == 0
    assert "step 0" in " ".join(capsys.readouterr().out.split())  # a long path wraps the line
