"""Muon for the hidden matrices, AdamW for the rest.

    M <- beta M + (1 - beta) G;  W <- (1 - lr wd) W - lr * 0.2 sqrt(max(m, n)) * msign(nesterov M)

msign(M) = U V^T for M = U S V^T, approximated by five Newton-Schulz steps (Keller Jordan, "Muon",
2024); the factor gives updates the size of AdamW's (Moonshot, arXiv 2502.16982). `torch.optim.Muon`
computes the same, but always in bf16, which takes a CPU without bf16 units several times as long as
the model itself (tests/benchmarks/optimizer.py). Here it is fp32, batched over matrices of a shape.
"""

from collections.abc import Iterable
from itertools import groupby

import torch
from torch import Tensor, nn

from .stage import Stage

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic that drives singular values towards 1
ITERATIONS = 5
BLOCK = 128  # rows of a large matrix that Muon orthogonalizes together


def newton_schulz(matrices: Tensor) -> Tensor:
    """msign of each of [K, m, n], its singular values between about 0.7 and 1.2; fp32.

    A step is X <- P X with P = a + b G + c G^2 and G = X X^T [K, m, m] of the short side m, so that
    G <- P G P: only the first G and the product of all P touch X itself.
    """
    a, b, c = COEFFICIENTS
    x, is_tall = matrices.float(), matrices.shape[-2] > matrices.shape[-1]
    gram, product = x.mT @ x if is_tall else x @ x.mT, None
    square = gram.diagonal(dim1=-2, dim2=-1).sum(-1)[:, None, None].clamp_min(1e-14)  # |X|^2
    gram = gram / square
    for left in reversed(range(ITERATIONS)):
        step = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        step.diagonal(dim1=-2, dim2=-1).add_(a)
        product = step if product is None else step @ product
        if left:
            gram = step @ gram @ step
    product = product * square.rsqrt()
    return x @ product.mT if is_tall else product @ x


class Muon(torch.optim.Optimizer):
    """For parameters [m, n], with AdamW's learning rate."""

    def __init__(self, parameters: Iterable, lr: float, momentum=0.95, weight_decay=0.01):
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:
        """One update of every matrix [m, n]; those of one shape go through together."""
        for group in self.param_groups:
            parameters = sorted(group["params"], key=lambda p: p.shape)
            for p in parameters:
                if not self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
            buffers = [self.state[p]["momentum_buffer"] for p in parameters]
            grads = [p.grad for p in parameters]
            torch._foreach_lerp_(buffers, grads, 1 - group["momentum"])
            nesterov = torch._foreach_lerp(grads, buffers, group["momentum"])
            torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
            updates = (
                update
                for _, same_shape in groupby(nesterov, key=lambda m: m.shape)
                for update in newton_schulz(torch.stack(list(same_shape)))
            )
            for p, update in zip(parameters, updates, strict=True):
                p.sub_(update, alpha=group["lr"] * 0.2 * max(p.shape) ** 0.5)


def make_optimizers(stage: Stage) -> list[torch.optim.Optimizer]:
    """Muon for matrices and convolution kernels; AdamW for vectors and `stage.adamw_only`.

    `flat_gradient` comes first: the views that Muon updates share the gradients it makes.
    """
    matrices, others = [], []
    for name, p in stage.modules.named_parameters():
        if not p.requires_grad:
            continue
        if p.ndim < 2 or any(word in name for word in stage.adamw_only):
            others.append(p)
        else:
            matrices += split_rows(p if p.ndim == 2 else as_matrix(p))
    optimizers: list[torch.optim.Optimizer] = []
    if matrices:
        optimizers.append(Muon(matrices, stage.lr))
    if others:
        lr = stage.adamw_lr or stage.lr
        optimizers.append(
            torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
        )
    return optimizers


def flat_gradient(parameters: list[nn.Parameter]) -> Tensor:
    """One buffer [n] that holds the gradients of all parameters, each laid out as its parameter."""
    sizes = [p.numel() for p in parameters]
    flat = torch.zeros(sum(sizes))
    for p, part in zip(parameters, flat.split(sizes), strict=True):
        p.grad = part.as_strided(p.shape, p.stride())
    return flat


def as_matrix(kernel: nn.Parameter) -> nn.Parameter:
    """A convolution's kernel [O, I, h, w] as a matrix [O, I*h*w] that shares memory and gradient.

    The columns of a kernel in channels_last order are (h, w, I), which is the same to Muon.
    """
    is_channels_last = not kernel.is_contiguous()

    def flat(x: Tensor) -> Tensor:
        return (x.movedim(1, -1) if is_channels_last else x).flatten(1)

    matrix = nn.Parameter(flat(kernel.data))
    matrix.grad = flat(kernel.grad)
    if matrix.data_ptr() != kernel.data_ptr() or matrix.grad.data_ptr() != kernel.grad.data_ptr():
        raise ValueError(f"a kernel of {tuple(kernel.shape)} cannot be viewed as a matrix")
    return matrix


def split_rows(matrix: nn.Parameter) -> list[nn.Parameter]:
    """A matrix [m, n] as blocks of BLOCK rows that share memory and gradient.

    Only if both sides exceed 2 BLOCK: Muon's work grows with the cube of the shorter one.
    """
    if min(matrix.shape) <= 2 * BLOCK:
        return [matrix]
    blocks = []
    for rows, grad in zip(matrix.data.split(BLOCK), matrix.grad.split(BLOCK), strict=True):
        blocks.append(nn.Parameter(rows))
        blocks[-1].grad = grad
    return blocks
