"""Muon: momentum whose matrices are orthogonalised, so that all directions learn at one pace.

    M <- beta M + (1 - beta) G;  W <- (1 - lr wd) W - lr * 0.2 sqrt(max(m, n)) * msign(nesterov M)

msign(M) = U V^T for M = U S V^T, approximated by five Newton-Schulz steps (Keller Jordan, "Muon",
2024); the factor gives updates the size of AdamW's (Moonshot, arXiv 2502.16982). `torch.optim.Muon`
computes the same, but always in bf16, which takes a CPU without bf16 units several times as long as
the model itself (tests/benchmarks/optimizer.py). Here it is fp32, matrices of one shape go through
together, and processes share the work.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby

import torch
import torch.distributed as dist
import torch.distributed.nn.functional  # noqa: F401
from torch import Tensor, nn

# The import above is for its default arguments: each is the process group of the moment. Optimizers
# import it when they first step; were there a group by then, it would outlive its destruction, and
# a thread of it that lets go of a tensor while the interpreter ends aborts the process.

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic that drives singular values towards 1
ITERATIONS = 5


def orthogonalised(matrices: Tensor) -> Tensor:
    """msign of each of [K, m, n], its singular values between about 0.7 and 1.2; fp32.

    A step is X <- P X with P = a + b G + c G^2 and G = X X^T [K, m, m] of the short side m, so that
    G <- P G P: only the first G and the product of all P touch X itself.
    """
    a, b, c = COEFFICIENTS
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = (matrices.mT if tall else matrices).float()
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-7)
    gram, product = x @ x.mT, None
    for left in reversed(range(ITERATIONS)):
        step = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        step.diagonal(dim1=-2, dim2=-1).add_(a)
        product = step if product is None else step @ product
        if left:
            gram = step @ gram @ step
    x = product @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """For parameters [m, n], with AdamW's learning rate; gradients must be equal on all ranks."""

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.01,
    ):
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:
        """One update of every matrix."""
        for group in self.param_groups:
            parameters = sorted(group["params"], key=lambda p: p.shape)  # those of a shape together
            if not parameters:
                continue
            directions = self._directions(parameters, self._momenta(parameters, group["momentum"]))
            torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
            for p, direction in zip(parameters, directions, strict=True):
                p.sub_(direction, alpha=group["lr"] * 0.2 * max(p.shape) ** 0.5)

    def _momenta(self, parameters: list[nn.Parameter], beta: float) -> list[Tensor]:
        """Nesterov's momentum of each parameter."""
        for p in parameters:
            if not self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        kept = [self.state[p]["momentum_buffer"] for p in parameters]
        grads = [p.grad for p in parameters]
        torch._foreach_lerp_(kept, grads, 1 - beta)
        return torch._foreach_lerp(grads, kept, beta)

    def _directions(self, parameters: list[nn.Parameter], momenta: list[Tensor]) -> list[Tensor]:
        """`orthogonalised` of each; a process does every nth, and one exchange hands all round."""
        rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        mine = [
            direction
            for _, alike in groupby(momenta[rank::size], key=lambda m: m.shape)
            for direction in orthogonalised(torch.stack(list(alike)))
        ]
        if size == 1:
            return mine
        shares = [parameters[k::size] for k in range(size)]
        lengths = [sum(p.numel() for p in share) for share in shares]
        flat = momenta[0].new_zeros(max(lengths))
        torch.cat([d.reshape(-1) for d in mine] or [flat[:0]], out=flat[: lengths[rank]])
        parts = [torch.empty_like(flat) for _ in range(size)]
        dist.all_gather(parts, flat)
        directions = [flat] * len(parameters)
        for k, share in enumerate(shares):
            pieces = parts[k][: lengths[k]].split([p.numel() for p in share])
            directions[k::size] = [d.view(p.shape) for d, p in zip(pieces, share, strict=True)]
        return directions
