"""The arithmetic of a LoRA layer: y = W x + s·B(A(dropout(x))), with s = alpha / r. Knows nothing about which adapter
is active or why.

PEFT makes the layers, holds their weights and writes their files; only their forward pass is ours, because PEFT's own
costs a fifth of a compression and 40 % of a training step on a CPU: it passes three times over every output, keeps each
layer's dropped input for the backward pass, and draws dropout masks one number at a time.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora import Linear
from torch import nn

_LEVELS = 2**16


def keep_mask(x: torch.Tensor, p: float) -> torch.Tensor:
    """0 where dropout zeroes `x`, else 1: uint8 of its shape, zero with probability p (a multiple of 2⁻¹⁶).

    Four entries are taken from each 64-bit draw on a CPU, where drawing is serial. (uint8, since a product with bool is
    four times slower there.)
    """
    if x.device.type != "cpu":
        return torch.empty(x.shape, dtype=torch.uint8, device=x.device).bernoulli_(1 - p)
    draws = torch.empty(math.ceil(x.numel() / 4), dtype=torch.int64).random_(-(2**63), None)
    threshold = round(p * _LEVELS) - _LEVELS // 2
    return (draws.view(torch.int16)[: x.numel()] >= threshold).view(torch.uint8).view(x.shape)


class _LowRankUpdate(torch.autograd.Function):
    """y + s·B(A(x)) with its gradients; of a dropout the mask is kept and not the dropped input."""

    @staticmethod
    def forward(ctx: Any, x: Any, y: Any, a_RD: Any, b_OR: Any, scale: float, keep: Any) -> torch.Tensor:
        """`[..., D]`, `[..., O]` → `[..., O]`; `keep` of x's shape, or None."""
        dropped = x if keep is None else x * keep
        low_TR = dropped.flatten(0, -2) @ a_RD.t()
        ctx.save_for_backward(x, low_TR, a_RD, b_OR, keep)
        ctx.scale = scale
        return torch.addmm(y.flatten(0, -2), low_TR, b_OR.t(), alpha=scale).view_as(y)

    @staticmethod
    def backward(ctx: Any, grad: Any) -> tuple:  # type: ignore[override]
        """Gradients of x, y, A and B, as far as they are needed."""
        x, low_TR, a_RD, b_OR, keep = ctx.saved_tensors
        grad_TO = grad.flatten(0, -2)
        grad_low_TR = (grad_TO @ b_OR).mul_(ctx.scale)
        grad_x = grad_a_RD = grad_b_OR = None
        if ctx.needs_input_grad[0]:
            grad_x = (grad_low_TR @ a_RD).view_as(x)
            if keep is not None:
                grad_x.mul_(keep)
        if ctx.needs_input_grad[2]:
            dropped = x if keep is None else x * keep
            grad_a_RD = grad_low_TR.t() @ dropped.flatten(0, -2)
        if ctx.needs_input_grad[3]:
            grad_b_OR = (grad_TO.t() @ low_TR).mul_(ctx.scale)
        return grad_x, grad, grad_a_RD, grad_b_OR, None, None


def fixed_linear(weight_OD: torch.Tensor, bias_O: torch.Tensor | None) -> Callable[[torch.Tensor], torch.Tensor]:
    """`[..., D]` → `[..., O]` by weights that never change, without gradients.

    A CPU gets them rearranged once for its matrix products: plain weights are rearranged in every call, which takes a
    third to a half of a product with few rows. Bit-equal to the plain product in bfloat16.
    """
    ops = torch.ops.mkldnn
    packs = weight_OD.device.type == "cpu" and torch.backends.mkldnn.is_available()
    packs = packs and hasattr(ops, "_linear_pointwise")
    if weight_OD.dtype == torch.bfloat16:
        packs = packs and ops._is_mkldnn_bf16_supported()
    if not packs or weight_OD.dtype not in (torch.float32, torch.bfloat16):
        return lambda x: F.linear(x, weight_OD, bias_O)
    packed = ops._reorder_linear_weight(weight_OD)
    return lambda x: ops._linear_pointwise(x, packed, bias_O, "none", [], "")


class LoraLinear(Linear):
    """PEFT's LoRA layer over a linear layer, with another forward pass. `merged_products` by adapter name take the
    place of base and update where they are given and no gradient is asked for; the base's weights stay as they are.
    """

    base_layer: Any
    merged_products: dict[str, Callable[[torch.Tensor], torch.Tensor]]

    def forward(self, x: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        """`[..., D]` → `[..., O]` through the base layer and the active adapter, none or one."""
        known = (name for name in self.active_adapters if name in self.lora_A)
        name = None if self.disable_adapters else next(known, None)
        if name in self.merged_products and not torch.is_grad_enabled():
            return self.merged_products[name](x)
        y = self.base_layer(x)
        if name is None:
            return y
        a_RD, b_OR, scale = self._weights(name)
        if not torch.is_grad_enabled():
            y.view(-1, y.shape[-1]).addmm_(x.reshape(-1, x.shape[-1]) @ a_RD.t(), b_OR.t(), alpha=scale)
            return y
        p = round(getattr(self.lora_dropout[name], "p", 0.0) * _LEVELS) / _LEVELS if self.training else 0.0
        return _LowRankUpdate.apply(x, y, a_RD, b_OR, scale / (1 - p), keep_mask(x, p) if p else None)

    def _weights(self, name: str) -> tuple[Any, Any, float]:
        return self.lora_A[name].weight, self.lora_B[name].weight, self.scaling[name]

    def merge_weights(self, name: str) -> None:
        """Keeps W + s·B·A, added in float32 and rounded once to the base's dtype, beside W."""
        a_RD, b_OR, scale = self._weights(name)
        update_OD = b_OR.float() @ a_RD.float() * scale
        base_OD = self.base_layer.weight
        merged_OD = (base_OD.float() + update_OD).to(base_OD.dtype)
        self.merged_products[name] = fixed_linear(merged_OD, self.base_layer.bias)


def use_own_forward(decoder: nn.Module) -> None:
    """Gives every LoRA layer over a plain linear layer the forward pass of this file; quantised ones keep PEFT's."""
    for layer in decoder.modules():
        if type(layer) is Linear:
            layer.__class__ = LoraLinear
            layer.__dict__["merged_products"] = {}
