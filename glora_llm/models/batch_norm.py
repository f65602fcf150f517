"""Batch norms of a pretrained model keep their running statistics while it is trained."""

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


def keep_statistics(model: nn.Module) -> None:
    """Let every batch norm normalise by its stored statistics, and leave them as they are, also in training.

    An adapter leaves the base as it is, and statistics are part of it: moved by batches of the new task they would be
    in no adapter's file, and differ between processes. The affine weights still learn where they are trained. A hook
    sets the module to evaluation before each forward pass, whatever mode the model is in.
    """
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.register_forward_pre_hook(_evaluate)


def _evaluate(module: nn.Module, _: object) -> None:
    module.training = False
