"""A rank of a run that sleeps in place of training: `python -m tests.e2e.steps_of_sleep FOLDER`.

It handles signals as training does. It writes FOLDER/up_RANK once it runs, and FOLDER/saved_RANK after a signal; before
that FOLDER/secret_RANK, the value of SECRET_TOKEN in its environment, and FOLDER/code_RANK, where its code is.
"""

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from configs import signals
from configs.cli import entrypoint
from launch.environment import ClusterEnvironment, is_main, was_launched


def main(argv: Sequence[str] | None = None) -> int:
    folder, rank = Path(sys.argv[1]), ClusterEnvironment.read().rank
    with signals.saving() as watch:
        watch.agree()
        watch.work()
        (folder / f"secret_{rank}").write_text(os.environ.get("SECRET_TOKEN", "not there"))
        (folder / f"code_{rank}").write_text(signals.__file__)
        (folder / f"up_{rank}").write_text("up")
        while not watch.number:
            time.sleep(0.05)
        time.sleep(0.5)
        (folder / f"saved_{rank}").write_text(str(watch.number))
        return signals.status_of(watch.number)


if __name__ == "__main__":
    signals.begin(saves=True, prints_errors=is_main(), launched=was_launched())
    entrypoint(main)
