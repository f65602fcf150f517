"""Parameters that ZeRO 3 has split over the ranks: reaching another module's, and looking at whole ones.

A parameter that several layers use is registered by one of them; the others must tell DeepSpeed that they read it.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn


def is_partitioned(parameter: Tensor | None) -> bool:
    """Tell whether ZeRO 3 manages this parameter (it may be whole at the moment)."""
    return hasattr(parameter, "ds_id")


def also_reads(module: nn.Module, parameters: Iterable[Tensor]) -> None:
    """Tell DeepSpeed that `module` reads parameters of other modules, so it gathers them before its passes.

    The first forward pass of all gathers them one by one, as they are read. Later passes, the backward pass and a
    checkpoint's recomputation rely on this registration: reading an attribute gathers in DeepSpeed's forward alone,
    and registers only what is not whole at that moment.
    """
    for parameter in parameters:
        if is_partitioned(parameter) and isinstance(parameter, nn.Parameter):
            import deepspeed

            deepspeed.zero.register_external_parameter(module, parameter)


@contextmanager
def whole(parameters: Iterable[Tensor]) -> Iterator[None]:
    """Make parameters whole on every process while the context lasts, for reading; all must enter it together."""
    split = [parameter for parameter in parameters if is_partitioned(parameter)]
    if not split:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(split):
        yield
