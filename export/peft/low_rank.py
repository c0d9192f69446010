"""LoRA, rank-stabilized LoRA and DoRA in PEFT's format.

A matrix that transformers' model keeps in one piece may be several of Trivium's, each with an A and B of its own. Then
PEFT's A has theirs one below the other, and its B theirs as blocks, [[B1, 0], [0, B2]], with the rows where the file
has them: a product of a higher rank with exactly the same values. A part without an adapter has rows of zeros.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from configs.adapters import TARGETS, AdapterConfig
from configs.loader import ConfigError, validate
from configs.model import ModelConfig
from export.conversion.walk import entries
from export.peft.adapter import PREFIX, Base, OwnAdapter, PeftAdapter, PeftError
from export.peft.matrices import AdapterMatrix, adapter_matrices, shortest_names, target_of
from pretrain.model.adapters.merging import adapter_name, parts_by_target

Parts = Mapping[str, torch.Tensor]
HEAD, THEIR_HEAD = "value_head.weight", "score.weight"
A, B, MAGNITUDE = "lora_A.weight", "lora_B.weight", "lora_magnitude_vector"
# Keys of adapter_config.json at which PEFT computes what Trivium does; at another value an adapter is refused.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "bias": ("none",),
    "lora_bias": (False,),
    "use_qalora": (False,),
    "use_bdlora": (None, False),
    "layer_replication": (None,),
    "alora_invocation_tokens": (None,),
    "trainable_token_indices": (None,),
    "velora_config": (None,),
    "kasa_config": (None,),
    "monteclora_config": (None,),
    "arrow_config": (None,),
    "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva"),  # others change the base's weights as well
}


class LowRankForm:
    """LoRA and DoRA, `peft_type` LORA."""

    kinds: tuple[str, ...] = ("lora", "dora")
    peft_type = "LORA"

    def check(self, adapter: AdapterConfig, model: ModelConfig) -> None:
        """Raises PeftError if the adapter belongs to weights in 4 bits (see `Form.check`)."""
        if adapter.base != "full":
            raise PeftError(
                f"the adapter was trained on weights in 4 bits (adapter.base = {adapter.base!r}), and PEFT's format "
                "does not say so; export the merged model, set adapter=merge"
            )

    def write(self, adapter: OwnAdapter, base: Base) -> PeftAdapter:
        """Returns a run's LoRA or DoRA in PEFT's format (see `Form.write`)."""
        config, parts = adapter.config, parts_by_target(adapter.tensors)
        everywhere = adapter_matrices(base.family, base.model)
        chosen = [matrix for matrix in everywhere if any(name in parts for name in matrix.ours)]
        assert parts.keys() <= {name for matrix in chosen for name in matrix.ours}, "a family has all layers"
        if config.kind == "dora":
            _check_dora(chosen, base)
        tensors: dict[str, torch.Tensor] = {}
        ranks: dict[str, int] = {}
        for matrix in chosen:
            a, b = _joined(matrix, parts, base)
            ranks[matrix.key] = a.shape[-2]
            tensors |= _theirs(matrix, a, b)
            if config.kind == "dora":
                tensors[f"{PREFIX}{matrix.tensors}.{MAGNITUDE}"] = _magnitude(matrix, parts, base)
        if HEAD in adapter.tensors:
            tensors[PREFIX + THEIR_HEAD] = adapter.tensors[HEAD]
        return PeftAdapter(_config(config, base, everywhere, chosen, ranks), tensors)

    def read(self, adapter: PeftAdapter, base: Base) -> OwnAdapter:
        """Returns PEFT's LoRA or DoRA in Trivium's form (see `Form.read`)."""
        config = adapter.config
        for key, plain in _PLAIN.items():
            if key in config and config[key] not in plain:
                raise PeftError(
                    f"adapter_config.json: {key} = {config[key]!r} is not supported, {plain[0]!r} is; merge the "
                    "adapter into its base with peft's merge_and_unload, and import the whole model"
                )
        kind = "dora" if config.get("use_dora") else "lora"
        left = {name.removeprefix(PREFIX): tensor for name, tensor in adapter.tensors.items()}
        found: dict[str, dict[str, torch.Tensor]] = {}
        scales: dict[str, float] = {}
        for matrix in adapter_matrices(base.family, base.model):
            parts, scale = _found(matrix, left, config, base)
            for name, own in parts.items():
                found[name], scales[name] = own, scale
        head = {HEAD: left.pop(THEIR_HEAD)} if THEIR_HEAD in left and not base.model.has_logits else {}
        if left:
            raise PeftError(
                f"adapter_model.safetensors has {len(left)} tensors that belong to no layer of the base model that can "
                f"have an adapter here, {', '.join(sorted(left)[:4])} among them; the adapter is of another base, or "
                "adapts other layers than the linear ones of the blocks"
            )
        if not found:
            raise PeftError("adapter_model.safetensors has no tensor of an adapter; it is not whole")
        return OwnAdapter(*_of_one_rank(found, scales, kind, config, base, head))


def _check_dora(matrices: Sequence[AdapterMatrix], base: Base) -> None:
    """Raises PeftError for matrices that PEFT finds by the name of a parameter, where it has LoRA alone."""
    without = [matrix for matrix in matrices if not matrix.by_module]
    if without:
        lost = {target_of(name) for matrix in without for name in matrix.ours}
        adapted = {target_of(name) for matrix in matrices for name in matrix.ours}
        others = [name for name in TARGETS if name in adapted - lost]
        raise PeftError(
            f"PEFT has no DoRA for {without[0].key} of {base.family.architecture}, since it takes the layer for one of "
            "the experts; export the merged model, set adapter=merge"
            + (f", or train with adapter.targets={others}" if others else "")
        )


def _joined(matrix: AdapterMatrix, parts: Mapping[str, Parts], base: Base) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns A and B of a matrix, [..., rank, in] and [..., out, rank], with experts in front."""
    own = [parts.get(name) for name in matrix.ours]
    a = torch.cat([part["a"].float() for part in own if part is not None], -2)
    blocks, start = [], 0
    for part, shape in zip(own, matrix.ours.values(), strict=True):
        block = torch.zeros(*shape[:-1], a.shape[-2])
        if part is not None:
            rank = part["b"].shape[-1]
            block[..., start : start + rank] = part["b"].float()
            start += rank
        blocks.append(block)
    (b,) = matrix.rows.to_theirs(blocks, base.model)
    return a, b


def _theirs(matrix: AdapterMatrix, a: torch.Tensor, b: torch.Tensor) -> dict[str, torch.Tensor]:
    """Returns the tensors of a matrix under PEFT's names; it keeps those of stacked experts in one."""
    if a.ndim == 3:
        if matrix.turned:
            a, b = b.transpose(1, 2), a.transpose(1, 2)
        a, b = a.flatten(0, 1), b.permute(1, 2, 0).flatten(1)
    name = PREFIX + matrix.tensors
    return {f"{name}.{A}": a.contiguous(), f"{name}.{B}": b.contiguous()}


def _magnitude(matrix: AdapterMatrix, parts: Mapping[str, Parts], base: Base) -> torch.Tensor:
    """Returns DoRA's lengths of the rows, which Trivium keeps as multiples of those of the base."""
    lengths = []
    for name in matrix.ours:
        own = base.read(name).float().square().sum(1).sqrt()
        lengths.append(own * parts[name]["magnitude"].float() if name in parts else own)
    (joined,) = matrix.rows.to_theirs(lengths, base.model)
    return joined


def _config(
    config: AdapterConfig,
    base: Base,
    everywhere: Sequence[AdapterMatrix],
    chosen: Sequence[AdapterMatrix],
    ranks: Mapping[str, int],
) -> dict[str, Any]:
    """Returns the content of adapter_config.json; names are as short as they can be."""
    own = {matrix.key for matrix in chosen}
    others = [matrix.key for matrix in everywhere if matrix.key not in own] + _other_modules(base, everywhere)
    wider = {key: rank for key, rank in ranks.items() if rank != config.rank}
    narrow = [key for key in ranks if key not in wider]
    patterns = {rank: shortest_names([key for key in wider if wider[key] == rank], narrow) for rank in wider.values()}
    found: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if base.model.has_logits else "SEQ_CLS",
        "inference_mode": True,
        "r": config.rank,
        "lora_alpha": _number(config.alpha),
        "use_rslora": config.rank_stabilized,
        "use_dora": config.kind == "dora",
        # Where PEFT finds a parameter by its own name, it has no dropout.
        "lora_dropout": config.dropout if all(matrix.by_module for matrix in chosen) else 0.0,
        "bias": "none",
        "fan_in_fan_out": any(matrix.transposed for matrix in chosen),
        "target_modules": shortest_names([matrix.key for matrix in chosen if matrix.by_module], others),
        "rank_pattern": {re.escape(name): rank for rank, names in patterns.items() for name in names},
        "alpha_pattern": {
            re.escape(name): _number(config.scale * (rank**0.5 if config.rank_stabilized else rank))
            for rank, names in patterns.items()
            for name in names
        },
    }
    if parameters := [matrix.key for matrix in chosen if not matrix.by_module]:
        named = [theirs for entry in entries(base.family, base.model) for theirs in entry.theirs]
        found["target_parameters"] = shortest_names(parameters, [name for name in named if name not in parameters])
    if not base.model.has_logits:
        found["modules_to_save"] = ["score"]
    return found


def _other_modules(base: Base, everywhere: Sequence[AdapterMatrix]) -> list[str]:
    """Returns the names in transformers of modules that can have no adapter here, such as the head."""
    known = {matrix.module for matrix in everywhere}
    named = {theirs.rpartition(".")[0] for entry in entries(base.family, base.model) for theirs in entry.theirs}
    return sorted(named - known)


def _number(value: float) -> float | int:
    return int(value) if value == int(value) else value


def _found(
    matrix: AdapterMatrix, left: dict[str, torch.Tensor], config: Mapping[str, Any], base: Base
) -> tuple[dict[str, dict[str, torch.Tensor]], float]:
    """Takes the tensors of a matrix out of `left`; returns the parts of Trivium's weights, and PEFT's scale."""
    if matrix.files and any(f"{name.removesuffix('.weight')}.{A}" in left for name in matrix.files):
        return _of_single_experts(matrix, left, config, base)
    name = matrix.tensors
    if matrix.inside and f"{name}.{A}" not in left and not _names(config, "down_proj"):
        name = matrix.module  # PEFT puts no second wrapper around it
    if f"{name}.{A}" not in left:
        return {}, 0.0
    a, b = _pair(left, name)
    count = next(iter(matrix.ours.values()))[0] if len(next(iter(matrix.ours.values()))) == 3 else 0
    rank = a.shape[0] // max(1, count)
    scale = _scale(config, matrix.key, rank)
    shapes = list(matrix.ours.values())
    (wanted_b,) = matrix.rows.to_theirs([torch.empty(*shape[:-1], rank, device="meta") for shape in shapes], base.model)
    size_in, size_out = shapes[0][-1], wanted_b.shape[-2]
    if count:
        sizes = (size_out, size_in) if matrix.turned else (size_in, size_out)
        _check(name, A, a, (count * rank, sizes[0]))
        _check(name, B, b, (sizes[1], count * rank))
        a, b = a.view(count, rank, -1), b.view(sizes[1], rank, count).permute(2, 0, 1)
        if matrix.turned:
            a, b = b.transpose(1, 2), a.transpose(1, 2)
    else:
        _check(name, A, a, (rank, size_in))
        _check(name, B, b, (size_out, rank))
    own_b = matrix.rows.to_ours([b], [(*shape[:-1], rank) for shape in shapes], base.model)
    lengths: list[torch.Tensor] | None = None
    if config.get("use_dora"):
        magnitude = left.pop(f"{name}.{MAGNITUDE}", None)
        if magnitude is None:
            raise PeftError(f"adapter_model.safetensors lacks {name}.{MAGNITUDE}, which use_dora = true needs")
        _check(name, MAGNITUDE, magnitude, (size_out,))
        lengths = matrix.rows.to_ours([magnitude.float()], [shape[:1] for shape in shapes], base.model)
    parts: dict[str, dict[str, torch.Tensor]] = {}
    for number, ours in enumerate(matrix.ours):
        own = {"a": a, "b": own_b[number].contiguous()}
        if lengths is not None:
            own["magnitude"] = _multiple(lengths[number], base.read(ours))
        if len(matrix.ours) > 1 and bool(b.any()):
            trained = own["b"].flatten(0, -2).any(0)  # the columns of this part's own block
            own["a"], own["b"] = a[..., trained, :], own["b"][..., trained]
            if not bool(trained.any()) and (lengths is None or bool((own["magnitude"] == 1).all())):
                continue
        parts[ours] = own
    return parts, scale


def _names(config: Mapping[str, Any], parameter: str) -> bool:
    """Whether adapter_config.json has a parameter of experts among its targets."""
    return any(str(name).rpartition(".")[2] == parameter for name in config.get("target_parameters") or ())


def _of_single_experts(
    matrix: AdapterMatrix, left: dict[str, torch.Tensor], config: Mapping[str, Any], base: Base
) -> tuple[dict[str, dict[str, torch.Tensor]], float]:
    """Takes the tensors of experts one by one, as PEFT wrote them while transformers kept experts so."""
    found, names = {}, iter(matrix.files)
    scale = 0.0
    for ours, (count, size_out, size_in) in matrix.ours.items():
        pairs = []
        for module in [next(names).removesuffix(".weight") for _ in range(count)]:
            if f"{module}.{A}" not in left:
                raise PeftError(f"adapter_model.safetensors has adapters of some experts alone, and none of {module}")
            a, b = _pair(left, module)
            _check(module, A, a, (len(a), size_in))
            _check(module, B, b, (size_out, len(a)))
            scale = _scale(config, module, len(a))
            pairs.append((a, b))
        found[ours] = {"a": torch.stack([a for a, _ in pairs]), "b": torch.stack([b for _, b in pairs])}
    return found, scale


def _pair(left: dict[str, torch.Tensor], name: str) -> tuple[torch.Tensor, torch.Tensor]:
    try:
        return left.pop(f"{name}.{A}").float(), left.pop(f"{name}.{B}").float()
    except KeyError as error:
        raise PeftError(f"adapter_model.safetensors lacks {PREFIX}{error.args[0]}; fetch the file again") from None


def _check(name: str, kind: str, tensor: torch.Tensor, wanted: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != wanted:
        raise PeftError(
            f"{PREFIX}{name}.{kind} is {list(tensor.shape)}, and the base model's layer takes {list(wanted)}; the "
            "adapter is of another base, so name the one that it was trained on"
        )


def _scale(config: Mapping[str, Any], key: str, rank: int) -> float:
    """Returns the factor on the product, by PEFT's rules of patterns. Raises PeftError if the rank is another one."""

    def of(patterns: str, default: str) -> float:
        for pattern, value in (config.get(patterns) or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", key):
                return float(value)
        stated = config.get(default)
        return 8.0 if stated is None else float(stated)

    if (stated := of("rank_pattern", "r")) != rank:
        raise PeftError(f"the adapter of {key} has rank {rank}, and adapter_config.json says {stated:g}")
    return of("alpha_pattern", "lora_alpha") / (rank**0.5 if config.get("use_rslora") else rank)


def _multiple(lengths: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Returns lengths of rows as multiples of those of the base; a row of zeros has length 0 with any multiple."""
    own = weight.float().square().sum(1).sqrt()
    return torch.where(own > 0, lengths / own, torch.ones_like(own))


def _of_one_rank(
    found: dict[str, dict[str, torch.Tensor]],
    scales: Mapping[str, float],
    kind: str,
    config: Mapping[str, Any],
    base: Base,
    head: Mapping[str, torch.Tensor],
) -> tuple[AdapterConfig, dict[str, torch.Tensor]]:
    """Pads all parts with zeros to one rank, and scales each B so that all have one scale."""
    rank = max(parts["a"].shape[-2] for parts in found.values())
    scale = next(scales[name] for name, parts in found.items() if parts["a"].shape[-2] == rank)
    targets = {str(target_of(name)) for name in found}
    shapes = {
        name: shape
        for matrix in adapter_matrices(base.family, base.model)
        for name, shape in matrix.ours.items()
        if target_of(name) in targets
    }
    tensors = dict(head)
    for name, shape in shapes.items():
        a, b = torch.zeros(*shape[:-2], rank, shape[-1]), torch.zeros(*shape[:-1], rank)
        parts = found.get(name)
        if parts is not None:
            own = parts["a"].shape[-2]
            a[..., :own, :] = parts["a"]
            b[..., :own] = parts["b"] if scales[name] == scale else parts["b"] * (scales[name] / scale)
        tensors[adapter_name(name, "a")], tensors[adapter_name(name, "b")] = a, b
        if kind == "dora":
            tensors[adapter_name(name, "magnitude")] = torch.ones(shape[0]) if parts is None else parts["magnitude"]
    stabilized = bool(config.get("use_rslora"))
    fields = {
        "kind": kind,
        "rank": rank,
        "alpha": scale * (rank**0.5 if stabilized else rank),
        "rank_stabilized": stabilized,
        "dropout": 0.0 if kind == "dora" or "experts" in targets else float(config.get("lora_dropout") or 0.0),
        "targets": [name for name in TARGETS if name in targets],
    }
    try:
        adapter = validate(AdapterConfig, fields, origin="adapter_config.json")
        adapter.targets_in(base.model)
    except ConfigError as error:
        raise PeftError(str(error)) from None
    return adapter, tensors
