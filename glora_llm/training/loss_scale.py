"""The loss scale of float16: DeepSpeed multiplies the loss by it, so that small gradients do not become zero.

It starts at 2^16, halves when gradients overflow (not yet the first time), and doubles after 1000 steps without. A step
that overflows is skipped: that is how the scale is found, and no sign of a bad run.
"""

from typing import Any

STATE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")  # of DeepSpeed's DynamicLossScaler


class LossScale:
    """The scale of one DeepSpeed engine; without float16, or with a fixed scale in its file, there is nothing to adapt.

    Args:
        wrapper: DeepSpeed's optimizer.
    """

    def __init__(self, wrapper: Any):
        scaler = getattr(wrapper, "loss_scaler", None)
        self.scaler: Any = scaler if getattr(scaler, "dynamic", False) else None
        if self.scaler is not None:
            self.scaler.raise_error_at_min_scale = False  # the loop counts bad steps itself, and says what to do

    @property
    def value(self) -> float | None:
        """The factor of the loss; None where nothing adapts it."""
        return None if self.scaler is None else float(self.scaler.cur_scale)

    @property
    def can_fall(self) -> bool:
        """True while a lower scale is left to try after an overflow."""
        return self.scaler is not None and self.scaler.cur_scale > self.scaler.min_scale

    def state_dict(self) -> dict[str, Any]:
        """Return what `load_state_dict` takes, as plain values; {} where nothing adapts."""
        return {} if self.scaler is None else {name: getattr(self.scaler, name) for name in STATE}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on as the scale did whose state this is; {} (a checkpoint of another precision) leaves it at its start."""
        if self.scaler is not None:
            for name, value in state.items():
                setattr(self.scaler, name, value)
