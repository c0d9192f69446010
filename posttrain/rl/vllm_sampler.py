"""vLLM as the sampler of a run, in a process of its own, which is given the weights before each rollout.

vLLM needs other versions of torch and transformers than the trainer, so `rl.vllm.python` names the Python of another
environment. Each rank has such a process, which ends with it. Weights go there as a Hugging Face folder in memory
(/dev/shm) where there is room, else among temporary files; prompts and completions as token ids in JSON. Texts are
vLLM's own draws: the same seed gives the same text only with the same vLLM on the same machine. Mixtures of experts,
GPUs and vLLM's own tensor parallel are left out.
"""

import atexit
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from configs.adapters import AdapterConfig
from configs.loader import ConfigError, Failure
from configs.model import ModelConfig
from configs.rl import RLSection, VLLMConfig
from configs.sampling import SamplingConfig
from posttrain.piped_process import PipedProcess, ProcessEnded
from posttrain.rl.vllm_weights import FolderWriter
from pretrain.generation.sampling import Completion
from pretrain.model import Decoder
from pretrain.parallel.groups import Mesh

CHILD = Path(__file__).with_name("vllm_child.py")
MEMORY = Path("/dev/shm")
LOOK_SECONDS = 60.0  # for a Python to say whether it has vLLM
LOOK = "import importlib.util, sys; sys.exit(0 if importlib.util.find_spec('vllm') else 3)"
HOW = "docs/reinforcement.md says how to make an environment with vLLM"
# Variables of torchrun and of the trainer's Python, which would mislead another process.
OTHERS = ("PYTHON", "TORCHELASTIC_", "RANK", "WORLD_SIZE", "LOCAL_", "GROUP_", "ROLE_", "MASTER_", "OMP_", "KMP_")
OWN = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # no further processes
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # ranks would be bound to the same cores
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}


def check_vllm(settings: RLSection, model: ModelConfig, adapter: AdapterConfig | None) -> None:
    """Raises ConfigError if vLLM cannot sample in a run with these settings, as far as can be told before it starts."""
    if model.moe:
        raise ConfigError(
            "rl.sampler = 'vllm' is tested with dense models, and this one is a mixture of experts, whose routers' "
            "choices are not taken over from vLLM; set rl.sampler=whole"
        )
    if adapter is not None:
        raise ConfigError(
            "rl.sampler = 'vllm' is tested with models without adapters, and the config has [adapter]; set "
            "rl.sampler=whole"
        )
    if torch.cuda.is_available():
        raise ConfigError(
            "rl.sampler = 'vllm' has been tested on processors alone, and this machine has a GPU; set rl.sampler=whole"
        )
    chosen = settings.vllm.python
    python = chosen or sys.executable
    said = f"rl.vllm.python = {python!r}" if chosen else f"rl.vllm.python is left out, and {python}"
    remedy = f"name the Python of an environment that has it, or set rl.sampler=whole ({HOW})"
    try:
        done = subprocess.run(
            [python, "-I", "-c", LOOK], stdin=subprocess.DEVNULL, capture_output=True, timeout=LOOK_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ConfigError(f"{said} cannot be run as a Python ({error}); {remedy}") from None
    if done.returncode:
        raise ConfigError(f"{said} does not have the package vllm; {remedy}")


class VLLMSampler:
    """The text sampler whose completions vLLM writes. The process starts when the first weights come.

    `room` is the most tokens that a prompt and its completion have. Whatever goes wrong in the process ends the run:
    Failure, which names a file with what vLLM printed.
    """

    choices = (0, 0)

    def __init__(
        self, settings: VLLMConfig, model: ModelConfig, architecture: str | None, room: int, run_dir: str | Path
    ) -> None:
        """Raises ConfigError if no class of transformers, and so of vLLM, can express the model."""
        self.settings, self._room, self._run_dir = settings, room, Path(run_dir)
        try:
            self._writer = FolderWriter(model, architecture, room)
        except ValueError as error:
            raise ConfigError(
                f"rl.sampler = 'vllm' samples with an exported model, and {error}; or set rl.sampler=whole"
            ) from None
        self._process: PipedProcess | None = None
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 (has no name, so nothing of it is left whatever happens)
        atexit.register(self.close)

    @property
    def runs(self) -> bool:
        """Whether the process has started."""
        return self._process is not None

    def take(self, decoder: Decoder, mesh: Mesh) -> None:
        """Gives vLLM the weights of a decoder, before it samples anything else."""
        weights = {**dict(decoder.named_global_parameters()), **decoder.named_balance()}
        with self._folder(sum(tensor.nbytes for tensor in weights.values()), mesh.rank) as folder:
            self._writer.write(lambda name: weights[name].detach().cpu(), Path(folder))
            if self.runs:
                self._ask({"folder": folder}, "take new weights")
                return
            dtype = str(weights["embedding.weight"].dtype).removeprefix("torch.")
            self._start(folder, dtype, mesh)

    def _start(self, folder: str, dtype: str, mesh: Mesh) -> None:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(OTHERS)}
        environment = kept | OWN | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
        python = self.settings.python or sys.executable
        self._process = PipedProcess([python, "-I", "-B", str(CHILD)], environment, self._log)
        setup = {
            "folder": folder,
            "architecture": self._writer.architecture,
            "dtype": dtype,
            "room": self._room,
            "cache_bytes": int(self.settings.cache_gb * 1e9),
        }
        version = self._ask(setup, "start")["version"]
        if mesh.is_main:
            print(f"vLLM {version} of {python} samples the completions", flush=True)

    @contextmanager
    def _folder(self, size: int, rank: int) -> Iterator[str]:
        """Makes a folder with room for `size` bytes, and removes it in the end; those of a killed run go first."""
        prefix, others = self.prefix(rank), Path(tempfile.gettempdir())
        for left in (*MEMORY.glob(f"{prefix}*"), *others.glob(f"{prefix}*")):
            shutil.rmtree(left, ignore_errors=True)
        has_room = MEMORY.is_dir() and shutil.disk_usage(MEMORY).free > 1.1 * size
        with tempfile.TemporaryDirectory(prefix=prefix, dir=MEMORY if has_room else others) as folder:
            yield folder

    def prefix(self, rank: int) -> str:
        """Returns how the names of a rank's folders of weights begin, which no other run's do."""
        run = hashlib.sha256(str(self._run_dir.resolve()).encode()).hexdigest()[:16]
        return f"trivium_vllm_{run}_{rank}_"

    def continued(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        sampling: SamplingConfig,
        seed: int,
        stop_ids: Sequence[int],
        keys: Sequence[str],
        keep_experts: bool = False,
    ) -> list[Completion]:
        assert not keep_experts and sampling == SamplingConfig(temperature=sampling.temperature)
        request = {
            "prompts": [list(prompt) for prompt in prompts],
            "seeds": [seed_of(seed, key) for key in keys],
            "max_new_tokens": max_new_tokens,
            "temperature": sampling.temperature,
            "stop_ids": list(stop_ids),
        }
        reply = self._ask(request, f"continue {len(prompts)} prompts")
        return [Completion(*one) for one in zip(reply["tokens"], reply["logprobs"], reply["stopped"], strict=True)]

    def _ask(self, request: Mapping[str, Any], aim: str) -> dict[str, Any]:
        """Sends a request and returns the reply. Raises Failure if there is none, or if it is an error."""
        assert self._process is not None, "vLLM is given weights before prompts"
        late = ""
        try:
            reply = self._process.exchange(request, self.settings.seconds)
            fault = f"said: {reply['error']}" if "error" in reply else ""
        except ProcessEnded as ended:
            fault = str(ended)
            late = "raise rl.vllm.seconds, or " if "took more than" in fault else ""
        if fault:
            self.close()
            raise Failure(
                f"vLLM was to {aim}, and {fault}; {late}see the end of {self._kept_log()}, or set rl.sampler=whole to "
                "go on without vLLM"
            )
        return reply

    def _kept_log(self) -> str:
        """Copies what vLLM printed into a file, and returns its path."""
        self._log.seek(0)
        with tempfile.NamedTemporaryFile(prefix="trivium_vllm_", suffix=".log", delete=False) as kept:
            shutil.copyfileobj(self._log, kept)
        return kept.name

    def close(self) -> None:
        """Ends the process."""
        if self._process is not None:
            self._process.close()
            self._process = None


def seed_of(seed: int, key: str) -> int:
    """Returns the seed of one completion, a hash of the run's seed and of the completion's key below 2^63."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{key}".encode()).digest()[:8], "little") >> 1
