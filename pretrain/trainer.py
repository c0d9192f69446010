"""The one train loop. Pretraining, SFT and RL differ in where batches come from and in the loss.

A run is its directory: started again with the same command, it goes on from the newest whole checkpoint, and a
finished one says so. Left out: asynchronous checkpoints.
"""

import fcntl
import hashlib
import json
import platform
import resource
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from configs import loader
from configs.loader import ConfigError
from configs.train import ModelConfig, Precision, TrainerConfig
from launch.environment import ClusterEnvironment
from pretrain import report
from pretrain.checkpoint import state as checkpoint_state
from pretrain.checkpoint import storage
from pretrain.data import BatchSource, micro_batches, share_of_rank
from pretrain.evaluate import Evaluator, peak_flops
from pretrain.metrics import MetricsLog, ProgressLine
from pretrain.model.losses import LossFunction
from pretrain.parallel.engine import Engine, Sums
from pretrain.parallel.groups import Place
from pretrain.schedule import learning_rate

INTERRUPTED = 130


class Trainer:
    """Trains `model_config` on `source` by `loss_fn` in the layout of `place`, into `config.run.dir`.

    `init_from` is a checkpoint whose weights the run starts from (SFT, RL). `evaluators` are asked every `eval.every`
    steps and at the end. `title` is the word before the progress bar.
    """

    def __init__(
        self,
        config: TrainerConfig,
        model_config: ModelConfig,
        source: BatchSource,
        loss_fn: LossFunction,
        place: Place,
        evaluators: Sequence[Evaluator] = (),
        init_from: Path | None = None,
        title: str = "train",
    ):
        dtype = choose_dtype(config.train.precision, place.device)
        precision = Precision.BF16 if dtype == torch.bfloat16 else Precision.FP32
        train = config.train.model_copy(update={"precision": precision})
        self.config = config.model_copy(update={"train": train})
        self.model_config, self.source, self.loss_fn, self.place = model_config, source, loss_fn, place
        self.evaluators, self.init_from, self.title = evaluators, init_from, title
        self.run_dir = Path(config.run.dir)
        self.step, self.samples, self.tokens = 0, 0, 0
        self.identity = {
            "model": loader.plain(model_config),
            "seed": config.run.seed,
            "seq_length": train.seq_length,
            "data": source.fingerprint,
            "init": _digest(init_from / "manifest.json") if init_from else None,
        }
        self._check_samples()
        self._stop_signal = 0
        self.engine = Engine(
            model_config, train, config.optimizer, place, config.run.seed, dtype, max(1, len(source.sources))
        )
        flops = peak_flops(place.device, dtype)
        self._flops_share = None if flops is None else self._flops_per_token() / (flops * place.layout.world_size)

    def fit(self) -> int:
        """Trains to `train.steps`. Returns the exit status: 0, or 130 when a signal stopped it after a checkpoint."""
        with ExitStack() as stack:
            stack.enter_context(_only_run_in(self.run_dir, self.place))
            self._resume()
            if self.step >= self.config.train.steps:
                if self.place.is_main:
                    print(
                        f"{self.title}: {self.run_dir} is finished at step {self.step}; nothing to do",
                        flush=True,
                    )
                return 0
            stack.enter_context(self._signals())
            log = progress = None
            if self.place.is_main:
                self._write_facts()
                log = MetricsLog(self.run_dir, self.step, self.config.log.tensorboard)
                progress = ProgressLine(self.title, self.step, self.config.train.steps)
                stack.callback(log.close)
                stack.callback(progress.close)
            status = self._loop(log, progress)
        if self.place.is_main:
            print(f"{self.title}: step {self.step}, {self.tokens:,} tokens, report in {report.write(self.run_dir)}")
        return status

    def _loop(self, log: MetricsLog | None, progress: ProgressLine | None) -> int:
        config = self.config
        while self.step < config.train.steps:
            started = time.perf_counter()
            sums, lr = self._train_step()
            seconds = time.perf_counter() - started
            record = self._record(sums, lr, seconds)
            if log and progress and (self.step % config.log.every == 0 or self.step == config.train.steps):
                log.write(record)
                progress.update(self.step, _summary(record))
            last, stopping = self.step == config.train.steps, self._agree_to_stop()
            if self.evaluators and (last or self.step % config.eval.every == 0):
                self._evaluate(log, progress)
            if last or stopping or self.step % config.checkpoint.every == 0:
                self._save(progress)
            if stopping and not last:
                if progress:
                    progress.say(f"{self.title}: stopped at step {self.step}; the same command goes on from there")
                return INTERRUPTED
        return 0

    def _train_step(self) -> tuple[Sums, float]:
        train, place = self.config.train, self.place
        lr = learning_rate(self.step, train.steps, self.config.optimizer.lr, self.config.schedule)
        self.source.prepare(self.engine, self.step)
        share = share_of_rank(self.samples, train.global_batch_size, place.dp_rank, place.layout.dp)
        batches = micro_batches(self.source.rows(share), train.micro_batch_size, share.start)
        try:
            sums = self.engine.train_step(batches, self.loss_fn, lr)
        except FloatingPointError as error:
            raise FloatingPointError(f"step {self.step + 1}: {error}; lower optimizer.lr and start again") from None
        self.step += 1
        self.samples += train.global_batch_size
        self.tokens += train.global_batch_size * train.seq_length
        return sums, lr

    def _record(self, sums: Sums, lr: float, seconds: float) -> dict[str, Any]:
        """The step's line in metrics.jsonl. All ranks call it, since some sums are taken here."""
        tokens_per_s = self.config.train.global_batch_size * self.config.train.seq_length / seconds
        record: dict[str, Any] = {
            "step": self.step,
            "tokens": self.tokens,
            "loss": sums.mean_loss,
            "grad_norm": sums.grad_norm,
            "lr": lr,
            "tokens_per_s": round(tokens_per_s, 1),
            "mfu": None if self._flops_share is None else round(tokens_per_s * self._flops_share, 4),
            "memory_bytes": _peak_memory(self.place.device),
        }
        weights = sums.weight.tolist()
        if len(self.source.sources) > 1:
            record["loss_by_source"] = {
                name: loss / weight
                for name, loss, weight in zip(self.source.sources, sums.loss.tolist(), weights, strict=True)
                if weight
            }
        record |= sums.metrics | self.engine.moe_stats()
        own = self.source.step_metrics()
        if own:
            counted = self.place.reports
            totals = self.place.sum_over_world(torch.tensor([v if counted else (0.0, 0.0) for v in own.values()]))
            record |= {
                name: total / max(count, 1e-12) for name, (total, count) in zip(own, totals.tolist(), strict=True)
            }
        return record

    def _evaluate(self, log: MetricsLog | None, progress: ProgressLine | None) -> None:
        results: dict[str, dict[str, float]] = {}
        for evaluator in self.evaluators:
            results |= evaluator(self.engine)
        if log and progress and results:
            log.write({"step": self.step, "eval": results})
            text = "; ".join(f"{name} " + " ".join(f"{k} {v:.4g}" for k, v in r.items()) for name, r in results.items())
            progress.say(f"{self.title} {self.step}: held out: {text}")

    def _save(self, progress: ProgressLine | None) -> None:
        started = time.perf_counter()
        facts = {
            "samples": self.samples,
            "tokens": self.tokens,
            "identity": self.identity,
            # No layer draws random numbers in training, so the seed and the sample cursor are the whole RNG state.
            "rng": {"seed": self.config.run.seed},
            "layout": str(self.place.layout),
            "config": self._full_config(),
        }
        keep = self.config.checkpoint.keep
        path = checkpoint_state.save(self.engine, self.run_dir, self.step, facts, keep)
        if progress:
            progress.say(f"{self.title} {self.step}: saved {path} in {time.perf_counter() - started:.1f} s")

    def _resume(self) -> None:
        """Goes to the newest whole checkpoint, or to the weights of `init_from`, or stays at the drawn ones."""
        path, problems = storage.find_newest(self.run_dir) if self.place.is_main else (None, [])
        path, problems = self.place.gather_json([str(path) if path else None, problems])[0]
        if self.place.is_main:
            for problem in problems:
                print(f"warning: {problem}", flush=True)
        if path is None:
            if problems:
                raise storage.CheckpointError(
                    f"no checkpoint of {self.run_dir} is whole; restore one, or choose another run.dir to start anew"
                )
            if self.init_from:
                checkpoint_state.restore(self.engine, self.init_from, optimizer=False)
            return
        manifest = storage.read_manifest(path)
        for key, ours in self.identity.items():
            theirs = manifest["identity"].get(key)
            if theirs != ours:
                raise ConfigError(
                    f"{path} was trained with {key} = {_difference(theirs, ours)}, this config says "
                    f"{_difference(ours, theirs)}; set it back, or choose another run.dir to start anew"
                )
        if manifest["step"] < self.config.train.steps:
            checkpoint_state.restore(self.engine, path)
            if self.place.is_main:
                print(f"{self.title}: going on from {path}", flush=True)
        self.step, self.samples, self.tokens = manifest["step"], manifest["samples"], manifest["tokens"]
        self._check_samples()

    def _check_samples(self) -> None:
        needed = self.samples + (self.config.train.steps - self.step) * self.config.train.global_batch_size
        if self.source.num_samples is not None and needed > self.source.num_samples:
            raise ConfigError(
                f"train.steps = {self.config.train.steps} needs {needed} samples and the data holds "
                f"{self.source.num_samples}; train fewer steps or build a plan with more samples"
            )

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """SIGINT and SIGTERM ask for a checkpoint after the current step; the launcher may send them twice."""

        def remember(number: int, _: object) -> None:
            self._stop_signal = number

        previous = {number: signal.signal(number, remember) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _agree_to_stop(self) -> bool:
        """True on all ranks once any rank got a signal."""
        flag = torch.tensor([float(self._stop_signal != 0)], device=self.place.device)
        dist.all_reduce(flag)
        return bool(flag.item())

    def _write_facts(self) -> None:
        loader.write_atomic(self.run_dir / "config.toml", loader.toml(self._full_config()))
        packages = ("torch", "megatron-core", "deepspeed", "numpy")
        facts = {
            "python": platform.python_version(),
            "platform": platform.platform(),
            "device": torch.cuda.get_device_name() if self.place.device.type == "cuda" else platform.machine(),
            "packages": {name: version(name) for name in packages},
            "layout": str(self.place.layout),
            "launcher": ClusterEnvironment.read().as_dict(),
            "parameters": self.model_config.num_parameters(),
        }
        loader.write_atomic(self.run_dir / "env.json", json.dumps(facts, indent=1).encode())

    def _full_config(self) -> dict[str, Any]:
        """The resolved config; a run that takes its model from `init_from` has the model in it too."""
        return {**loader.plain(self.config), "model": loader.plain(self.model_config)}

    def _flops_per_token(self) -> float:
        """Forward and backward: 6 per active weight in a product, and 12 * layers * heads * dim * S/2 for attention."""
        model = self.model_config
        lookups = 0 if model.tie_embeddings else model.vocab_size * model.hidden_size
        attention = 6 * model.num_layers * model.num_heads * model.dim_per_head * self.config.train.seq_length
        return 6 * (model.num_parameters(active=True) - lookups) + attention


def choose_dtype(precision: Precision, device: torch.device) -> torch.dtype:
    """`auto` is bf16 on a GPU and on a CPU with bf16 instructions, else fp32."""
    if precision == Precision.AUTO:
        cpu = torch.cpu.get_capabilities()
        fast = device.type == "cuda" or cpu.get("avx512_bf16") or cpu.get("amx_bf16")
        return torch.bfloat16 if fast else torch.float32
    return torch.bfloat16 if precision == Precision.BF16 else torch.float32


@contextmanager
def _only_run_in(run_dir: Path, place: Place) -> Iterator[None]:
    """Holds the run directory's lock; a second run in it is refused on all ranks."""
    run_dir.mkdir(parents=True, exist_ok=True)
    with open(run_dir / ".lock", "a") as lock:
        free = True
        if place.is_main:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                free = False
        if not place.gather_json(free)[0]:
            raise ConfigError(
                f"another process is training in {run_dir}; wait for it, stop it or choose another run.dir"
            )
        yield


def _summary(record: dict[str, Any]) -> str:
    text = f"loss {record['loss']:.4f}  grad {record['grad_norm']:.2f}  {record['tokens_per_s']:,.0f} tokens/s"
    return f"reward {record['reward']:.3f}  {text}" if "reward" in record else text


def _peak_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _difference(value: Any, other: Any) -> Any:
    """Of two dicts, what is particular to the first."""
    if isinstance(value, dict) and isinstance(other, dict):
        return {k: v for k, v in value.items() if other.get(k) != v}
    return value
