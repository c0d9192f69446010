"""The tensors that every loss of reinforcement learning is a function of, and sums over the sequences in them.

All tensors are [B, S]: a value for each token that was sampled, at the position that predicts it. A row may hold
several sequences (packed rows), so sequences are told apart by number, not by row. A batch can be written to a file and
read again, which is how `trivium rl compare` gets one.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as as_file
from torch import Tensor

from configs.files import write_atomic

CHECKSUM = "all_sha256"  # the checksum, in a file's metadata, of all its arrays; safetensors itself has none


@dataclass(frozen=True)
class TokenBatch:
    """Tokens of completions with what policies, reward and critic say of each; all tensors are [B, S].

    `mask` (bool) is True on tokens that the policy sampled, and False in prompts, at padding and where a tool wrote.
    `sequences` (int64) has the number of each token's completion, unique in the batch and below B * S, and -1 at
    padding; `sequences_of` makes it from the segments of rows. Values outside the mask are never read.
    """

    logprobs: Tensor  # of the policy that is trained; losses send gradients here and into `values`, and nowhere else
    mask: Tensor
    sequences: Tensor
    old_logprobs: Tensor | None = None  # of the policy before the first update on this rollout, by the trainer's code
    rollout_logprobs: Tensor | None = None  # of the same policy, by the sampler's code
    ref_logprobs: Tensor | None = None  # of the reference policy
    advantages: Tensor | None = None
    rewards: Tensor | None = None  # of each token; a completion's one reward is at its last token
    decoupled: Tensor | None = None  # at the last token, several rewards, each normalised in its group, and summed
    groups: Tensor | None = None  # int64, the number of the prompt; completions of one prompt are compared
    values: Tensor | None = None  # of the critic that is trained
    old_values: Tensor | None = None  # of the critic before the first update on this rollout
    returns: Tensor | None = None

    def __post_init__(self) -> None:
        for name, tensor in self.tensors().items():
            if tensor.ndim != 2 or tensor.shape != self.logprobs.shape:
                raise ValueError(
                    f"{name} {list(tensor.shape)} must be [rows, tokens], as logprobs {list(self.logprobs.shape)} are"
                )
        if self.mask.dtype != torch.bool:
            raise ValueError(f"mask is {self.mask.dtype}, not bool; weights of tokens belong to the aggregation")

    def tensors(self) -> dict[str, Tensor]:
        """Returns the tensors that the batch has, by name."""
        return {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) is not None}

    def need(self, name: str) -> Tensor:
        """Returns a tensor without its gradient, 0 outside the mask. Raises ValueError if the batch lacks it."""
        tensor: Tensor | None = getattr(self, name)
        if tensor is None:
            raise ValueError(f"the batch has no {name}, which this formula needs; record it with the rollout")
        return self.inside(tensor.detach())

    def inside(self, x: Tensor) -> Tensor:
        """Returns `x` with 0 outside the mask, so that no value there, not even NaN, reaches a loss or a gradient."""
        return torch.where(self.mask, x, 0)

    def but(self, **changes: Tensor) -> "TokenBatch":
        """Returns a copy of the batch in which the tensors named by `changes` are replaced."""
        return replace(self, **changes)

    def sequence_sum(self, x: Tensor) -> Tensor:
        """Returns for each token the sum of `x` over the masked tokens of its sequence, [B, S]; 0 at padding."""
        here = self.mask & (self.sequences >= 0)
        index = self.sequences.clamp(min=0).flatten()
        sums = x.new_zeros(x.numel()).index_add(0, index, torch.where(here, x, 0.0).flatten())
        return torch.where(self.sequences >= 0, sums[index].view_as(x), 0.0)

    def sequence_mean(self, x: Tensor) -> Tensor:
        """Returns for each token the mean of `x` over the masked tokens of its sequence, [B, S]."""
        return self.sequence_sum(x) / self.lengths().clamp(min=1)

    def lengths(self) -> Tensor:
        """Returns for each token the number of masked tokens in its sequence, [B, S], in the dtype of `logprobs`."""
        return self.sequence_sum(torch.ones_like(self.logprobs).detach())

    def first_and_last(self) -> tuple[Tensor, Tensor]:
        """Returns bool [B, S] twice: where the first masked token of each sequence is, and where its last one is."""
        tokens = torch.arange(self.mask.numel(), device=self.mask.device)
        here = (self.mask & (self.sequences >= 0)).flatten()
        index = self.sequences.flatten()[here]
        found = torch.zeros(2, self.mask.numel(), dtype=torch.bool, device=self.mask.device)
        for row, how in zip(found, ("amin", "amax"), strict=True):
            ends = torch.full_like(tokens, -1).scatter_reduce(0, index, tokens[here], how, include_self=False)
            row[ends[ends >= 0]] = True
        return found[0].view_as(self.mask), found[1].view_as(self.mask)

    def num_sequences(self) -> Tensor:
        """Returns the number of sequences with a masked token, a scalar in the dtype of `logprobs`."""
        return self.first_and_last()[1].sum().to(self.logprobs.dtype)

    def save(self, path: str | Path) -> None:
        """Writes the batch to a safetensors file, whole or not at all."""
        arrays = {name: tensor.detach().cpu().numpy() for name, tensor in self.tensors().items()}
        write_atomic(path, file_of(arrays, {"format": "trivium token batch"}))

    @classmethod
    def load(cls, path: str | Path) -> "TokenBatch":
        """Reads a batch. Raises ValueError, which says what to do, if `path` is no file with one."""
        try:
            if Path(path).is_dir():
                raise IsADirectoryError("it is a folder")
            arrays, metadata = arrays_of(path)
        except (OSError, SafetensorError) as error:
            raise ValueError(
                f"{path} cannot be read as a recorded batch ({error}); name a safetensors file of one"
            ) from None
        if CHECKSUM in metadata and metadata[CHECKSUM] != arrays_sha256(arrays):
            raise ValueError(f"{path} does not match its own SHA-256, so it is damaged; restore it or name another")
        tensors: dict[str, Any] = {name: torch.from_numpy(array) for name, array in arrays.items()}
        known = {f.name for f in fields(cls)}
        if missing := [name for name in ("logprobs", "mask", "sequences") if name not in tensors]:
            raise ValueError(f"{path} has no {', '.join(missing)}, so it is no recorded batch; record one again")
        try:
            batch = cls(**{name: tensor for name, tensor in tensors.items() if name in known})
        except ValueError as error:
            raise ValueError(f"{path} is no recorded batch: {error}") from None
        numbers = batch.sequences[batch.mask]
        if numbers.numel() and (int(numbers.min()) < 0 or int(numbers.max()) >= batch.mask.numel()):
            raise ValueError(f"{path} has sequence numbers outside 0 to {batch.mask.numel() - 1}; record it again")
        return batch


def arrays_sha256(arrays: Mapping[str, np.ndarray]) -> str:
    """Returns the SHA-256, in hex, of arrays with their names, types and shapes."""
    found = hashlib.sha256()
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        found.update(f"{name} {array.dtype.str} {array.shape}".encode())
        found.update(array.data)
    return found.hexdigest()


def file_of(arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> bytes:
    """Returns a safetensors file of arrays and metadata, with a checksum of all arrays in the metadata."""
    whole = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    return as_file(whole, metadata={**metadata, CHECKSUM: arrays_sha256(whole)})


def arrays_of(path: str | Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Reads the arrays and the metadata of a safetensors file. Raises OSError or SafetensorError."""
    with safe_open(path, framework="numpy") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118 (no dict)


def sequences_of(segments_BS: Tensor) -> Tensor:
    """Returns the numbers of sequences of rows with these segments, which count from 0 in each row (-1: padding)."""
    rows, length = segments_BS.shape
    first = torch.arange(rows, device=segments_BS.device)[:, None] * length
    return torch.where(segments_BS >= 0, first + segments_BS, -1)
