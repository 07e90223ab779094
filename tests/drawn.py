"""Models whose every weight tells."""

import torch
from torch import nn


def randomised(model: nn.Module) -> nn.Module:
    """In eval mode, with every parameter random and away from its initial value."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            around = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            parameter.copy_(around + 0.2 * torch.randn(parameter.shape, generator=generator))
    return model.eval()
