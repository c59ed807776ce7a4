"""The MMDiT at full width, two double and four single blocks, against diffusers, same weights.

    python -m tests.benchmarks diffusion

One velocity of a 512x512 image with a context of 81 embeddings (generation) and of 405 (editing).
A whole sampling with classifier-free guidance, the negative context of 512 states as T5's: a
256x256 image in few steps, since twenty at 512x512 would take an hour. The peer's loop is that of
diffusers' `FluxPipeline` with true CFG: two passes a step, its own scheduler. Its weights are views
of ours.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from nexus_min.config import MMDiTConfig
from nexus_min.model import flow
from nexus_min.model.mmdit import MMDiT, context_ids_generation, image_ids, patchify, unpatchify
from nexus_min.sampling import Context, velocity_field

from .common import Row, alternate, core_share, difference, dtypes, name_of, require

CONFIG = MMDiTConfig(depth=2, depth_single_blocks=4)
ROUNDS, STEPS, CFG, GUIDANCE = 2, 3, 3.0, 3.5


# ---- the same weights under both names -----------------------------------------------------------

EMBEDDERS = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
    "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
    "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
    "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
}
DOUBLE = {
    "img_mod.lin": "norm1.linear",
    "txt_mod.lin": "norm1_context.linear",
    "img_attn.qkv": "attn.to_q attn.to_k attn.to_v",
    "txt_attn.qkv": "attn.add_q_proj attn.add_k_proj attn.add_v_proj",
    "img_attn.norm.query_norm": "attn.norm_q",
    "img_attn.norm.key_norm": "attn.norm_k",
    "txt_attn.norm.query_norm": "attn.norm_added_q",
    "txt_attn.norm.key_norm": "attn.norm_added_k",
    "img_attn.proj": "attn.to_out.0",
    "txt_attn.proj": "attn.to_add_out",
    "img_mlp.0": "ff.net.0.proj",
    "img_mlp.2": "ff.net.2",
    "txt_mlp.0": "ff_context.net.0.proj",
    "txt_mlp.2": "ff_context.net.2",
}
SINGLE = {
    "modulation.lin": "norm.linear",
    "linear1": "attn.to_q attn.to_k attn.to_v proj_mlp",
    "linear2": "proj_out",
    "norm.query_norm": "attn.norm_q",
    "norm.key_norm": "attn.norm_k",
}
BLOCKS = {
    "double_blocks": ("transformer_blocks", DOUBLE),
    "single_blocks": ("single_transformer_blocks", SINGLE),
}


def their_names(name: str) -> list[str]:
    """Our module's name -> the peer's; several where ours is one fused matrix."""
    if name in EMBEDDERS:
        return [EMBEDDERS[name]]
    kind, number, rest = name.split(".", 2)
    blocks, table = BLOCKS[kind]
    return [f"{blocks}.{number}.{part}" for part in table[rest].split()]


def their_weights(ours: MMDiT) -> dict[str, Tensor]:
    """Views of our parameters under diffusers' names; the last modulation, whose halves it swaps, a
    copy."""
    width, found = ours.config.hidden_size, {}
    for key, value in ours.state_dict().items():
        name, kind = key.rsplit(".", 1)
        theirs = their_names(name)
        if name == "final_layer.adaLN_modulation.1":
            value = torch.cat(value.chunk(2)[::-1])
        sizes = [width] * (len(theirs) - 1)
        parts = value.split([*sizes, len(value) - sum(sizes)])
        kind = "weight" if kind == "scale" else kind
        found |= {f"{n}.{kind}": part for n, part in zip(theirs, parts, strict=True)}
    return found


def random_model(config: MMDiTConfig, dtype: torch.dtype = torch.float32) -> MMDiT:
    """Ours with random weights that keep activations near one."""
    with torch.device("meta"):
        model = MMDiT(config).to(dtype)
    model = model.to_empty(device="cpu").eval().requires_grad_(False)
    torch.manual_seed(0)
    for name, p in model.named_parameters():
        p.uniform_(0.5, 1.5) if name.endswith("scale") else p.uniform_(-0.03, 0.03)
    return model


def their_model(ours: MMDiT) -> nn.Module:
    """diffusers' transformer on our weights."""
    config = ours.config
    with torch.device("meta"):
        model = require("diffusers").FluxTransformer2DModel(
            in_channels=config.in_channels,
            num_layers=config.depth,
            num_single_layers=config.depth_single_blocks,
            attention_head_dim=config.hidden_size // config.num_heads,
            num_attention_heads=config.num_heads,
            joint_attention_dim=config.context_in_dim,
            pooled_projection_dim=config.vec_in_dim,
            guidance_embeds=True,
            axes_dims_rope=config.axes_dim,
        )
    model.load_state_dict(their_weights(ours), strict=True, assign=True)
    return model.eval().requires_grad_(False)


# ---- what is measured ----------------------------------------------------------------------------


def context(tokens: int, config: MMDiTConfig) -> Context:
    """Random states at position 0."""
    txt, pooled = torch.randn(1, tokens, config.context_in_dim), torch.randn(1, config.vec_in_dim)
    return Context(txt, context_ids_generation(tokens), pooled)


def flop(config: MMDiTConfig, image: int, text: int) -> float:
    """Of one velocity, in the blocks' matrices and in attention."""
    dim, L = config.hidden_size, image + text
    per_token = 2 * (4 + 2 * config.mlp_ratio) * dim**2
    depth = config.depth + config.depth_single_blocks
    return depth * (L * per_token + 4 * L**2 * dim)


def velocity(ours: MMDiT, theirs: nn.Module, side: int, text: int) -> Row:
    """One velocity at side x side latent cells: both get tokens, and time as a tensor."""
    config, conditioning = ours.config, context(text, ours.config)
    dtype = ours.img_in.weight.dtype
    img = torch.randn(1, config.in_channels // 4, side, side)
    img, txt, pooled = (
        patchify(img).to(dtype),
        conditioning.txt.to(dtype),
        conditioning.pooled.to(dtype),
    )
    t, guidance, ids = torch.tensor([0.7]), torch.tensor([GUIDANCE]), image_ids(side, side)
    found: dict[str, Tensor] = {}

    def run_ours() -> None:
        found["ours"] = ours(img, ids, txt, conditioning.txt_ids, t, pooled, guidance)

    def run_theirs() -> None:
        (found["theirs"],) = theirs(
            hidden_states=img,
            encoder_hidden_states=txt,
            pooled_projections=pooled,
            timestep=t,
            img_ids=ids[0],
            txt_ids=conditioning.txt_ids[0],
            guidance=guidance,
            return_dict=False,
        )

    run_ours(), run_theirs()
    times, note = alternate(run_ours, run_theirs, ROUNDS), ""
    if dtype != torch.float32:
        exact = copy.deepcopy(ours).float()
        want = exact(
            img.float(), ids, txt.float(), conditioning.txt_ids, t, pooled.float(), guidance
        )
        off = (f"{difference(found[side], want):.1e}" for side in ("ours", "theirs"))
        note = "off our fp32: ours {}, the peer's {}".format(*off)
    return Row(
        f"MMDiT velocity, {img.shape[1] + text} tokens",
        name_of(dtype),
        "diffusers",
        *times,
        goal=1.1 if dtype == torch.float32 else 1.4,
        error=difference(**found),
        flop=flop(config, img.shape[1], text),
        core=core_share(run_ours),
        note=note,
    )


def sampling(ours: MMDiT, theirs: nn.Module, side: int, steps: int, rounds: int = 1) -> Row:
    """An image from noise with CFG, as `pipeline.NexusGen.denoise_steps` draws it.

    Both models have run before, in `velocity`.
    """
    config, dtype = ours.config, ours.img_in.weight.dtype
    noise = torch.randn(1, config.in_channels // 4, side, side)
    positive, negative = context(81, config), context(512, config)
    sigmas = flow.schedule(steps)
    found: dict[str, Tensor] = {}

    def run_ours() -> None:
        settings = (side, side, GUIDANCE, sigmas[:-1].tolist())
        towards, away = (velocity_field(ours, c, *settings) for c in (positive, negative))

        def guided(x: Tensor, t: Tensor) -> Tensor:
            return flow.cfg(away(x, t), towards(x, t), CFG)

        *_, end = flow.denoise(guided, noise, sigmas)
        found["ours"] = end.x

    def run_theirs() -> None:
        found["theirs"] = their_loop(theirs, noise, sigmas, positive, negative)

    times = alternate(run_ours, run_theirs, rounds)
    image = (side // 2) ** 2
    return Row(
        f"sampling with CFG, {steps} steps, {image} image tokens, contexts of 81 and 512",
        name_of(dtype),
        "diffusers loop",
        *times,
        goal=1.25 if dtype == torch.float32 else 1.6,
        error=difference(**found),
        flop=steps * (flop(config, image, 81) + flop(config, image, 512)),
        note="20 steps at 512x512 do not fit the time",
    )


def their_loop(
    model: nn.Module, noise: Tensor, sigmas: Tensor, positive: Context, negative: Context
) -> Tensor:
    """The denoising loop of `FluxPipeline` with true CFG, on its scheduler, at our noise levels."""
    scheduler = require("diffusers").FlowMatchEulerDiscreteScheduler(shift=1.0)
    scheduler.set_timesteps(sigmas=sigmas[:-1].tolist())
    height, width = noise.shape[-2:]
    dtype = model.x_embedder.weight.dtype
    latents, ids = patchify(noise).to(dtype), image_ids(height, width)[0]
    guidance = torch.tensor([GUIDANCE])

    def predict(conditioning: Context, timestep: Tensor) -> Tensor:
        return model(
            hidden_states=latents,
            timestep=timestep / 1000,
            guidance=guidance,
            pooled_projections=conditioning.pooled.to(dtype),
            encoder_hidden_states=conditioning.txt.to(dtype),
            txt_ids=conditioning.txt_ids[0],
            img_ids=ids,
            return_dict=False,
        )[0]

    for t in scheduler.timesteps:
        timestep = t.expand(len(latents))
        found, away = predict(positive, timestep), predict(negative, timestep)
        found = away + CFG * (found - away)
        latents = scheduler.step(found, t, latents, return_dict=False)[0]
    return unpatchify(latents, height, width)


@torch.no_grad()
def rows() -> Iterator[Row]:
    """Two velocities and a sampling, in each dtype."""
    for dtype in dtypes():
        ours = random_model(CONFIG, dtype)
        theirs = their_model(ours)
        yield velocity(ours, theirs, 64, 81)
        yield velocity(ours, theirs, 64, 405)
        yield sampling(ours, theirs, 32, STEPS)
