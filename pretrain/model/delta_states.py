"""States of gated delta nets in generation, with the inputs that the convolution of each row still sees."""

import torch

from configs.model_parts import DeltaConfig


class DeltaStates:
    """The states of one layer: `state` [rows, K, R, P, V] in fp32 or better, shape letters as in `delta_rule`.

    `inputs` [W - 1, rows, K, channels] are the inputs of the convolution for a row's last tokens, zeros before the
    first one.
    """

    def __init__(self, delta: DeltaConfig, rows: int, dtype: torch.dtype, device: torch.device):
        heads, sharing = delta.num_key_heads, delta.num_value_heads // delta.num_key_heads
        channels = 2 * delta.key_head_dim + sharing * delta.value_head_dim
        shape = rows, heads, sharing, delta.key_head_dim, delta.value_head_dim
        self.state = torch.zeros(shape, dtype=torch.promote_types(dtype, torch.float32), device=device)
        self.inputs = torch.zeros(delta.kernel_size - 1, rows, heads, channels, dtype=dtype, device=device)

    def start(self, channels: torch.Tensor, valid_SB: torch.Tensor | None) -> None:
        """Takes the last inputs of rows [S, B, K, channels] that begin with their first token; padding is last."""
        length, rows = channels.shape[:2]
        count = len(self.inputs)
        ends = torch.full((rows,), length, device=channels.device) if valid_SB is None else valid_SB.sum(0)
        at = ends - count + torch.arange(count, device=channels.device)[:, None]  # [W - 1, B]
        found = channels.detach()[at.clamp(min=0), torch.arange(rows, device=channels.device)]
        self.inputs[:, :rows] = found * (at >= 0)[..., None, None]

    def shifted(self, channels: torch.Tensor) -> torch.Tensor:
        """Adds the inputs [B, K, channels] of one more token to rows; returns all that it sees [W, B, K, channels]."""
        seen = torch.cat((self.inputs[:, : len(channels)], channels.detach()[None]))
        self.inputs[:, : len(channels)] = seen[1:]
        return seen

    def write(self, state: torch.Tensor) -> None:
        """Takes the states of the first rows."""
        self.state[: len(state)] = state.detach()

    def copy_rows(self, first: int, other: "DeltaStates", rows: torch.Tensor) -> None:
        """Copies `rows` of other states to these from row `first` on."""
        self.state[first : first + len(rows)] = other.state[rows]
        self.inputs[:, first : first + len(rows)] = other.inputs[:, rows]

    def move_rows(self, rows: torch.Tensor, to: torch.Tensor) -> None:
        """Copies `rows` to the rows `to`."""
        self.state[to], self.inputs[:, to] = self.state[rows], self.inputs[:, rows]
