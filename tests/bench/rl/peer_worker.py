"""TRL's side of the contest, run by the Python of TRL's environment: a GRPO run whose settings are in its argument."""

import json
import sys
import time
from pathlib import Path
from typing import Any


def reward(prompts: list[Any], completions: list[Any], **_: Any) -> list[float]:
    """Returns 1 for each completion that has the prompt's digits in order, else 0."""
    asked = [prompt[-1]["content"].removeprefix("Sort ") for prompt in prompts]
    said = [completion[0]["content"].strip() for completion in completions]
    return [float(answer == "".join(sorted(digits))) for digits, answer in zip(asked, said, strict=True)]


def main() -> None:
    import transformers
    import trl
    from datasets import Dataset

    settings = json.loads(sys.argv[1])
    prompts = json.loads(Path(settings["prompts"]).read_text())
    tokenizer = transformers.AutoTokenizer.from_pretrained(settings["model"])
    config = trl.GRPOConfig(
        output_dir="peer_trl",
        use_cpu=True,
        bf16=False,
        report_to=[],
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
        max_steps=settings["steps"],
        per_device_train_batch_size=settings["batch"],
        gradient_accumulation_steps=1,
        num_generations=settings["group"],
        max_completion_length=settings["longest"],
        temperature=1.0,
        beta=0.0,
        loss_type="grpo",
        gradient_checkpointing=False,
        learning_rate=1e-3,
        lr_scheduler_type="cosine",
        warmup_steps=5,
        adam_beta2=0.99,
        adam_epsilon=1e-3,
        weight_decay=0.0,
        shuffle_dataset=False,
    )
    ends: list[float] = []

    class Clock(transformers.TrainerCallback):
        """Notes when each step ended."""

        def on_step_end(self, *_: Any, **__: Any) -> None:
            ends.append(time.perf_counter())

    messages = [{"prompt": [{"role": "user", "content": prompt}]} for prompt in prompts]
    trainer = trl.GRPOTrainer(
        model=settings["model"],
        reward_funcs=reward,
        args=config,
        train_dataset=Dataset.from_list(messages),
        processing_class=tokenizer,
        callbacks=[Clock()],
    )
    started = time.perf_counter()
    trainer.train()
    seconds = [end - begin for begin, end in zip([started, *ends], ends, strict=False)]
    rewards = [line["reward"] for line in trainer.state.log_history if "reward" in line]
    Path(settings["out"]).write_text(json.dumps({"version": trl.__version__, "seconds": seconds, "rewards": rewards}))


if __name__ == "__main__":
    main()
