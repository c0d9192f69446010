"""Batch script of a Slurm job that runs one command of Trivium, and goes on after its time limit.

The script has the values of one job at its top, each quoted, and below them a body that is the same for all jobs. In
it Slurm's warning before the time limit is passed to every rank; the ranks save and end with 75, and the job puts
itself back into the queue, as it does when the watchdog ended the ranks (76).
"""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from configs.launch import LaunchConfig
from launch.launched_command import LaunchedCommand

HEADER = """\
# Written by `trivium launch --on slurm`. It can be submitted again with sbatch; the run then goes on where it was.
"""
BODY = r"""
trap told=USR1 USR1
trap told=TERM TERM # sent by `scancel` and `scontrol requeue`; Slurm signals the ranks itself

# One task on each node. When the tasks of one node have ended, --wait ends those of the others a minute later, which
# may wait for them forever.
on_each_node=(srun --export=ALL --wait=60)

[ -z "$setup" ] || . "$setup" || exit 1
export PYTHONPATH="$code${PYTHONPATH:+:$PYTHONPATH}" PYTHONSAFEPATH=1 PYTHONUNBUFFERED=1
cd "$folder" || exit 1
echo "job $SLURM_JOB_ID, start $((${SLURM_RESTART_COUNT:-0} + 1)), on $SLURM_JOB_NODELIST: $title"

if [ ${#check[@]} -gt 0 ]; then
  "${on_each_node[@]}" --label "${check[@]}" && [ "$SLURM_JOB_NUM_NODES" -ge "$min_nodes" ] && checked=yes
  if [ ! "$checked" ] && [ ! "$told" ]; then
    echo "A node is not fit to start on; task N in the lines above is node N, from 0, of $SLURM_JOB_NODELIST."
    echo "Mend it, or leave it out: sbatch --exclude=NODE $script"
    exit 1
  fi
fi

if [ ${#elastic[@]} -gt 0 ]; then # some nodes may be missing, and the nearest layout may leave some of them idle
  used=$("${elastic[@]}" "$SLURM_JOB_NUM_NODES" "${wanted[@]}") || exit
  on_each_node+=(--nodes="$used" --ntasks="$used")
fi

# Signals stay blocked in each process until it has set its handlers, so that none kills it while it starts. They are
# sent again every second, so that processes that are still starting get them too.
SLURM_EXIT_ERROR=138 "${on_each_node[@]}" env --block-signal=INT,TERM,HUP,USR1 "${command[@]}" &
srun=$!
while kill -0 $srun 2>/dev/null; do
  [ "$told" = USR1 ] && kill -USR1 $srun
  sleep 1 &
  wait $!
done
wait $srun
status=$?
# A signal before srun has started its tasks ends srun with another status; nothing is lost then either.
[ "$told" ] && [ $status -ge 128 ] && status=75
if { [ $status -eq 75 ] || [ $status -eq 76 ]; } && [ "$told" != TERM ]; then
  if [ "${SLURM_RESTART_COUNT:-0}" -ge "$most_requeues" ]; then
    echo "slurm.most_requeues = $most_requeues is reached; to go on with this run: sbatch $script"
  else
    scontrol requeue "$SLURM_JOB_ID"
  fi
fi
exit $status
"""


@dataclass(frozen=True)
class SlurmJob:
    """Everything that the script of one job is made from; all paths are absolute."""

    command: LaunchedCommand
    config: LaunchConfig
    python: str
    folder: Path
    code: Path
    script: Path
    name: str = ""
    after: tuple[str, ...] = ()

    @property
    def nodes(self) -> int:
        """The nodes of the job: those of the config for ranks, else one."""
        return self.config.nodes if self.command.trains else 1

    @property
    def min_nodes(self) -> int:
        """The fewest nodes that the job starts on."""
        return min(self.nodes, self.config.min_nodes or self.nodes)

    def words(self) -> list[str]:
        """The command that starts on each node, with the launcher of its ranks if it has some."""
        launcher: tuple[str, ...] = ()
        if self.command.trains:
            launcher = ("launch.ranks", "--nproc-per-node", str(self.config.nproc_per_node))
            launcher += ("--min-nodes", "1") if self.min_nodes < self.nodes else ()
        return [*self._python(), "launch.bootstrap", *launcher, self.command.module, *self.command.arguments]

    def elastic(self) -> list[str]:
        """The command that prints how many of the job's nodes have work to do; empty if the job needs all its nodes."""
        return [*self._python(), "launch.bootstrap", "launch.elastic"] if self.min_nodes < self.nodes else []

    def wanted(self) -> list[str]:
        """The last words of the command `elastic`: the nodes wanted, the ranks on each, and what is to be started."""
        counts = (str(self.nodes), str(self.config.nproc_per_node))
        return [*counts, self.command.module, *self.command.arguments] if self.min_nodes < self.nodes else []

    def check(self) -> list[str]:
        """The command by which `trivium doctor` checks each node before ranks start; empty without that."""
        ranks = self.config.nproc_per_node if self.command.trains else 1
        words = [*self._python(), "launch.bootstrap", "pretrain.doctor.doctor", "--ranks", str(ranks)]
        return words if self.config.slurm.check_nodes else []

    def _python(self) -> list[str]:
        return [*self.config.wrapper, self.python, "-m"]

    def _job_name(self) -> str:
        """The command and the folder it writes, in characters that any display of a queue has."""
        words = ("trivium", self.command.name, self.command.folder.name if self.command.folder else "")
        return re.sub(r"[^A-Za-z0-9]+", "-", " ".join(words)).strip("-")

    def options(self) -> list[str]:
        """The options of sbatch."""
        slurm, command = self.config.slurm, self.command
        output = str(self.script.parent).replace("%", "%%")  # sbatch replaces %j
        options = [
            f"--job-name={self.name or self._job_name()}",
            f"--output={output}/%j.log",
            "--open-mode=append",
            f"--nodes={self.nodes}" if self.min_nodes == self.nodes else f"--nodes={self.min_nodes}-{self.nodes}",
            "--ntasks-per-node=1",
            f"--time={slurm.time}",
            f"--export={','.join(self.config.passed)}",
        ]
        if slurm.cpus_per_node:
            options.append(f"--cpus-per-task={slurm.cpus_per_node}")
        if slurm.gpus_per_node and command.name != "data run":
            options.append(f"--gpus-per-node={slurm.gpus_per_node}")
        for key in ("partition", "account", "qos"):
            if value := getattr(slurm, key):
                options.append(f"--{key}={value}")
        options += ["--requeue", f"--signal=B:USR1@{slurm.warn_seconds}"] if command.resumes else ["--no-requeue"]
        if self.after:
            options += [f"--dependency=afterok:{':'.join(self.after)}", "--kill-on-invalid-dep=yes"]
        return [*options, *slurm.options]

    def render(self) -> str:
        """The whole script."""
        setup = str(Path(self.config.setup).absolute()) if self.config.setup else ""
        values = {
            "title": shlex.join(["trivium", *self.command.name.split(), *self.command.arguments]),
            "min_nodes": str(self.min_nodes),
            "folder": str(self.folder),
            "code": str(self.code),
            "script": str(self.script),
            "setup": setup,
            "most_requeues": str(self.config.slurm.most_requeues if self.command.resumes else 0),
        }
        lines = ["#!/bin/bash", *(f"#SBATCH {_quoted_for_sbatch(option)}" for option in self.options())]
        lines += [HEADER.rstrip()]
        lines += [f"{name}={shlex.quote(value)}" for name, value in values.items()]
        lines += [f"check=({shlex.join(self.check())})", f"command=({shlex.join(self.words())})"]
        lines += [f"elastic=({shlex.join(self.elastic())})", f"wanted=({shlex.join(self.wanted())})"]
        if self.config.slurm.cpus_per_node:
            lines.append(f"export SRUN_CPUS_PER_TASK={self.config.slurm.cpus_per_node}")
        return "\n".join(lines) + "\n" + BODY


def _quoted_for_sbatch(option: str) -> str:
    """Quotes an option for a line of the script, of which sbatch reads double quotes and backslashes inside them."""
    if re.fullmatch(r"[\w./:=@%,+*-]+", option):
        return option
    return '"' + re.sub(r'(["\\])', r"\\\1", option) + '"'
