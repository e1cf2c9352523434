"""Half precision where it pays: the large matrix products. Everything between them stays in fp32."""

import copy

import torch
from torch import Tensor, nn

from flow_policy_rl.policy import FlowPolicy

DTYPES = {
    "fp16": torch.float16
}  # no bf16: onnxruntime has no such products on a CPU, so nothing could check the file
# Kept in fp32: small, and what they compute (flow time, coefficient of the drift) is what the error grows from.
KEPT = ("from_time", "drift_gain")


class Halved(nn.Module):
    """A linear map or convolution with weights, input and product in half precision, fp32 outside."""

    def __init__(self, module: nn.Module, dtype: torch.dtype):
        super().__init__()
        self.low = copy.deepcopy(module).to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        """fp32 -> fp32."""
        return self.low(x.to(self.low.weight.dtype)).float()


def converted(policy: FlowPolicy, kind: str) -> FlowPolicy:
    """A copy of the policy in fp32 or fp16."""
    policy = copy.deepcopy(policy)
    if kind == "fp32":
        return policy
    for name, module in list(policy.named_modules()):
        if isinstance(module, nn.Linear | nn.Conv2d) and not any(kept in name for kept in KEPT):
            parent, _, leaf = name.rpartition(".")
            setattr(policy.get_submodule(parent), leaf, Halved(module, DTYPES[kind]))
    return policy
