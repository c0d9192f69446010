"""`python -m launch.bootstrap MODULE ARGS...`: runs `python -m MODULE ARGS...` with signal handlers set first.

Importing a module can take seconds, in which a signal would kill the process. `trivium launch` and `trivium recipe`
start their processes through this module, which imports next to nothing before it sets the handlers.
"""

import gc
import runpy
import signal
import sys

from configs import signals
from launch.environment import is_main, was_launched

# Module of each `trivium` command that runs on ranks and saves its work: those that train, and sampling.
TRAINING = {
    "train": "pretrain.train",
    "sft": "posttrain.sft",
    "rm": "posttrain.rm",
    "dpo": "posttrain.dpo",
    "ppo": "posttrain.ppo",
    "grpo": "posttrain.grpo",
    "distill": "posttrain.distill",
    "sample": "posttrain.sample",
}
# Module of each command that `trivium launch` starts as ranks.
ON_RANKS = {**TRAINING, "replay": "pretrain.replay"}
OURS = ("data_pipeline", "pretrain", "posttrain", "export", "launch")


def begin(module: str) -> None:
    """Sets the signal handlers that a Trivium module needs; `module` is its name as for `python -m`."""
    saves = module in TRAINING.values()
    if module in ON_RANKS.values():
        # Looking for garbage among modules, which stay, takes a sixth of the time of importing them.
        # `pretrain.parallel.groups.joined` turns it on again.
        gc.disable()
    # `trivium launch` is stopped as its ranks are, by all signals on which they save.
    signals.begin(saves or module == "launch.ranks", prints_errors=is_main(), launched=saves and was_launched())


def main() -> None:
    """Runs the module that the first argument names, with the arguments after it."""
    module = sys.argv[1]
    if module.split(".")[0] in OURS:
        begin(module)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, signals.SAVING)  # blocked by ProcessGroup.start
    del sys.argv[0]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
