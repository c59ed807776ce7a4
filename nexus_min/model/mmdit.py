"""The multimodal diffusion transformer (MMDiT) of FLUX.1-dev: velocity of the image tokens.

v = MMDiT(x_t, context, t, guidance, y): V_theta of the paper's equation 7, the "diffusion
transformer" of both decoders in figure 1 (c, d). In the double blocks two streams with weights of
their own attend jointly. In the single blocks they are one sequence. The vector (t, guidance, y)
acts through shift, scale and gate alone; y is CLIP's pooled text vector.

Official classes: black-forest-labs `Flux`, `DoubleStreamBlock`, `SingleStreamBlock`, `LastLayer`;
the attributes carry their names. Conventions: t in [0, 1], t = 1 is noise. Context tokens ("txt")
come first in the joint sequence. Positions, t and guidance stay fp32 when the weights are bf16. The
official code rounds them to bf16: a guidance of 1000 * 3.5 = 3500 becomes 3504.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..config import MMDiTConfig
from .gradients import join_inputs, normalize, split_outputs
from .rope import FP32, apply_rope_interleaved, flux_rope

PATCH = 2  # latent cells along one side of an image token
EPS = 1e-6  # of every norm in this file
ULP_HIGHER = [13, 44]  # of 128 frequencies: see `timestep_frequencies`


# ---- tokens and their positions ----------------------------------------------------------------


def patchify(latents: Tensor) -> Tensor:
    """Latents [B, C, h, w] -> tokens [B, h/2 * w/2, C*4]."""
    if latents.shape[-2] % PATCH or latents.shape[-1] % PATCH:
        raise ValueError(
            f"latents {tuple(latents.shape)} do not divide into {PATCH} x {PATCH} cells"
        )
    return rearrange(latents, "B C (h p) (w q) -> B (h w) (C p q)", p=PATCH, q=PATCH)


def unpatchify(tokens: Tensor, height: int, width: int) -> Tensor:
    """Inverse of `patchify`: [B, N, C*4] -> latents [B, C, height, width], sizes in cells."""
    h, w = height // PATCH, width // PATCH
    if tokens.shape[1] != h * w:
        raise ValueError(f"{tokens.shape[1]} tokens cannot fill {height} x {width} latent cells")
    return rearrange(tokens, "B (h w) (C p q) -> B C (h p) (w q)", h=h, p=PATCH, q=PATCH)


def image_ids(height: int, width: int) -> Tensor:
    """Positions (0, row, column) of the tokens of a height x width latent: [1, h/2 * w/2, 3]."""
    rows, columns = (torch.arange(side // PATCH, **FP32) for side in (height, width))
    return F.pad(torch.cartesian_prod(rows, columns), (1, 0)).unsqueeze(0)


def context_ids_generation(n: int) -> Tensor:
    """Zeros [1, n, 3]: neither T5 states nor the generation decoder's context have a position."""
    return torch.zeros(1, n, 3, **FP32)


def context_ids_editing(
    target_grid: tuple[int, int, int],
    ref_grid: tuple[int, int, int] | None,
    height: int,
    width: int,
    merge: int = 2,
) -> Tensor:
    """Positions of [target, reference] embeddings, spread over the image: [1, N + M, 3].

    Grids are (t, h, w) in vision patches *before* merging; height and width in latent cells.
    """
    ids = []
    for index, (_, h, w) in enumerate(g for g in (target_grid, ref_grid) if g is not None):
        # row i lies at i * height / h of the latent: target, source and image share one frame
        rows = torch.arange(h // merge, **FP32) * (height / h)
        columns = torch.arange(w // merge, **FP32) * (width / w)
        # the first axis tells them apart: 0 is the target, 1 the source
        ids.append(F.pad(torch.cartesian_prod(rows, columns), (1, 0), value=index))
    return torch.cat(ids).unsqueeze(0)


# ---- the condition vector ----------------------------------------------------------------------


def timestep_frequencies(n: int) -> Tensor:
    """10000^(-k/n), k = 0 .. n - 1: [n], fp32, the same bits on every processor."""
    # fp32 `exp` differs by one ulp between processors; times 1000 t, latents move by up to 5e-5.
    # So: exp in fp64, rounded once; then raise the two that our official reference has higher.
    k = torch.arange(n, dtype=torch.float32, device="cpu")
    freqs = (-math.log(10_000) * k / n).double().exp().float()
    if n == 128:
        high = freqs[ULP_HIGHER]
        freqs[ULP_HIGHER] = torch.nextafter(high, torch.ones_like(high))
    return freqs


def timestep_embedding(t: Tensor, dim: int) -> Tensor:
    """t [B] in [0, 1] (or a guidance scale) -> [cos, sin] sinusoid [B, dim] of 1000 t, fp32."""
    freqs = timestep_frequencies(dim // 2).to(t.device)
    t = 1000 * t.to(torch.promote_types(t.dtype, torch.float32))  # multiply in fp32 or more
    angles = t.float()[:, None] * freqs
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


class MLPEmbedder(nn.Module):
    """Linear, SiLU, Linear: [B, in_dim] -> [B, C]."""

    def __init__(self, in_dim: int, dim: int):
        super().__init__()
        self.in_layer = nn.Linear(in_dim, dim)
        self.out_layer = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.out_layer(F.silu(self.in_layer(x)))


class ModulationOut(NamedTuple):
    """Shift and scale of a normed input, gate of the residual: [B, 1, C] each."""

    shift: Tensor
    scale: Tensor
    gate: Tensor


class Modulation(nn.Module):
    """SiLU(vec) [B, C] -> one `ModulationOut`, or two (attention, MLP) for a double block."""

    def __init__(self, dim: int, double: bool):
        super().__init__()
        self.count = 2 if double else 1
        self.lin = nn.Linear(dim, 3 * self.count * dim)

    def forward(self, cond: Tensor) -> list[ModulationOut]:
        # [B, C] -> [B, 1, 3 or 6 C], in the order shift, scale, gate
        parts = self.lin(cond).unsqueeze(1).chunk(3 * self.count, dim=-1)
        return [ModulationOut(*parts[i : i + 3]) for i in range(0, len(parts), 3)]


class Modulations(NamedTuple):
    """Shifts, scales and gates of all blocks: all that the network sees of (t, guidance, y)."""

    double: list[tuple[list[ModulationOut], list[ModulationOut]]]  # (image, context) of each block
    single: list[ModulationOut]
    final: tuple[Tensor, Tensor]  # shift, scale


def modulated_norm(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """(1 + scale) * LayerNorm(x) + shift; x [B, L, C], shift and scale [B, 1, C]."""
    return torch.addcmul(shift, 1 + scale, F.layer_norm(x, x.shape[-1:], eps=EPS))


# ---- attention ---------------------------------------------------------------------------------


class RMSNormScale(nn.Module):
    """Weight of an RMSNorm over the head dimension; the released files call it `scale`."""

    def __init__(self, dim: int):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(dim))


class QKNorm(nn.Module):
    """Split a fused qkv into heads; RMSNorm of queries and keys, each with a scale of its own."""

    def __init__(self, dim: int):
        super().__init__()
        self.query_norm = RMSNormScale(dim)
        self.key_norm = RMSNormScale(dim)

    def forward(self, qkv: Tensor) -> tuple[Tensor, Tensor]:
        """[B, L, 3*H*D] -> normed queries and keys [B, L, 2, H, D], values [B, L, H, D]."""
        # one RMSNorm over both, since they have one shape
        scale = torch.stack((self.query_norm.scale, self.key_norm.scale)).unsqueeze(1)
        qk, v = qkv.unflatten(-1, (3, -1, scale.shape[-1])).split((2, 1), dim=2)
        return normalize(qk, EPS) * scale, v.squeeze(2)


def attention(qk: Tensor, v: Tensor, rope: tuple[Tensor, Tensor], skip: int = 0) -> Tensor:
    """qk [B, L, 2, H, D], v [B, L, H, D] of the joint sequence -> [B, L - skip, H*D]."""
    cos, sin = (rearrange(r, "B 1 L D -> B L 1 1 D") for r in rope)
    q, k = apply_rope_interleaved(qk, cos, sin).unbind(2)
    q, k, v = (x.transpose(1, 2) for x in (q[:, skip:], k, v))
    return rearrange(F.scaled_dot_product_attention(q, k, v), "B H L D -> B L (H D)")


class SelfAttention(nn.Module):
    """The projections of one stream; the attention itself is joint, in `DoubleStreamBlock`."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.qkv = nn.Linear(dim, 3 * dim)
        self.norm = QKNorm(dim // num_heads)
        self.proj = nn.Linear(dim, dim)


# ---- blocks ------------------------------------------------------------------------------------


def mlp(dim: int, ratio: float) -> nn.Sequential:
    """Linear, tanh-GELU, Linear."""
    hidden = int(dim * ratio)
    return nn.Sequential(
        nn.Linear(dim, hidden), nn.GELU(approximate="tanh"), nn.Linear(hidden, dim)
    )


class DoubleStreamBlock(nn.Module):
    """Joint attention of context and image, each stream with its own norms, projections and MLP."""

    def __init__(self, config: MMDiTConfig):
        super().__init__()
        dim = config.hidden_size
        self.img_mod = Modulation(dim, double=True)
        self.img_attn = SelfAttention(dim, config.num_heads)
        self.img_mlp = mlp(dim, config.mlp_ratio)
        self.txt_mod = Modulation(dim, double=True)
        self.txt_attn = SelfAttention(dim, config.num_heads)
        self.txt_mlp = mlp(dim, config.mlp_ratio)

    def forward(
        self,
        img: Tensor,
        txt: Tensor,
        mods: tuple[list[ModulationOut], list[ModulationOut]],
        rope: tuple[Tensor, Tensor],
    ) -> tuple[Tensor, Tensor]:
        """img [B, N, C], txt [B, L, C] -> both, updated; `mods` are those of (image, context)."""
        (img_mod1, img_mod2), (txt_mod1, txt_mod2) = mods  # 1: attention, 2: MLP
        img_qkv = self.img_attn.qkv(modulated_norm(img, *img_mod1[:2]))
        txt_qkv = self.txt_attn.qkv(modulated_norm(txt, *txt_mod1[:2]))
        (img_qk, img_v), (txt_qk, txt_v) = self.img_attn.norm(img_qkv), self.txt_attn.norm(txt_qkv)
        # the streams meet here: concatenate along L
        joint = attention(torch.cat((txt_qk, img_qk), 1), torch.cat((txt_v, img_v), 1), rope)
        txt_attn, img_attn = joint.split((txt.shape[1], img.shape[1]), dim=1)
        # x + gate * f(x), for the attention and then for the MLP
        img = torch.addcmul(img, img_mod1.gate, self.img_attn.proj(img_attn))
        txt = torch.addcmul(txt, txt_mod1.gate, self.txt_attn.proj(txt_attn))
        img = torch.addcmul(img, img_mod2.gate, self.img_mlp(modulated_norm(img, *img_mod2[:2])))
        txt = torch.addcmul(txt, txt_mod2.gate, self.txt_mlp(modulated_norm(txt, *txt_mod2[:2])))
        return img, txt


class SingleStreamBlock(nn.Module):
    """Attention and MLP side by side on the joint sequence: one Linear in, one out."""

    def __init__(self, config: MMDiTConfig):
        super().__init__()
        dim, hidden = config.hidden_size, int(config.hidden_size * config.mlp_ratio)
        self.widths = (3 * dim, hidden)
        self.linear1 = nn.Linear(dim, 3 * dim + hidden)
        self.linear2 = nn.Linear(dim + hidden, dim)
        self.norm = QKNorm(dim // config.num_heads)
        self.modulation = Modulation(dim, double=False)

    def forward(
        self, x: Tensor, mod: ModulationOut, rope: tuple[Tensor, Tensor], skip: int = 0
    ) -> Tensor:
        """x [B, L, C] (context first) -> [B, L - skip, C]: all but the first `skip` tokens."""
        # attention and MLP read one norm, and share their Linears
        x_norm = modulated_norm(x, *mod[:2])
        qkv, hidden = split_outputs(self.linear1, x_norm, self.widths, skip)
        attn = attention(*self.norm(qkv), rope, skip)
        out = join_inputs(self.linear2, attn, F.gelu(hidden, approximate="tanh"))
        return torch.addcmul(x[:, skip:], mod.gate, out)


class LastLayer(nn.Module):
    """Modulated LayerNorm, then Linear to the token's channels."""

    def __init__(self, dim: int, out_channels: int):
        super().__init__()
        self.linear = nn.Linear(dim, out_channels)
        # [shift; scale] as in FLUX files; `weights` swaps the halves of Nexus-Gen's `.bin` files
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))

    def forward(self, x: Tensor, mod: tuple[Tensor, Tensor]) -> Tensor:
        return self.linear(modulated_norm(x, *mod))


# ---- the network -------------------------------------------------------------------------------


class MMDiT(nn.Module):
    """Velocity of the image tokens; attributes carry the keys of `flux1-dev.safetensors`.

    `forward` = `condition` (one vector) -> `modulations` -> `velocity` (the part to compile). The
    modulations depend on t, guidance and y only. A sampler may compute them for its whole schedule
    beforehand and drop a quarter of the weights. `rope` depends on the sizes only.
    """

    def __init__(self, config: MMDiTConfig):
        super().__init__()
        self.config = config
        dim = config.hidden_size
        self.img_in = nn.Linear(config.in_channels, dim)
        self.txt_in = nn.Linear(config.context_in_dim, dim)
        self.time_in = MLPEmbedder(config.time_embed_dim, dim)
        self.vector_in = MLPEmbedder(config.vec_in_dim, dim)
        self.guidance_in = MLPEmbedder(config.time_embed_dim, dim)
        self.double_blocks = nn.ModuleList(DoubleStreamBlock(config) for _ in range(config.depth))
        self.single_blocks = nn.ModuleList(
            SingleStreamBlock(config) for _ in range(config.depth_single_blocks)
        )
        self.final_layer = LastLayer(dim, config.in_channels)

    def forward(
        self,
        img: Tensor,
        img_ids: Tensor,
        txt: Tensor,
        txt_ids: Tensor,
        timesteps: Tensor,
        y: Tensor,
        guidance: Tensor,
    ) -> Tensor:
        """The velocity noise - data as tokens [B, N, in_channels].

        img [B, N, in_channels]: noisy latents from `patchify`; txt [B, L, context_in_dim]; ids
        [1 or B, N or L, 3]; timesteps [B] in [0, 1]; y [B, vec_in_dim]: pooled CLIP vector;
        guidance [B]: FLUX.1-dev's distilled guidance, 3.5. A batch of one in the last three serves
        the whole batch.
        """
        mods = self.modulations(self.condition(timesteps, y, guidance))
        return self.velocity(img, txt, mods, self.rope(img_ids, txt_ids))

    def rope(self, img_ids: Tensor, txt_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Positions of the joint sequence -> cos, sin [1 or B, 1, L + N, D/2], fp32."""
        batch = max(len(img_ids), len(txt_ids))
        ids = torch.cat([i.float().expand(batch, -1, -1) for i in (txt_ids, img_ids)], dim=1)
        return flux_rope(ids, self.config.axes_dim, self.config.theta)

    def condition(self, timesteps: Tensor, y: Tensor, guidance: Tensor) -> Tensor:
        """vec = time + guidance + pooled text: [B, C]."""
        # the sinusoids are fp32; the embedders compute in the dtype of the weights
        dtype, dim = self.img_in.weight.dtype, self.config.time_embed_dim
        time = self.time_in(timestep_embedding(timesteps, dim).to(dtype))
        strength = self.guidance_in(timestep_embedding(guidance, dim).to(dtype))
        return time + strength + self.vector_in(y.to(dtype))

    def modulations(self, vec: Tensor) -> Modulations:
        """vec [B, C] -> the shifts, scales and gates of every block."""
        cond = F.silu(vec)  # once for all blocks; the final layer has a SiLU of its own
        final = self.final_layer.adaLN_modulation(vec).unsqueeze(1)
        return Modulations(
            [(block.img_mod(cond), block.txt_mod(cond)) for block in self.double_blocks],
            [block.modulation(cond)[0] for block in self.single_blocks],
            final.chunk(2, dim=-1),
        )

    def velocity(
        self, img: Tensor, txt: Tensor, mods: Modulations, rope: tuple[Tensor, Tensor]
    ) -> Tensor:
        """The transformer proper: img [B, N, in_channels], txt [B, L, context_in_dim] -> as img."""
        img, txt = self.img_in(img), self.txt_in(txt)
        for block, mod in zip(self.double_blocks, mods.double, strict=True):
            img, txt = block(img, txt, mod, rope)
        x = torch.cat((txt, img), dim=1)
        for i, (block, mod) in enumerate(zip(self.single_blocks, mods.single, strict=True)):
            # nobody reads the context tokens after the last block
            is_last = i == len(self.single_blocks) - 1
            x = block(x, mod, rope, skip=txt.shape[1] if is_last else 0)
        return self.final_layer(x[:, -img.shape[1] :], mods.final)
