"""Memory profiles: the same image from every one, and only what must be on the device is."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_model import save_tiny

from nexus_min import offload
from nexus_min import parts as parts_module
from nexus_min.config import NexusGenConfig
from nexus_min.model.mmdit import MMDiT
from nexus_min.offload import (
    ACTIVATION_RESERVE,
    FP8,
    FP8Linear,
    Target,
    choose,
    memory_needed,
    modulations,
    to_fp8,
)
from nexus_min.pipeline import NexusGen

OPTIONS = {"num_steps": 3, "cfg_scale": 2.0, "max_new_tokens": 4}
PROFILES = ("resident", "staged", "stream")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("placed"))


@pytest.fixture(scope="module")
def photo():
    return np.random.default_rng(0).integers(0, 256, (90, 70, 3), dtype=np.uint8)


def latents(events) -> torch.Tensor:
    """All latents of a walk."""
    return torch.cat([value.x for name, value in events if name == "step"])


def away(module: torch.nn.Module, home: dict) -> set[str]:
    """Names of the parameters that do not lie where the file was mapped."""
    return {n for n, p in module.named_parameters() if p.data_ptr() != home[n]}


def homes(module: torch.nn.Module) -> dict[str, int]:
    return {n: p.data_ptr() for n, p in module.named_parameters()}


@pytest.mark.parametrize("profile", ["staged", "stream"])
def test_every_profile_gives_the_same(folder, photo, profile):
    plain, placed = NexusGen.load(folder), NexusGen.load(folder, memory=profile)
    for decoder in ("editing", "generation"):
        runs = [m.edit_steps(photo, "red", decoder=decoder, **OPTIONS) for m in (plain, placed)]
        torch.testing.assert_close(*map(latents, runs), atol=1e-5, rtol=0)
    runs = [m.generate_steps("a circle", **OPTIONS) for m in (plain, placed)]
    torch.testing.assert_close(*map(latents, runs), atol=1e-5, rtol=0)
    said = [m.understand(photo, "what?", max_new_tokens=5) for m in (plain, placed)]
    assert said[0] == said[1]


@pytest.mark.parametrize("profile", PROFILES)
def test_files_of_mixed_dtypes_are_cast_as_they_travel(tmp_path, profile):
    folder = save_tiny(tmp_path)
    for file in folder.rglob("*.safetensors"):
        state = load_file(file)
        save_file({k: v.half() if i % 2 else v for i, (k, v) in enumerate(state.items())}, file)
    want = NexusGen.load(folder).generate("a circle", num_steps=1, fast_preamble=True)
    model = NexusGen.load(folder, memory=profile)
    got = model.generate("a circle", num_steps=1, fast_preamble=True)
    assert got.tobytes() == want.tobytes()


@pytest.mark.parametrize("profile", ["staged", "stream"])
def test_one_part_is_there_at_a_time_and_modulations_only_ahead(folder, profile):
    model = NexusGen.load(folder, memory=profile)
    mmdit = model.generation.mmdit
    home = {name: homes(part) for name, part in (("ar", model.ar), ("dit", mmdit))}
    assert not away(model.ar, home["ar"]) and not away(mmdit, home["dit"])
    events = model.generate_steps("a circle", fast_preamble=True, num_steps=3, cfg_scale=1.0)
    for name, _ in events:
        if name == "embeddings":
            assert "lm_head.weight" in away(model.ar, home["ar"])
        if name == "step":
            assert not away(model.ar, home["ar"])
            there = away(mmdit, home["dit"])
            assert "img_in.weight" in there and not any("mod" in n.lower() for n in there)
            block = any("blocks" in n for n in there)
            assert block == (profile == "staged")
    model.offloader.offload_all()
    assert not away(mmdit, home["dit"]) and not away(model.autoencoder, homes(model.autoencoder))


def test_a_stream_holds_two_blocks_at_most(folder, monkeypatch):
    model = NexusGen.load(folder, memory="stream", parts=["ar", "generation", "autoencoder"])
    mmdit, most = model.generation.mmdit, []
    home = homes(mmdit)
    plain = offload.F.linear

    def watching(*args):
        there = {n.split(".")[1] for n in away(mmdit, home) if n.startswith("single_blocks")}
        most.append(len(there))
        return plain(*args)

    monkeypatch.setattr("torch.nn.functional.linear", watching)
    model.generate("a circle", fast_preamble=True, num_steps=2, cfg_scale=1.0)
    assert max(most) == 1  # the next one's copies are not its parameters yet


def test_an_error_inside_a_block_sends_it_home(folder):
    model = NexusGen.load(folder, memory="stream", parts=["generation"])
    mmdit = model.generation.mmdit
    home = homes(mmdit.double_blocks[0])
    with pytest.raises(TypeError):
        mmdit.double_blocks[0](None)
    assert not away(mmdit.double_blocks[0], home)


NO_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has ..."),
    RuntimeError("MPS backend out of memory (MPS allocated: 8.00 GB)"),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 9 bytes"),
    MemoryError(),
    KeyboardInterrupt(),
]


@pytest.mark.parametrize("error", NO_MEMORY, ids=lambda e: str(e)[:8] or type(e).__name__)
@pytest.mark.parametrize("profile", PROFILES)
def test_a_call_that_breaks_off_leaves_the_model_usable(folder, monkeypatch, profile, error):
    """Wherever it breaks off, the next call gives the same latents, bit for bit."""
    model = NexusGen.load(folder, memory=profile, parts=["ar", "generation", "autoencoder"])
    options = {"fast_preamble": True, "num_steps": 2, "cfg_scale": 1.0}
    want = latents(model.generate_steps("a circle", **options))
    plain, count = torch.nn.functional.linear, [0]

    def failing(*args):
        count[0] -= 1
        if count[0] == 0:
            raise error
        return plain(*args)

    monkeypatch.setattr(torch.nn.functional, "linear", failing)
    for at in (3, 40, 75):  # in the AR model, the modulations, the blocks
        count[0] = at
        broken_off = KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else MemoryError
        with pytest.raises(broken_off) as told:
            latents(model.generate_steps("a circle", **options))
        if broken_off is MemoryError:
            smaller = {"resident": "--memory staged", "staged": "--memory stream"}
            assert smaller.get(profile, "try --fp8") in str(told.value)
            assert "resident needs 0.0" in str(told.value) and "\n" not in str(told.value)
    count[0] = 0
    assert torch.equal(latents(model.generate_steps("a circle", **options)), want)


@pytest.mark.parametrize("profile", ["staged", "stream"])
def test_a_copy_that_fails_is_not_taken_for_there(folder, monkeypatch, profile):
    """In bf16, while the weights at home are fp32: what did not arrive would compute otherwise."""
    parts = ["ar", "generation", "autoencoder"]
    model = NexusGen.load(folder, dtype=torch.bfloat16, memory=profile, parts=parts)
    options = {"fast_preamble": True, "num_steps": 2, "cfg_scale": 1.0}
    want, plain, count = latents(model.generate_steps("a circle", **options)), Target.copy, [0]
    model.offloader.offload_all()

    def failing(*args, **more):
        count[0] -= 1
        if count[0] == 0:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return plain(*args, **more)

    monkeypatch.setattr(Target, "copy", failing)
    count[0] = 2
    with pytest.raises(MemoryError, match="CUDA out of memory.; weights alone: resident needs"):
        model.generate("a circle", **options)
    assert torch.equal(latents(model.generate_steps("a circle", **options)), want)


def test_loading_without_memory_tells_what_all_parts_need(folder, monkeypatch):
    read = parts_module.read_part

    def failing(name, folder, config, load_kwargs):
        if name == "editing" and load_kwargs.get("device") != "meta":
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return read(name, folder, config, load_kwargs)

    monkeypatch.setattr(parts_module, "read_part", failing)
    with pytest.raises(
        MemoryError, match="CUDA out of memory.; weights alone.*--memory staged"
    ) as e:
        NexusGen.load(folder)
    parts = {name: read(name, folder, NexusGenConfig.tiny(), {}) for name in parts_module.PARTS}
    assert offload.estimate(memory_needed(parts, torch.float32)) in str(e.value)


# ---- fp8 ---------------------------------------------------------------------------------------


def test_fp8_linear_is_near_and_a_quarter_of_the_size():
    torch.manual_seed(0)
    linear = torch.nn.Linear(256, 128)
    linear.weight.data[3] *= 100  # a row of its own scale
    linear.weight.data[5] = 0
    small, x = FP8Linear(linear), torch.randn(64, 256)
    want, got = linear(x), small(x)
    assert small.weight.dtype == FP8 and small.weight.nbytes * 4 == linear.weight.nbytes
    relative = (got - want).norm(dim=0) / want.norm(dim=0)
    assert 1e-3 < relative.max() < 0.05  # three bits of mantissa: 2^-4 at most a weight
    assert torch.equal(got[:, 5], want[:, 5])


def test_fp8_covers_the_matrices_of_all_blocks_and_no_others():
    mmdit = MMDiT(NexusGenConfig.tiny().mmdit)
    matrices = {n for n, p in mmdit.named_parameters() if "blocks" in n and p.ndim == 2}  # before
    to_fp8(mmdit)
    assert {n for n, p in mmdit.named_parameters() if p.dtype == FP8} == matrices


@pytest.mark.parametrize("profile", PROFILES)
def test_fp8_pictures_are_near_and_the_same_from_every_profile(folder, profile):
    options = {"fast_preamble": True, "num_steps": 3, "cfg_scale": 2.0}
    plain = latents(NexusGen.load(folder).generate_steps("a circle", **options))
    placed = NexusGen.load(folder, memory=profile, fp8=True)
    got = latents(placed.generate_steps("a circle", **options))
    reference = NexusGen.load(folder, memory="resident", fp8=True)
    torch.testing.assert_close(
        got, latents(reference.generate_steps("a circle", **options)), atol=1e-5, rtol=0
    )
    error = (got - plain).norm() / plain.norm()
    assert 1e-5 < error < 0.1


# ---- the choice --------------------------------------------------------------------------------


def test_needs_count_what_each_profile_holds():
    with torch.device("meta"):
        config = NexusGenConfig.v2()
        parts = {"generation": MMDiT(config.mmdit)}
    need = memory_needed(parts, torch.bfloat16)
    assert need["resident"] == 2 * 11_901_408_320
    largest = 2 * (3072 * 6 * 3072 + 6 * 3072)  # bytes of a double block's modulation
    away = sum(p.numel() for m in modulations(parts["generation"]) for p in m.parameters())
    assert away == (19 * 2 * 6 + 38 * 3 + 2) * 3072 * (3072 + 1)  # 3.25 B of 11.90 B
    assert need["staged"] == need["resident"] - 2 * away + 2 * largest  # two on their way
    assert need["staged"] == pytest.approx(17.5e9, rel=0.01) and need["stream"] < 2e9


@pytest.mark.parametrize(
    ("free", "profile"), [(80, "resident"), (24, "staged"), (12, "stream"), (1, "stream")]
)
def test_auto_takes_the_first_that_fits(free, profile):
    wanted = {"resident": 64 << 30, "staged": 17 << 30, "stream": 4 << 30}
    chosen, why = choose(wanted, free << 30)
    assert chosen == profile and "68.7" in why and f"{(free << 30) / 1e9:.1f} GB free" in why
    assert ("none fits" in why) == (free == 1)


def test_auto_leaves_room():
    assert (
        choose({"resident": 10, "staged": 5, "stream": 1}, 10 + ACTIVATION_RESERVE)[0] == "resident"
    )
    assert choose({"resident": 10, "staged": 5, "stream": 1}, 9 + ACTIVATION_RESERVE)[0] == "staged"


def test_an_unknown_profile_is_a_clear_error(folder):
    with pytest.raises(ValueError, match="memory must be one of auto, resident, staged, stream"):
        NexusGen.load(folder, memory="swap")


@pytest.mark.parametrize(
    ("message", "is_memory"),
    [
        ("CUDA out of memory. Tried to allocate", True),
        ("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried", True),
        ("could not create a primitive", True),  # oneDNN without memory for its kernel
        ("could not create a primitive descriptor for a convolution", False),
        ("mat1 and mat2 shapes cannot be multiplied", False),
    ],
)
def test_errors_of_memory_are_recognized(message, is_memory):
    assert offload.is_out_of_memory(RuntimeError(message)) == is_memory
