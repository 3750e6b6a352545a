"""Numbers on their way between host and GPU, without waiting: the host goes on while they travel."""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(numbers: Tensor, device: torch.device) -> Tensor:
    """A copy, from memory that the GPU reads by itself; what a stream is given later finds it there."""
    return numbers.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else numbers.to(device)


class Coming:
    """Numbers that come from a device; `read` waits until they are there."""

    def __init__(self, numbers: Tensor):
        self.here, self.done = numbers, None
        if numbers.is_cuda:
            self.here = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
            self.here.copy_(numbers, non_blocking=True)
            self.done = torch.cuda.Event()
            self.done.record()

    def read(self) -> Tensor:
        if self.done is not None:
            self.done.synchronize()
        return self.here
