"""One walk of a family's table, for export and for import.

`entries` applies the rules to a model. `fit` compares them with the names and shapes of a folder, and `problems` says
everything that is missing, extra and misshapen. `convert` goes through them in order, embedding, layers, head, and
yields the tensors of the other side: it holds those of one rule at a time, so that both directions stream.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from configs.model import ModelConfig
from export.conversion.operations import Operation, Shape, their_shapes
from export.conversion.table import Family, Rule
from export.conversion.tensor_shapes import parameters

LAYERS = "model.layers.{layer}."  # begins the names of a layer's tensors in files of families with further layers
KEPT = "kept."  # begins the names of tensors of an imported file that Trivium computes nothing with
SHOWN = 20  # names of one kind in a message


class ConversionError(ValueError):
    """Everything that is wrong with a folder or with weights, in one message with a line for each problem."""

    def __init__(self, problems: Sequence[str]):
        self.problems = list(problems)
        lines = "".join(f"\n- {problem}" for problem in self.problems)
        super().__init__(self.problems[0] if len(self.problems) == 1 else f"{len(self.problems)} problems:{lines}")


@dataclass(frozen=True)
class Entry:
    """A rule applied to one layer or to none: names and shapes of both sides."""

    operation: Operation
    ours: dict[str, Shape]
    theirs: dict[str, Shape]
    keep_fp32: bool = False


def entries(family: Family, config: ModelConfig) -> list[Entry]:
    """Returns the entries of a model, in order. Raises ConversionError naming tensors that the family has no name for.

    The order is that of `parameters`, by the first of an entry's tensors.
    """
    shapes = parameters(config)
    rules: dict[str, list[Rule]] = {}
    for rule in family.rules:
        for name in rule.our_names:
            rules.setdefault(name, []).append(rule)
    found: list[Entry] = []
    done: set[str] = set()
    lacking = []
    for name in shapes:
        if name in done:
            continue
        layer = match[1] if (match := re.match(r"layers\.(\d+)\.", name)) else ""
        served = name.replace(f"layers.{layer}.", "layers.{layer}.", 1) if layer else name
        for rule in rules.get(served, ()):
            ours = [ours.replace("{layer}", layer) for ours in rule.our_names]
            beside = [rule.beside.replace("{layer}", layer)] if rule.beside else []
            if all(other in shapes for other in (*ours, *beside)):
                done.update(ours)
                found.append(_entry(rule, layer, {name: shapes[name] for name in ours}, family, config))
                break
        else:
            lacking.append(name)
    if lacking:
        raise ConversionError([f"{family.architecture} has no tensor for {_listed(lacking)}"])
    return found


def _entry(rule: Rule, layer: str, ours: dict[str, Shape], family: Family, config: ModelConfig) -> Entry:
    experts = config.moe.num_experts if config.moe else 0
    is_further = bool(layer) and int(layer) >= config.num_layers
    theirs: list[str] = []
    for name in rule.their_names:
        named = name.replace(LAYERS, family.further_layers) if is_further else name
        named = named.replace("{layer}", layer)
        many = [named.replace("{expert}", str(expert)) for expert in range(experts)]
        theirs += many if "{expert}" in named else [named]
    made = their_shapes(rule.operation, list(ours.values()), config)
    return Entry(rule.operation, ours, dict(zip(theirs, made, strict=True)), rule.keep_fp32)


def convert(
    walked: Sequence[Entry],
    read: Callable[[str], torch.Tensor],
    config: ModelConfig,
    to: Literal["ours", "theirs"],
    kept: Callable[[str], torch.Tensor | None] = lambda name: None,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields (name, tensor) of one side for every entry; `read` returns a tensor of the other side by name.

    `kept` returns what an import kept of a tensor of the file, or None; an import yields that too, under its name after
    "kept.".
    """
    for entry in walked:
        if to == "ours":
            theirs = [read(name) for name in entry.theirs]
            yield from zip(entry.ours, entry.operation.to_ours(theirs, list(entry.ours.values()), config), strict=True)
            if (left := entry.operation.left_over(theirs)) is not None:
                yield KEPT + next(iter(entry.theirs)), left
        else:
            made = entry.operation.to_theirs([read(name) for name in entry.ours], config)
            if (left := kept(next(iter(entry.theirs)))) is not None:
                made = entry.operation.put_back(made, left)
            yield from zip(entry.theirs, made, strict=True)


@dataclass(frozen=True)
class Fit:
    """The tensors of a folder as those of a model: its entries, and what fits and what does not.

    `names` gives the folder's name of each tensor of the entries, `kept` the names of tensors to keep as they are, and
    `problems` a sentence for each kind of fault.
    """

    walked: list[Entry]
    names: dict[str, str]
    kept: list[str]
    problems: list[str]


def fit(family: Family, config: ModelConfig, found: Mapping[str, Shape | None]) -> Fit:
    """Compares the names and shapes of a folder's tensors with those that the family gives the model."""
    walked = entries(family, config)
    wanted = {name: shape for entry in walked for name, shape in entry.theirs.items()}
    bare = family.prefix and not any(name.startswith(family.prefix) for name in found)
    names = {name.removeprefix(family.prefix) if bare else name: name for name in wanted}
    present = {names.get(name, name): shape for name, shape in found.items()}
    head = head_name(family)
    kept = [*family.kept, *(_copies(layer.index) for layer in config.mtp_layers)]
    aside = [re.compile(pattern) for pattern in (*family.ignored, *kept)]
    rest = {
        name: shape
        for name, shape in present.items()
        if name in wanted or not (any(p.fullmatch(name) for p in aside) or (config.tie_embeddings and name == head))
    }
    said = problems(wanted, rest, family.architecture)
    lacking = [name for name in wanted if name not in rest]
    if lacking == [head]:
        said[0] += "; if the output head is the embedding, set tie_word_embeddings = true in config.json"
    elif lacking:
        said[0] += "; fetch the files again, or the config.json that belongs to them"
    tables = [shape for name in (embedding_name(family), head) if (shape := present.get(name))]
    if tables and tables[0][0] != config.vocab_size:
        rows = tables[0][0]
        said.append(
            f"the embedding has {rows} rows and config.json says vocab_size = {config.vocab_size}; set vocab_size = "
            f"{rows} if the tokenizer has no more tokens"
        )
    names_kept = [name for name in found if name not in wanted and any(re.fullmatch(p, name) for p in kept)]
    return Fit(walked, {theirs: mine for mine, theirs in names.items()}, names_kept, said)


def _copies(layer: int) -> str:
    """Returns the pattern of the copies of embedding and head that a file may have for a module of prediction."""
    return rf"(?:.*\.)?layers\.{layer}\.(?:embed_tokens|shared_head\.head)\.weight"


def modules_in(family: Family, found: Iterable[str], num_layers: int) -> int:
    """Returns the number of modules of multi-token prediction that a folder with these tensors has."""
    if "{layer}" not in family.further_layers:  # the family has one at most, whose names begin as its block's do
        return int(any(name.startswith(family.further_layers.partition(".")[0] + ".") for name in found))
    own = re.compile(r"(?:.*\.)?layers\.(\d+)\.(?:enorm|hnorm|eh_proj|shared_head\.norm)\.weight")
    layers = [int(match[1]) for name in found if (match := own.fullmatch(name))]
    return max(0, max(layers, default=0) + 1 - num_layers)


def head_name(family: Family) -> str:
    """Returns the name of the output head in files of the family."""
    return next((rule.their_names[0] for rule in family.rules if "lm_head.weight" in rule.our_names), "lm_head.weight")


def embedding_name(family: Family) -> str:
    """Returns the name of the embedding in files of the family."""
    return next(rule.their_names[0] for rule in family.rules if "embedding.weight" in rule.our_names)


def problems(wanted: Mapping[str, Shape], found: Mapping[str, Shape | None], model: str) -> list[str]:
    """Returns a sentence for each kind of fault of names and shapes: missing, misshapen, extra.

    A shape that is None is not known.
    """
    missing = [name for name in wanted if name not in found]
    extra = sorted(found.keys() - wanted.keys())
    misshapen = [
        f"{name} {shape} instead of {wanted[name]}"
        for name, shape in found.items()
        if shape is not None and name in wanted and shape != wanted[name]
    ]
    said = []
    if missing:
        said.append(f"{_counted(missing)} missing that {model} has: {_listed(missing)}")
    if misshapen:
        said.append(f"{_counted(misshapen)} of another shape than the config gives: {_listed(misshapen)}")
    if extra:
        said.append(f"{_counted(extra)} not part of {model}: {_listed(extra)}")
    return said


def _counted(names: Sequence[str]) -> str:
    return f"{len(names)} tensors are" if len(names) > 1 else "1 tensor is"


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
