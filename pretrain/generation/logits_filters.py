"""Changes to logits before a next token is drawn: repetition penalty, temperature, top-k, top-p and min-p.

Each function takes logits [B, V] in fp32, changes nothing in place, and gives what the logits processor of the same
name in transformers gives, ties and rounding included. A token that is never drawn gets minus infinity.
"""

import torch

from configs.sampling import SamplingConfig

NEVER = float("-inf")


def penalize_repetition(logits_BV: torch.Tensor, ids_BL: torch.Tensor, penalty: float) -> torch.Tensor:
    """Divides positive logits of the tokens `ids_BL` by the penalty and multiplies negative ones by it, once a token.

    The ids are a text so far, prompt included (Keskar et al. 2019); rows of different lengths are filled up with ids
    of their own.
    """
    found_BL = logits_BV.gather(1, ids_BL)
    return logits_BV.scatter(1, ids_BL, torch.where(found_BL < 0, found_BL * penalty, found_BL / penalty))


def keep_top_k(logits_BV: torch.Tensor, top_k: int) -> torch.Tensor:
    """Keeps the `top_k` likeliest tokens (Fan et al. 2018), and those that are as likely as the last of them."""
    least_B1 = logits_BV.topk(min(top_k, logits_BV.shape[1])).values[:, -1:]
    return logits_BV.masked_fill(logits_BV < least_B1, NEVER)


def keep_top_p(logits_BV: torch.Tensor, top_p: float) -> torch.Tensor:
    """Keeps the fewest likeliest tokens whose probabilities add up to `top_p`, at least one (Holtzman et al. 2020)."""
    rising_BV, order_BV = logits_BV.sort(-1)
    is_cut_BV = rising_BV.softmax(-1).cumsum(-1) <= 1 - top_p
    is_cut_BV[:, -1] = False
    return logits_BV.masked_fill(is_cut_BV.scatter(1, order_BV, is_cut_BV), NEVER)


def keep_min_p(logits_BV: torch.Tensor, min_p: float) -> torch.Tensor:
    """Keeps the tokens with at least `min_p` times the probability of the likeliest one (Nguyen et al. 2024)."""
    probs_BV = logits_BV.softmax(-1)
    return logits_BV.masked_fill(probs_BV < min_p * probs_BV.amax(-1, keepdim=True), NEVER)


def processed(logits_BV: torch.Tensor, sampling: SamplingConfig, ids_BL: torch.Tensor | None = None) -> torch.Tensor:
    """Applies all options in the order of transformers' `generate`; at temperature 0 only the repetition penalty.

    `ids_BL` are only needed for a repetition penalty.
    """
    if sampling.repetition_penalty != 1:
        assert ids_BL is not None, "a repetition penalty needs the tokens so far"
        logits_BV = penalize_repetition(logits_BV, ids_BL, sampling.repetition_penalty)
    if sampling.temperature == 0:
        return logits_BV
    if sampling.temperature != 1:
        logits_BV = logits_BV / sampling.temperature
    if sampling.top_k > 0:
        logits_BV = keep_top_k(logits_BV, sampling.top_k)
    if sampling.top_p < 1:
        logits_BV = keep_top_p(logits_BV, sampling.top_p)
    if sampling.min_p > 0:
        logits_BV = keep_min_p(logits_BV, sampling.min_p)
    return logits_BV
