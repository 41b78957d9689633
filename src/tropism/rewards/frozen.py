"""A reward's network: never trained, and copied to the precision and device of what it is asked to judge."""

from __future__ import annotations

import copy
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn


class Frozen:
    """Holds `module` in eval mode without parameter gradients; gradients still flow through it to its input."""

    def __init__(self, module: nn.Module):
        module = module.eval().requires_grad_(False)
        first = next(chain(module.parameters(), module.buffers()), torch.empty(0))  # some have neither
        self.module = module
        self._copies = {(first.dtype, first.device): module}

    def like(self, x: Tensor) -> Any:
        """The module on x's device, in x's precision and at least float32.

        Copies are kept: moving the module itself would break a graph that is still alive.
        """
        key = (at_least_float32(x), x.device)
        if key not in self._copies:
            self._copies[key] = copy.deepcopy(self.module).to(x.device, key[0])
        return self._copies[key]


def at_least_float32(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
