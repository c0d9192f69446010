"""Causal attention within the documents of packed rows, without a mask of tokens by tokens.

`Documents` says where documents lie in the rows of a micro-batch. It is made once, on the host, when the batch is
prepared, and every layer uses it. On a GPU in half precision all documents go through one call of flash attention,
`torch.nn.attention.varlen`; on a CPU each goes through SDPA's flash kernel; anything else, such as fp32 on a GPU,
takes SDPA document by document. A run on a CPU in bf16 that compiles its blocks has a faster backward pass than
SDPA's, see `native`. Shape letters: see `decoder.py`.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from pretrain.model import native
from pretrain.model.products import widens

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # torch before 2.10
    varlen_attn = None  # type: ignore[assignment]

_MAX_HEAD_DIM = 256  # of flash attention
_FIRST_CAPABILITY = (8, 0)  # of a GPU that flash attention runs on: Ampere


@dataclass(frozen=True)
class Documents:
    """The documents of a micro-batch of rows. A document is a run of tokens with the same number in a row.

    Padding counts as a document of its own, so that its tokens have something to attend to.
    """

    # [G, 4] on the host: documents from token `start` to `end` of each of the rows `first` to `last`, exclusive of
    # `end` and `last`, as columns (first, last, start, end). Consecutive rows that are cut alike are one block.
    blocks: torch.Tensor
    # [number of documents + 1] int32, on the device: the index at which each document ends, rows one after another.
    ends: torch.Tensor
    is_whole: bool  # every row is one document
    # [B, T] on the host: at the first token of a document the number of its tokens that are its context, which the
    # pattern `prefix` sees both ways; None where there are none.
    contexts: torch.Tensor | None = None

    @classmethod
    def of(cls, segments_BT: torch.Tensor) -> "Documents":
        """Finds the documents of rows whose tokens carry the numbers of their documents, -1 for padding."""
        rows = segments_BT.detach().cpu()
        count, length = rows.shape
        begins = torch.ones_like(rows, dtype=torch.bool)
        begins[:, 1:] = rows[:, 1:] != rows[:, :-1]
        starts = begins.flatten().nonzero()[:, 0]
        ends = torch.cat((starts, torch.tensor([count * length])))
        blocks: list[list[int]] = []
        newest: dict[tuple[int, int], list[int]] = {}  # the block of a span of tokens that ended with the last row
        for first, last in zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True):
            row, start = divmod(first, length)
            span = (start, start + last - first)
            if span in newest and newest[span][1] == row:
                newest[span][1] = row + 1
            else:
                newest[span] = [row, row + 1, *span]
                blocks.append(newest[span])
        moved = ends.to(segments_BT.device, torch.int32)
        return cls(torch.tensor(blocks, dtype=torch.int64).view(-1, 4), moved, is_whole=len(starts) == count)

    def lengths(self) -> torch.Tensor:
        """Returns the length of the document that each token is in, of all rows one after another."""
        sizes = self.ends.diff()
        return sizes.repeat_interleave(sizes)

    def numbers(self, rows: int) -> torch.Tensor:
        """Returns the number of the document that each token of so many rows is in, [T, B], on the device of `ends`."""
        ends = self.ends.long()
        length = int(self.blocks[:, 3].max())  # all rows are full, with padding, which is a document too
        tokens = torch.arange(rows * length, device=ends.device)
        return torch.searchsorted(ends[1:], tokens, right=True).view(rows, length).t()

    def with_contexts(self, loss_mask_BT: torch.Tensor) -> "Documents":
        """Returns these documents with contexts: the tokens up to the first one whose next token is trained on."""
        trained, contexts = loss_mask_BT.detach().cpu() != 0, torch.zeros(loss_mask_BT.shape, dtype=torch.int64)
        for first, last, start, end in self.blocks.tolist():
            own = trained[first:last, start:end]
            contexts[first:last, start] = (own.int().argmax(1) + 1) * own.any(1)
        return replace(self, contexts=contexts)

    def to(self, device: torch.device) -> "Documents":
        """Moves what kernels read; the blocks stay on the host."""
        return replace(self, ends=self.ends.to(device, non_blocking=True))

    def pin_memory(self) -> "Documents":
        return replace(self, ends=self.ends.pin_memory())


def attend_documents(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, documents: Documents) -> torch.Tensor:
    """Computes causal attention within each document, [T, B, N, D], from q [T, B, N, D] and k and v [T, B, K, D]."""
    if documents.is_whole:
        return attend_rows(q, k, v, None)
    if _has_varlen(q):
        return _by_varlen(q, k, v, documents)
    if q.device.type == "cpu":
        return _on_cpu(q, k, v, documents.blocks)[0]
    return by_document(q, k, v, documents, partial(attend_rows, mask=None))


def attend_rows(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Computes attention of whole rows: causal without a mask, which is [queries, keys] or [B, 1, queries, keys]."""
    if mask is None and (_has_native_backward(q, k) or (_is_bf16_on_cpu(q) and widens() and len(q) == len(k))):
        return _on_cpu(q, k, v, torch.tensor([[0, q.shape[1], 0, q.shape[0]]]))[0]
    q, k, v = (x.permute(1, 2, 0, 3) for x in (q, k, v))
    if q.is_cuda and q.dtype == torch.float32:  # the kernel that keeps no scores has no grouped heads in fp32
        k, v = (shared_heads(x, q.shape[1], dim=1) for x in (k, v))
    gqa = q.shape[1] != k.shape[1]
    out_BNSD = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=gqa)
    return out_BNSD.permute(2, 0, 1, 3)


def _has_native_backward(q: torch.Tensor, k: torch.Tensor) -> bool:
    """Returns whether gradients of attention of `q` to as many keys as it has queries are our own kernel's."""
    is_even = q.shape[-1] % 2 == 0 and len(q) == len(k)
    return _is_bf16_on_cpu(q) and is_even and native.is_loaded()


def _is_bf16_on_cpu(q: torch.Tensor) -> bool:
    return q.dtype == torch.bfloat16 and q.device.type == "cpu"


def shared_heads(x: torch.Tensor, num_heads: int, dim: int) -> torch.Tensor:
    """Repeats key-value heads, which are in dimension `dim`, until each query head has its own."""
    sharing = num_heads // x.shape[dim]
    return x if sharing == 1 else x.repeat_interleave(sharing, dim)


# Arguments of `varlen_attn` by version: torch 2.10 has is_causal, 2.11 a window instead, and 2.12 grouped heads too.
_VARLEN_ARGUMENTS = frozenset(inspect.signature(varlen_attn).parameters) if varlen_attn is not None else frozenset()


def _has_varlen(q: torch.Tensor) -> bool:
    return (
        not _VARLEN_ARGUMENTS.isdisjoint(("window_size", "is_causal"))
        and q.is_cuda
        and q.dtype in (torch.bfloat16, torch.float16)
        and q.shape[-1] % 8 == 0
        and q.shape[-1] <= _MAX_HEAD_DIM
        and torch.cuda.get_device_capability(q.device) >= _FIRST_CAPABILITY
    )


def _by_varlen(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, documents: Documents) -> torch.Tensor:
    """Lays rows one after another and computes all documents in one call."""
    length, rows = q.shape[:2]
    packed_q, packed_k, packed_v = (x.transpose(0, 1).flatten(0, 1) for x in (q, k, v))
    causal: dict[str, Any] = {"window_size": (-1, 0)} if "window_size" in _VARLEN_ARGUMENTS else {"is_causal": True}
    if "enable_gqa" in _VARLEN_ARGUMENTS:
        causal["enable_gqa"] = q.shape[2] != k.shape[2]
    else:
        packed_k, packed_v = (shared_heads(x, q.shape[2], dim=1) for x in (packed_k, packed_v))
    out = varlen_attn(
        packed_q,
        packed_k,
        packed_v,
        documents.ends,
        documents.ends,
        length,  # it bounds the documents' lengths, and unlike their maximum it is the same in every step
        length,
        **causal,
    )
    assert isinstance(out, torch.Tensor)
    return out.unflatten(0, (rows, length)).transpose(0, 1)


def by_document(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    documents: Documents,
    attend: Callable[..., torch.Tensor],
    with_row: bool = False,
    with_context: bool = False,
) -> torch.Tensor:
    """Calls `attend` for one document after another, on any device, and puts the outputs together.

    With `with_row` it passes the number of the document's row, too, and with `with_context` the length of its context.
    It splits rows instead of slicing them: the gradient of a slice is as long as what it was cut from.
    """
    spans: list[list[tuple[int, int]]] = [[] for _ in range(q.shape[1])]
    for first, last, start, end in documents.blocks.numpy():
        for row in range(first, last):
            spans[row].append((int(start), int(end)))
    outputs = []
    for row, own in enumerate(spans):
        own = sorted(own)
        lengths = [end - start for start, end in own]
        parts = zip(*(x[:, row : row + 1].split(lengths) for x in (q, k, v)), strict=True)
        more = (row,) if with_row else ()
        if with_context and documents.contexts is not None:
            contexts = documents.contexts[row].tolist()
            found = [attend(*part, *more, context=contexts[at]) for part, (at, _) in zip(parts, own, strict=True)]
        else:
            found = [attend(*part, *more) for part in parts]
        outputs.append(torch.cat(found))
    return torch.cat(outputs, dim=1)


# An operator of its own, so that compiled code has no graph break here and is not built anew for other lengths.
@torch.library.custom_op("trivium::causal_documents", mutates_args=())
def _on_cpu(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, blocks: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Computes blocks of documents by the kernel that SDPA takes on a CPU; also gives its logsumexp [B, N, T]."""
    out, logsumexp = _empty_outputs(q, k, v, blocks)
    for first, last, start, end in blocks.numpy():
        part = (_by_kernel(_block(x, first, last, start, end)) for x in (q, k, v))
        found, sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*part, is_causal=True)
        _block(out, first, last, start, end).copy_(found)
        logsumexp[first:last, :, start:end] = sums
    return out, logsumexp


@_on_cpu.register_fake
def _empty_outputs(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, blocks: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    length, rows, heads, _ = q.shape
    wide = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty(q.shape), q.new_empty(rows, heads, length, dtype=wide)


@torch.library.custom_op("trivium::causal_documents_backward", mutates_args=())
def _on_cpu_backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    logsumexp: torch.Tensor,
    blocks: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Computes the gradients of q, k and v."""
    if _has_native_backward(q, k):
        return native.causal_backward(grad, q, k, v, out, logsumexp, blocks)
    gradients = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    for first, last, start, end in blocks.numpy():
        own_grad, *own = (_by_kernel(_block(x, first, last, start, end)) for x in (grad, q, k, v, out))
        found = backward(own_grad, *own, logsumexp[first:last, :, start:end], 0.0, True)
        for whole, part in zip(gradients, found, strict=True):
            _block(whole, first, last, start, end).copy_(part)
    return gradients


@_on_cpu_backward.register_fake
def _empty_gradients(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    logsumexp: torch.Tensor,
    blocks: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _block(x_TBND: torch.Tensor, first: int, last: int, start: int, end: int) -> torch.Tensor:
    """Returns the tokens of a block as the kernel takes them, [rows, heads, tokens, D]."""
    return x_TBND[start:end, first:last].permute(1, 2, 0, 3)


def _by_kernel(x: torch.Tensor) -> torch.Tensor:
    """Returns a block in the precision in which torch's kernel is fastest."""
    return x.float() if x.dtype == torch.bfloat16 and widens() else x


def _keep(ctx: Any, inputs: tuple[torch.Tensor, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    q, k, v, blocks = inputs
    ctx.save_for_backward(q, k, v, *output, blocks)


def _backward(ctx: Any, grad: torch.Tensor, _: Any) -> tuple[torch.Tensor | None, ...]:
    backward: Callable[..., Any] = _on_cpu_backward
    return (*backward(grad, *ctx.saved_tensors), None)


_on_cpu.register_autograd(_backward, setup_context=_keep)
