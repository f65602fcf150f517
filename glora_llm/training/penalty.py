"""A penalty on trained parameters, by its gradient alone: under ZeRO 3 a parameter is whole only while it is used."""

from collections.abc import Callable, Mapping

from torch import Tensor, nn

GradientOf = Callable[[Tensor], Tensor]


class Penalty:
    """Adds the gradient of a penalty to that of the loss, in the backward pass that `is_due` is set for.

    Args:
        gradients: of the penalty by parameter, a function of the parameter's value.
        loss_scale: returns what the loss is multiplied by (float16).
    """

    is_due: bool

    def __init__(self, gradients: Mapping[nn.Parameter, GradientOf], loss_scale: Callable[[], float] = lambda: 1.0):
        self.is_due, self.loss_scale = False, loss_scale
        for parameter, gradient in gradients.items():
            parameter.register_hook(self._hook(parameter, gradient))

    def _hook(self, parameter: nn.Parameter, gradient: GradientOf) -> Callable[[Tensor], Tensor]:
        def add(dp: Tensor) -> Tensor:
            if not self.is_due:
                return dp
            return dp + (self.loss_scale() * gradient(parameter.detach().float())).to(dp.dtype)

        return add
