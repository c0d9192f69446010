"""AutoTokenizer gives our ids beside the config.json of every family, for tokenizers of every kind and origin."""

import io
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console
from tokenizers import Tokenizer as Fast
from transformers import AutoTokenizer, dynamic_module_utils

from configs.export import ExportConfig
from configs.tokenizer import TokenizerConfig, TokenizerKind
from data_pipeline.tokens.chat_encoder import ChatEncoder
from data_pipeline.tokens.foreign import adopt, roles_file
from data_pipeline.tokens.tokenizer import Tokenizer
from data_pipeline.tokens.tokenizer_training import train_on_texts
from export import checks, huggingface
from export.checked_texts import read_texts
from export.checks import ODD_TEXTS
from export.hf_tokenizer import first_difference, write_tokenizer
from posttrain.chat.chat_format import jinja_template
from pretrain.checkpoint.lineage import Lineage
from pretrain.generation.text_codec import TextCodec
from tests.foreign_tokenizers import MAKERS, TEMPLATE, TEXTS, bert, byte_level, gpt2, llama2, llama3, qwen, t5, write
from tests.tiny_models import make_source, random_weights, tiny

MODEL_TYPES = (
    *("bloom", "deepseek_v2", "deepseek_v3", "gemma2", "gemma3_text", "glm", "glm4", "glm4_moe", "gpt2", "gpt_neox"),
    *("gpt_oss", "llama", "llama4_text", "mistral", "mixtral", "olmo2", "olmo3", "openai-gpt", "opt", "phi3", "qwen2"),
    *("qwen2_moe", "qwen3", "qwen3_moe", "kimi_k2", "baichuan", "qwen", "chatglm"),
)
RUNS = [f"a{sign * size}b" for sign in (" ", "\n", "\t") for size in (1, 2, 3, 6, 7, 31, 400)]
ODD = [*ODD_TEXTS, *RUNS, *TEXTS[::7]]


@pytest.fixture(scope="module", params=list(TokenizerKind))
def own(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp(request.param)
    runs = 0 if request.param == TokenizerKind.WORDPIECE else 12
    settings = TokenizerConfig(
        kind=request.param, vocab_size=700, whitespace_runs=runs, special_tokens=("<|tool|>",), vocab_multiple=64
    )
    train_on_texts(TEXTS, folder, settings)
    return Tokenizer.load(folder)


@pytest.fixture(autouse=True)
def no_modules_of_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Keeps transformers' copies of modules within the test."""
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    yield


def load(folder: Path, trust: bool = False):
    return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=trust)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_our_ids_beside_any_family_s_config(own: Tokenizer, model_type: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    write_tokenizer(tmp_path, own.origin, 4096, model_type=model_type)
    fast = load(tmp_path)
    assert first_difference(fast, own, ODD if model_type in ("qwen2", "llama", "gpt2") else ODD_TEXTS) is None
    assert fast("of wisdom").input_ids == [1, *own.encode("of wisdom")]
    assert (tmp_path / "tokenization_trivium.py").is_file() == (model_type == "qwen2"), "code only where it is needed"


def test_qwen2_needs_the_hint_and_gives_our_ids_with_and_without_trust(own: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    write_tokenizer(tmp_path, own.origin, 4096, model_type="qwen2")
    for trust in (False, True):
        fast = load(tmp_path, trust)
        assert first_difference(fast, own, ODD) is None
        assert type(fast).__name__ == "TriviumTokenizer" or not trust
    told = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert told.pop("auto_map") and told["tokenizer_class"] == "PreTrainedTokenizerFast"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(told))
    with pytest.raises(Exception, match=""):  # what goes wrong depends on the kind of tokenizer
        assert first_difference(load(tmp_path), own, ODD) is None


@pytest.mark.parametrize("maker", MAKERS, ids=lambda maker: maker.__name__)
@pytest.mark.parametrize("model_type", ["llama", "qwen2", "gpt2"])
def test_a_tokenizer_trained_elsewhere_keeps_ids_roles_and_template(maker, model_type: str, tmp_path: Path) -> None:
    end = "[SEP]" if maker is bert else None
    folder = write(tmp_path / "hub", *maker())
    adopt(TokenizerConfig(file=str(folder), end_of_document=end), tmp_path / "run")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/config.json").write_text(json.dumps({"model_type": model_type}))
    ours = Tokenizer.load(tmp_path / "run")
    write_tokenizer(tmp_path / "out", ours.origin, 4096, model_type=model_type)
    fast = load(tmp_path / "out")
    assert first_difference(fast, ours, ODD) is None
    assert fast("of wisdom").input_ids == [ours.bos_id] * (ours.bos_id >= 0) + ours.encode("of wisdom")
    assert (fast.eos_token_id, fast.pad_token_id) == (ours.eos_id, ours.pad_id)
    assert fast.unk_token == ("<|endoftext|>" if maker is gpt2 else ours.symbols.get("unk_token")), "as its files say"
    assert fast.chat_template == (TEMPLATE if maker is qwen else None)
    told = json.loads((tmp_path / "out/tokenizer_config.json").read_text())
    assert told["add_prefix_space"] == (maker in (llama2, t5)), "whether it puts a space before a text"
    same = (tmp_path / "out/tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
    assert same == (maker is not bert), "a file stays as it is unless it cuts, fills up or frames texts"


@pytest.mark.parametrize("begin", ["{{ bos_token }}", ""], ids=["the template begins", "nothing begins"])
def test_a_rendered_dialogue_has_the_ids_of_training_both_ways(begin: str, tmp_path: Path) -> None:
    """The tokenizer itself puts a token before a text, as Llama 3's does; a model as it was imported keeps that."""
    made, files = llama3()
    roles = {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"}
    ours = Tokenizer.load(write(tmp_path / "hub", made, files | {"tokenizer_config.json": roles}))
    turn = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}<|end_of_text|>{% endfor %}"
    messages = [{"role": "user", "content": "of wisdom"}]
    for as_it_came in (False, True):
        (out := tmp_path / str(as_it_came)).mkdir()
        write_tokenizer(out, ours.origin, 4096, begin + turn, "llama", as_it_came)
        fast, expected = load(out), ChatEncoder(ours, begin + turn).prompt(messages)
        assert expected.count(ours.bos_id) == bool(begin)
        rendered = fast.apply_chat_template(messages, tokenize=False)
        ways = [fast(rendered, add_special_tokens=add).input_ids for add in (True, False)]
        assert [fast.apply_chat_template(messages, return_dict=False), ways[1]] == [expected] * 2
        assert ways[0] == [ours.bos_id] * as_it_came + expected
        keys = json.loads((out / "tokenizer_config.json").read_text())
        assert (keys["add_bos_token"], keys["add_prefix_space"]) == (as_it_came, False)


def test_a_template_that_wants_a_system_message_first_gets_one(tmp_path: Path) -> None:
    """Checks and samples ask in its way, and give a template that goes without no such message."""
    turn = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}<|end_of_text|>{% endfor %}"
    refuses = "{% if messages[0].role != 'system' %}{{ raise_exception('a system message comes first') }}{% endif %}"
    ours = Tokenizer.load(write(tmp_path / "hub", *llama3()))
    for template, roles in ((turn, ["user"]), (refuses + turn, ["system", "user"])):
        chat = ChatEncoder(ours, template)
        chat.check()
        asked = chat.question("of wisdom")
        assert [one["role"] for one in asked] == roles and asked[-1]["content"] == "of wisdom"
        config = tiny(vocab_size=ours.vocab_size)
        source = make_source(config, random_weights(config), Path(ours.origin), template)
        settings = ExportConfig(run="unused", out="unused", chat_prompts=["of wisdom"], sample_tokens=4)
        assert read_texts(source, settings, Console(file=io.StringIO())).prompts == [chat.prompt(asked)]
        write_tokenizer(tmp_path, ours.origin, 4096, template, "llama")
        assert checks._chat_difference(load(tmp_path), TextCodec(ours.origin, template), False) is None


@pytest.mark.parametrize("role", ["unk_token", "bos_token", "mask_token"])
def test_a_token_that_only_tokenizer_config_calls_special_is_a_control_symbol(role: str, tmp_path: Path) -> None:
    made = byte_level(["<|endoftext|>"])
    made.add_tokens(["<that>"])
    folder = write(tmp_path / "hub", made, {"tokenizer_config.json": {"eos_token": "<|endoftext|>", role: "<that>"}})
    ours = Tokenizer.load(folder)
    number = made.token_to_id("<that>")
    assert (ours.special_ids["<that>"], ours.symbols[role]) == (number, "<that>")
    assert number not in ours.encode("a <that> b") and ours.decode([number]) == ""
    (tmp_path / "out").mkdir()
    write_tokenizer(tmp_path / "out", ours.origin, 4096)
    assert first_difference(load(tmp_path / "out"), ours, [*ODD_TEXTS, "a <that> b", "<that"]) is None


def test_a_tokenizer_that_makes_a_space_of_another_character_keeps_its_ids(tmp_path: Path) -> None:
    """Compares ids of a tokenizer like Gemma's, which keeps every text but U+2581."""
    described = json.loads(llama2()[0].to_str())
    described["normalizer"] = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
    described["decoder"]["decoders"] = described["decoder"]["decoders"][:3]
    folder = write(tmp_path / "hub", Fast.from_str(json.dumps(described)), llama2()[1])
    ours = Tokenizer.load(folder)
    assert ours.lossless and ours.decode(ours.encode("a \u2581 b")) == "a   b"
    (tmp_path / "out").mkdir()
    write_tokenizer(tmp_path / "out", ours.origin, 4096)
    assert first_difference(load(tmp_path / "out"), ours, ODD_TEXTS) is None


@pytest.mark.parametrize("maker", [gpt2, llama3, t5])
def test_a_model_with_a_tokenizer_trained_elsewhere_is_exported_and_verified(maker, tmp_path: Path) -> None:
    """Runs the checks of an export, which pass whether anything begins a document, and the folder names its own end."""
    ours = Tokenizer.load(write(tmp_path / "hub", *maker()))
    config = tiny(vocab_size=ours.vocab_size)
    source = make_source(config, random_weights(config), Path(ours.origin))
    settings = ExportConfig(run="unused", out=str(tmp_path / "out"), prompts=["def f", "中"], sample_tokens=4)
    console = Console(width=200, file=io.StringIO())
    texts = read_texts(source, settings, console)
    assert huggingface.export(source, texts, settings, tmp_path / "out", {"key": "value"}, console) == 0
    begin = ours.bos_id if ours.bos_id >= 0 else None
    for name in ("config.json", "generation_config.json"):
        told = json.loads((tmp_path / "out" / name).read_text())
        ends = told["eos_token_id"]
        assert told["bos_token_id"] == begin and ours.eos_id in (ends if isinstance(ends, list) else [ends])


def test_a_training_run_keeps_the_roles_of_a_tokenizer_trained_elsewhere(tmp_path: Path) -> None:
    ours = Tokenizer.load(write(tmp_path / "hub", *qwen()))
    lineage = Lineage(Path(ours.origin), roles=roles_file(ours))
    lineage.keep(tmp_path / "run", lineage.identity)
    kept = Tokenizer.load(tmp_path / "run")
    assert (kept.eos_id, kept.pad_id, kept.chat_template) == (ours.eos_id, ours.pad_id, TEMPLATE)
    assert kept.encode(ODD[0]) == ours.encode(ODD[0]) and kept.sha256 == ours.sha256


def test_a_template_that_leaves_control_tokens_in_messages_is_published_too(own: Tokenizer, tmp_path: Path) -> None:
    """Trivium's own template takes them apart, so that both read them as text; of another, the rest is compared."""
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    another = "{% for m in messages %}<|user|>{{ m['content'] }}<|end|>{% endfor %}"
    for template, leaves in ((another, True), (jinja_template(), False)):
        write_tokenizer(tmp_path, own.origin, 4096, template, "llama")
        codec, theirs = TextCodec(own.origin, template), load(tmp_path)
        assert checks._leaves_control_tokens(theirs, codec) == leaves
        assert checks._chat_difference(theirs, codec, False) is None
    other = TextCodec(own.origin, another.replace("<|user|>", "<|assistant|>"))
    write_tokenizer(tmp_path, own.origin, 4096, another, "llama")
    assert "apply_chat_template: [" in str(checks._chat_difference(load(tmp_path), other, False))
