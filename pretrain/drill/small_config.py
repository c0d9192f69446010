"""The config of the runs that a drill breaks: the user's own in small, in the same layout as far as ranks allow.

Every change is tried on its own and kept if the config is still legal, so that a model keeps its parts. Keys that the
user has set on the command line are left alone. Imports no torch.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from configs.layout import Layout
from configs.loader import ConfigError, plain, validate
from configs.train import PretrainConfig
from pretrain.rehearsal.distinct_ranks import smallest_world

STEPS, EVERY, KEPT = 24, 4, 3  # of training, from one checkpoint to the next, of checkpoints
MOST_RANKS = 16
USUAL_RANKS = 4  # at most, unless more are asked for
LARGE = 5_000_000  # parameters from which on a model is made smaller
SHORT = 64  # tokens of a row that stands in for data
VOCABULARIES = (512, 1024)
LEAST_SECONDS = 5.0  # of the watchdog
DEGREES = ("tp", "pp", "cp", "ep")
Changes = Mapping[str, Any]


class SmallConfig:
    """A config that becomes smaller change by change, and what has been changed, for the user.

    `ranks` is the number of ranks. `given` are the keys of the user's overrides.
    """

    def __init__(self, config: PretrainConfig, ranks: int, given: Iterable[str]):
        self.config, self.ranks = config, ranks
        self._given = tuple(given)
        self._before = _flat(plain(config))

    @property
    def layout(self) -> Layout:
        """The layout of the runs. Raises ConfigError if the config has none for this number of ranks."""
        return Layout.of(self.ranks, self.config.parallel, self.config.model, self.config.train)

    def take(self, changes: Changes) -> None:
        """Makes changes that a drill cannot do without. Raises ConfigError if they are not legal."""
        self.config = self._changed(changes)

    def attempt(self, *options: Changes) -> None:
        """Makes the first of these changes that is legal, has a layout, and makes the model no larger."""
        for changes in options:
            if any(self._is_given(key) for key in changes):
                continue
            try:
                tried = self._changed(changes)
                Layout.of(self.ranks, tried.parallel, tried.model, tried.train)
            except ConfigError:
                continue
            if tried.model.num_parameters() <= self.config.model.num_parameters():
                self.config = tried
                return

    def changed(self) -> list[str]:
        """Returns the changes of model, batch and layout as `key old -> new`."""
        after = _flat(plain(self.config))
        keys = sorted(key for key in self._before.keys() | after.keys() if self._before.get(key) != after.get(key))
        shown = [key for key in keys if key.split(".")[0] in ("model", "parallel", "train") and key != "train.steps"]
        return [f"{key} {_said(self._before.get(key))} -> {_said(after.get(key))}" for key in shown]

    def _is_given(self, key: str) -> bool:
        return any(key == given or key.startswith(f"{given}.") for given in self._given if given != "model")

    def _changed(self, changes: Changes) -> PretrainConfig:
        tree = plain(self.config)
        for key, value in changes.items():
            *parents, leaf = key.split(".")
            node = tree
            for parent in parents:
                node = node.setdefault(parent, {})
            if value is None:
                node.pop(leaf, None)
            else:
                node[leaf] = value
        return validate(PretrainConfig, tree)


def default_ranks(config: PretrainConfig) -> int:
    """Returns the number of ranks if the user names none: those of the smallest job of this layout, at least two."""
    return max(2, min(USUAL_RANKS, smallest_world(config.parallel)))


def fit_layout(small: SmallConfig) -> None:
    """Lowers degrees of parallelism, the largest first, until the ranks are a multiple of what they need."""
    while small.ranks % smallest_world(small.config.parallel):
        parallel = small.config.parallel
        name = max(DEGREES, key=lambda degree: getattr(parallel, degree))
        degree = getattr(parallel, name)
        lowered = {f"parallel.{name}": degree // _smallest_factor(degree)}
        if small._is_given(f"parallel.{name}"):
            raise ConfigError(
                f"parallel.{name}={degree} and the other degrees need a multiple of {smallest_world(parallel)} ranks, "
                f"and --nproc-per-node is {small.ranks}; give as many, up to {MOST_RANKS}, or lower a degree"
            )
        if name == "pp":
            lowered |= {"parallel.layers_per_stage": None}
            lowered |= {"parallel.vpp": 1} if lowered["parallel.pp"] == 1 else {}
        if name == "tp" and lowered["parallel.tp"] == 1:
            lowered |= {"parallel.sp": False}
        small.take(lowered)


def make_small(small: SmallConfig, has_plan: bool) -> None:
    """Makes training short, and the model and the batch small. Rows of a plan keep their length and vocabulary."""
    train = small.config.train
    if small.config.adapter:
        raise ConfigError(
            f"adapter.kind = {str(small.config.adapter.kind)!r} trains adapters of another model, and a drill trains a "
            "small model from random weights; set adapter=none"
        )
    small.take(
        {
            "init": None,
            "train.compile": False,
            "train.steps": STEPS,
            "schedule.steps": max(small.config.schedule.steps or train.steps, STEPS),
            "checkpoint": {"every": EVERY, "keep": KEPT},
            "eval": {"rows": 0},
            "tracking": {},
            "log": {"tensorboard": False},
            "watchdog.least_seconds": min(LEAST_SECONDS, small.config.watchdog.least_seconds),
        }
    )
    _shrink_batch(small)
    if not has_plan:
        parts = small.config.parallel.sequence_parts
        lengths = sorted({max(1, SHORT // parts) * parts, SHORT * parts})
        small.attempt(*({"train.seq_length": n} for n in lengths if n < train.seq_length))
        small.attempt(*({"model.vocab_size": n} for n in VOCABULARIES if n < small.config.model.vocab_size))
    if small.config.model.num_parameters() > LARGE:
        _shrink_model(small)


def _shrink_batch(small: SmallConfig) -> None:
    """Takes the smallest batch that fills the pipeline twice, if the batch is larger or not legal with these ranks."""
    parallel, batch = small.config.parallel, small.config.train.global_batch_size
    dp = small.ranks // (parallel.tp * parallel.cp * parallel.pp)
    sizes = [dp * n for n in range(2 * parallel.pp, 4 * parallel.pp + 1)]
    small.attempt(*({"train.micro_batch_size": 1, "train.global_batch_size": n} for n in sizes if n < batch))
    try:
        _ = small.layout
    except ConfigError:
        small.attempt(*({"train.micro_batch_size": 1, "train.global_batch_size": n} for n in sizes))


def _shrink_model(small: SmallConfig) -> None:
    model, parallel = small.config.model, small.config.parallel
    stages = parallel.pp * parallel.vpp
    small.attempt(
        *({"model.num_layers": n, "parallel.layers_per_stage": None} for n in range(max(2, stages), model.num_layers))
    )
    heads, ratio = parallel.tp * parallel.cp, max(1, model.num_heads // model.num_kv_heads)
    options = ((n, max(1, n // ratio)) for n in (2 * heads, 4 * heads, 8 * heads) if n < model.num_heads)
    # Key-value heads stay divided among the ranks of tensor parallel if they are.
    pairs = [(n, kv) for n, kv in options if kv % parallel.tp == 0 or model.num_kv_heads % parallel.tp]
    small.attempt(
        *(
            {"model.num_heads": n, "model.num_kv_heads": kv, "model.head_dim": size}
            for size in (16, 32, 64, None)
            for n, kv in pairs
        ),
        {"model.head_dim": 16},
        {"model.head_dim": 32},
    )
    if delta := model.attention.delta:
        sharing = delta.num_value_heads // delta.num_key_heads
        prefix = "model.attention.delta."
        counts = [n for n in (heads, 2 * heads, 4 * heads) if n < delta.num_key_heads]
        small.attempt(*({f"{prefix}num_key_heads": n, f"{prefix}num_value_heads": n * sharing} for n in counts))
    for key, sizes in (
        ("model.attention.delta.key_head_dim", (16,)),
        ("model.attention.delta.value_head_dim", (16,)),
        ("model.moe.num_experts", (2 * parallel.ep, 4 * parallel.ep, 8 * parallel.ep, 16 * parallel.ep)),
        ("model.moe.ffn_hidden_size", (32 * parallel.tp, 64 * parallel.tp)),
        ("model.moe.shared_ffn_hidden_size", (32 * parallel.tp, 64 * parallel.tp)),
        ("model.ffn_hidden_size", (64 * parallel.tp, 128 * parallel.tp)),
        ("model.attention.latent.q_rank", (16,)),
        ("model.attention.latent.kv_rank", (16,)),
        ("model.attention.latent.nope_head_dim", (16,)),
        ("model.attention.latent.rope_head_dim", (8,)),
        ("model.attention.latent.v_head_dim", (16,)),
        ("model.hidden_size", (64, 128, 256)),
    ):
        now = _flat(plain(small.config)).get(key)
        small.attempt(*({key: size} for size in sizes if now is not None and size < now))


def _smallest_factor(number: int) -> int:
    return next(n for n in range(2, number + 1) if number % n == 0)


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _said(value: Any) -> str:
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def given_keys(overrides: Sequence[str]) -> list[str]:
    """Returns the keys of `key=value` overrides."""
    return [override.partition("=")[0].strip() for override in overrides]
