"""8-bit weights for sampling: the blocks' linear layers in int8 or float8 (kernels/linear8.py).

    model = Transformer.from_pretrained(folder, dtype)                        # on the host
    quantize(model, torch.int8, "cuda")

Adaptive norms keep their dtype: they run once per picture (engine/fast.py).
"""
import torch
from torch import nn

import kernels
from engine.fast import modulation_layers


class QuantizedLinear(nn.Module):
    """A linear layer whose weight is stored in 8 bits with one scale per row."""
    def __init__(self, linear, dtype, device):
        super().__init__()
        self.weight, self.scale = kernels.quantize_rows(linear.weight.to(device), dtype)
        self.bias = None if linear.bias is None else linear.bias.to(device)

    def forward(self, x):
        return kernels.linear8(x, self.weight, self.scale, self.bias)


def quantize(model, dtype, device, host_norms=True):
    """Replace the blocks' linear layers, in place, by QuantizedLinear of `dtype` (torch.int8 or
    torch.float8_e4m3fn) on `device`, layer by layer: the full weights are never all there. With
    `host_norms` the adaptive norms stay where they are. -> model"""
    kept = {norm.linear for norm in modulation_layers(model)}
    for parent in [m for block in model.blocks for m in block.modules()]:
        for name, child in parent.named_children():
            if isinstance(child, nn.Linear) and child not in kept:
                parent.register_module(name, QuantizedLinear(child, dtype, device))
    for module in model.modules():
        if not (host_norms and module in kept):
            for name, value in module.named_parameters(recurse=False):
                moved = nn.Parameter(value.to(device), requires_grad=False)
                module.register_parameter(name, moved)
    return model
