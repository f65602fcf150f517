"""Tell that training diverges while it does: a learning rate that is too high shows in the first steps."""

FACTOR, NATS, IN_A_ROW = 1.5, 2.0, 2  # above FACTOR x the first loss + NATS, so many steps in a row


class LossWatch:
    """Compares each loss with the first one of this launch, and speaks once.

    Args:
        lr: the recipe's training.lr.

    Attributes:
        first: the first finite loss, nats/token; None: there was none.
        high: steps in a row whose loss was far above it.
        is_said: it has been said.
    """

    def __init__(self, lr: float):
        self.lr = lr
        self.first: float | None = None
        self.high = 0
        self.is_said = False

    def look(self, loss: float, skipped: bool, step: int) -> str:
        """Return what is to be said after a step; empty: nothing.

        Args:
            loss: of the step, nats/token.
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
        if self.high < IN_A_ROW:
            return ""
        self.is_said = True
        return (
            f"warning: the loss was {self.first:.2f} at first, and is {loss:.2f} after step {step}: training diverges. "
            f"End it (Ctrl-C), and start again in a new output.dir with a lower training.lr (it is {self.lr:g}; try a "
            "tenth of it), or with a longer training.warmup."
        )
