"""`python -m launch.bootstrap MODULE ARGS...`: runs `python -m MODULE ARGS...`, with signals answered from the start.

Importing a module can take seconds. Launchers of ours start their processes by this one, which imports next to nothing
before it has seen to signals.
"""

import runpy
import signal
import sys

from configs import signals
from launch.environment import is_main, was_launched

# The entrypoints that train, as commands and as modules.
TRAINING = {"train": "pretrain.train", "sft": "posttrain.sft", "grpo": "posttrain.grpo"}
OURS = ("data_pipeline", "pretrain", "posttrain", "export", "launch")


def begin(module: str) -> None:
    """Answers signals as `module` of ours has to, a name as for `python -m`."""
    saves = module in TRAINING.values()
    # A launcher ends as its ranks do.
    signals.begin(saves or module == "launch.ranks", speaks=is_main(), launched=saves and was_launched())


def main() -> None:
    module = sys.argv[1]
    if module.split(".")[0] in OURS:
        begin(module)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, signals.SAVING)  # see ProcessGroup.start_module
    del sys.argv[0]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
