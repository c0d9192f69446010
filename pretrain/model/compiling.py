"""Compiles the forward passes of blocks by torch.compile, which keeps the code for the next start."""

import hashlib
import os
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import torch
import torch.compiler.config
from torch import nn

TAG = "TORCH_COMPILE_CACHE_KEY_TAG"  # torch's own variable for what kept code is looked up by, beside the graph


def compile_blocks(blocks: Iterable[nn.Module]) -> None:
    """Compiles the forward pass of each block when it is first called, or takes code that was kept.

    torch looks kept code up by the graph and its inputs. These do not say what shapes our own operators give, which
    may be others in another version of Trivium, so code is looked up by a digest of the model's sources, too.
    """
    torch.compiler.config.cache_key_tag = os.environ.get(TAG, "") + digest_of_sources(Path(__file__).parent)
    for block in blocks:
        # Not `block.compile()`, which compiles hooks too: one waits for the block's weights.
        vars(block)["forward"] = torch.compile(block.forward)


@cache
def digest_of_sources(folder: Path) -> str:
    """Computes a digest of the names and contents of all sources of a package."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(f"{path.relative_to(folder)}\0".encode() + path.read_bytes())
    return digest.hexdigest()
