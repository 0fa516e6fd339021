"""Models of tests whose answers say something."""

import torch


def with_large_weights(model, factor):
    """The model with matrices ``factor`` times as large, as if it were trained, and norms that are not 1."""
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
            else:
                parameter.mul_(factor)
    return model
