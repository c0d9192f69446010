"""Solved prompts of a task as examples for fine-tuning: rendered like dialogues, and split as the task splits."""

from configs.tasks import DemonstrationConfig
from posttrain.chat.dialogues import Example, not_learnt
from posttrain.chat.format_interface import Chat, UntrainedEnd
from posttrain.chat.messages import BrokenDialogue, Message
from posttrain.chat.thinking import with_switches
from posttrain.records import Records
from posttrain.tasks.task import Split, Task, available

_ANEW = "choose another run.dir for a run with train.seq_length={}"


def read_demonstrations(
    task: Task | None, settings: DemonstrationConfig | None, chat: Chat, seed: int, seq_length: int, parts: int = 1
) -> dict[str, Records[Example]]:
    """Returns solved prompts by the task's name, or {} without a task. Raises as `demonstrations`."""
    if task is None or settings is None or not settings.demonstrations:
        return {}
    counts = available(task, "train", settings.demonstrations), available(task, "heldout", settings.eval_prompts)
    train = demonstrations(task, chat, seed, "train", counts[0], seq_length, parts)
    heldout = demonstrations(task, chat, seed, "heldout", counts[1], seq_length, parts)
    return {task.name: Records("demonstrations", train, heldout)}


def demonstrations(
    task: Task, chat: Chat, seed: int, split: Split, count: int, seq_length: int, parts: int = 1
) -> list[Example]:
    """Returns the first `count` prompts of a split with their right answers; `parts` is as in `read_split`.

    Answers within a prompt are not learnt. Raises ValueError if one is longer than `seq_length` tokens.
    """
    examples: list[Example] = []
    for index in range(count):
        problem = task.problem(seed, split, index)
        if problem.demonstration is None:
            continue
        location = f"{task.name}/{split}/{index}"
        answer: Message = {"role": "assistant", "content": problem.demonstration}
        try:
            given = with_switches([*not_learnt(problem.messages), answer], False)
            samples = [sample.to_write() for sample in chat.samples(given)]
        except UntrainedEnd as error:
            raise error.at("task", location) from None
        except BrokenDialogue as broken:
            raise ValueError(f"the demonstration of {problem.id} cannot be learnt: {broken}; correct it") from None
        examples += [Example.of(location, location, sample) for sample in samples]
    longest = max((len(example.tokens) for example in examples), default=0)
    if longest > seq_length:
        fits = f"set train.seq_length={-(-longest // parts) * parts}" if parts else _ANEW.format(longest)
        raise ValueError(
            f"prompts of the task {task.name!r} have up to {longest} tokens with their answers, more than "
            f"train.seq_length = {seq_length}; {fits} or more"
        )
    return examples
