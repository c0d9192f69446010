"""The process in which `verifiers_process.py` plays the episodes of an environment of the package verifiers.

Run by path and with `python -P`, it imports nothing but Python's own modules, verifiers and what the environment needs.
The first process loads the problems and forks one process an episode, so that an episode which hangs, ends its process
or fills the memory harms no other. There the environment runs as verifiers runs it, and its model is a server on the
loopback interface that hands each request to the trainer and waits for the answer.
"""

import asyncio
import json
import os
import random
import resource
import select
import signal
import socket
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import verifiers.v1 as vf
from aiohttp import ClientSession, web
from verifiers.v1.configs.agent import agent_config_fields
from verifiers.v1.dialects.chat import message_to_wire
from verifiers.v1.runtimes import subprocess as local_runtime

__all__ = ["SampledHarness"]  # verifiers finds the harness of a module by it
HARNESS = "trivium_sampled"  # the name under which verifiers imports this module
PACKET = 2**20  # bytes of a message on the control socket, which are all short
SHOWN = 300  # characters of an error
COMPLETION = {"id": "sampled", "object": "chat.completion", "created": 0, "model": "policy"}


class Refused(Exception):
    """Error for an environment that cannot be played here, with the reason."""


class SampledHarness(vf.Harness[vf.HarnessConfig]):
    """Harness without a program: each segment of an episode is one request for the model's next message."""

    APPENDS_SYSTEM_PROMPT = True
    SUPPORTS_RESUME = True
    EXECUTES_CODE = False
    NEEDS_CONTAINER = False

    async def launch(
        self,
        ctx: vf.ModelContext,
        trace: vf.Trace,
        runtime: vf.Runtime,
        endpoint: str,
        secret: str,
        mcp_urls: dict[str, str],
        data: vf.TaskData,
    ) -> vf.ProgramResult:
        system, prompt = self.resolve_prompt(data)
        async with (
            ClientSession(timeout=None, headers={"Authorization": f"Bearer {secret}"}) as client,
            client.post(
                f"{endpoint}/chat/completions", json={"model": ctx.model, "messages": _wire(system, prompt)}
            ) as response,
        ):
            said = await response.text()
        return vf.ProgramResult(exit_code=int(response.status != 200), stdout="", stderr=said)


class Episode:
    """One episode: what its model was asked and has answered, and the socket to the trainer."""

    def __init__(self, trainer: socket.socket) -> None:
        self.trainer, self._lines = trainer, trainer.makefile("rb")
        self.dialogue: list[dict[str, Any]] = []
        self._asked = asyncio.Lock()

    def say(self, content: dict[str, Any]) -> None:
        self.trainer.sendall(json.dumps(content).encode() + b"\n")

    def end(self, reason: str, detail: str = "") -> None:
        """Says that the episode cannot be scored, and ends the process."""
        self.say({"reason": reason, "detail": " ".join(detail.split())[:SHOWN]})
        os._exit(0)

    async def complete(self, request: web.Request) -> web.Response:
        """Answers one request for a completion with what the trainer's model writes."""
        messages = [_plain(message) for message in (await request.json())["messages"]]
        if self._asked.locked():
            self.end("asked for a second answer before the first")
        async with self._asked:
            known = len(self.dialogue)
            if messages[:known] != self.dialogue:
                self.end("changed earlier messages, or began another dialogue")
            if len(messages) == known:
                self.end("asked for another answer without a message between")
            if any(not isinstance(message["content"], str) for message in messages):
                self.end("sent a message that is not text")
            if any(not _encodes(message["content"]) for message in messages[known:]):
                self.end("sent text that cannot be encoded")
            self.say({"messages": messages[known:]})
            line = await asyncio.get_running_loop().run_in_executor(None, self._lines.readline)
            if not line:
                os._exit(0)  # the trainer needs no more of this episode
            answer = {"role": "assistant", "content": json.loads(line)["answer"]}
            self.dialogue = [*messages, answer]
        return web.json_response({**COMPLETION, "choices": [{"index": 0, "finish_reason": "stop", "message": answer}]})

    async def play(self, environment: vf.Env, task: vf.Task) -> None:
        """Plays the episode, and says its score or why it has none."""
        app = web.Application(client_max_size=2**30)
        app.router.add_post("/v1/chat/completions", self.complete)
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        client = vf.EvalClientConfig(base_url=f"http://127.0.0.1:{runner.addresses[0][1]}/v1", api_key_var="NO_KEY")
        async with environment.serving():
            episode = await environment.run_episode(task, vf.ModelContext(model="policy", client=client))
        errors = [error for part in (episode, *episode.traces) for error in part.errors]
        if errors:
            self.end(f"raised {errors[0].type}", errors[0].message)
        if not episode.ok or any(trace.is_timeout for trace in episode.traces):
            self.end("took longer than a time limit of its own")
        (trace,) = episode.traces
        if lacking := [name for name, reward in trace.rewards.items() if reward is None]:
            self.end(f"did not compute its reward {lacking[0]}")
        parts = {name: reward.score for name, reward in trace.rewards.items() if reward is not None}
        self.say({"value": trace.reward, "parts": parts})


def _wire(system: str | None, prompt: str | vf.Messages | None) -> list[dict[str, Any]]:
    first: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
    if isinstance(prompt, str):
        return [*first, {"role": "user", "content": prompt}]
    return [*first, *(message_to_wire(message) for message in prompt or [])]


def _plain(message: dict[str, Any]) -> dict[str, Any]:
    """Returns role and text of a message; its content stays as it is if it has parts that are no text."""
    content = message.get("content")
    if isinstance(content, list) and all(part.get("type") == "text" for part in content):
        content = "".join(part["text"] for part in content)
    return {"role": message["role"], "content": content}


def _encodes(text: str) -> bool:
    return not any("\ud800" <= letter <= "\udfff" for letter in text)


def load(setup: dict[str, Any]) -> tuple[vf.Env, list[vf.Task]]:
    """Returns the environment and its problems. Raises Refused for one that cannot be played here."""
    settings = dict(setup["env"])
    config = vf.resolve_env_config({**settings, "taskset": {**settings.get("taskset", {}), "id": setup["taskset"]}})
    seats = agent_config_fields(config)
    if len(seats) != 1:
        raise Refused(
            f"it has {len(seats)} agents ({', '.join(seats)}), and one model is trained; use one that has one"
        )
    (seat,) = seats
    own = dict(settings.get(seat, {}))
    if wrong := [key for key in ("harness", "runtime", "model", "client", "sampling") if key in own]:
        raise Refused(f"its config sets env.{seat}.{wrong[0]}, which the trainer decides; leave it out")
    if vf.default_harness_id(setup["taskset"]) != "bash":
        raise Refused("its agent is a program of its own (a harness), and here the model itself answers")
    if config.taskset.task.judges:
        raise Refused("it is scored by a judge, a model behind a network; use rewards that compute")
    played = {"harness": {"id": HARNESS}, "runtime": {"type": "subprocess"}}
    config = vf.resolve_env_config(
        {
            **settings,
            "taskset": {**settings.get("taskset", {}), "id": setup["taskset"]},
            "interception": {"type": "server"},
            seat: {**own, **played},
        }
    )
    environment = vf.load_environment(config)
    kind = type(environment.taskset).task_type()
    if kind.NEEDS_CONTAINER:
        raise Refused("its problems need a container")
    if kind.toolsets(config.taskset.task) or environment.taskset.toolsets(config.taskset):
        raise Refused("its problems have tools, which verifiers serves as programs of their own (MCP servers)")
    tasks = list(environment.taskset.take(setup["max_problems"]))
    for task in tasks:
        if task.data.image is not None:
            raise Refused(f"its problem {task.data.idx} needs a container (image {task.data.image!r})")
    return environment, tasks


def described(tasks: list[vf.Task]) -> dict[str, Any]:
    """Returns what the trainer has to know of the problems."""
    rewards = tasks[0].hooks("reward") if tasks else []
    return {
        "problems": [
            {
                "key": task.key,
                "prompt": [_plain(message) for message in _wire(task.data.system_prompt, task.data.prompt)],
            }
            for task in tasks
        ],
        "rewards": {function.__name__: getattr(function, "_vf_weight", 1.0) for function in rewards},
    }


def main() -> None:
    control = socket.socket(fileno=int(sys.argv[1]))
    sys.modules[HARNESS] = sys.modules[__name__]
    message, fds, _, _ = socket.recv_fds(control, PACKET, 1)
    setup, trainer = json.loads(message), socket.socket(fileno=fds[0])
    sys.path[:] = setup["path"]
    local_runtime.CACHE_DIR = Path(setup["folder"])  # else a process that is killed leaves folders at home
    for kind, most in ((resource.RLIMIT_AS, setup["memory_bytes"]), (resource.RLIMIT_CORE, 0)):
        with suppress(ValueError, OSError):  # the system's own limit is lower
            resource.setrlimit(kind, (most, most))
    try:
        environment, tasks = load(setup)
        found = described(tasks)
    except BaseException as error:
        said = str(error) if isinstance(error, Refused) else f"{type(error).__name__}: {error}"
        found = {"error": " ".join(said.split())[: 3 * SHOWN]}
    with trainer:
        trainer.sendall(json.dumps(found).encode() + b"\n")
    if "error" not in found:
        _serve(control, environment, tasks)


def _serve(control: socket.socket, environment: vf.Env, tasks: list[vf.Task]) -> None:
    """Forks a process for each episode that the trainer begins, and ends those that it ends, until it closes."""
    running: dict[int, int] = {}  # process ids by the number of the episode
    while True:
        select.select([control], [], [], 1.0 if running else None)
        for number, pid in list(running.items()):
            if os.waitpid(pid, os.WNOHANG)[0]:
                del running[number]
        if not select.select([control], [], [], 0)[0]:
            continue
        message, fds, _, _ = socket.recv_fds(control, PACKET, 1)
        if not message:
            break
        content = json.loads(message)
        if not fds:
            if content["end"] in running:
                _kill(running.pop(content["end"]))
            continue
        pid = os.fork()
        if pid == 0:
            control.close()
            _play(socket.socket(fileno=fds[0]), environment, tasks[content["index"]])
        os.close(fds[0])
        running[content["number"]] = pid
    for pid in running.values():
        _kill(pid)
    os._exit(0)  # without Python's own clearing up, which takes seconds with so many modules


def _kill(pid: int) -> None:
    """Ends the process of an episode, and all that it started in its group."""
    for end in (os.killpg, os.kill):
        with suppress(ProcessLookupError):
            end(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def _play(trainer: socket.socket, environment: vf.Env, task: vf.Task) -> None:
    try:
        os.setsid()
        random.seed(task.key)  # an environment that draws is the same in every sample of a problem, and after a resume
        if numpy := sys.modules.get("numpy"):
            numpy.random.seed(random.getrandbits(32))
        episode = Episode(trainer)
        try:
            asyncio.run(episode.play(environment, task))
        except BaseException as error:
            episode.end(f"raised {type(error).__name__}", str(error))
    finally:
        os._exit(0)


if __name__ == "__main__":
    main()
