"""Config of a mixture of experts."""

from collections.abc import Sequence
from typing import Literal

from pydantic import Field, model_validator

from configs.remedies import could_be, divisors
from configs.section import Section


class MoEConfig(Section):
    """Top-k routing over `num_experts`; the defaults are Mixtral's.

    Gating turns router logits into scores; the top_k scores weigh the experts' outputs. With groups (DeepSeek-V2 and
    V3), a token uses only experts of its best groups. The load of experts is balanced by an auxiliary loss or by a bias
    on the scores that choose experts (DeepSeek-V3); the z-loss keeps the router's logits small.
    """

    num_experts: int = Field(ge=2)
    """The number of routed experts in each layer."""
    top_k: int = Field(default=2, ge=1)
    """The number of routed experts that each token uses."""
    ffn_hidden_size: int | None = Field(default=None, ge=8)
    """The inner size of one expert's MLP; left out, it is model.ffn_hidden_size."""
    num_shared_experts: int = Field(default=0, ge=0)
    """The number of experts that every token uses in addition to the routed ones; 0 for none."""
    shared_ffn_hidden_size: int | None = Field(default=None, ge=8)
    """The inner size of all shared experts together; left out, each is as large as a routed one."""
    shared_gate: bool = False
    """Whether the shared experts' output is multiplied by a learned sigmoid of the token (Qwen-MoE)."""
    first_layer: int = Field(default=0, ge=0)
    """The number of layers before the first mixture of experts; they have plain MLPs."""
    every: int = Field(default=1, ge=1)
    """The distance from one layer with a mixture of experts to the next; those between have plain MLPs."""
    dense_layers: tuple[int, ...] = ()
    """Further layers with a plain MLP, by number from 0."""
    router_bias: bool = False
    """Whether the router's logits have a learned bias (gpt-oss)."""
    weigh: Literal["output", "input"] = "output"
    """Whether scores multiply an expert's output, or its input (Llama 4)."""
    gating: Literal["softmax", "sigmoid"] = "softmax"
    """The function from logits to scores: over all experts (softmax), or for each expert by itself (sigmoid)."""
    renormalize: bool = True
    """Whether the top_k scores are divided by their sum before they weigh the outputs."""
    routed_scaling: float = Field(default=1.0, gt=0)
    """A factor on the weights of the routed experts' outputs."""
    num_groups: int = Field(default=1, ge=1)
    """The number of groups of equal size that the experts are divided into; 1 for no groups."""
    top_groups: int = Field(default=1, ge=1)
    """The number of groups whose experts a token may use, those with the highest group_score."""
    group_score: Literal["max", "top2"] = "max"
    """The score of a group: the score of its best expert (max) or the sum of its best two (top2)."""
    aux_loss: Literal["sequence", "micro_batch", "global_batch"] = "sequence"
    """The tokens over which the auxiliary loss balances the use of experts."""
    aux_loss_coef: float = Field(default=0.01, ge=0)
    """The factor on the auxiliary loss; 0 turns it off."""
    z_loss_coef: float = Field(default=0.0, ge=0)
    """The factor on the z-loss, which keeps the router's logits small; 0 turns it off."""
    bias_update_rate: float = Field(default=0.0, ge=0)
    """The change of each expert's bias after an optimizer step, upward for under-used experts; 0: no bias."""
    capacity_factor: float | None = Field(default=None, gt=0)
    """The limit of an expert's tokens in training, as a multiple of an even share; left out, no token is dropped."""

    @model_validator(mode="after")
    def _numbers_fit(self) -> "MoEConfig":
        if problem := self._problem():
            raise ValueError(problem)
        return self

    def _problem(self) -> str:
        """Returns a sentence on keys that do not fit together and how to correct them; "" if all fit."""
        experts, groups, top_groups = self.num_experts, self.num_groups, self.top_groups
        if self.weigh == "input" and self.top_k > 1:
            return (
                f"model.moe.weigh = 'input' multiplies the input of one expert a token, and model.moe.top_k = "
                f"{self.top_k}; set model.moe.top_k=1 or model.moe.weigh=output"
            )
        if self.shared_gate and not self.num_shared_experts:
            return "model.moe.shared_gate needs shared experts; set model.moe.num_shared_experts=1 or leave it out"
        if self.shared_ffn_hidden_size and not self.num_shared_experts:
            return (
                "model.moe.shared_ffn_hidden_size needs shared experts; set model.moe.num_shared_experts=1 or leave it "
                "out"
            )
        if experts % groups:
            return (
                f"model.moe.num_experts = {experts} is not a multiple of model.moe.num_groups = {groups}, and groups "
                f"are of equal size; {self._could_be('num_groups', divisors(experts))}"
            )
        if top_groups > groups:
            return (
                f"model.moe.top_groups = {top_groups} is more than model.moe.num_groups = {groups}; set "
                f"model.moe.top_groups={groups} or less"
            )
        reachable = experts // groups * top_groups
        if self.top_k > reachable:
            among = f"the {reachable} of {top_groups} groups" if groups > 1 else f"model.moe.num_experts = {experts}"
            return f"model.moe.top_k = {self.top_k} is more than {among}; set model.moe.top_k={reachable} or less"
        if self.group_score == "top2" and experts // groups < 2:
            return (
                f"model.moe.group_score = 'top2' needs two experts in a group, and {experts} experts in {groups} "
                "groups have one; set model.moe.group_score=max"
            )
        return ""

    def _could_be(self, key: str, tried: Sequence[int]) -> str:
        """Returns a clause that names values of a key that fit the rest, or says that none does."""
        said = could_be(
            f"model.moe.{key}",
            getattr(self, key),
            tried,
            lambda value: not self.model_copy(update={key: value})._problem(),
        )
        return said or f"no other value of model.moe.{key} alone fits the rest, so change more than one key"

    def state(self) -> tuple[str, ...]:
        """Names of the balancing state that is kept from step to step and saved in checkpoints."""
        bias = ("bias",) if self.bias_update_rate else ()
        return (*bias, "load") if self.aux_loss == "global_batch" and self.aux_loss_coef else bias
