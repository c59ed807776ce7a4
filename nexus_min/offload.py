"""Where the weights are: all on the device, one part of the model at a time, or a few blocks.

At full size the autoregressive model is 16.6 GB in bf16 and each decoder 23.9 GB, of which 6.5 GB
(the modulations) depend on (t, guidance, pooled text) alone and work once an image. Profiles:

    resident  every part stays on the device
    staged    one part visits at a time: AR model, decoder, autoencoder; the modulations pass
              through one by one, before the first step
    stream    of that part, the blocks pass through too, at every step, the next one on its way
              while one computes

Between visits the weights rest on the host, where the loader mapped their files: no second copy.
`fp8` stores the MMDiT's matrices in 8 bits, on either side. No equation; official counterpart:
DiffSynth's `enable_vram_management`.
"""

from __future__ import annotations

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
ACTIVATION_RESERVE = (
    3 << 30
)  # bytes left for activations, the cache of keys and values, and kernels
FP8 = torch.float8_e4m3fn

# ------------------------------------------------------------------------------------------- fp8


class FP8Linear(nn.Module):
    """A Linear whose matrix is stored in float8_e4m3 with one scale a row; computed as before.

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
    for block in (*mmdit.double_blocks, *mmdit.single_blocks):
        for module in list(block.modules()):
            for name, child in list(module.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(module, name, FP8Linear(child))
    return mmdit


# ---------------------------------------------------------------------------------------- visits


class Target(NamedTuple):
    """Where weights work, and in which type; those stored in 8 bits keep theirs."""

    device: torch.device
    dtype: torch.dtype

    def copy(self, x: Tensor, waiting: bool = True) -> Tensor:
        """A copy of host weights there; on a GPU, if not `waiting`, over pinned memory."""
        dtype = x.dtype if x.dtype == FP8 else self.dtype
        if self.device.type == "cuda" and not waiting:
            return x.pin_memory().to(self.device, non_blocking=True).to(dtype)
        return x.to(self.device, copy=True).to(dtype)


class Weights:
    """Parameters that travel together: copies on the device while at work, else the originals."""

    def __init__(self, parameters: Iterable[nn.Parameter]):
        self.home = [(p, p.data) for p in parameters]

    def copies(self, target: Target, waiting: bool = True) -> list[Tensor]:
        return [target.copy(data, waiting) for _, data in self.home]

    def use(self, copies: Sequence[Tensor]) -> None:
        for (p, _), copy in zip(self.home, copies, strict=True):
            p.data = copy

    def to_host(self) -> None:
        for p, data in self.home:
            p.data = data


class Stream:
    """Modules that visit the device in turn, each for its own forward pass.

    A thread fetches the next one meanwhile; on a GPU over a stream of its own, so that the copy
    overlaps the arithmetic. At most two are there at once.
    """

    def __init__(self, modules: Sequence[nn.Module], weights: Sequence[Weights], target: Target):
        self.weights, self.target = weights, target
        self.side = torch.cuda.Stream(target.device) if target.device.type == "cuda" else None
        self.thread = ThreadPoolExecutor(1)
        self.coming: tuple[int, Future] | None = None
        for i, module in enumerate(modules):
            module.register_forward_pre_hook(partial(self.to_device, i))
            module.register_forward_hook(partial(self.to_host, i), always_call=True)

    def fetch(self, i: int) -> tuple[list[Tensor], Any]:
        """Copies of module i, and the event after which they are whole."""
        with torch.cuda.stream(self.side) if self.side else nullcontext():
            copies = self.weights[i].copies(self.target, waiting=False)
            return copies, self.side.record_event() if self.side else None

    def to_device(self, i: int, *_) -> None:
        coming, self.coming = self.coming, None  # a fetch that fails is not asked for again
        if coming is None or coming[0] != i:
            coming = i, self.thread.submit(self.fetch, i)
        copies, event = coming[1].result()
        if event is not None:
            now = torch.cuda.current_stream(self.target.device)
            now.wait_event(event)
            for copy in copies:  # not to be reused before the arithmetic that reads them is done
                copy.record_stream(now)
        self.weights[i].use(copies)
        following = (i + 1) % len(self.weights)
        self.coming = following, self.thread.submit(self.fetch, following)

    def to_host(self, i: int, *_) -> None:
        self.weights[i].to_host()

    def stop(self) -> None:
        """Drop what is on its way, and what an interrupted pass has left."""
        if self.coming is not None:
            self.coming[1].cancel() or self.coming[1].exception()
        self.coming = None
        for weights in self.weights:
            weights.to_host()


class OffloadedModule:
    """One part of the model, to be brought to a place and sent home; `streams` come and go."""

    def __init__(self, module: nn.Module, target: Target, streams: Sequence[Sequence[nn.Module]]):
        self.target, self.streams = target, []
        taken: set[nn.Parameter] = set()
        for modules in streams:
            own = [[p for p in m.parameters() if p not in taken] for m in modules]
            taken.update(p for parameters in own for p in parameters)
            self.streams.append(Stream(modules, [Weights(ps) for ps in own], target))
        self.rest = Weights(p for p in module.parameters() if p not in taken)

    def to_device(self) -> None:
        self.rest.use(self.rest.copies(self.target))

    def to_host(self) -> None:
        self.rest.to_host()
        for stream in self.streams:
            stream.stop()


# ------------------------------------------------------------------------------------- profiles


def modules_of(part: Any) -> list[nn.Module]:
    """The towers of a part: itself, or those among the fields of a tuple."""
    return [m for m in (part if isinstance(part, tuple) else (part,)) if isinstance(m, nn.Module)]


def modulations(part: Any) -> list[nn.Module]:
    """The layers that depend on (t, guidance, pooled) alone, in the order of their use."""
    found: list[nn.Module] = []
    for mmdit in (m for m in modules_of(part) if isinstance(m, MMDiT)):
        found.append(mmdit.final_layer.adaLN_modulation)
        found += [m for m in mmdit.modules() if isinstance(m, Modulation)]
    return found


def blocks(part: Any) -> list[nn.Module]:
    """The repeated blocks of the three large stacks: MMDiT, Qwen decoder, T5."""
    found: list[nn.Module] = []
    for tower in modules_of(part):
        if isinstance(tower, MMDiT):
            found += [*tower.double_blocks, *tower.single_blocks]
        elif isinstance(tower, NexusGenAR):
            found += tower.model.layers
        elif isinstance(tower, T5Encoder):
            found += tower.encoder.block[1:]  # the first owns the position bias, read ahead of all
    return found


def size(parameters: Iterable[Tensor], dtype: torch.dtype | None = None) -> int:
    """Bytes of parameters, in `dtype` but for those of 8 bits."""
    width = {FP8: 1}
    return sum(p.numel() * width.get(p.dtype, (dtype or p.dtype).itemsize) for p in parameters)


def memory_needed(parts: dict[str, Any], dtype: torch.dtype | None = None) -> dict[str, int]:
    """Bytes on the device under each profile, without activations, in `dtype` or as they are."""

    def of(part: Any, without: Sequence[nn.Module]) -> int:
        away = {p for m in without for p in m.parameters()}
        kept = (p for m in modules_of(part) for p in m.parameters() if p not in away)
        largest = max((size(m.parameters(), dtype) for m in without), default=0)
        return size(kept, dtype) + 2 * largest

    found = list(parts.values())
    return {
        "resident": sum(of(part, ()) for part in found),
        "staged": max((of(part, modulations(part)) for part in found), default=0),
        "stream": max((of(part, modulations(part) + blocks(part)) for part in found), default=0),
    }


def choose(wanted: dict[str, int], free: int | None) -> tuple[str, str]:
    """The first profile that leaves `ACTIVATION_RESERVE` bytes free (else stream), and the reason.

    None free: resident, on a device that shares the host's memory.
    """
    if free is None:
        need = wanted["resident"] / 1e9
        return "resident", f"{need:.2f} GB of weights, on a device that shares the host's memory"
    fits = [name for name, need in wanted.items() if need + ACTIVATION_RESERVE <= free]
    name = fits[0] if fits else "stream"
    rest = f"of {free / 1e9:.1f} GB free, {ACTIVATION_RESERVE / 1e9:.1f} kept for activations"
    rest += "" if fits else "; none fits, stream comes nearest"
    return name, f"{estimate(wanted)}; {rest}"


def estimate(wanted: dict[str, int]) -> str:
    """What each profile needs, in words."""
    told = ", ".join(f"{profile} needs {need / 1e9:.3g}" for profile, need in wanted.items())
    return f"{told} GB"


def advice(profile: str, wanted: dict[str, int]) -> str:
    """What to do when memory ran out under a profile; `wanted` as from `memory_needed`."""
    smaller = {"auto": "staged", "resident": "staged", "staged": "stream"}.get(profile)
    told = f"the next smaller is {smaller}: --memory {smaller}" if smaller else "try --fp8"
    rest = f"weights alone: {estimate(wanted)}; this was {profile}, {told}"
    return f"{rest}, or a smaller height and width"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on whichever device."""
    text = re.search("out of memory|can't allocate memory", str(error), re.I)  # GPU | CPU
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or bool(text)


class OutOfMemory(MemoryError):
    """One that says already what to do."""


@contextmanager
def explain_oom(advise: Callable[[], str]) -> Iterator[None]:
    """Within, running out of memory is an OutOfMemory of one line that ends in `advise()`."""
    told = None
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, OutOfMemory) or not is_out_of_memory(error):
            raise
        told = str(error).split("\n")[0]
    if told is not None:  # here: raised above, it would keep alive all that the old error holds
        raise OutOfMemory(f"{told}; {advise()}".lstrip("; "))


def free_bytes(device: torch.device) -> int | None:
    """Free memory of a GPU; None where the device shares the host's."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None


class Offloader:
    """Keeps track of which part is where. `onload` before a part works; nothing else to do."""

    def __init__(self, profile: str, target: Target, reason: str = ""):
        self.profile, self.target, self.reason = profile, target, reason
        self.parts: list[tuple[Any, OffloadedModule]] = []
        self.current: OffloadedModule | None = None

    @classmethod
    def of(cls, memory: str, parts: dict[str, Any], target: Target) -> Offloader:
        """The profile asked for, or chosen by the device's free memory; with all `parts`."""
        profile, reason = memory, ""
        if memory == "auto":
            profile, reason = choose(memory_needed(parts, target.dtype), free_bytes(target.device))
        self = cls(profile, target, reason)
        for part in parts.values():
            self.add(part)
        return self

    def wrap(self, part: Any) -> OffloadedModule:
        """How a part travels under this profile."""
        streams = {"staged": [modulations(part)], "stream": [modulations(part), blocks(part)]}
        towers = nn.ModuleList(modules_of(part))
        return OffloadedModule(towers, self.target, streams.get(self.profile, ()))

    def add(self, part: Any) -> None:
        """Take charge of a part: it goes to the device now (resident) or when it is brought."""
        wrap = self.wrap(part)
        if self.profile == "resident":
            wrap.to_device()
        else:
            self.parts.append((part, wrap))

    def onload(self, wanted: Any) -> None:
        """Have a part, or the part with this tower, on the device, alone."""
        for part, wrap in self.parts:
            if any(wanted is x for x in (part, *modules_of(part))) and wrap is not self.current:
                self.offload_all()
                wrap.to_device()
                self.current = wrap

    @contextmanager
    def temporary(self, part: Any) -> Iterator[None]:
        """Have a part on the device that is not kept."""
        self.offload_all()
        wrap = self.wrap(part)
        wrap.to_device()
        try:
            yield
        finally:
            wrap.to_host()

    def offload_all(self) -> None:
        """Send home what is on the device."""
        if self.current is not None:
            self.current.to_host()
        self.current = None
