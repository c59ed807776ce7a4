"""Offloading: which weights are on the device, when the model is larger than its memory.

At full size the autoregressive model has 16.6 GB in bf16 and each decoder 23.9 GB, of which 6.5 GB
(the modulations) depend on (t, guidance, pooled text) alone and work once an image. Profiles:

    resident  every part stays on the device
    staged    one part at a time: AR model, decoder, autoencoder; the modulations are streamed one
              by one before the first step
    stream    as staged, and the part's blocks are streamed too at every step: the next block is
              copied while one computes

Offloaded weights stay on the host, where the loader mapped their files: there is no second copy.
`to_fp8` stores the MMDiT's matrices in 8 bits. Official: DiffSynth's `enable_vram_management`.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .model.autoregressive import NexusGenAR
from .model.mmdit import MMDiT, Modulation
from .model.text_encoders import T5Encoder

PROFILES = ("auto", "resident", "staged", "stream")
ACTIVATION_RESERVE = 3 << 30  # bytes for activations, the KV cache and kernels
FP8 = torch.float8_e4m3fn


class FP8Linear(nn.Module):
    """A Linear whose matrix is stored in float8_e4m3 with one scale a row; it computes in x.dtype.

    y = (x W8^T) * scale + bias, scale = max |row| / 448 (the largest e4m3 number).
    """

    def __init__(self, linear: nn.Linear):
        super().__init__()
        rows = linear.weight.detach().float()
        scale = (rows.abs().amax(1, keepdim=True) / torch.finfo(FP8).max).clamp(min=1e-12)
        scale = scale.bfloat16().float()  # exact in any dtype that it is later cast to
        self.weight = nn.Parameter((rows / scale).to(FP8), requires_grad=False)
        self.scale = nn.Parameter(scale[:, 0], requires_grad=False)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight.to(x.dtype)) * self.scale.to(x.dtype)
        return y if self.bias is None else y + self.bias


def to_fp8(mmdit: MMDiT) -> MMDiT:
    """Replace the matrices of all blocks, one at a time; embedders and last layer stay."""
    for block in blocks(mmdit):
        linears = [(name, m) for name, m in block.named_modules() if isinstance(m, nn.Linear)]
        for name, linear in linears:
            block.set_submodule(name, FP8Linear(linear))
    return mmdit


# ------------------------------------------------------------------------- host <-> device copies


class Target(NamedTuple):
    """The device and dtype that weights work in; 8-bit weights keep their dtype."""

    device: torch.device
    dtype: torch.dtype

    def copy(self, x: Tensor, pinned: bool = False) -> Tensor:
        """A copy of host weights; `pinned` makes the transfer to a GPU asynchronous."""
        dtype = x.dtype if x.dtype == FP8 else self.dtype
        if pinned and self.device.type == "cuda":
            return x.pin_memory().to(self.device, non_blocking=True).to(dtype)
        return x.to(self.device, copy=True).to(dtype)


class OffloadedModule:
    """Parameters that point to copies on the device while they work, else to the host's data."""

    def __init__(self, parameters: Iterable[nn.Parameter], target: Target, streams=()):
        self.host, self.target = [(p, p.data) for p in parameters], target
        self.streams: Sequence[Stream] = streams  # of the modules inside that are streamed

    def copies(self, pinned: bool = False) -> list[Tensor]:
        return [self.target.copy(data, pinned) for _, data in self.host]

    def to_device(self, copies: Sequence[Tensor] = ()) -> None:
        for (p, _), copy in zip(self.host, copies or self.copies(), strict=True):
            p.data = copy

    def to_host(self) -> None:
        for p, data in self.host:
            p.data = data
        for stream in self.streams:
            stream.stop()


class Stream:
    """Modules that are on the device only for their own forward pass.

    A thread copies the next module meanwhile; on a GPU it has a CUDA stream of its own, so that
    the copy overlaps the arithmetic. At most two modules are on the device at once.
    """

    def __init__(self, modules: Sequence[nn.Module], weights: Sequence[OffloadedModule]):
        self.weights, self.device = weights, weights[0].target.device
        self.cuda_stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self.thread = ThreadPoolExecutor(1)
        self.next: tuple[int, Future] | None = None  # number of a module, and its copies
        for i, module in enumerate(modules):
            module.register_forward_pre_hook(partial(self.to_device, i))
            module.register_forward_hook(lambda *_, i=i: weights[i].to_host(), always_call=True)

    def fetch(self, i: int) -> tuple[list[Tensor], Any]:
        """Copies of module i, and the event after which they are complete."""
        with torch.cuda.stream(self.cuda_stream) if self.cuda_stream else nullcontext():
            copies = self.weights[i].copies(pinned=True)
            return copies, self.cuda_stream.record_event() if self.cuda_stream else None

    def to_device(self, i: int, *_) -> None:
        """Use the copies of module i, and start to fetch the next one's."""
        fetched, self.next = self.next, None  # a fetch that failed is not used again
        if fetched is None or fetched[0] != i:
            fetched = i, self.thread.submit(self.fetch, i)
        copies, event = fetched[1].result()
        if event is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_event(event)
            for copy in copies:  # its memory is not reused before the arithmetic has read it
                copy.record_stream(current)
        self.weights[i].to_device(copies)
        i = (i + 1) % len(self.weights)
        self.next = i, self.thread.submit(self.fetch, i)

    def stop(self) -> None:
        """Drop the next module's copies, and those that an interrupted pass has left."""
        if self.next is not None:
            self.next[1].cancel() or self.next[1].exception()
        self.next = None
        for weights in self.weights:
            weights.to_host()


# --------------------------------------------------------------------------------------- profiles


def towers(part: Any) -> list[nn.Module]:
    """The modules of a part: itself, or those among the fields of a tuple."""
    return [m for m in (part if isinstance(part, tuple) else (part,)) if isinstance(m, nn.Module)]


def modulations(tower: nn.Module) -> list[nn.Module]:
    """The layers that depend on (t, guidance, pooled) alone, in the order of their use."""
    if not isinstance(tower, MMDiT):
        return []
    layers = [m for m in tower.modules() if isinstance(m, Modulation)]
    return [tower.final_layer.adaLN_modulation, *layers]


def blocks(tower: nn.Module) -> list[nn.Module]:
    """The repeated blocks of the three large stacks: MMDiT, Qwen decoder, T5."""
    if isinstance(tower, MMDiT):
        return [*tower.double_blocks, *tower.single_blocks]
    if isinstance(tower, NexusGenAR):
        return [*tower.model.layers]
    # all blocks of T5 read the first one's position bias
    return [*tower.encoder.block[1:]] if isinstance(tower, T5Encoder) else []


STREAMED = {"resident": (), "staged": (modulations,), "stream": (modulations, blocks)}


def memory_needed(parts: dict[str, Any], dtype: torch.dtype | None = None) -> dict[str, int]:
    """Bytes on the device under each profile, without activations, in `dtype` or as they are."""

    def size(parameters: Iterable[Tensor]) -> int:
        return sum(
            p.numel() * (FP8 if p.dtype == FP8 else dtype or p.dtype).itemsize for p in parameters
        )

    def needed(part: Any, finds: Sequence[Callable]) -> int:
        streamed = [m for find in finds for tower in towers(part) for m in find(tower)]
        taken = {p for module in streamed for p in module.parameters()}
        rest = (p for tower in towers(part) for p in tower.parameters() if p not in taken)
        return size(rest) + 2 * max((size(m.parameters()) for m in streamed), default=0)

    sizes = {k: [needed(part, finds) for part in parts.values()] for k, finds in STREAMED.items()}
    return {k: sum(v) if k == "resident" else max(v, default=0) for k, v in sizes.items()}


def choose(needed: dict[str, int], free: int | None) -> tuple[str, str]:
    """The first profile that leaves `ACTIVATION_RESERVE` bytes free (else stream), and the reason.

    free: bytes; None on a device that shares the host's memory, where all parts stay resident.
    """
    if free is None:
        size = f"{needed['resident'] / 1e9:.2f} GB of weights"
        return "resident", f"{size}, on a device that shares the host's memory"
    fitting = [name for name, size in needed.items() if size + ACTIVATION_RESERVE <= free]
    free, reserve = (f"{size / 1e9:.1f} GB" for size in (free, ACTIVATION_RESERVE))
    reason = f"{estimate(needed)}; of {free} free, {reserve} kept for activations"
    if not fitting:
        return "stream", f"{reason}; none fits, stream comes nearest"
    return fitting[0], reason


def estimate(needed: dict[str, int]) -> str:
    """What each profile needs, in words."""
    return ", ".join(f"{name} needs {size / 1e9:.3g}" for name, size in needed.items()) + " GB"


class Offloader:
    """Keeps track of which part is on the device: call `onload` before a part works."""

    def __init__(self, memory: str, parts: dict[str, Any], target: Target):
        self.profile, self.reason, self.target = memory, "", target
        if memory == "auto":
            cuda = target.device.type == "cuda"  # other devices share the host's memory
            free = torch.cuda.mem_get_info(target.device)[0] if cuda else None
            self.profile, self.reason = choose(memory_needed(parts, target.dtype), free)
        self.parts = [(part, self._wrap(part)) for part in parts.values()]
        self.current: OffloadedModule | None = None
        if self.profile == "resident":
            for _, module in self.parts:
                module.to_device()
            self.parts = []

    def _wrap(self, part: Any) -> OffloadedModule:
        streams, taken = [], set()
        for find in STREAMED[self.profile]:
            modules = [module for tower in towers(part) for module in find(tower)]
            own = [[p for p in m.parameters() if p not in taken] for m in modules]
            taken.update(p for parameters in own for p in parameters)
            if modules:
                streams.append(Stream(modules, [OffloadedModule(ps, self.target) for ps in own]))
        rest = {p: None for tower in towers(part) for p in tower.parameters() if p not in taken}
        return OffloadedModule(rest, self.target, streams)

    def onload(self, wanted: Any) -> None:
        """Move a part, or the part with this tower, to the device; all others to the host."""
        for part, module in self.parts:
            if module is not self.current and any(wanted is x for x in (part, *towers(part))):
                self.offload_all()
                module.to_device()
                self.current = module

    @contextmanager
    def temporary(self, part: Any) -> Iterator[None]:
        """Within, a part that is not kept is on the device, alone."""
        self.offload_all()
        module = self._wrap(part)
        module.to_device()
        try:
            yield
        finally:
            module.to_host()

    def offload_all(self) -> None:
        """Move the part on the device to the host."""
        if self.current is not None:
            self.current.to_host()
        self.current = None


# ---------------------------------------------------------------------------------- out of memory


def advice(profile: str, needed: dict[str, int]) -> str:
    """What to do when memory ran out under a profile; `needed` as from `memory_needed`."""
    smaller = {"auto": "staged", "resident": "staged", "staged": "stream"}.get(profile)
    remedy = f"the next smaller is {smaller}: --memory {smaller}" if smaller else "try --fp8"
    sizes = f"weights alone: {estimate(needed)}; this was {profile}"
    return f"{sizes}, {remedy}, or a smaller height and width"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on whichever device."""
    # GPU | CPU | oneDNN, when its kernel gets no memory ("... descriptor" would be an unknown case)
    signs = "out of memory|can't allocate memory|could not create a primitive(?! descriptor)"
    found = re.search(signs, str(error), re.I)
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or bool(found)


class OutOfMemory(MemoryError):
    """An error that already says what to do."""


@contextmanager
def explain_oom(advise: Callable[[], str]) -> Iterator[None]:
    """Within, running out of memory is an OutOfMemory of one line that ends in `advise()`."""
    message = None
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, OutOfMemory) or not is_out_of_memory(error):
            raise
        message = str(error).split("\n")[0]
    if message is not None:  # raised above, it would keep alive all that the old error holds
        raise OutOfMemory(f"{message}; {advise()}".lstrip("; "))
