"""`python -m launch.remote`: runs one command on another machine for the process that started this one over ssh.

The first line of standard input is JSON with the command's words, its folder and its environment variables, so that no
shell and no list of processes sees them. Each later line is the number of a signal to pass on. When the input ends,
because the other side was killed or cannot be reached, the command is told to save and end, as by SIGTERM.
"""

import json
import os
import signal
import sys
import threading

from launch.processes import ProcessGroup


def main() -> int:
    """Runs the command and returns its exit status."""
    job = json.loads(sys.stdin.readline())
    os.chdir(job["folder"])
    with ProcessGroup() as group:
        group.start(job["command"], {**os.environ, **job["environment"]})
        threading.Thread(target=_pass_signals_on, daemon=True).start()
        return group.wait()


def _pass_signals_on() -> None:
    """Sends this process the signals that arrive as numbers over ssh; its group passes them on to the command."""
    for line in sys.stdin:
        os.kill(os.getpid(), int(line))
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main())
