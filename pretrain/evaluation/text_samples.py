"""Texts that a model writes in training: at every evaluation it continues the same prompts, at temperature 0."""

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from configs.loader import ConfigError
from configs.model import ModelConfig
from configs.sampling import SamplingConfig
from configs.train import EvalConfig, TrainerConfig
from pretrain.checkpoint.lineage import Lineage
from pretrain.checkpoint.state import gather_weights
from pretrain.evaluation.task_scores import codec_of
from pretrain.generation.sampling import generate
from pretrain.generation.text_codec import TextCodec
from pretrain.heldout_loss import Evaluator
from pretrain.logs.text_samples_file import FILE
from pretrain.model import build_single
from pretrain.parallel.engine import Engine


class TextSamples:
    """Continuations of the prompts in `eval.prompts`, a line in samples.jsonl for each evaluation.

    The main rank writes them with a whole copy of the model, which must fit on its device, and the others wait for it.
    `step` tells how many steps are done.
    """

    def __init__(self, config: EvalConfig, codec: TextCodec, context: int, run_dir: Path, step: Callable[[], int]):
        self._codec, self._path, self._step, self._prompts = codec, run_dir / FILE, step, config.prompts
        self._tokens = min(config.prompt_tokens, context - 1)
        self._ids = [
            codec.encode_chat(codec.chat.question(text)) if config.chat else codec.encode_prompt(text)
            for text in self._prompts
        ]
        longest, text = max(((len(ids), text) for ids, text in zip(self._ids, self._prompts, strict=True)))
        if longest + self._tokens > context:
            fewer = f", or set eval.prompt_tokens={context - longest} or less" if longest < context else ""
            raise ConfigError(
                f"eval.prompts: {text[:40]!r} has {longest} tokens, and with eval.prompt_tokens = "
                f"{config.prompt_tokens} more it goes beyond the {context} that the model reads; shorten it{fewer}"
            )

    def __call__(self, engine: Engine) -> dict[str, dict[str, float]]:
        """Writes the continuations of the moment; returns no measures. Collective: all ranks call it."""
        weights = gather_weights(engine)
        if engine.mesh.is_main:
            dtype = next(engine.module.parameters()).dtype
            decoder = build_single(engine.model_config, weights, dtype, engine.separate_adapter).to(engine.mesh.device)
            greedy, stop = SamplingConfig(temperature=0.0), self._codec.stop_ids
            found = generate(decoder, self._ids, self._tokens, greedy, stop_ids=stop, pad_id=self._codec.pad_id)
            texts = [self._codec.decode(one.tokens) for one in found]
            samples = [{"prompt": p, "text": text} for p, text in zip(self._prompts, texts, strict=True)]
            line = json.dumps({"step": self._step(), "samples": samples}, ensure_ascii=False)
            try:
                with open(self._path, "a", encoding="utf-8") as file:
                    file.write(line + "\n")
            except OSError as error:
                print(f"warning: {self._path} cannot be written ({os.strerror(error.errno or 0)})", flush=True)
        engine.mesh.gather_json(None)  # the others wait, as in any evaluation
        return {}


def text_samples(
    config: TrainerConfig, model: ModelConfig, lineage: Lineage, step: Callable[[], int]
) -> Sequence[Evaluator]:
    """Returns the evaluator that continues `eval.prompts`, none if there are no prompts.

    Raises ConfigError if the model cannot read or write text, or a prompt is too long for it.
    """
    if not config.eval.prompts:
        return []
    codec = codec_of("eval.prompts", config.eval, model, lineage)
    context = max(lineage.context, config.train.seq_length)
    return [TextSamples(config.eval, codec, context, Path(config.run.dir), step)]
