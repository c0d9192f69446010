"""Imports between packages: compares the syntax trees of all modules with a table of what each may import.

Imports inside functions and under TYPE_CHECKING count too. Imports by third-party packages do not, but for the parts
that must run without torch a subprocess checks that it was not loaded.
"""

import ast
import functools
import importlib
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("configs", "data_pipeline", "pretrain", "posttrain", "export", "launch", "cli", "pages")
TORCH = ("torch", "megatron", "deepspeed")
TOKEN_STORE = (
    "data_pipeline.core.integrity",
    "data_pipeline.mixture.earlier",
    "data_pipeline.mixture.rows",
    "data_pipeline.mixture.packing",
    "data_pipeline.tokens.foreign",
    "data_pipeline.tokens.chat_encoder",
    "data_pipeline.tokens.chat_template",
    "data_pipeline.tokens.tokenizer",
)
LAUNCH = ("launch.environment", "launch.bootstrap")  # ranks and rendezvous; start of a process
PAGES = ("pages",)  # shared by the HTML reports of data runs and training runs


@dataclass(frozen=True)
class ImportRule:
    """Imports allowed to modules under `part`; for a module under several parts the longest one counts.

    `ours` are the allowed modules of this repository. `only`, if not empty, are the allowed third-party modules.
    `never` are modules that are not allowed even so. A name includes everything below it.
    """

    part: str
    ours: tuple[str, ...]
    only: tuple[str, ...] = ()
    never: tuple[str, ...] = ()


# Names that pretrain/model takes from megatron-core: layers, and functions into and out of split layers. Their process
# groups are arguments. ProcessGroup and ReduceOp are types.
MEGATRON_LAYERS = tuple(
    f"pretrain.megatron.{name}"
    for name in (
        "ColumnParallelLinear",
        "ModelParallelConfig",
        "RowParallelLinear",
        "VocabParallelEmbedding",
        "all_to_all",
        "copy_to_tensor_model_parallel_region",
        "gather_from_sequence_parallel_region",
        "get_pg_size",
        "reduce_from_tensor_model_parallel_region",
        "reduce_scatter_to_sequence_parallel_region",
    )
)
# How a Hugging Face folder is read: by export and import, and by a training run that starts from one (init.hf).
FOLDERS = ("export.conversion", "export.hf_folder", "export.publishing", "export.tensors")
# Modules that the report of a run uses, beside those below pages.
REPORTED = ("logs.goodput", "logs.metrics_file", "logs.text_samples_file", "report", "run.history")
LIBRARIES = ("deepspeed", "megatron", "pretrain.megatron")  # of parallel training, used only through pretrain.parallel
RULES = (
    ImportRule("configs", ours=("configs",), only=("pydantic", "pydantic_core", "tomli_w")),
    ImportRule("data_pipeline", ours=("configs", "data_pipeline", *PAGES), never=TORCH),
    ImportRule("data_pipeline.executors", ours=("configs", "data_pipeline", "launch.environment"), never=TORCH),
    ImportRule(
        "pretrain.model",
        ours=("configs", "pretrain.model", *MEGATRON_LAYERS),
        only=("torch", "numpy"),
        never=(
            "torch.distributed.init_process_group",
            "torch.distributed.new_group",
            "torch.distributed.get_rank",
            "torch.distributed.get_world_size",
            "torch.distributed.device_mesh",
        ),
    ),
    # The only module that imports megatron-core.
    ImportRule("pretrain.megatron", ours=("configs",), only=("megatron", "torch")),
    ImportRule(
        "pretrain.parallel",
        ours=("configs", "pretrain.megatron", "pretrain.model", "pretrain.parallel", "launch.environment"),
        never=("megatron",),
    ),
    ImportRule("pretrain.report", ours=("configs", *(f"pretrain.{name}" for name in REPORTED), *PAGES), never=TORCH),
    ImportRule("pretrain.logs.text_samples_file", ours=(), only=("nothing",)),
    ImportRule("pretrain.logs.metrics_file", ours=(), only=("nothing",)),
    ImportRule("pretrain.logs.goodput", ours=(), only=("nothing",)),
    ImportRule("pretrain.run.history", ours=("configs", "pretrain.schedule"), never=TORCH),
    ImportRule("pretrain.schedule", ours=("configs",), never=TORCH),
    ImportRule("pretrain.report.line_charts", ours=PAGES, never=TORCH),
    ImportRule("pretrain.report.mask_page", ours=(), never=TORCH),
    ImportRule("pages", ours=(), only=("nothing",)),
    ImportRule("pretrain", ours=("configs", "pretrain", *LAUNCH, *TOKEN_STORE, *PAGES), never=LIBRARIES),
    ImportRule("pretrain.rehearsal", ours=("configs", "pretrain", "launch", *TOKEN_STORE, *PAGES), never=LIBRARIES),
    ImportRule("pretrain.doctor", ours=("configs", "pretrain", "launch", *PAGES), never=LIBRARIES),
    ImportRule("pretrain.drill", ours=("configs", "pretrain", "launch", *PAGES), never=LIBRARIES),
    ImportRule(
        "pretrain.run.initial_model", ours=("configs", "pretrain", "export.hf_folder", *TOKEN_STORE), never=LIBRARIES
    ),
    ImportRule("pretrain.checkpoint.whole_model", ours=("configs", "pretrain", "export.hf_folder"), never=LIBRARIES),
    ImportRule("pretrain.checkpoint.adapter_base", ours=("configs", "pretrain", "export.hf_folder"), never=LIBRARIES),
    ImportRule(
        "posttrain",
        ours=("configs", "pretrain", "posttrain", "data_pipeline.reading.whole_files", *LAUNCH, *TOKEN_STORE),
        never=LIBRARIES,
    ),
    ImportRule(  # vLLM reads weights as a Hugging Face folder
        "posttrain.rl.vllm_weights",
        ours=("configs", "export.conversion", "export.hf_config", "export.tensors"),
        never=LIBRARIES,
    ),
    ImportRule("posttrain.rl.vllm_child", ours=(), only=("vllm",)),  # runs with another Python
    ImportRule(  # near-duplicates among completions are found as among documents
        "posttrain.rejection.text_measures", ours=("posttrain", "data_pipeline.scan.minhash"), never=LIBRARIES
    ),
    ImportRule(
        "export",
        ours=("configs", "pretrain", "export", "data_pipeline.report.baselines_file", *LAUNCH, *TOKEN_STORE),
        never=LIBRARIES,
    ),
    *(ImportRule(part, ours=("configs", *FOLDERS, *TOKEN_STORE), never=LIBRARIES) for part in FOLDERS),
    ImportRule("pretrain.evaluation.sandbox_child", ours=(), only=("nothing",)),  # runs alone, beside a model's program
    ImportRule("launch", ours=("configs", "launch", *PAGES), only=("rich",)),
    ImportRule("launch.mpi_rank", ours=("configs", "launch"), only=("mpi4py",)),
    ImportRule("configs.signals", ours=(), only=("nothing",)),  # imported before everything else, so it must load fast
    ImportRule("cli", ours=("configs.cli", "configs.signals", *LAUNCH), only=("nothing",)),
)


@functools.cache
def imports(source: str, module: str, is_package: bool) -> tuple[tuple[int, str], ...]:
    """Returns (line, dotted name) of everything that a module imports; `from a import b` gives a.b."""
    return tuple(_imports(source, module, is_package))


def _imports(source: str, module: str, is_package: bool) -> Iterator[tuple[int, str]]:
    """Yields (line, dotted name) of everything that a module imports.

    `from a import b` gives a.b; relative names are made absolute.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = module.split(".")[: None if is_package and node.level == 1 else -node.level + is_package]
            base = ".".join(([*parents] if node.level else []) + ([node.module] if node.module else []))
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                yield node.lineno, node.args[0].value


def under(name: str, parts: tuple[str, ...]) -> bool:
    return any(name == part or name.startswith(part + ".") for part in parts)


def offences(source: str, module: str, is_package: bool = False) -> list[str]:
    """Returns a sentence for each import of `module` that the table forbids."""
    rule = max((rule for rule in RULES if under(module, (rule.part,))), key=lambda rule: len(rule.part))
    found = []
    for line, name in imports(source, module, is_package):
        top = name.split(".")[0]
        if top in sys.stdlib_module_names:
            continue
        if top in PACKAGES:
            # `from pretrain import parallel` and `import pretrain.parallel` count as the same.
            wrong = not under(name, rule.ours) or under(name, rule.never)
        else:
            wrong = (bool(rule.only) and not under(name, rule.only)) or under(name, rule.never)
        if wrong:
            found.append(f"{module}, line {line}: imports {name}, which {rule.part} may not")
    return found


def modules() -> list[tuple[str, Path]]:
    single = [ROOT / f"{name}.py" for name in PACKAGES if not (ROOT / name).is_dir()]
    files = [*single, *(file for name in PACKAGES for file in sorted((ROOT / name).rglob("*.py")))]
    names = [".".join(file.relative_to(ROOT).with_suffix("").parts) for file in files]
    return [(name.removesuffix(".__init__"), file) for name, file in zip(names, files, strict=True)]


def test_every_import_goes_in_an_allowed_direction() -> None:
    found = modules()
    assert {name.split(".")[0] for name, _ in found} == set(PACKAGES)
    wrong = [
        offence
        for name, file in found
        for offence in offences(file.read_text(encoding="utf-8"), name, file.name == "__init__.py")
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("module", "source", "name"),
    [
        ("configs.train", "import torch", "torch"),
        ("configs.train", "import numpy as np", "numpy"),
        ("data_pipeline.mixture.rows", "def f():\n    from torch import nn", "torch.nn"),
        (
            "data_pipeline.mixture.rows",
            "from pretrain.data.batch_source import collate",
            "pretrain.data.batch_source.collate",
        ),
        (
            "data_pipeline.command",
            "from launch.environment import mpi_rank_and_world",
            "launch.environment.mpi_rank_and_world",
        ),
        ("pretrain.model.moe", "from ..parallel import groups", "pretrain.parallel.groups"),
        ("pretrain.model.moe", "from torch.distributed import new_group", "torch.distributed.new_group"),
        ("pretrain.model", "from pretrain.megatron import parallel_state", "pretrain.megatron.parallel_state"),
        ("pretrain.model.moe", "from megatron.core import tensor_parallel", "megatron.core.tensor_parallel"),
        ("pretrain.parallel.groups", "from megatron.core import parallel_state", "megatron.core.parallel_state"),
        ("pretrain.trainer", "from pretrain.megatron import parallel_state", "pretrain.megatron.parallel_state"),
        ("pretrain.parallel.engine", "import pretrain.trainer", "pretrain.trainer"),
        ("pretrain.trainer", "import deepspeed", "deepspeed"),
        ("pretrain.trainer", "from data_pipeline import dedup", "data_pipeline.dedup"),
        ("pretrain.trainer", "import posttrain", "posttrain"),
        ("pretrain.report.run_report", "from pretrain.model.losses import loss", "pretrain.model.losses.loss"),
        ("export.hf_folder", "from pretrain.checkpoint import storage", "pretrain.checkpoint.storage"),
        ("pretrain.trainer", "from export.hf_folder import open_hf_folder", "export.hf_folder.open_hf_folder"),
        ("export.huggingface", "from posttrain.chat.chat_format import X", "posttrain.chat.chat_format.X"),
        (
            "posttrain.sft",
            "if TYPE_CHECKING:\n    from export.model_source import X",
            "export.model_source.X",
        ),
        ("launch.recipe", "import_module('pretrain.train')", "pretrain.train"),
        ("launch.recipe", "import pydantic", "pydantic"),
        ("cli", "from launch import ranks", "launch.ranks"),
    ],
)
def test_a_planted_wrong_import_is_caught(module: str, source: str, name: str) -> None:
    found = offences(source, module, is_package=module == "pretrain.model")
    assert len(found) == 1 and f"imports {name}," in found[0]


def test_no_module_of_ours_takes_the_name_of_one_of_pythons() -> None:
    """Compares names of packages with Python's: a top-level html.py would hide Python's html from `python -m`."""
    assert not set(PACKAGES) & set(sys.stdlib_module_names)


def test_allowed_imports_pass() -> None:
    assert not offences("import os, torch\nfrom configs.train import ModelConfig", "pretrain.model.moe")
    assert not offences("from . import moe\nfrom .norm import RMSNorm", "pretrain.model", is_package=True)
    assert not offences(
        "from data_pipeline.mixture.rows import Plan\nfrom .losses import x", "pretrain.data.batch_source"
    )


def cycles(graph: dict[str, set[str]]) -> list[str]:
    """Returns the first cycle among packages that import each other, as its names in order; [] if there is none."""
    try:
        list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        return list(error.args[1])
    return []


@pytest.mark.parametrize("package", ["data_pipeline", "pretrain", "posttrain", "export"])
def test_no_rooms_of_a_package_import_each_other(package: str) -> None:
    """Holds the folders of a package to an order in which to read them; modules beside them may import all."""
    rooms = {file.parent.name for file in (ROOT / package).glob("*/__init__.py")}
    graph: dict[str, set[str]] = {room: set() for room in rooms}
    for name, file in modules():
        top, *inner = name.split(".")
        if top == package and inner and inner[0] in rooms:
            for _, imported in imports(file.read_text(encoding="utf-8"), name, file.name == "__init__.py"):
                other, room = imported.split(".")[:2] if "." in imported else ("", "")
                if other == top and room in rooms - {inner[0]}:
                    graph[inner[0]].add(room)
    assert not cycles(graph), "rooms that import each other: " + " <- ".join(cycles(graph))
    one, imported = next((one, found) for one, found in sorted(graph.items()) if found)
    assert cycles(graph | {other: graph[other] | {one} for other in imported}), "a planted cycle is found"


def test_torch_free_parts_load_no_torch() -> None:
    """Imports torch-free parts, which load neither MPI nor Ray, since an executor imports these when chosen."""
    free = [
        name
        for name, file in modules()
        if name.split(".")[0] in ("configs", "launch", "cli", "pages", "data_pipeline")
        or name.startswith("pretrain.report.")
    ]
    # Training ranks read rows, and pack none, so they need no compiler.
    rows = "import data_pipeline.mixture.rows; assert 'numba' not in sys.modules, 'mixture.rows'\n"
    script = f"import importlib, sys\n{rows}" + "\n".join(
        f"importlib.import_module({name!r}); assert not {{'torch', 'mpi4py', 'ray'}} & set(sys.modules), {name!r}"
        for name in free
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def test_ranks_load_no_loggers_of_libraries() -> None:
    """Imports megatron-core and DeepSpeed, whose loggers would take each rank seconds, whichever is installed."""
    from pretrain import megatron
    from pretrain.parallel.deepspeed_import import deepspeed

    assert not deepspeed.autotuning.autotuner.has_mlflow

    timers = sys.modules["megatron.core.timers"]
    assert timers.SummaryWriter is None and timers.wandb is None
    with megatron.not_installed("this", "sys"):
        with pytest.raises(ImportError):
            importlib.import_module("this")
        assert importlib.import_module("sys") is sys
    assert "this" not in sys.modules and "torch.utils.tensorboard" not in {k for k, v in sys.modules.items() if not v}


@functools.cache
def missing(name: str) -> bool:
    """Whether a dotted name of this repository is neither a module nor a word in its parent's code."""
    path = ROOT.joinpath(*name.split("."))
    if path.is_dir() or path.with_suffix(".py").is_file():
        return False
    files = [file for file in (path.parent.with_suffix(".py"), path.parent / "__init__.py") if file.is_file()]
    code = re.sub(r'^""".*?"""', "", files[0].read_text(encoding="utf-8"), flags=re.DOTALL) if files else ""
    return not re.search(rf"\b{path.name}\b", code)


def test_every_import_of_ours_exists() -> None:
    """Looks up every import of ours, also inside functions, so that a module that was moved is caught in seconds."""
    ours, wrong = (*PACKAGES, "tests"), []
    tests = [(".".join(file.relative_to(ROOT).with_suffix("").parts), file) for file in (ROOT / "tests").rglob("*.py")]
    for module, file in [*modules(), *tests]:
        for line, name in imports(file.read_text(encoding="utf-8"), module, file.name == "__init__.py"):
            if name.split(".")[0] in ours and missing(name):
                wrong.append(f"{module}, line {line}: imports {name}, which does not exist")
    assert not wrong, "\n".join(wrong)
    assert missing("pretrain.run_report") and missing("pretrain.trainer.Nothing") and not missing("pretrain.trainer")


def test_no_test_module_imports_another() -> None:
    """Holds code that tests share to modules of its own, so that each test file can be read and moved alone.

    A conftest has fixtures alone, which pytest finds without an import.
    """
    wrong = []
    for file in sorted((ROOT / "tests").rglob("*.py")):
        module = ".".join(file.relative_to(ROOT).with_suffix("").parts)
        for line, name in imports(file.read_text(encoding="utf-8"), module, file.name == "__init__.py"):
            if re.match(r"tests\.(.*\.)?(test_|conftest\b)", name):
                wrong.append(f"{module}, line {line}: imports {name}")
    assert not wrong, "\n".join(wrong)


def test_unit_tests_stand_where_the_code_stands() -> None:
    """Compares the folders of tests with those of the code, so that a reader finds one from the other."""
    unit = ROOT / "tests/unit"
    folders = {file.parent.relative_to(unit) for file in unit.rglob("test_*.py")}
    assert len(folders) > 40 and not [str(folder) for folder in folders if not (ROOT / folder).is_dir()]
