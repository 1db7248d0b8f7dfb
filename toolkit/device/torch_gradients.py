"""What a mean KLD is pulled by: gradients of stored values' factors, which torch alone has.

N output features, K input features, J blocks a row, B block_size; T tokens, D hidden, V vocab.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

Floats = NDArray[np.float32]
# Positions whose logits are in memory at once.
_POSITIONS: Final = 128


class TunedTensor:
    """Values [N, J, B] times scales [N, J] times factors [N, J], which begin at one and follow gradients; together a
    tensor of a `shape`, [N, K] or [N], whose last blocks may end in padding. It is where its scales are; where these
    are `short`, what comes of them is rounded to bfloat16, and gradients pass that by."""

    def __init__(self, values: NDArray[Any], scales: Any, shape: Sequence[int], short: bool = False) -> None:
        self._short = short
        self._values, self._scales = torch.tensor(values, device=scales.device), scales
        self._shape, self._width = tuple(shape), int(np.prod(shape[1:]))
        self.factors = torch.ones_like(self._scales)
        self._tensor: Any = None

    def tensor(self) -> Any:
        """Returns the tensor as a leaf that collects gradients, the same until they are pulled."""
        if self._tensor is None:
            whole = (self._values * self._product()[..., None]).reshape(self._scales.shape[0], -1)
            self._tensor = whole[:, : self._width].reshape(self._shape).contiguous().requires_grad_()
        return self._tensor

    def pull(self) -> None:
        """Gives the factors the gradient that the tensor collected, and forgets the tensor."""
        collected, self._tensor = self._tensor.grad, None
        if collected is None:
            self.factors.grad = torch.zeros_like(self.factors)
            return
        padding = self._values.shape[1] * self._values.shape[2] - self._width
        padded = torch.nn.functional.pad(collected.reshape(-1, self._width), (0, padding))
        self.factors.grad = (padded.reshape(self._values.shape) * self._values).sum(dim=-1) * self._scales

    def forget(self) -> None:
        """Lets go of the tensor and of what it collected."""
        self._tensor = None

    def scales(self) -> Floats:
        """Returns the scales [N, J] times their factors as they can be stored, in numpy's float32."""
        return np.asarray(self._product().cpu().numpy(), np.float32)

    def _product(self) -> Any:
        product = self._scales * self.factors
        return product.to(torch.bfloat16).to(torch.float32) if self._short else product


class Adam:
    """Moves the factors of many tensors down their gradients (arXiv 1412.6980), a step at a time."""

    def __init__(self, tuned: Sequence[TunedTensor], rate: float) -> None:
        self._tuned, self._rate = tuned, rate
        self._optimizer = torch.optim.Adam([each.factors for each in tuned], lr=rate)

    def step(self, fraction: float) -> None:
        """Pulls what every tensor collected, and moves by a fraction of the rate."""
        for each in self._tuned:
            each.pull()
        for group in self._optimizer.param_groups:
            group["lr"] = self._rate * fraction
        self._optimizer.step()


def divergence(exact: Any, exact_head: Any, hidden: Any, head: Any, weight: float = 0.0) -> float:
    """Returns the sum over positions of KLD(exact || other) of next tokens, for hidden states [T, D] after the final
    norm and heads [V, D]. Unless `weight` is 0, whatever `hidden` and `head` come from collects the gradient of the sum
    times that."""
    seen, total = hidden.detach().requires_grad_(), 0.0
    with torch.set_grad_enabled(weight != 0):
        for start in range(0, hidden.shape[0], _POSITIONS):
            some = slice(start, start + _POSITIONS)
            wanted = torch.log_softmax(exact[some] @ exact_head.T, dim=-1)
            found = torch.log_softmax(seen[some] @ head.T, dim=-1)
            lost = (wanted.exp() * (wanted - found)).sum()
            total += float(lost.detach())
            if weight:
                torch.autograd.backward(lost * weight)
    if weight:
        torch.autograd.backward(hidden, seen.grad)
    return total


def looked_up(table: Any, ids: Sequence[int]) -> Any:
    """Returns rows [T, D] of a table, which collects their gradients."""
    return table[torch.tensor(list(ids), device=table.device)]


def without_gradients() -> Any:
    """Returns a context in which nothing is remembered for gradients."""
    return torch.no_grad()
