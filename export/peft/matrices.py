"""The matrices of transformers' model that can have an adapter, and Trivium's weights that each of them is made of.

They follow from the family's table: its operations move and join rows of weights, and never touch columns.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from configs.adapters import TARGETS
from configs.model import ModelConfig
from export.conversion.operations import Chain, Copy, Join, Operation, Shape, SplitExperts, Transpose
from export.conversion.table import Family
from export.conversion.walk import Entry, entries

_LINEAR = re.compile(r"layers\.\d+\.(?:attention|mlp|moe\.shared)\.(\w+)\.weight")
_EXPERTS = re.compile(r"layers\.\d+\.moe\.experts\.(\w+_proj)")
# transformers keeps the experts of these files stacked in a module `mlp.experts`; Mixtral's files call it otherwise.
_RENAMED = {".block_sparse_moe.": ".mlp."}
# PEFT takes stacked matrices for [experts, out, in] unless their module says otherwise, as GPT-OSS's alone does.
_SAYS_TRANSPOSED = ("GptOssForCausalLM",)
# Names of linear layers that PEFT, when it loads an adapter of a model with experts, takes for those of the experts.
_TAKEN_FOR_EXPERTS = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class AdapterMatrix:
    """A matrix, or the stacked matrices of all experts: the `parameter` of a `module` of transformers.

    `rows` makes its rows of those of `ours`, Trivium's weights by name. `turned` says that PEFT takes its rows for
    columns, `transposed` that a linear layer's weight is kept as [in, out]. `by_module` says that PEFT finds it by the
    module's name; else by that of the parameter, which serves LoRA alone. `inside` is the number of wrappers that PEFT
    puts around this one, where several parameters of one module have an adapter. `files` are the names of the same
    matrices in files that keep experts one by one.
    """

    module: str
    parameter: str
    ours: dict[str, Shape]
    rows: Operation
    transposed: bool = False
    turned: bool = False
    by_module: bool = True
    inside: int = 0
    files: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        """The name of the matrix in adapter_config.json."""
        return self.module if self.by_module else f"{self.module}.{self.parameter}"

    @property
    def tensors(self) -> str:
        """The beginning of the names of the tensors that adapt the matrix."""
        return self.module + ".base_layer" * self.inside


def target_of(name: str) -> str | None:
    """Returns the name of a weight in `adapter.targets`, None if it cannot have an adapter."""
    if match := _LINEAR.fullmatch(name):
        return match[1] if match[1] in TARGETS else None
    return "experts" if _EXPERTS.fullmatch(name) else None


def adapter_matrices(family: Family, model: ModelConfig) -> list[AdapterMatrix]:
    """Returns all matrices of a model that can have an adapter, in the order of its layers."""
    walked = [entry for entry in entries(family, model) if all(target_of(name) for name in entry.ours)]
    split = any(isinstance(entry.operation, SplitExperts) for entry in walked)
    found: list[AdapterMatrix] = []
    experts: dict[str, dict[str, Entry]] = {}
    for entry in walked:
        first = next(iter(entry.ours))
        if target_of(first) != "experts":
            found.append(_linear(entry, split))
            continue
        layer, _, _ = first.rpartition(".")
        experts.setdefault(layer, {})[first.rpartition(".")[2]] = entry
    for matrices in experts.values():
        found += _stacked(matrices, family)
    return found


def _linear(entry: Entry, beside_experts: bool) -> AdapterMatrix:
    (theirs,) = entry.theirs
    module, _, parameter = theirs.rpartition(".")
    rows, transposed = _without_transpose(entry.operation)
    taken = beside_experts and module.rpartition(".")[2] in _TAKEN_FOR_EXPERTS
    return AdapterMatrix(module, parameter, entry.ours, rows, transposed, by_module=not taken)


def _stacked(matrices: dict[str, Entry], family: Family) -> Iterator[AdapterMatrix]:
    """Yields the matrices of one layer's experts: gates and inputs in one, and outputs."""
    down = matrices.pop("down_proj")
    ours = {name: shape for entry in matrices.values() for name, shape in entry.ours.items()}
    first = next(iter(matrices.values()))
    if isinstance(down.operation, SplitExperts):
        module = next(iter(down.theirs)).partition(".experts.")[0] + ".experts"
        for old, new in _RENAMED.items():
            module = module.replace(old, new)
        files = tuple(name for entry in matrices.values() for name in entry.theirs)
        yield AdapterMatrix(module, "gate_up_proj", ours, Join(1), by_module=False, inside=1, files=files)
        yield AdapterMatrix(module, "down_proj", down.ours, Copy(), by_module=False, files=tuple(down.theirs))
        return
    for entry, inside in ((first, 1), (down, 0)):
        (theirs,) = entry.theirs
        module, _, parameter = theirs.rpartition(".")
        rows, transposed = _without_transpose(entry.operation)
        turned = transposed and family.architecture not in _SAYS_TRANSPOSED
        yield AdapterMatrix(module, parameter, entry.ours, rows, turned=turned, by_module=False, inside=inside)


def _without_transpose(operation: Operation) -> tuple[Operation, bool]:
    """Returns an operation without its final transposition, and whether it had one."""
    steps = operation.steps if isinstance(operation, Chain) else (operation,)
    kept = tuple(step for step in steps if not isinstance(step, Transpose))
    assert not any(isinstance(step, Transpose) for step in steps[: len(kept)]), "a file transposes last"
    return Chain(kept) if kept else Copy(), len(kept) < len(steps)


def shortest_names(chosen: Iterable[str], others: Sequence[str]) -> list[str]:
    """Returns the shortest ends of the chosen names that none of the other names has, as PEFT compares them."""
    found: dict[str, None] = {}
    for name in chosen:
        parts = name.split(".")
        for count in range(1, len(parts) + 1):
            end = ".".join(parts[-count:])
            if not any(other == end or other.endswith(f".{end}") for other in others):
                break
        found[end] = None
    return list(found)
