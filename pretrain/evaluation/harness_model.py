"""Trivium's decoder and sampler as a model of lm-evaluation-harness (`lm_eval`), in one process.

Log-likelihoods equal those of the harness's own `HFLM` on the exported model, with one difference: the perplexity of a
whole text (`loglikelihood_rolling`) conditions on one beginning-of-text token, where HFLM predicts a second one after
it if the tokenizer adds one. Importing this module imports `lm_eval`, which takes seconds.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs

from configs.loader import ConfigError
from configs.sampling import SamplingConfig
from pretrain.evaluation.evaluation_progress import ProgressCount
from pretrain.evaluation.likelihood import BATCH_TOKENS, Ids, likelihoods
from pretrain.generation.sampling import generate
from pretrain.generation.text_codec import TextCodec
from pretrain.generation.text_stream import TextStream
from pretrain.model import Decoder

MAX_NEW_TOKENS = 256  # of tasks that do not say how many
CACHED = 4  # tokens in the key-value cache of generation for each token of `batch_tokens`
# Settings of a task's generation that are carried out; others are refused, so that no score is of another sampling.
SAMPLING = tuple(field.name for field in fields(SamplingConfig))
SETTINGS = ("until", "max_gen_toks", "do_sample", *SAMPLING)


@register_model("trivium")
class TriviumLM(TemplateLM):
    """A decoder with its tokenizer, as the harness asks for one.

    `context` is the number of tokens that the model reads at once. With `add_bos`, every text begins with the
    beginning-of-text token, as every document did in training. With `chat`, texts come from the chat template, and its
    control symbols become their ids; else they are plain text. `cut` counts, by task, the prompts that lost their
    beginning because they were longer than the context.
    """

    def __init__(
        self,
        decoder: Decoder,
        codec: TextCodec,
        context: int,
        add_bos: bool = True,
        chat: bool = False,
        batch_tokens: int = BATCH_TOKENS,
        seed: int = 1234,
    ) -> None:
        super().__init__()
        self.decoder, self.codec, self.max_length = decoder, codec, context
        self.add_bos, self.chat, self.batch_tokens, self.seed = add_bos and codec.bos_id >= 0, chat, batch_tokens, seed
        self.cut: Counter[str] = Counter()

    @property
    def eot_token_id(self) -> int:
        return self.codec.eos_id if self.codec.eos_id >= 0 else self.codec.pad_id

    @property
    def prefix_token_id(self) -> int:
        """The token that stands before a text without context: what begins or ends texts, else what fills rows."""
        return self.codec.bos_id if self.codec.bos_id >= 0 else self.eot_token_id

    @property
    def tokenizer_name(self) -> str:
        return str(self.codec.tokenizer.sha256)

    def chat_template(self, chat_template: bool | str = False) -> str:
        return (self.codec.chat_template or "") if chat_template else ""

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return self.codec.render_chat(chat_history, add_generation_prompt)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        ids = self.codec.encode_rendered(string) if self.chat else list(self.codec.tokenizer.encode(string))
        wanted = self.add_bos if add_special_tokens is None else add_special_tokens
        return [self.codec.bos_id, *ids] if wanted and ids[:1] != [self.codec.bos_id] else ids

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Encodes context and continuation as one text and divides its ids.

        A tokenizer may join both in one token. Where that would leave the continuation without any token, it is encoded
        by itself.
        """
        before, after = super()._encode_pair(context, continuation)
        before = before or [self.prefix_token_id]  # the context was all spaces, which go to the continuation
        return before, after or self.tok_encode(continuation, add_special_tokens=False)

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        pairs = []
        for request in requests:
            context, continuation = request.args
            if context:
                before, after = self._encode_pair(context, continuation)
            else:
                before, after = [self.prefix_token_id], self.tok_encode(continuation, add_special_tokens=False)
                if after[:1] == before:
                    after = after[1:]
            self._note_if_cut(request, len(before) + len(after) - 1, self.max_length)
            pairs.append((before, after))
        return self._score("likelihoods", pairs)

    def _loglikelihood_tokens(self, requests: list[Any], **_: Any) -> list[tuple[float, bool]]:
        return self._score("likelihoods", [(before, after) for _, before, after in requests])

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Returns the log-likelihood of each whole text, which is divided into windows if it is long."""
        texts = [self.tok_encode(request.args[0], add_special_tokens=False) for request in requests]
        return [total for total, _ in self._score("texts", [([self.prefix_token_id], ids) for ids in texts])]

    def _score(self, what: str, pairs: Sequence[tuple[Ids, Ids]]) -> list[tuple[float, bool]]:
        with ProgressCount(what, len(pairs)) as progress:
            found = likelihoods(self.decoder, pairs, self.max_length, self.batch_tokens, progress)
        return [(one.logprob, one.is_greedy) for one in found]

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Returns the continuation of each prompt, up to the first of its task's stop strings and without it."""
        answers = [""] * len(requests)
        groups: dict[str, list[int]] = {}  # numbers of the requests with the same settings
        for number, request in enumerate(requests):
            groups.setdefault(repr(sorted(request.args[1].items(), key=str)), []).append(number)
        with ProgressCount("answers", len(requests)) as progress:
            for numbers in groups.values():
                texts = self._continue([requests[number] for number in numbers], progress)
                for number, text in zip(numbers, texts, strict=True):
                    answers[number] = text
        return answers

    def _continue(self, requests: list[Any], progress: Callable[[int], None]) -> list[str]:
        """Continues prompts that have the same settings; each one's draws are keyed by its index in its task."""
        settings = generation_settings(str(requests[0].task_name), requests[0].args[1])
        wanted = settings["max_gen_toks"]
        # A prompt gives way to the answer, but never more than half of the context.
        most = self.max_length - min(wanted, self.max_length // 2)
        prompts = [self.tok_encode(request.args[0]) or [self.prefix_token_id] for request in requests]
        for request, prompt in zip(requests, prompts, strict=True):
            self._note_if_cut(request, len(prompt), most)
        prompts = [prompt[-most:] for prompt in prompts]
        limits = [min(wanted, self.max_length - len(prompt)) for prompt in prompts]
        drawn: Counter[str] = Counter()  # a task may ask for several answers to one document
        keys = []
        for request in requests:
            name = f"{request.task_name}/{request.doc_id}"
            keys.append(f"{name}/{drawn[name]}")
            drawn[name] += 1
        longest = max(len(prompt) + limit for prompt, limit in zip(prompts, limits, strict=True))
        stops = [stop for stop in settings["until"] if stop]
        texts = [TextStream(self.codec.decode, stops) for _ in requests]

        def watch(number: int, token: int) -> bool:
            texts[number].push(token)
            return texts[number].stopped

        generate(
            self.decoder,
            prompts,
            limits,
            settings["sampling"],
            self.seed,
            stop_ids=self.codec.stop_ids,
            keys=keys,
            pad_id=self.codec.pad_id,
            max_rows=max(1, CACHED * self.batch_tokens // longest),
            watch=watch,
        )
        progress(len(requests))
        for text in texts:
            text.finish()
        return [text.text for text in texts]

    def _note_if_cut(self, request: Any, tokens: int, most: int) -> None:
        if tokens > most:
            self.cut[str(request.task_name)] += 1


def generation_settings(task: str, given: dict[str, Any]) -> dict[str, Any]:
    """Returns {"sampling", "max_gen_toks", "until"} of a task's generation_kwargs.

    Raises ConfigError for a setting that the sampler does not have or cannot take.
    """
    settings: dict[str, Any] = dict(normalize_gen_kwargs(given, MAX_NEW_TOKENS))
    unknown = [f"{key} = {value!r}" for key, value in settings.items() if key not in SETTINGS]
    if unknown:
        raise ConfigError(
            f"task {task} sets generation_kwargs.{unknown[0]}, which Trivium's sampler does not have; remove it from "
            f"the task's file, or use {', '.join(SETTINGS)}"
        )
    try:
        chosen = {key: settings[key] for key in SAMPLING if settings.get(key) is not None}
        sampling = SamplingConfig(**chosen if settings["do_sample"] else {**chosen, "temperature": 0.0})
    except (ConfigError, TypeError) as error:
        raise ConfigError(f"task {task}, generation_kwargs: {error}") from None
    most = settings["max_gen_toks"]
    if most < 1:
        raise ConfigError(f"task {task} sets generation_kwargs.max_gen_toks = {most}; give 1 or more")
    return {"sampling": sampling, "max_gen_toks": most, "until": settings["until"]}
