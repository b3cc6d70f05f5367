"""PyTorch modules as oracles: weights away from their initialisation, as arrays, and their outputs beside ours."""

import numpy as np
import torch


def shake(model, seed=0):
    """Weights away from their initialisation, so that no branch is near zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in model.parameters():
            value += 0.1 * torch.randn(value.shape, generator=generator)
    return model.eval()


def arrays(model):
    return {key: value.numpy() for key, value in model.state_dict().items()}


def close(ours, theirs, rtol=1e-4):
    ours, theirs = np.asarray(ours), theirs.detach().numpy()
    theirs = np.moveaxis(theirs, 1, -1) if theirs.ndim == 4 else theirs
    assert ours.shape == theirs.shape
    error = np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)
    assert error <= rtol, error
    return error
