"""The private step: Opacus's fast-clipping optimizer, told what the gradient paths need and nothing derived from data.

p.summed_grad   sum of clipped gradients, filled by a gradient path (fedhead.client.gradients)
+ noise         standard deviation noise_multiplier * max_grad_norm, by Opacus
/ divisor       a declared constant, never a true count
+ pull          mu (p - p_received), FedProx
-> torch        sgd, adam or adamw; weight decay is theirs
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from opacus.optimizers.optimizer import _check_processed_flag, _mark_as_processed
from opacus.optimizers.optimizer_fast_gradient_clipping import DPOptimizerFastGradientClipping
from torch import Tensor, nn
from torch.optim.sgd import sgd

from fedhead.common.config.schema import SGD, AdamW, Optimizer
from fedhead.common.privacy.noise import Noise


def make_optimizer(settings: Optimizer, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """The torch optimizer of a recipe; its learning rate is set for each round."""
    parameters = list(parameters)
    if isinstance(settings, SGD):
        return torch.optim.SGD(
            parameters, lr=0.0, momentum=settings.momentum, weight_decay=settings.weight_decay, foreach=False
        )
    kind = torch.optim.AdamW if isinstance(settings, AdamW) else torch.optim.Adam
    return kind(parameters, lr=0.0, betas=settings.betas, eps=settings.epsilon, weight_decay=settings.weight_decay)


def _is_sgd(optimizer: torch.optim.Optimizer) -> bool:
    return type(optimizer) is torch.optim.SGD and len(optimizer.param_groups) == 1


class PrivateOptimizer(DPOptimizerFastGradientClipping):  # type: ignore[misc]  # Opacus has no types
    """Opacus's optimizer for sums that are clipped already.

    Parameters
    ----------
    optimizer : torch.optim.Optimizer
        What applies the noised gradient.

    Notes
    -----
    Guarantee: each step releases sum + noise, where the noise has standard deviation noise_multiplier * clipping_norm
    in every coordinate of every parameter, an empty batch included. Whoever fills ``p.summed_grad`` answers for one
    record moving it by at most clipping_norm. A sum is used once: a second step without `zero_grad` is an error.
    """

    noise: Noise

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        # Any: Opacus keeps sums and flags as attributes of the parameters
        self._params: list[Any] = [p for group in optimizer.param_groups for p in group["params"]]
        super().__init__(
            optimizer, noise_multiplier=0.0, max_grad_norm=0.0, expected_batch_size=1, loss_reduction="mean"
        )
        self._pull: tuple[float, Sequence[Tensor]] | None = None
        self._divisor: Tensor | None = None
        self._momentum: list[Tensor | None] | None = [None] * len(self._params) if _is_sgd(optimizer) else None

    def step(self, closure: None = None) -> None:
        """Release the sum with noise and apply it."""
        assert closure is None, "a closure would read the records a second time"
        self.pre_step()
        if self._momentum is None:
            self.original_optimizer.step()
            return
        # torch's own function behind SGD.step, without the profiling around it: a fifteenth of a private step
        group = self.original_optimizer.param_groups[0]
        if not group["momentum"] and not group["weight_decay"]:
            rate = -group["lr"]
            for p in self._params:
                p.detach().add_(p.grad, alpha=rate)
            return
        self._descend(group, self._momentum)

    @torch.no_grad()
    def _descend(self, group: dict[str, Any], momentum: list[Tensor | None]) -> None:
        sgd(
            self._params,
            [p.grad for p in self._params],
            momentum,
            foreach=False,
            weight_decay=group["weight_decay"],
            momentum=group["momentum"],
            lr=group["lr"],
            dampening=0.0,
            nesterov=False,
            maximize=False,
        )

    def begin(
        self,
        *,
        noise_multiplier: float,
        clipping_norm: float,
        divisor: float,
        learning_rate: float,
        proximal_mu: float = 0.0,
    ) -> None:
        """Start a round: forget the state of the last one and take what fixes this one.

        Parameters
        ----------
        noise_multiplier : float, > 0
            Noise standard deviation over clipping norm.
        clipping_norm : float, > 0
        divisor : float, > 0
            A declared constant: expected records in a step.
        learning_rate : float, > 0
        proximal_mu : float, >= 0
            Strength of the pull to the parameters as they are now.
        """
        self.noise_multiplier, self.max_grad_norm = noise_multiplier, clipping_norm
        self.expected_batch_size = divisor
        # as a tensor, because a number of Python takes half the time of dividing a small gradient
        self._divisor = torch.tensor(divisor, dtype=self._params[0].dtype)
        self._pull = (proximal_mu, [p.detach().clone() for p in self._params]) if proximal_mu else None
        begin_round(self.original_optimizer, learning_rate)
        if self._momentum is not None:
            self._momentum = [None] * len(self._params)
        self.zero_grad()

    @property
    def params(self) -> list[Any]:
        """The trained parameters; kept, because Opacus asks for them many times a step."""
        return self._params

    def accumulate(self) -> None:
        """Nothing to add up here: the paths did. A step without records releases noise alone."""
        for p in self._params:
            if p.summed_grad is None:
                p.summed_grad = torch.zeros_like(p, requires_grad=False)

    def add_noise(self) -> None:
        """Noise every sum; the source is `self.noise`."""
        for p in self._params:
            _check_processed_flag(p.summed_grad)
            p.grad = self.noise.add(
                p.summed_grad, noise_multiplier=self.noise_multiplier, clipping_norm=self.max_grad_norm
            )
            _mark_as_processed(p.summed_grad)

    def scale_grad(self) -> None:
        """Divide by the declared constant, then add the pull, which no record has a part in."""
        for p in self._params:
            p.grad.div_(self._divisor)
        if self._pull is not None:
            add_pull(self._params, *self._pull)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget sums and gradients."""
        for p in self._params:
            p.summed_grad = None
            p.grad = None


def begin_round(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Forget momentum and moments, and set the learning rate."""
    optimizer.state.clear()
    for group in optimizer.param_groups:
        group["lr"] = learning_rate


def add_pull(parameters: Sequence[nn.Parameter], mu: float, anchor: Sequence[Tensor]) -> None:
    """Add mu (p - anchor) to each gradient (FedProx: Li et al. 2020, arXiv:1812.06127)."""
    for p, received in zip(parameters, anchor, strict=True):
        gradient: Any = p.grad
        gradient.add_(p.detach() - received, alpha=mu)
