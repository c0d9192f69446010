"""Remedies in messages about options of commands: each is done word for word, and the command goes on then.

Where the next thing that a command needs is no part of the case, such as a run, its absence is told instead.
"""

import importlib
from pathlib import Path

import pytest

from configs.loader import ConfigError
from launch import recipe

ROOT = Path(__file__).resolve().parents[2]
TRAIN, DATA = str(ROOT / "configs/pretrain/demo.toml"), str(ROOT / "configs/data/demo.toml")
SFT, EXPORT = str(ROOT / "configs/posttrain/demo_sft.toml"), str(ROOT / "configs/export/demo.toml")
DRILL, PROVE = "pretrain.drill.drill", "pretrain.proof.prove"
SAMPLE, EVAL = "data_pipeline.provenance.document_samples", "export.evaluate"
COMPARE, CONFIG = "posttrain.algorithms.compare_dialects", "configs.config_command"
RECALL, CLASSIFIER = "data_pipeline.provenance.recall", "data_pipeline.scores.classifier"
RUN, NO_RUN = ["run.dir=x"], "holds no finished stage"
DRY = ["--dry-run"]
NO_BATCH, NO_MODEL = "cannot be read as a recorded batch", "x does not exist"
EXAMPLES = ["good", "--bad", "bad", "--out", "model"]
LINES = [DATA, "--stage", "lines", *RUN]
WEB_LINES = [DATA, "--stage", "web_lines", *RUN]


@pytest.mark.parametrize(
    ("command", "wrong", "words", "right", "next_refusal"),
    [
        (
            COMPARE,
            ["b", "--drift", "-1"],
            "is no distance; give 0 or a small number of nats, such as 0.2",
            ["b", "--drift", "0.2"],
            NO_BATCH,
        ),
        (COMPARE, ["b", "--drift", "inf"], "give 0 or", ["b", "--drift", "0"], NO_BATCH),
        (COMPARE, ["b", "--max-length", "0"], "give at least 1", ["b", "--max-length", "1"], NO_BATCH),
        (COMPARE, ["b", "--max-length", "0"], "or leave it out", ["b"], NO_BATCH),
        (
            DRILL,
            [TRAIN, *DRY, "--nproc-per-node", "1"],
            "give --nproc-per-node 2",
            [TRAIN, *DRY, "--nproc-per-node=2"],
            "",
        ),
        (DRILL, [TRAIN, *DRY, "--only", "kil"], "write --only kill,stop", [TRAIN, *DRY, "--only", "kill,stop"], ""),
        (
            DRILL,
            [TRAIN, *DRY, "adapter.rank=2"],
            "set adapter=none",
            [TRAIN, *DRY, "adapter.rank=2", "adapter=none"],
            "",
        ),
        *(
            (DRILL, [TRAIN, *DRY, "--nproc-per-node=3", "parallel.tp=2"], words, [TRAIN, *DRY, *right], "")
            for words, right in (
                (
                    "need a multiple of 2 ranks, and --nproc-per-node is 3; give as many",
                    ["--nproc-per-node=4", "parallel.tp=2"],
                ),
                ("or lower a degree", ["--nproc-per-node=3", "parallel.tp=1"]),
            )
        ),
        (
            PROVE,
            [TRAIN, "--layouts", "tpp2"],
            "e.g. tp2, tp2sp",
            [TRAIN, "--layouts", "tp2,tp2sp", "--precision", "x"],
            "--precision",
        ),
        (
            PROVE,
            [TRAIN, "--layouts", "tp3", "--precision", "fp16"],
            "write fp32,bf16 for both",
            [
                TRAIN,
                "--layouts",
                "tp3",
                "--precision",
                "fp32,bf16",
            ],
            "--layouts: tp3",
        ),
        (
            "pretrain.doctor.doctor",
            ["tests"],
            "give one, such as runs/demo/pretrain, or train CONFIG",
            ["train", TRAIN],
            None,
        ),
        (
            "pretrain.doctor.doctor",
            [EXPORT],
            "are those of a export config, which trains nothing; name another config",
            [TRAIN],
            None,
        ),
        ("pretrain.doctor.doctor", ["--ranks", "0", "train", TRAIN], "is no number of ranks; give 1 or more", [], None),
        (
            "posttrain.rehearse",
            [TRAIN, "--world=0"],
            "is no number; give 1 or more, such as --world 1",
            [TRAIN, "--world=1", "--processes=0"],
            "--processes",
        ),
        (
            "posttrain.rehearse",
            [TRAIN, "--world=1", "--micro-batches=999"],
            "of a step; set --micro-batches 2, or leave it out",
            [],
            None,
        ),
        (DRILL, [SFT, *DRY], "train by the same engine: write a pretraining config with the", [TRAIN, *DRY], ""),
        (
            SAMPLE,
            [DATA, "-n", "0", *RUN],
            "is not a whole number of at least 1; give one, e.g. 20",
            [DATA, "-n", "20", *RUN],
            NO_RUN,
        ),
        (SAMPLE, [DATA, "--chars", "x", *RUN], "give one, e.g. 20", [DATA, "--chars", "20", *RUN], NO_RUN),
        (SAMPLE, [DATA, "--kept", "--reason", "a", *RUN], "leave one of them out", [DATA, "--kept", *RUN], NO_RUN),
        (
            SAMPLE,
            [DATA, "--stage", "tokens", *RUN],
            "drops and cuts nothing; those that do: extract, ",
            [DATA, "--stage", "extract", *RUN],
            NO_RUN,
        ),
        *(
            (
                SAMPLE,
                WEB_LINES,
                'the config has this stage switched off; give a rule set drop_lines = ["c4"] or ["refinedweb"]',
                [
                    *WEB_LINES,
                    f'rules.code.drop_lines=["{name}"]',
                ],
                NO_RUN,
            )
            for name in ("c4", "refinedweb")
        ),
        *(
            (
                SAMPLE,
                [DATA, "--stage", stage, *RUN, f"{stage}.enabled=false"],
                f"set {stage}.enabled = true",
                [
                    DATA,
                    "--stage",
                    stage,
                    *RUN,
                    f"{stage}.enabled=true",
                ],
                NO_RUN,
            )
            for stage in ("lines", "substrings")
        ),
        (SAMPLE, [*LINES, "lines=none"], "add a section [lines]", [*LINES, "lines.max_copies=6"], NO_RUN),
        (RECALL, [DATA, "--similar", "2", *RUN, *DRY], "such as 0.8", [DATA, "--similar", "0.8", *RUN, *DRY], ""),
        (
            "data_pipeline.provenance.explain",
            [DATA, *RUN],
            "trivium data explain needs --id, the document to explain",
            [DATA, "--id", "a", *RUN],
            "run: trivium data run",
        ),
        (
            CLASSIFIER,
            [*EXAMPLES, "--heldout", "0.9"],
            "from 1e-06 to 0.5",
            [*EXAMPLES, "--heldout", "0.5"],
            "matches no file",
        ),
        (EVAL, ["x", "--rows", "0"], "there are no --tasks; leave it out, or", ["x"], NO_MODEL),
        (EVAL, ["x", "--rows", "0"], "or give --tasks", ["x", "--rows", "0", "--tasks", "y"], NO_MODEL),
        (EVAL, ["x", "--rows", "-1"], "give 0 or more", ["x", "--rows", "0", "--tasks", "y"], NO_MODEL),
        (EVAL, ["x", "--limit", "0"], "give 1 or more", ["x", "--limit", "1"], NO_MODEL),
        (CONFIG, ["--new", "sft", "data"], "--new prints a whole config, so leave out 'data'", ["--new", "sft"], ""),
        (CONFIG, ["--models", "sft"], "--models lists all published models, so leave out 'sft'", ["--models"], ""),
        (
            CONFIG,
            ["--explain", "sft", "data.dialgues"],
            "did you mean data.dial",
            ["--explain", "sft", "data.dialogues"],
            "",
        ),
        (CONFIG, ["--explain", "sft", "data.dialgues"], "or task.files", ["--explain", "sft", "task.files"], ""),
        (CONFIG, ["--new", "sfx"], "choose one of: data, pretrain, sft, ", ["--new", "pretrain"], ""),
        (
            "posttrain.rehearse",
            [TRAIN, "--device=tpu"],
            "set --device gpu or",
            [TRAIN, "--device=gpu", "--world=x"],
            "--world",
        ),
        (
            "posttrain.rehearse",
            [TRAIN, "--device=tpu"],
            "or --device cpu",
            [TRAIN, "--device=cpu", "--world=x"],
            "--world",
        ),
        (PROVE, ["--fuzz", "0"], "give a number of 1 or more", ["--fuzz", "1", "--out", "/proc/none"], "--out"),
        (
            PROVE,
            [TRAIN, "--layouts", "tp2", "--inject", "x"],
            "is no known bug; there are norm_gradients_not_summed",
            [
                TRAIN,
                "--layouts",
                "tpp2",
                "--inject",
                "norm_gradients_not_summed",
            ],
            "is not a layout",
        ),
        (
            PROVE,
            [TRAIN, "--layouts", "zero2", "--precision", "fp64"],
            "compare it in fp32",
            [
                TRAIN,
                "--layouts",
                "zero2,tp3",
                "--precision",
                "fp32",
            ],
            "--layouts: tp3",
        ),
    ],
)
def test_a_command_goes_on_once_its_message_was_followed(
    command: str,
    wrong: list[str],
    words: str,
    right: list[str],
    next_refusal: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    main = importlib.import_module(command).main
    with pytest.raises(ConfigError) as raised:
        main(wrong)
    assert words in str(raised.value)
    if next_refusal == "":
        assert main(right) == 0
    elif next_refusal is not None:
        with pytest.raises(ConfigError) as raised:
            main(right)
        assert next_refusal in str(raised.value) and words not in str(raised.value)


def test_the_demo_goes_on_in_the_folder_that_its_message_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="here; run the demo from the root of the repository"):
        recipe.demo(["--dry-run"])
    monkeypatch.chdir(ROOT)
    assert recipe.demo(["--dry-run"]) == 0
