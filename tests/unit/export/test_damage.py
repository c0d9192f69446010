"""Damage of a run's folder, or of an exported one: what is damaged is named, and remedies are those that work."""

import re
import shutil
from pathlib import Path

import pytest
import torch

from configs import run_history
from configs.checkpoint_folders import check_named
from configs.initial import InitConfig
from configs.loader import ConfigError
from configs.sealed import CHECKPOINT
from export import import_hf
from export.model_source import open_source
from export.publishing import RECORD, check_export, publish
from posttrain.initial_chat_model import InitialChatModel
from pretrain.checkpoint import storage
from pretrain.checkpoint.lineage import Lineage
from pretrain.doctor.after_run import after_run
from pretrain.run.initial_model import InitialModel
from tests.tiny_models import tiny, write_imported


@pytest.fixture(scope="module")
def imported(tokenizer_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with one checkpoint, of step 0."""
    return write_imported(tmp_path_factory.mktemp("damage") / "run", tiny(), tokenizer_path)


@pytest.fixture
def run(imported: Path, tmp_path: Path) -> Path:
    """A copy of the run, to be damaged."""
    return Path(shutil.copytree(imported, tmp_path / "run"))


def test_a_checkpoint_in_the_folder_of_another_step_is_passed_over(run: Path) -> None:
    moved = storage.directory(run, 5)
    storage.directory(run, 0).rename(moved)
    with pytest.raises(storage.CheckpointError, match="step_5 holds the checkpoint of step 0: ") as told:
        storage.verify(moved)
    (name,) = re.findall(r"rename it to (\w+)", str(told.value))
    assert storage.find_newest(run)[0] is None
    moved.rename(moved.with_name(name))
    assert storage.latest(run) == storage.directory(run, 0)
    elsewhere = Path(shutil.copytree(storage.directory(run, 0), run / "the_best"))
    assert storage.verify(elsewhere)["step"] == 0, "a copy may have any other name"


def test_a_run_without_a_whole_checkpoint_is_not_told_to_take_an_earlier_one(run: Path) -> None:
    file = storage.directory(run, 0) / "weights_00001.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(storage.CheckpointError, match=r"has \d+ bytes, its manifest says \d+; restore one, or") as told:
        storage.latest(run)
    assert "earlier" not in str(told.value)


def test_a_file_with_the_name_of_a_checkpoint_is_passed_over(run: Path) -> None:
    storage.directory(run, 3).write_text("")
    (storage.directory(run, 4) / storage.MANIFEST).mkdir(parents=True)
    assert storage.latest(run) == storage.directory(run, 0)
    with pytest.raises(storage.CheckpointError, match=r"step_3 is not a whole checkpoint"):
        storage.read_manifest(storage.directory(run, 3))


def test_a_damaged_manifest_is_passed_by_as_the_message_says(run: Path) -> None:
    first, newest = storage.directory(run, 0), storage.directory(run, 3)
    shutil.copytree(first, newest)
    manifest = newest / storage.MANIFEST
    for content in ("{", "", "{} {}"):
        manifest.write_text(content)
        with pytest.raises(
            storage.CheckpointError, match=r"json is damaged: it is not JSON \(.*; use an earlier check"
        ):
            open_source(newest)
        assert open_source(first).step == 0
    manifest.unlink()
    with pytest.raises(
        storage.CheckpointError, match=r"does not exist, so .*/step_3 is not a whole checkpoint; use an earlier"
    ):
        storage.read_manifest(newest)
    assert storage.read_manifest(first)["step"] == 0


def test_a_checkpoint_that_would_lack_a_part_of_a_tensor_is_not_written(tmp_path: Path) -> None:
    parts = []
    for rank in range(2):
        piece = storage.Piece("a", (4,), (rank * 2,), (2,), 0, 2)
        parts.append(storage.write_rank(tmp_path, rank, {"a": (piece, {"weight": torch.ones(2)})}))
    with pytest.raises(storage.CheckpointError, match="a: the ranks hold 2 of 4 elements; not saved"):
        storage.complete(tmp_path, parts[:1], {"step": 1}, ("weight",))
    assert not (tmp_path / storage.MANIFEST).exists()
    storage.complete(tmp_path, parts, {"step": 1}, ("weight",))
    with storage.Reader(tmp_path) as reader:
        assert reader.read("a").tolist() == [1] * 4
        with pytest.raises(storage.CheckpointError, match="no weight of b, so it is a checkpoint of another model"):
            reader.read("b")


def test_a_tokenizer_that_was_replaced_while_a_run_started_is_taken_by_the_next_start(
    tokenizer_path: Path, tmp_path: Path
) -> None:
    file = Path(shutil.copy(tokenizer_path, tmp_path / "tokenizer.model"))
    started, run = Lineage(file), tmp_path / "run"
    identity = started.identity
    run.mkdir()
    file.write_bytes(b"another one")
    with pytest.raises(ConfigError, match=r"tokenizer\.model was replaced while the run started; start it again"):
        started.keep(run, identity)
    again = Lineage(file)
    again.keep(run, again.identity)
    assert (run / "tokenizer.model").read_bytes() == b"another one"


def test_a_checkpoint_without_manifest_is_none_that_a_message_names(run: Path) -> None:
    shutil.copytree(storage.directory(run, 0), storage.directory(run, 3))
    (storage.directory(run, 3) / storage.MANIFEST).unlink()
    for named, said in (("checkpoints/step_3", "is no checkpoint"), ("", "is a run, not a checkpoint")):
        with pytest.raises(ConfigError, match=said) as told:
            check_named(InitConfig(checkpoint=str(run / named)))
        (other,) = re.findall(r"set init\.checkpoint=(\S+)", str(told.value))
        check_named(InitConfig(checkpoint=other))
    with pytest.raises(ConfigError, match=r"is a check.* and leave init\.run out \(as an override: init\.run=\)"):
        check_named(InitConfig(run=str(storage.directory(run, 0))))
    (storage.directory(run, 0) / storage.MANIFEST).unlink()
    with pytest.raises(ConfigError, match=r"no checkpoint of \S+ has a manifest\.json; name another run's"):
        check_named(InitConfig(checkpoint=str(run / "checkpoints/step_3")))


def test_a_damaged_history_or_config_is_named(run: Path) -> None:
    file = run / run_history.FILE
    for content in ("[{", "{}x", '["a"]', '{"a": 1}', "3", "null"):
        file.write_text(content)
        with pytest.raises(ConfigError, match=r"is damaged \(it is n.*\); remove it: the newest checkpoint has the h"):
            run_history.read(run)
    file.unlink()
    manifest = storage.directory(run, 0) / storage.MANIFEST
    values = CHECKPOINT.read(manifest.read_bytes(), manifest)
    assert run_history.read(run) == values.get("data_spans", [])
    values |= {"data_spans": [{"first_step": 0}], "config": {"train": {"steps": 5}}}
    manifest.write_bytes(CHECKPOINT.write(values))
    (run / "checkpoints/step_9").mkdir()
    assert run_history.read(run) == [{"first_step": 0}]
    (run / "checkpoints/step_9").rmdir()
    (run / "config.toml").write_text("x = [")
    found = [str(one) for one in after_run(run)]
    assert "config.toml is damaged" in found[0] and "it ended at step 0 of 5, by" in found[-1], found


@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_a_damaged_file_of_an_export_is_named_before_anything_is_made_of_it(
    exported: Path, tmp_path: Path, damage: str
) -> None:
    folder, out = tmp_path / "folder", tmp_path / "out"
    for name in sorted(file.name for file in exported.iterdir()):
        shutil.rmtree(folder, ignore_errors=True)
        file = Path(shutil.copytree(exported, folder)) / name
        content = file.read_bytes()
        if damage == "remove":
            file.unlink()
        else:
            file.write_bytes(
                content[:-2] if damage == "cut" else content[:-9] + bytes([content[-9] ^ 1]) + content[-8:]
            )
        if name == "README.md" or (name, damage) == (RECORD, "remove"):
            import_hf.import_directory(folder, out, dry_run=True)
            continue
        readers = [
            lambda: import_hf.import_directory(folder, out),
            lambda: InitialModel.open(InitConfig(hf=str(folder)), str(out), "auto"),
        ]
        if (name, damage) != ("config.json", "remove"):  # generation and evaluation know a folder by this file
            readers.append(lambda: open_source(folder))
        for read in readers:
            with pytest.raises(ConfigError, match=re.escape(str(file))) as told:
                read()
            assert damage != "remove" or f"{file} is missing; export the model again; " in str(told.value)
            assert (name, damage) != (RECORD, "cut") or "); export the model again; if a change" in str(told.value)
        assert not out.exists()
        (folder / RECORD).unlink()  # as the message says for a change that is meant
        if name == "generation_config.json" and damage == "remove":
            import_hf.import_directory(folder, out, dry_run=True)


def test_the_adapter_beside_an_exported_model_has_checksums_too(tmp_path: Path) -> None:
    partial, out = tmp_path / "partial", tmp_path / "out"
    (partial / "adapter").mkdir(parents=True)
    for name in ("config.json", "adapter/adapter_model.safetensors"):
        (partial / name).write_text(name)
    publish(partial, out, {})
    check_export(out / "adapter")
    (out / "adapter/adapter_model.safetensors").write_text("damaged")
    check_export(out)
    with pytest.raises(ConfigError, match=r"adapter/adapter_model\.safetensors is not the one that .*/out/adapter was"):
        check_export(out / "adapter")


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("", "writes nothing of a user's message; correct it"),
        ("{{ 1 / 0 }}", r"refuses a user's message \(ZeroDivisionError: division by zero\); correct it"),
        ("{% if", "is not valid Jinja: line 1: unexpected 'end of template'; correct it"),
        ("{{ messages | unknown }}", "is not valid Jinja: line 1: No filter named 'unknown'; correct it"),
    ],
)
def test_a_chat_template_that_cannot_be_used_is_one_sentence(
    exported: Path, tmp_path: Path, template: str, said: str
) -> None:
    folder = Path(shutil.copytree(exported, tmp_path / "folder"))
    (folder / RECORD).unlink()
    (folder / "chat_template.jinja").write_text(template)
    with pytest.raises(ConfigError, match=said):
        open_source(folder).codec()
    with pytest.raises(ConfigError, match=said):
        InitialChatModel.open(InitConfig(hf=str(folder)), str(tmp_path / "run"), "auto")
    file = tmp_path / "own.jinja"
    file.write_text(template)
    with pytest.raises(ConfigError, match=rf"^data\.chat_template = '{file}': .*{said}"):
        InitialChatModel.open(InitConfig(hf=str(exported)), str(tmp_path / "run"), "auto", template=str(file))


def test_a_byte_order_mark_is_no_part_of_a_chat_template(exported: Path, tmp_path: Path) -> None:
    template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{{ eos_token }}{% endfor %}"
    (tmp_path / "own.jinja").write_text(template, encoding="utf-8-sig")
    init = InitConfig(hf=str(exported))
    found = InitialChatModel.open(init, str(tmp_path / "run"), "auto", template=str(tmp_path / "own.jinja"))
    assert found.lineage.chat_template == found.chat.template == template
