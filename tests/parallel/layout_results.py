"""Compares what a layout computed with what one rank computed: losses, gradients, norms and weights."""

from typing import Any

import pytest
import torch

Results = tuple[list[dict[str, Any]], dict[str, torch.Tensor]]  # each rank's result, and whole tensors by name


def check_copies(found: Results) -> None:
    """Holds ranks to one grad norm and, bit by bit, to the same master weights wherever they hold the same slice.

    The norm is also held against the norm of the gathered gradients. Ranks that clip by different norms drift apart.
    """
    results, tensors = found
    assert all(result["norms"] == results[0]["norms"] for result in results), [result["norms"] for result in results]
    gradients = {name: tensor.double() for name, tensor in tensors.items() if name.startswith("grad/")}
    head, embedding = gradients.get("grad/lm_head.weight"), gradients.get("grad/embedding.weight")
    if head is not None and embedding is not None and torch.equal(head, embedding):
        del gradients["grad/lm_head.weight"]  # the last stage's copy of a tied embedding
    norm = float(torch.stack([gradient.square().sum() for gradient in gradients.values()]).sum().sqrt())
    assert results[0]["norms"][0] == pytest.approx(norm, rel=1e-6)
    check_slices(results)


def check_slices(results: list[dict[str, Any]]) -> None:
    """Holds ranks, bit by bit, to the same master weights wherever they hold the same slice."""
    held: dict[str, set[str]] = {}
    for result in results:
        for name, digest in result["slices"].items():
            held.setdefault(name, set()).add(digest)
    apart = [name for name, digests in held.items() if len(digests) > 1]
    assert not apart, f"ranks hold different weights: {apart}"


def check_same(found: Results, reference: Results) -> None:
    check_copies(found)
    results, tensors = found[0], dict(found[1])
    expected = reference[0][0]
    for result in results:  # every rank returns the same numbers
        assert result["losses"] == pytest.approx(expected["losses"], rel=2e-6)
        assert result["norms"][0] == pytest.approx(expected["norms"][0], rel=2e-6)
        assert result["norms"] == pytest.approx(expected["norms"], rel=1e-5)  # the weights differ by as much
        for step, values in enumerate(result["by_source"]):
            assert values == pytest.approx(expected["by_source"][step], rel=2e-6)
        assert result["moe"].keys() == expected["moe"].keys()
        for key, value in expected["moe"].items():  # by layer too
            assert result["moe"][key] == pytest.approx(value, rel=2e-6), key
        shared = result["details"].keys() & expected["details"].keys()  # ZeRO stages 2 and 3 measure no update
        assert "activation_rms_by_layer" in shared
        for key in shared:
            # Norms of an update that Adam makes of small gradients differ by more than the gradients.
            rel = 1e-4 if key in ("update_norm", "update_ratio") else 5e-6
            assert result["details"][key] == pytest.approx(expected["details"][key], rel=rel), key
        assert result["heldout"] == pytest.approx(expected["heldout"], rel=1e-5)
    # With tied embeddings the last stage's copy of the head has the embedding's gradient and weight.
    for kind in ("grad", "weight"):
        if f"{kind}/lm_head.weight" not in reference[1] and f"{kind}/lm_head.weight" in tensors:
            assert torch.equal(tensors.pop(f"{kind}/lm_head.weight"), tensors[f"{kind}/embedding.weight"])
    assert tensors.keys() == reference[1].keys()
    for name, tensor in tensors.items():
        if torch.equal(tensor, reference[1][name]):
            continue  # both may be zeros, which have no relative error
        error = torch.linalg.vector_norm(tensor - reference[1][name]) / size_of(name, reference[1])
        # Some weights begin at zero. All of them are two steps of Adam, in which noise of a small gradient is larger.
        began_at_zero = name.startswith("weight/") and float(reference[1][name].abs().max()) < 0.03
        allowed = 1e-4 if began_at_zero else 1e-5
        assert error < allowed, f"{name} differs by {error:.1e}"


def size_of(name: str, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """Returns the size that a tensor's error is relative to.

    A bias of keys adds the same to all scores of a query, unless the keys are then rotated or normed. So the softmax
    does not see it, its gradient is rounding alone, and its size is that of the queries' bias.
    """
    sizes = [torch.linalg.vector_norm(tensors[name])]
    if name.endswith(("k_proj.bias", "k_norm.bias")):
        sizes.append(torch.linalg.vector_norm(tensors[name.replace(".k_", ".q_")]))
    return max(sizes)
