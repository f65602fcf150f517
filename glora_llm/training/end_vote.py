"""Let all processes know at the same micro batch that one of them was told to end."""

import torch
from torch import distributed as dist


class EndVote:
    """A sum over processes that runs beside a micro batch, between CPUs: neither host nor device waits for it.

    Attributes:
        group: of the processes, over gloo; None for a single one.
        mine: this process's last vote.
        told: the same as a CPU tensor of one number; summed over processes when it is complete.
        work: the collective that sums it.
    """

    def __init__(self) -> None:
        self.group = dist.new_group(backend="gloo") if dist.get_world_size() > 1 else None
        self.mine = False
        self.told = torch.zeros(1, dtype=torch.int32, device="cpu")
        self.work: dist.Work | None = None

    def cast(self, told_to_end: bool) -> None:
        """Say whether this process was told to end; all processes must call it equally often."""
        self.mine = told_to_end
        if self.group is not None:
            self.told.fill_(told_to_end)
            self.work = dist.all_reduce(self.told, group=self.group, async_op=True)

    def outcome(self) -> bool:
        """Tell whether any process was told to end when it voted last."""
        if self.work is None:
            return self.mine
        self.work.wait()
        return bool(self.told)

    def close(self) -> None:
        """Leave the group."""
        if self.group is not None:
            dist.destroy_process_group(self.group)
