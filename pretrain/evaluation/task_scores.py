"""Scores of tasks of lm-evaluation-harness in training, at every evaluation of the train loop."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from configs.loader import ConfigError
from configs.model import ModelConfig
from configs.train import EvalConfig, TrainerConfig
from pretrain.checkpoint.lineage import Lineage
from pretrain.checkpoint.state import gather_weights
from pretrain.evaluation.packages import need_packages, stay_offline
from pretrain.generation.text_codec import TextCodec
from pretrain.heldout_loss import Evaluator
from pretrain.model import build_single
from pretrain.parallel.engine import Engine

if TYPE_CHECKING:
    from pretrain.evaluation.harness_tasks import LoadedTasks


class TaskScores:
    """Evaluator that scores tasks of lm-evaluation-harness with the current weights.

    The main rank computes them with a whole copy of the model, which must fit on its device, and the others wait for
    it. All ranks load the tasks, so that a mistake in them ends all ranks before the first step, with a ConfigError.
    """

    def __init__(self, config: EvalConfig, codec: TextCodec, context: int, seed: int) -> None:
        need_packages("eval.tasks")
        stay_offline()
        from pretrain.evaluation.harness_tasks import load_tasks  # takes seconds, so only if there are tasks

        self._config, self._codec, self._context, self._seed = config, codec, context, seed
        self._tasks: LoadedTasks = load_tasks(config.tasks, num_fewshot=config.num_fewshot, key="eval.tasks")

    def __call__(self, engine: Engine) -> dict[str, dict[str, float]]:
        """Returns the measures of each task. Collective: all ranks call it."""
        weights = gather_weights(engine)
        found: dict[str, dict[str, float]] = {}
        if engine.mesh.is_main:
            from pretrain.evaluation.harness_model import TriviumLM
            from pretrain.evaluation.harness_tasks import run_tasks

            dtype = next(engine.module.parameters()).dtype
            decoder = build_single(engine.model_config, weights, dtype, engine.separate_adapter)
            decoder = decoder.to(engine.mesh.device)
            model = TriviumLM(decoder, self._codec, self._context, chat=self._config.chat, seed=self._seed)
            scores = run_tasks(model, self._tasks, self._config.task_documents)["scores"]
            for name, values in scores.items():
                known = {measure: value for measure, value in values["measures"].items() if value is not None}
                found[f"task {name}"] = known
        return engine.mesh.gather_json(found)[0]


def task_scores(config: TrainerConfig, model: ModelConfig, lineage: Lineage) -> Sequence[Evaluator]:
    """Returns the evaluator of the tasks in `eval.tasks`, none if there are no tasks.

    Raises ConfigError for a task that cannot be run, and if the model cannot read or write its texts.
    """
    if not config.eval.tasks:
        return []
    codec = codec_of("eval.tasks", config.eval, model, lineage)
    return [TaskScores(config.eval, codec, max(lineage.context, config.train.seq_length), config.run.seed)]


def codec_of(key: str, config: EvalConfig, model: ModelConfig, lineage: Lineage) -> TextCodec:
    """Returns the codec of the model's texts. Raises ConfigError, naming the `key` that asks, if it writes none."""
    if not model.has_logits:
        raise ConfigError(f"{key} is for a model that writes text, not for a reward model; leave it out")
    if lineage.tokenizer is None:
        raise ConfigError(f"{key} needs the model's tokenizer, which is unknown; leave it out")
    if config.chat and lineage.chat_template is None:
        raise ConfigError("eval.chat = true, and the model has no chat template; set eval.chat=false")
    ends = (lineage.imported or {}).get("token_ids", {}).get("eos_token_id")
    return TextCodec(lineage.tokenizer, lineage.chat_template, [ends] if isinstance(ends, int) else ends or [])
