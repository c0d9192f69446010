"""Scores of tasks of lm-evaluation-harness during pretraining, at every evaluation of the train loop."""

from pathlib import Path
from typing import TYPE_CHECKING

from configs.train import PretrainEvalConfig
from data_pipeline.tokens.tokenizer import Tokenizer
from pretrain.checkpoint.state import gather_weights
from pretrain.evaluation.packages import need_packages
from pretrain.model import build_single
from pretrain.parallel.engine import Engine

if TYPE_CHECKING:
    from pretrain.evaluation.harness_tasks import LoadedTasks


class PlainCodec:
    """A model's tokenizer without a chat template, see `pretrain.evaluation.harness_model.Codec`."""

    chat_template: str | None = None

    def __init__(self, tokenizer: Path):
        self.tokenizer = Tokenizer.load(tokenizer)
        self.bos_id, self.eos_id = self.tokenizer.bos_id, self.tokenizer.eos_id
        self.pad_id = max(self.tokenizer.pad_id, 0)
        self.stop_ids = [self.eos_id]

    def encode_rendered(self, text: str) -> list[int]:
        return self.tokenizer.encode(text)

    def decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode([i for i in ids if i < self.tokenizer.vocab_size])

    def render_chat(self, messages: list[dict[str, str]], open_answer: bool) -> str:
        raise ValueError("a model in pretraining has no chat template")


class TaskScores:
    """Scores of tasks with the weights of the moment; see `pretrain.heldout_loss.Evaluator`.

    The main rank computes them with a whole copy of the model, which must fit on its device, and the others wait for
    it. All ranks load the tasks, so that a mistake in them ends all ranks before the first step, with a ConfigError.
    """

    def __init__(self, config: PretrainEvalConfig, tokenizer: Path, context: int, seed: int) -> None:
        need_packages("eval.tasks")
        from pretrain.evaluation.harness_tasks import load_tasks  # takes seconds, so only if there are tasks

        self._config, self._context, self._seed = config, context, seed
        self._codec = PlainCodec(tokenizer)
        self._tasks: LoadedTasks = load_tasks(config.tasks, num_fewshot=config.num_fewshot, key="eval.tasks")

    def __call__(self, engine: Engine) -> dict[str, dict[str, float]]:
        """Returns the measures of each task. Collective: all ranks call it."""
        weights = gather_weights(engine)
        found: dict[str, dict[str, float]] = {}
        if engine.mesh.is_main:
            from pretrain.evaluation.harness_model import TriviumLM
            from pretrain.evaluation.harness_tasks import run_tasks

            dtype = next(engine.module.parameters()).dtype
            decoder = build_single(engine.model_config, weights, dtype).to(engine.mesh.device)
            model = TriviumLM(decoder, self._codec, self._context, seed=self._seed)
            scores = run_tasks(model, self._tasks, self._config.task_documents)["scores"]
            for name, values in scores.items():
                known = {measure: value for measure, value in values["measures"].items() if value is not None}
                found[f"task {name}"] = known
        return engine.mesh.gather_json(found)[0]
