"""A small environment of the package verifiers, whose source tests write into a folder that is on Python's path."""

import asyncio
from collections.abc import Sequence
from typing import Any

from posttrain.chat.chat_format import ChatFormat

TASKSET = "guess-a-number"
FILE = "guess_a_number.py"

SOURCE = '''
import os
import random
import time

import verifiers.v1 as vf

__all__ = ["Guesses", "GuessEnv"]


class GuessData(vf.TaskData):
    secret: str = ""


class GuessTask(vf.Task[GuessData]):
    """Rewards of a guess; the words of a guess let them fail in several ways."""

    @vf.reward(weight=1.0)
    async def found(self, trace: vf.Trace) -> float:
        said = trace.last_reply
        if "raise" in said:
            raise KeyError("a fault in the reward")
        if "nan" in said:
            return float("nan")
        if "text" in said:
            return "no number"
        if "hang" in said:
            time.sleep(60)
        if "exit" in said:
            os._exit(3)
        return float(self.data.secret in said)

    @vf.reward(weight=0.25)
    async def quick(self, trace: vf.Trace) -> float:
        return 1.0 / trace.num_turns


class Guesses(vf.Taskset[GuessTask]):
    def load(self):
        for i in range(40):
            data = GuessData(prompt=f"Guess {i}", system_prompt="Be quick", secret=str(i % 10))
            yield GuessTask(data, self.config.task)


class GuessConfig(vf.EnvConfig):
    agent: vf.AgentConfig = vf.AgentConfig()
    turns: int = 3


class GuessEnv(vf.Env[GuessConfig]):
    async def run(self, task, agents):
        async with agents.agent.interaction(task) as game:
            reply = await game.turn()
            for _ in range(self.config.turns - 1):
                if reply.terminated or task.data.secret in reply.last_reply:
                    break
                if "wait" in reply.last_reply:
                    time.sleep(60)
                reply = await game.turn(f"No, try {random.randrange(10)}")
'''


def messages_in(chat: ChatFormat, tokens: Sequence[int]) -> list[tuple[str, str]]:
    """Returns the role and text of each message that tokens hold."""
    roles = {chat.ids[f"<|{role}|>"]: role for role in ("system", "user", "assistant")}
    found: list[tuple[str, list[int]]] = []
    for token in tokens:
        if token in roles:
            found.append((roles[token], []))
        elif found and token != chat.end_id:
            found[-1][1].append(token)
    return [(role, chat.tokenizer.decode(text)) for role, text in found]


def own_tasks() -> dict[str, Any]:
    """Returns the tasks of the environment by key, as verifiers itself loads them in this process."""
    import verifiers.v1 as vf

    return {task.key: task for task in vf.load_taskset(vf.taskset_config_type(TASKSET)(id=TASKSET))}


def own_scores(task: Any, messages: Sequence[tuple[str, str]]) -> tuple[float, dict[str, float]]:
    """Returns the reward that verifiers itself gives a dialogue of (role, text), and the scores that it is made of."""
    import verifiers.v1 as vf
    from verifiers.v1.graph import MessageNode
    from verifiers.v1.trace import TraceTask

    agent = vf.AgentInfo(config=vf.AgentConfig())
    trace = vf.Trace(task=TraceTask(type=type(task).__name__, data=task.data), state=vf.State(), agent=agent)
    kinds = {"system": vf.SystemMessage, "user": vf.UserMessage, "assistant": vf.AssistantMessage}
    for i, (role, text) in enumerate(messages):
        message, parent = kinds[role](content=text), i - 1 if i else None
        trace.nodes.append(MessageNode(message=message, parent=parent, sampled=role == "assistant"))
    asyncio.run(task.score(trace))
    return trace.reward, {name: reward.score for name, reward in trace.rewards.items() if reward is not None}
