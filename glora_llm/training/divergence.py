"""Tell that training diverges, or learns nothing more: a learning rate that is too high shows in the first steps."""

FACTOR, NATS, IN_A_ROW = 1.5, 2.0, 2  # above FACTOR x the first loss + NATS, so many steps in a row


class LossWatch:
    """Compares each loss with the first one of this launch, and speaks once.

    Args:
        lr: the recipe's training.lr.

    Attributes:
        first: the first finite loss, nats/token; None: there was none.
        high: steps in a row whose loss was far above it.
        dead: steps in a row whose gradient was exactly 0.
        is_said: it has been said.
    """

    def __init__(self, lr: float):
        self.lr = lr
        self.first: float | None = None
        self.high = self.dead = 0
        self.is_said = False

    def look(self, loss: float, grad_norm: float, skipped: bool, step: int) -> str:
        """Return what is to be said after a step; empty: nothing.

        Args:
            loss: of the step, nats/token.
            grad_norm: of the step, before clipping.
            skipped: loss or gradient was not finite.
            step: that is done.
        """
        if self.is_said:
            return ""
        if skipped:
            self.is_said = True
            return f"warning: step {step} is not finite. If that goes on, lower training.lr (it is {self.lr:g})."
        if self.first is None:
            self.first = loss
        self.high = self.high + 1 if loss > FACTOR * self.first + NATS else 0
        self.dead = self.dead + 1 if grad_norm == 0 else 0
        if max(self.high, self.dead) < IN_A_ROW:
            return ""
        self.is_said = True
        said = f"the loss was {self.first:.2f} at first, and is {loss:.2f} after step {step}: training diverges"
        if self.dead:
            said = (
                f"the gradient is exactly 0 in {self.dead} steps in a row up to step {step}: nothing is learnt any more"
            )
        return (
            f"warning: {said}. End it (Ctrl-C), and start again in a new output.dir with a lower training.lr (it is "
            f"{self.lr:g}; try a tenth of it), or with a longer training.warmup."
        )
