"""The process in which vLLM continues prompts: it reads requests, one JSON object a line, and writes a reply to each.

`vllm_sampler.py` runs it by path with the Python that has vLLM, so it imports nothing of Trivium. Standard output and
standard error lead to a log; requests and replies have pipes of their own. It ends with its parent, however that ends.
"""

import ctypes
import json
import os
import signal
import sys
from typing import Any

PR_SET_PDEATHSIG = 1  # of prctl: the signal that this process gets when its parent ends
SHOWN = 600  # characters of an error


class VLLMEngine:
    """An engine of vLLM that has the weights of a Hugging Face folder, and takes others of the same model."""

    def __init__(self, setup: dict[str, Any]) -> None:
        """Loads the folder. Raises ValueError if vLLM does not know the class of the model."""
        import vllm

        self.version, architecture = str(vllm.__version__), setup["architecture"]
        if architecture not in vllm.ModelRegistry.get_supported_archs():
            raise ValueError(f"vLLM {self.version} has no model class {architecture}")
        self.model = vllm.LLM(
            model=setup["folder"],
            skip_tokenizer_init=True,
            dtype=setup["dtype"],
            max_model_len=setup["room"],
            kv_cache_memory_bytes=setup["cache_bytes"],
            enforce_eager=True,
            generation_config="vllm",  # its own defaults: no top_k or top_p that a folder may name
            logprobs_mode="processed_logprobs",  # at the temperature of sampling
            max_logprobs=1,
            disable_log_stats=True,
        )

    def reload(self, folder: str) -> dict[str, Any]:
        """Takes the weights in a folder in place of its own, and forgets what it computed with those."""
        self.model.collective_rpc("reload_weights", kwargs={"weights_path": folder})
        if not self.model.reset_prefix_cache():
            raise RuntimeError("vLLM did not empty its cache of prefixes")
        return {}

    def continued(self, request: dict[str, Any]) -> dict[str, Any]:
        """Returns what the model writes after each prompt: token ids, their log-probabilities, and how it ended."""
        from vllm import SamplingParams, TokensPrompt

        settings = [
            SamplingParams(
                temperature=request["temperature"],
                top_k=0,
                top_p=1.0,
                min_p=0.0,
                seed=seed,
                max_tokens=request["max_new_tokens"],
                ignore_eos=True,
                stop_token_ids=request["stop_ids"],
                logprobs=0,  # of the sampled token alone
                detokenize=False,
            )
            for seed in request["seeds"]
        ]
        prompts = [TokensPrompt(prompt_token_ids=prompt) for prompt in request["prompts"]]
        texts = [result.outputs[0] for result in self.model.generate(prompts, settings, use_tqdm=False)]
        return {
            "tokens": [list(text.token_ids) for text in texts],
            "logprobs": [
                [at[token].logprob for token, at in zip(text.token_ids, text.logprobs, strict=True)] for text in texts
            ],
            "stopped": [text.finish_reason == "stop" for text in texts],
        }


def main() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    requests, replies = os.fdopen(int(sys.argv[1]), "rb"), os.fdopen(int(sys.argv[2]), "wb")
    engine: VLLMEngine | None = None
    for line in requests:
        request = json.loads(line)
        try:
            if engine is None:
                engine = VLLMEngine(request)
                reply: dict[str, Any] = {"version": engine.version}
            elif "folder" in request:
                reply = engine.reload(request["folder"])
            else:
                reply = engine.continued(request)
        except Exception as error:  # whatever vLLM raises is told to the trainer, which ends the run
            sys.excepthook(*sys.exc_info())
            reply = {"error": " ".join(f"{type(error).__name__}: {error}".split())[:SHOWN]}
        replies.write(json.dumps(reply).encode() + b"\n")
        replies.flush()


if __name__ == "__main__":
    main()
