"""Scripts that `trivium launch --on slurm --dry-run` prints: their options, the words that bash reads, refusals."""

import json
import os
import re
import subprocess
from pathlib import Path

import pytest

from configs.launch import LaunchConfig
from configs.loader import ConfigError, load
from configs.starters import starter
from launch import ranks, snapshot
from launch.launched_command import read_command

ROOT = Path(__file__).resolve().parents[3]
ODD = 'l\'été $(touch x) `touch y` "50%" #1; *'  # a name that a shell would take apart unless it is quoted
TRAIN = ["train", str(ROOT / "configs/pretrain/demo.toml")]
BATCH = "train.global_batch_size=16"
SECRET = "planted-51ab-secret"


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert ranks.main(["--on", "slurm", "--dry-run", *arguments]) == 0
    return capsys.readouterr().out


def options(script: str) -> list[str]:
    return re.findall(r"^#SBATCH (.*)$", script, re.MULTILINE)


def words_in(script: str, name: str) -> list[str]:
    """Returns the array `name` of a script as bash reads it, after the lines at its top that set values."""
    head = script.split("\ntrap ")[0]
    show = f'[ ${{#{name}[@]}} = 0 ] || printf "%s\\0" "${{{name}[@]}}"'
    done = subprocess.run(["bash", "-c", f"{head}\n{show}"], capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stderr
    return done.stdout.split("\0")[:-1]


def test_bash_reads_the_words_as_they_were_given(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    wrapper = ["--set", f"wrapper={json.dumps(['env', f'NAME={ODD}'])}", "--set", f"python=/opt/{ODD}/python"]
    script = printed(capsys, "--nproc-per-node", "2", *wrapper, *TRAIN, f"run.dir={ODD}", "train.steps=70")
    folder = tmp_path / ODD / "launch"
    assert words_in(script, "command") == [
        *("env", f"NAME={ODD}", f"/opt/{ODD}/python", "-m", "launch.bootstrap"),
        *("launch.ranks", "--nproc-per-node", "2", "pretrain.train"),
        *(str(folder / "1/demo.toml"), f"run.dir={ODD}", "train.steps=70"),
    ]
    assert words_in(script, "script") == [str(folder / "1/job.sh")]
    assert Path(words_in(script, "code")[0]).parent == folder / "code"
    assert list(tmp_path.iterdir()) == [], "a dry run writes nothing, and no name was run as a command"
    assert subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0
    escaped = str(folder / "1").replace("%", "%%").replace('"', '\\"')
    assert f'"--output={escaped}/%j.log"' in options(script)


def test_a_job_has_the_clusters_options_and_goes_on_after_its_time_limit(capsys: pytest.CaptureFixture[str]) -> None:
    script = printed(capsys, "--cluster", "h100", "--nnodes", "2", "--after", "17", "--after", "18", *TRAIN, BATCH)
    given = options(script)
    assert {"--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=8", "--exclusive", "--time=24:00:00"} <= set(given)
    assert {"--requeue", "--signal=B:USR1@600", "--open-mode=append"} <= set(given)
    assert {"--dependency=afterok:17:18", "--kill-on-invalid-dep=yes"} <= set(given)
    assert "--job-name=trivium-train-pretrain" in given
    assert words_in(script, "check")[-2:] == ["--ranks", "8"]
    bare = printed(capsys, "--set", "slurm.check_nodes=false", "--set", "slurm.cpus_per_node=12", *TRAIN)
    assert "\nexport SRUN_CPUS_PER_TASK=12\n" in bare
    assert words_in(bare, "check") == [] and "--cpus-per-task=12" in options(bare)
    assert not any(option.startswith(("--gpus", "--partition", "--dependency")) for option in options(bare))


@pytest.mark.parametrize(
    ("command", "requeued", "gpus"), [("sft", True, True), ("data run", True, False), ("export", False, True)]
)
def test_other_commands_have_jobs_too(
    capsys: pytest.CaptureFixture[str], command: str, requeued: bool, gpus: bool
) -> None:
    config = {"sft": "posttrain/demo_sft", "data run": "data/demo", "export": "export/demo"}[command]
    words = [*command.split(), str(ROOT / f"configs/{config}.toml"), *(["init.run=runs/x"] if command == "sft" else [])]
    script = printed(capsys, "--cluster", "a100", "--nnodes", "2", *words)
    given = options(script)
    assert ("--requeue" in given) == requeued and ("--no-requeue" in given) != requeued
    assert any(option.startswith("--signal") for option in given) == requeued
    assert ("--gpus-per-node=8" in given) == gpus
    assert f"--nodes={2 if command == 'sft' else 1}" in given
    assert ("launch.ranks" in words_in(script, "command")) == (command == "sft")


def test_a_recipe_is_a_chain_of_jobs(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    said = printed(capsys, "recipe", "run", "configs/recipes/demo.toml", "dir=runs/x")
    scripts = re.split(r"^# /.*\n", said, flags=re.MULTILINE)[1:]
    stages = [words_in(script, "command")[-1] for script in scripts]
    assert stages[0] == "data" and len(stages) > 5 and all("--only" in words_in(s, "command") for s in scripts)
    chain = [next((o for o in options(script) if o.startswith("--dependency")), None) for script in scripts]
    assert chain == [None, *(f"--dependency=afterok:JOB-OF-{stage}" for stage in stages[:-1])]


def test_names_of_variables_are_written_and_no_values(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ASKED_FOR", SECRET)
    monkeypatch.setenv("NOT_ASKED_FOR", SECRET)
    script = printed(capsys, "--set", 'environment=["ASKED_FOR"]', *TRAIN)
    assert "--export=HOME,LANG,PATH,USER,ASKED_FOR" in options(script)
    assert SECRET not in script and "NOT_ASKED_FOR" not in script


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--set", f'environment=["TOKEN={SECRET}"]', *TRAIN], "'TOKEN' is not the name of an environment variable"),
        (["--set", 'slurm.options=["--nodes=3"]', *TRAIN], "sets what the launcher sets itself; set nnodes"),
        (["--set", 'slurm.options=["-N3"]', *TRAIN], "is no long option of sbatch"),
        (["--set", r'slurm.partition="a\nb"', *TRAIN], "slurm.partition = 'a\\nb' has a line break"),
        (["--set", r'wrapper=["a\rb"]', *TRAIN], "wrapper = 'a\\rb' has a line break"),
        (["--set", "slurm.time=soon", *TRAIN], "'soon' is no time limit of sbatch"),
        (["--set", 'hosts=["-oProxyCommand=x"]', *TRAIN], "'-oProxyCommand=x' is no host"),
        (["--set", 'hosts=["a", "b"]', *TRAIN], "Slurm chooses them itself; set nnodes"),
        (["--set", 'hosts=["a", "b"]', "--nnodes", "3", *TRAIN], "hosts names 2 machines; leave nnodes out"),
        (["--set", "slurm.partitoin=x", *TRAIN], "did you mean 'partition'?"),
        (["--set", "setup=no/such/file", *TRAIN], "setup = 'no/such/file' is no file"),
        (["--cluster", "h200", *TRAIN], "--cluster h200 is none of a100, cpu, h100"),
        ([*TRAIN, "--resume", "no"], "--resume no would refuse to go on after a requeue"),
        (["recipe", "run", str(ROOT / "configs/recipes/demo.toml"), "--until", "sft"], "--until is for a recipe that"),
        (["--after", "x7", *TRAIN], "--after x7 is no number of a job"),
        (["--node-rank", "1", *TRAIN], "--node-rank is for --on local; leave it out of --on slurm"),
        (["--nproc-per-node", "3", *TRAIN, "parallel.tp=2"], "does not divide the 3 ranks"),
        ([*TRAIN, "train.stpes=3"], "did you mean 'steps'?"),
        ([str(ROOT / "configs/launch/cpu.toml")], "is a config of `trivium launch` itself: give it as --cluster"),
        (["train"], "the config comes first after `train`"),
        (["tests.e2e.steps_of_sleep", "x"], "is a module and names no folder for its job"),
        (["generate", "x"], "'generate' cannot be started as ranks"),
    ],
)
def test_what_no_job_can_have_is_refused(arguments: list[str], words: str) -> None:
    with pytest.raises(ConfigError) as raised:
        ranks.main(["--on", "slurm", "--dry-run", *arguments])
    assert words in str(raised.value) and SECRET not in str(raised.value)


def test_without_slurm_a_dry_run_is_offered(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match=r"needs the command sbatch, which is not on PATH; .* add --dry-run"):
        ranks.main(["--on", "slurm", *TRAIN])
    assert list(tmp_path.iterdir()) == []


def test_a_refused_job_leaves_no_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Submits to a Slurm that takes no job, and to one that takes the first of a recipe, whose files then stay."""
    sbatch, jobs = tmp_path / "bin/sbatch", tmp_path / "runs/jobs"
    sbatch.parent.mkdir()
    monkeypatch.setenv("PATH", f"{sbatch.parent}:{os.environ['PATH']}")
    recipe = ["recipe", "run", str(ROOT / "configs/recipes/demo.toml")]
    for command, takes in ((TRAIN, 0), (recipe, 0), (recipe, 1)):
        sbatch.write_text(f"#!/bin/sh\necho x >> {tmp_path}/n\n[ $(wc -l < {tmp_path}/n) -le {takes} ] && echo 7\n")
        sbatch.chmod(0o755)
        (tmp_path / "n").unlink(missing_ok=True)
        with pytest.raises(ConfigError, match=r"sbatch refused the job: .*slurm\.\* keys \(--dry-run before the"):
            ranks.main(["--on", "slurm", "--job-dir", str(jobs), *command])
        assert (jobs / "1").is_dir() == bool(takes) and (takes or not (tmp_path / "runs").exists())


def test_the_copy_of_the_code_is_named_after_its_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = snapshot.snapshot(tmp_path / "own", copy=False)
    assert not own.exists() and snapshot.snapshot(tmp_path / "own") == own == snapshot.snapshot(tmp_path / "own")
    assert [path.name for path in (tmp_path / "own").iterdir()] == [own.name], "nothing unfinished is left"
    for file in ("cli.py", "configs/pretrain/demo.toml", "launch/snapshot.py", "data_pipeline/run.py"):
        assert (own / file).read_bytes() == (ROOT / file).read_bytes()
    (tmp_path / "root/launch").mkdir(parents=True)
    (tmp_path / "root/launch/a.py").write_text("1")
    monkeypatch.setattr(snapshot, "ROOT", tmp_path / "root")
    one = snapshot.snapshot(tmp_path / "code")
    (tmp_path / "root/launch/a.py").write_text("2")
    other = snapshot.snapshot(tmp_path / "code")
    assert one != other and [(path / "launch/a.py").read_text() for path in (one, other)] == ["1", "2"]


@pytest.mark.parametrize(
    "config", ["pretrain/demo", "posttrain/demo_grpo", "posttrain/demo_sft", "data/demo", "export/demo"]
)
def test_a_config_alone_says_what_its_command_is(capsys: pytest.CaptureFixture[str], config: str) -> None:
    """Gives a config alone, also with the launcher's options last: `trivium launch CONFIG --on slurm --dry-run`."""
    name = {"pretrain/demo": "train", "data/demo": "data run"}.get(config, config.rpartition("_")[2].split("/")[0])
    path = str(ROOT / f"configs/{config}.toml")
    start = ["init.run=runs/x"] if name in ("grpo", "sft") else []
    assert ranks.main([path, *start, "--on", "slurm", "--dry-run"]) == 0
    alone = capsys.readouterr().out
    assert alone == printed(capsys, *name.split(), path, *start) and "--dry-run" not in alone


@pytest.mark.parametrize("cluster", ["h100", "a100"])
def test_the_preset_of_llama_3_fits_a_node_of_eight(cluster: str) -> None:
    config = load(LaunchConfig, ROOT / f"configs/launch/{cluster}.toml")
    command = read_command(["train", str(ROOT / "configs/pretrain/llama3_8b.toml")], config.world_size)
    assert (config.world_size, command.folder) == (8, Path("runs/llama3_8b/pretrain"))
    with pytest.raises(ConfigError, match="does not divide the 7 ranks"):
        read_command(["train", str(ROOT / "configs/pretrain/llama3_8b.toml")], 7)


def test_a_new_launch_config_starts_by_the_command_that_it_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    file = tmp_path / "launch.toml"
    file.write_text(starter("launch"))
    words = starter("launch").splitlines()[1].removeprefix("# trivium launch ").replace("THIS_FILE", str(file)).split()
    assert ranks.main(words) == 0 and "--dry-run" in words
