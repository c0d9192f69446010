"""Draws models, layouts, precisions and batches at random, proves each, and shrinks a failure to a small config.

Draw i of a seed is a pure function of both, so that a failure can be drawn again. Models are tiny, since a bug of
composition does not need a large one, and layouts have up to MOST_RANKS ranks.
"""

import random
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from configs.layout import Layout, LayoutRequest
from configs.loader import ConfigError, plain, validate
from configs.remedies import Misfit
from configs.train import PretrainConfig
from pretrain.proof.candidate import Candidate
from pretrain.proof.draw_model import draw_model, simpler_models

# Keys and whole sections of a pretraining config that no draw varies, with the reason for each.
NOT_DRAWN = {
    "run.dir": "it is the folder of the results",
    "init": "a draw begins with random weights, and draws the keys of the model itself",
    "adapter": "tests/parallel/test_adapters.py holds adapters in each layout against one rank",
    "train.freeze": "tests/parallel/test_adapters.py freezes weights in each layout",
    "data": "the rows of a proof do not come from a plan",
    "train.steps": "a proof takes three steps",
    "train.precision": "the proof's own --precision is drawn in its place",
    "train.compile": "compiling takes longer than many draws; the layout tests hold compiled blocks against others",
    "train.deterministic": "it chooses kernels of GPUs",
    "parallel.backend": "it changes nothing on CPUs, where all messages go over gloo",
    "schedule": "a proof keeps one learning rate",
    "checkpoint": "a proof saves nothing",
    "eval": "the proof's evaluation is of one batch, always",
    "log": "a proof logs nothing",
    "tracking": "a proof records nothing",
    "checks": "they change no number, and a test of their own compares runs with and without",
    "spikes": "a proof takes three steps, and a spike needs twenty before it",
    "watchdog": "it changes no number; tests/parallel/test_watchdog.py stops ranks in each layout",
}
MOST_RANKS = 4
MOST_SHRINKS = 80  # configs that are tried for one failure

# Records steps in run.dir, given (number of ranks, config, precision, injected bug, folder of the reference).
Run = Callable[[int, dict[str, Any], str, str | None, Path | None], None]


@dataclass(frozen=True)
class Draw:
    """One drawn case. `degrees` are those of `candidate.DEGREES`, and `accum` counts a rank's micro-batches."""

    model: dict[str, Any]
    train: dict[str, Any]
    optimizer: dict[str, Any]
    degrees: dict[str, int]
    precision: str
    accum: int
    sp: bool = False
    offload: bool = False
    layers_per_stage: tuple[int, ...] | None = None
    seed: int = 1234

    def config(self, run_dir: Path, parallel: bool) -> dict[str, Any]:
        """Returns the config, with the layout in it or, for the reference, without."""
        batch = self.train["micro_batch_size"] * self.accum * self.degrees["dp"]
        section: dict[str, Any] = {"offload_optimizer": self.offload}
        return {
            "run": {"dir": str(run_dir), "seed": self.seed},
            "data": {"plan": "not read"},
            "model": self.model,
            "train": {**self.train, "steps": 10, "global_batch_size": batch},
            "optimizer": self.optimizer,
            "parallel": section | (self.candidate.parallel if parallel else {}),
        }

    @property
    def candidate(self) -> Candidate:
        return Candidate.named(self.degrees, self.sp).with_layers(self.layers_per_stage)

    @property
    def is_legal(self) -> bool:
        """Returns whether training would accept the config and, in fp64, the proof."""
        stages = self.degrees.get("pp", 1) * self.degrees.get("vpp", 1)
        if self.candidate.world_size > MOST_RANKS or len(self.layers_per_stage or range(stages)) != stages:
            return False
        try:
            config = validate(PretrainConfig, self.config(Path("run"), parallel=True))
            request = LayoutRequest(self.candidate.world_size, config.parallel, config.model, config.train)
            layout = Layout.fit(request)  # makes no message with what would fit
        except (ConfigError, Misfit):
            return False
        return self.precision != "fp64" or (layout.zero == 1 and not layout.offload_optimizer)

    def __str__(self) -> str:
        moe = f", {self.model['moe']['num_experts']} experts" if "moe" in self.model else ""
        return f"{self.candidate.name} in {self.precision}, {self.model['num_layers']} layers{moe}"


def draw(seed: int, index: int) -> Draw:
    """Returns draw `index` of a seed, a legal one."""
    random_ = random.Random(f"{seed}/{index}")
    while True:
        drawn = _draw(random_)
        if drawn.is_legal and drawn.candidate.world_size > 1:
            return drawn


def _draw(r: random.Random) -> Draw:
    train: dict[str, Any] = {
        "micro_batch_size": r.choice((1, 2, 3)),
        "seq_length": r.choice((4, 8, 12, 24)),
        "recompute": r.choice(("none", "none", "selective", "full")),
        "dropout": r.choice((0.0, 0.0, 0.2)),
    }
    model = draw_model(r, train["seq_length"])
    degrees = dict.fromkeys(("tp", "pp", "cp", "dp"), 1)
    for factor in r.choice(((2,), (3,), (4,), (2, 2), (2, 2), (2, 2))):
        degrees[r.choice(("tp", "tp", "pp", "cp", "dp"))] *= factor
    degrees["vpp"] = r.choice((1, 1, 2, 3)) if degrees["pp"] > 1 else 1
    degrees["ep"] = r.choice((1, 2, 3, 4)) if "moe" in model else 1
    degrees["zero"] = r.choice((1, 1, 2, 3)) if degrees["pp"] == 1 else 1
    optimizer = {
        "lr": r.choice((0.01, 0.001)),
        "betas": r.choice(([0.9, 0.95], [0.8, 0.999], [0.0, 0.9])),
        "weight_decay": r.choice((0.0, 0.1)),
        "clip_grad": r.choice((0.0, 0.01, 1.0)),
        "eps": r.choice((1e-8, 1e-6)),
    }
    return Draw(
        model,
        train,
        optimizer,
        degrees,
        precision=r.choice(("fp32", "fp32", "bf16", "bf16", "fp64")),
        accum=r.randint(1, 4),
        sp=degrees["tp"] > 1 and r.random() < 0.5,
        offload=r.random() < 0.15,
        layers_per_stage=_draw_stages(r, model["num_layers"], degrees["pp"] * degrees["vpp"]),
        seed=r.randrange(10_000),
    )


def _draw_stages(r: random.Random, layers: int, stages: int) -> tuple[int, ...] | None:
    """Returns a number of layers for each pipeline stage, or None for the balanced ones."""
    if stages == 1 or stages > layers or r.random() < 0.5:
        return None
    cuts = sorted(r.sample(range(1, layers), stages - 1))
    return tuple(end - first for first, end in zip((0, *cuts), (*cuts, layers), strict=True))


@dataclass
class Prover:
    """Proves draws, with the bug `inject` planted if one is named; results of references are kept."""

    run: Run
    inject: str | None = None
    _references: dict[str, Path] = field(default_factory=dict)
    _folder: Path = field(default_factory=lambda: Path(tempfile.mkdtemp(prefix="trivium-fuzz-")))

    def close(self) -> None:
        """Removes what was recorded."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def failures(self, drawn: Draw) -> list[str]:
        """Returns sentences about what is wrong in a draw's layout; none if it agrees with one rank."""
        from pretrain.proof.compare import compare  # imports torch

        candidate, out = drawn.candidate, self._folder / "layout"
        shutil.rmtree(out, ignore_errors=True)
        try:
            one = self._reference(drawn)
            self.run(candidate.world_size, drawn.config(out, parallel=True), drawn.precision, self.inject, one)
        except (RuntimeError, AssertionError) as error:  # the second comes from a test's ranks
            return [f"the ranks failed: {str(error)[-1500:]}"]
        config = validate(PretrainConfig, drawn.config(out, parallel=False))
        return compare(one, out, candidate.name, candidate.world_size, config, 0.0).failed

    def _reference(self, drawn: Draw) -> Path:
        alone = replace(drawn, degrees={"dp": drawn.degrees["dp"]}, sp=False)
        key = repr((alone.config(Path(), parallel=False), alone.precision))
        if key not in self._references:
            out = self._folder / f"one{len(self._references)}"
            self.run(1, drawn.config(out, parallel=False), drawn.precision, None, None)
            self._references[key] = out
        return self._references[key]


def shrink(drawn: Draw, failures_of: Callable[[Draw], list[str]]) -> tuple[Draw, list[str]]:
    """Returns the smallest failing draw that is found by leaving out one thing after another, and its failures."""
    failures, tried, shrunk = failures_of(drawn), {repr(drawn)}, True
    while shrunk:
        shrunk = False
        for smaller in simpler(drawn):
            if repr(smaller) in tried or not smaller.is_legal or smaller.candidate.world_size == 1:
                continue
            if len(tried) > MOST_SHRINKS:
                break
            tried.add(repr(smaller))
            if found := failures_of(smaller):
                drawn, failures, shrunk = smaller, found, True
                break
    return drawn, failures


def simpler(drawn: Draw) -> Iterator[Draw]:
    """Yields draws to try when `draw` fails: first with all sizes small, then each with one feature less."""
    model, train = drawn.model, drawn.train
    sizes = {"vocab_size": 16, "num_layers": 1, "hidden_size": 8, "ffn_hidden_size": 8, "num_heads": 2}
    small: dict[str, Any] = {**sizes, "num_kv_heads": 2, "init_std": model["init_std"]}
    short = {"micro_batch_size": 1, "seq_length": 4, "recompute": "none", "dropout": 0.0}
    balanced = replace(drawn, layers_per_stage=None)
    plain_ = replace(balanced, train=short, optimizer={"lr": 0.01}, accum=1, precision="fp32", offload=False)
    moe = {key: value for key, value in model.get("moe", {}).items() if key in ("num_experts", "top_k")}
    for key in ("tp", "cp", "dp"):  # one kind of parallelism alone
        if drawn.degrees.get(key, 1) > 1:
            only = {**dict.fromkeys(drawn.degrees, 1), key: drawn.degrees[key]}
            for model_ in (small, small | {"attention": {"qk_norm": "head"}}):
                yield replace(plain_, model=model_, degrees=only)
    yield replace(plain_, model=small)
    yield replace(plain_, model=small | {"attention": {"qk_norm": "head"}})
    if moe:
        yield replace(plain_, model=small | {"moe": moe})
        yield replace(plain_, model=small | {"moe": model["moe"]})
    for key, degree in drawn.degrees.items():
        if degree > 1:
            for smaller in sorted({1, degree // 2, 2} - {degree}):
                yield replace(balanced, degrees={**drawn.degrees, key: smaller})
    if drawn.degrees.get("ep", 1) > 1 and drawn.degrees["dp"] > 1:
        yield replace(drawn, degrees={**drawn.degrees, "ep": 1, "dp": 1})
    yield balanced
    yield replace(drawn, sp=False)
    yield replace(drawn, offload=False)
    yield replace(drawn, precision="fp32")
    yield replace(drawn, accum=1)
    for smaller_model in simpler_models(model):
        yield replace(drawn, model=smaller_model)
    for key, value in {**sizes, "num_kv_heads": model["num_heads"]}.items():
        yield replace(balanced, model={**model, key: value})
    for key, value in short.items():
        yield replace(drawn, train={**train, key: value})
    yield replace(drawn, optimizer={"lr": 0.01})


def command_of(drawn: Draw, file: Path) -> tuple[dict[str, Any], str]:
    """Returns the config to write to `file`, and the command that proves it."""
    settings = drawn.config(Path("runs/fuzz"), parallel=False)
    settings["parallel"] |= {"layers_per_stage": drawn.layers_per_stage and list(drawn.layers_per_stage)}
    config = validate(PretrainConfig, settings)
    command = f"trivium prove {file} --layouts {drawn.candidate.name} --precision {drawn.precision}"
    return plain(config), command
