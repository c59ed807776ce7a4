"""The autoregressive model: text and images in; text, or image embeddings from slots, out.

Prefilled autoregression (figure 2b of Nexus-Gen): at the positions of an image to generate, the
inputs are N learned vectors ("slots"), in training and at inference alike. No output is fed back,
so one causal pass predicts the whole image. The hidden state at `vision_start` predicts slot 0;
slot k predicts slot k + 1. The loss is equation 3 of the paper.

Official class: `Qwen2_5_VLForConditionalGeneration` of modelscope/Nexus-Gen. In training an image
of 9 x 9 slots takes 9 positions. The official generate loop counts 81, so later text sits 72 too
far right. Here inference follows training.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import ARConfig
from .decoder import KVCache, QwenDecoder
from .vision import QwenViT

Grid = tuple[int, int, int]  # (t, h, w) of an image, in patches before merging
IGNORE = -100  # label of a token that is not learned


class AROutput(NamedTuple):
    logits: Tensor  # [B, L, vocab]: position i predicts token i + 1
    image_embeddings: Tensor  # [B, L, C]: position i predicts the image embedding at i + 1
    hidden: Tensor  # [B, L, C]


class ARLoss(NamedTuple):
    loss: Tensor  # 3 ce + 1.5 mse + 1.5 one_minus_cos
    ce: Tensor
    mse: Tensor
    one_minus_cos: Tensor


class NexusGenAR(nn.Module):
    """Vision tower, decoder, and two linear heads (tokens, image embeddings) on its output."""

    def __init__(self, config: ARConfig):
        super().__init__()
        width = config.text.hidden_size
        if config.vision.out_hidden_size != width:
            raise ValueError(f"vision width {config.vision.out_hidden_size} != text width {width}")
        self.config = config
        self.visual = QwenViT(config.vision)
        self.model = QwenDecoder(config.text)
        self.lm_head = nn.Linear(width, config.text.vocab_size, bias=False)
        self.vision_head = nn.Linear(width, width, bias=False)
        self.image_prefill_embeds = nn.Embedding(config.num_image_slots, width)

    def embed(
        self, input_ids: Tensor, image_embeds: Tensor | None = None, slot_mask: Tensor | None = None
    ) -> Tensor:
        """input_ids [B, L] -> decoder inputs [B, L, C].

        Slots (slot_mask [B, L], True) take the learned vectors, numbered from 0 in each image. The
        other image tokens take image_embeds [n, C] in reading order.
        """
        x = self.model.embed_tokens(input_ids)
        is_source = input_ids == self.config.image_token_id
        if slot_mask is not None:
            # number of a slot in its image = distance from the last token that is no slot
            index = torch.arange(slot_mask.shape[1], device=slot_mask.device).expand_as(slot_mask)
            before = torch.where(slot_mask, -1, index).cummax(dim=1).values
            numbers = (index - before - 1)[slot_mask]
            most = self.config.num_image_slots
            if (numbers >= most).any():
                raise ValueError(f"an image of {numbers.max() + 1} slots; the model has {most}")
            x = scatter_rows(x, slot_mask, self.image_prefill_embeds(numbers))
            is_source = is_source & ~slot_mask
        given, needed = 0 if image_embeds is None else len(image_embeds), int(is_source.sum())
        if given != needed:
            raise ValueError(f"{given} image embeddings for {needed} image tokens in the text")
        return scatter_rows(x, is_source, image_embeds) if needed else x

    def forward(
        self,
        input_ids: Tensor,
        image_embeds: Tensor | None = None,
        image_grid_thw: Tensor | None = None,
        attention_mask: Tensor | None = None,
        slot_mask: Tensor | None = None,
    ) -> AROutput:
        """Both heads at every position of input_ids [B, L]; see `embed` and `rope_index`."""
        positions, _ = rope_index(input_ids, image_grid_thw, attention_mask, config=self.config)
        x = self.embed(input_ids, image_embeds, slot_mask)
        hidden = self.model(x, positions, attention_mask)
        return AROutput(self.lm_head(hidden), self.vision_head(hidden), hidden)


def scatter_rows(x: Tensor, where: Tensor, rows: Tensor) -> Tensor:
    """x [B, L, C] with rows [n, C] where [B, L] is True, in reading order."""
    index = where.flatten().nonzero().squeeze(1)  # faster than x[where] = rows, mainly backward
    return x.flatten(0, 1).index_copy(0, index, rows.to(x.dtype)).view_as(x)


# ---- positions ---------------------------------------------------------------------------------


def rope_index(
    input_ids: Tensor,
    image_grid_thw: Tensor | None = None,
    attention_mask: Tensor | None = None,
    *,
    config: ARConfig,
) -> tuple[Tensor, Tensor]:
    """M-RoPE positions [3, B, L] = (t, h, w); deltas [B, 1], official: next free position - L.

    input_ids [B, L]; image_grid_thw [n, 3] in patches, one row for each image in reading order;
    attention_mask [B, L], 0 at padding, which gets position 1.
    """
    keep = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    if input_ids.ndim != 2 or keep.shape != input_ids.shape:
        shapes = f"input_ids {tuple(input_ids.shape)} and attention_mask {tuple(keep.shape)}"
        raise ValueError(f"{shapes} should both be [B, L]")
    grids = [] if image_grid_thw is None else image_grid_thw.tolist()
    image, merge, used = config.image_token_id, config.vision.spatial_merge_size, 0
    positions, deltas = torch.ones((3, *input_ids.shape), dtype=torch.long, device="cpu"), []
    for b, (row, kept) in enumerate(zip(input_ids.tolist(), keep.bool().cpu(), strict=True)):
        ids = [token for token, is_kept in zip(row, kept.tolist(), strict=True) if is_kept]
        found, start = [], 0
        while len(found) < len(ids):
            if ids[len(found)] != image:
                found.append((start, start, start))  # text: t = h = w
                start += 1
                continue
            t, h, w = grids[used] if used < len(grids) else (0, 0, 0)
            used, h, w = used + 1, h // merge, w // merge
            run = ids[len(found) : len(found) + t * h * w]
            if not run or run != [image] * (t * h * w):
                raise ValueError(
                    f"the image tokens of row {b} do not fit image_grid_thw {grids}, one (t, h, w) "
                    f"for each image: image {used} should have {t * h * w} tokens"
                )
            # image at p: (p, p + row, p + column), same in each frame; next token: max + 1
            found += [(start, start + i, start + j) for i in range(h) for j in range(w)] * t
            start += max(h, w)
        positions[:, b, kept] = positions.new_tensor(found).view(-1, 3).T
        deltas.append([start - len(row)])
    if used != len(grids):
        raise ValueError(f"{len(grids)} grids for {used} images in the text: {grids}")
    return positions.to(input_ids.device), torch.tensor(deltas, device=input_ids.device)


# ---- loss --------------------------------------------------------------------------------------


def ar_loss(
    model: NexusGenAR,
    input_ids: Tensor,
    labels: Tensor,
    attention_mask: Tensor | None = None,
    image_grid_thw: Tensor | None = None,
    image_embeds: Tensor | None = None,
    slot_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
) -> ARLoss:
    """Equation 3: 3 CE + 1.5 MSE + 1.5 (1 - cos); "1 -" follows the official code.

    labels [B, L]: the token where it is learned, else IGNORE; slot_mask [B, L]: True at image
    tokens to generate; image_embeds [n, C]: of all image tokens in reading order, sources and
    targets alike. Right padding needs no attention_mask. `packing.packed_ar_loss` is faster.
    """
    x, labels, slots, targets = loss_inputs(model, input_ids, labels, image_embeds, slot_mask)
    if position_ids is None:
        position_ids, _ = rope_index(input_ids, image_grid_thw, attention_mask, config=model.config)
    hidden = model.model(x, position_ids, attention_mask)
    hidden, labels, slots = hidden[:, :-1], labels[:, 1:], slots[:, 1:]  # the shift by one
    logits = model.lm_head(hidden[labels != IGNORE])
    return loss_terms(logits, labels[labels != IGNORE], model.vision_head(hidden[slots]), targets)


def loss_inputs(
    model: NexusGenAR,
    input_ids: Tensor,
    labels: Tensor,
    image_embeds: Tensor | None,
    slot_mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Decoder inputs [B, L, C], labels and slots [B, L], target embeddings [m, C]."""
    slots = torch.zeros_like(input_ids, dtype=torch.bool) if slot_mask is None else slot_mask.bool()
    is_image = input_ids == model.config.image_token_id
    if (slots & ~is_image).any() or slots[:, 0].any():
        raise ValueError("slot_mask marks tokens that are no image tokens, or the first of a row")
    is_target, width = slots[is_image], model.config.text.hidden_size
    given = (0, width) if image_embeds is None else tuple(image_embeds.shape)
    if given != (len(is_target), width):
        raise ValueError(f"image_embeds {given} should be {(len(is_target), width)}")
    if image_embeds is None:
        image_embeds = model.vision_head.weight.new_empty(given)
    image_embeds = image_embeds.detach()  # the vision tower is frozen
    x = model.embed(input_ids, image_embeds[~is_target], slots)
    return x, labels.masked_fill(slots, IGNORE), slots, image_embeds[is_target]


def loss_terms(logits: Tensor, labels: Tensor, predicted: Tensor, targets: Tensor) -> ARLoss:
    """logits [n, vocab], labels [n], predicted and target embeddings [m, C] -> the loss, fp32."""
    # without labels or slots a term is an empty sum: 0, but with a gradient, so backward() works
    ce = F.cross_entropy(logits.float(), labels, reduction="sum") / max(len(labels), 1)
    predicted, targets = predicted.float(), targets.float()
    mse = one_minus_cos = predicted.sum()
    if len(targets):
        cos = F.cosine_similarity(predicted, targets, dim=-1, eps=1e-8)
        mse, one_minus_cos = F.mse_loss(predicted, targets), (1 - cos).mean()
    return ARLoss(3.0 * ce + 1.5 * mse + 1.5 * one_minus_cos, ce, mse, one_minus_cos)


# ---- image slots -------------------------------------------------------------------------------


def slot_inputs(
    model: NexusGenAR, input_ids: Tensor, start: Tensor, slot_grid: Grid | None = None
) -> tuple[Tensor, Tensor]:
    """Slot vectors [B, N, C] and positions [3, B, N] of an image after `vision_start`.

    start [B, 1]: the next free position; slot_grid: by default the configured square.
    """
    grid, merge = slot_grid or model.config.slot_grid, model.config.vision.spatial_merge_size
    h, w = grid[1] // merge, grid[2] // merge  # patches -> embeddings
    N, most = h * w, model.config.num_image_slots
    if not 0 < N <= most:
        raise ValueError(f"grid {grid} has {N} slots; the model has {most}")
    if (input_ids[:, -1] != model.config.vision_start_token_id).any():
        raise ValueError("each row must end with vision_start: pad prompts on the left")
    prefill = model.image_prefill_embeds.weight[:N].expand(len(input_ids), -1, -1)
    number = torch.arange(N, device=start.device)
    offsets = torch.stack((torch.zeros_like(number), number // w, number % w))  # (t, h, w)
    return prefill, start + offsets[:, None]  # [B, 1] + [3, 1, N]


def prefill_image_slots(
    model: NexusGenAR,
    input_ids: Tensor,
    image_embeds: Tensor | None = None,
    image_grid_thw: Tensor | None = None,
    attention_mask: Tensor | None = None,
    slot_grid: Grid | None = None,
) -> Tensor:
    """Embeddings [B, N, C] of the images that begin after the prompts, in ONE causal pass.

    input_ids [B, L] end with vision_start; shorter rows are padded on the left, with
    attention_mask. image_embeds and image_grid_thw belong to the images *in* the prompts.
    """
    positions, deltas = rope_index(input_ids, image_grid_thw, attention_mask, config=model.config)
    x, start = model.embed(input_ids, image_embeds), deltas + input_ids.shape[1]
    prefill, slot_positions = slot_inputs(model, input_ids, start, slot_grid)
    N = prefill.shape[1]
    # [prompt ... vision_start, slot 0 ... slot N-2]: the last slot would predict vision_end
    hidden = model.model(
        torch.cat((x, prefill[:, :-1].to(x.dtype)), dim=1),
        torch.cat((positions, slot_positions[..., :-1]), dim=2),
        extend_mask(attention_mask, N - 1),
        num_outputs=N,
    )
    return model.vision_head(hidden)


def prefill_image_slots_loop(
    model: NexusGenAR,
    input_ids: Tensor,
    image_embeds: Tensor | None = None,
    image_grid_thw: Tensor | None = None,
    attention_mask: Tensor | None = None,
    slot_grid: Grid | None = None,
) -> Tensor:
    """The same numbers slot by slot, like the official loop: N passes instead of one."""
    positions, deltas = rope_index(input_ids, image_grid_thw, attention_mask, config=model.config)
    x, start = model.embed(input_ids, image_embeds), deltas + input_ids.shape[1]
    prefill, slot_positions = slot_inputs(model, input_ids, start, slot_grid)
    cache, out = KVCache(), []
    for k in range(prefill.shape[1]):  # the prompt predicts slot 0, slot k predicts slot k + 1
        mask = extend_mask(attention_mask, k)
        out.append(model.vision_head(model.model(x, positions, mask, cache, num_outputs=1)))
        x, positions = prefill[:, k : k + 1], slot_positions[:, :, k : k + 1]
    return torch.cat(out, dim=1)


def extend_mask(attention_mask: Tensor | None, length: int) -> Tensor | None:
    """attention_mask [B, L] with `length` visible tokens appended."""
    return None if attention_mask is None else F.pad(attention_mask.long(), (0, length), value=1)


# ---- text --------------------------------------------------------------------------------------


def penalize(logits: Tensor, ids: Tensor, penalty: float) -> Tensor:
    """Repetition penalty (CTRL): logits [vocab] of `ids` / penalty if positive, else * penalty."""
    x = logits[ids]
    return logits.index_copy(0, ids, torch.where(x > 0, x / penalty, x * penalty))


@torch.no_grad()
def generate(
    model: NexusGenAR,
    input_ids: Tensor,
    image_embeds: Tensor | None = None,
    image_grid_thw: Tensor | None = None,
    max_new_tokens: int = 1024,
    repetition_penalty: float = 1.05,
    sample: Callable[[Tensor], int | Tensor] = torch.argmax,
    cache: KVCache | None = None,
) -> Iterator[tuple[str, int | Tensor]]:
    """Continue one prompt [1, L]; yield ("token", id) and ("image", embeddings [N, C]).

    At every vision_start one pass predicts an image and vision_end is forced. Stops at im_end or
    endoftext, or after max_new_tokens text tokens. The penalty sees the prompt too. sample:
    penalized fp32 logits [vocab] -> id. cache: holds the first tokens of the prompt, and is
    extended, so that a conversation can continue.
    """
    if len(input_ids) != 1:
        raise ValueError(f"generate continues one prompt, not {len(input_ids)}")
    config, cache, ids = model.config, cache or KVCache(), input_ids
    # never sampled: the code appends these two itself after an image
    banned = torch.tensor([config.vision_end_token_id, config.image_token_id], device=ids.device)
    positions, deltas = rope_index(ids, image_grid_thw, config=config)
    x, start = model.embed(ids, image_embeds), deltas + ids.shape[1]
    x, positions = x[:, cache.length :], positions[:, :, cache.length :]  # the rest is cached
    for _ in range(max_new_tokens):
        num_slots = 0
        if ids[0, -1] == config.vision_start_token_id:
            prefill, slot_positions = slot_inputs(model, ids, start)
            num_slots, start = prefill.shape[1], slot_positions.amax(dim=(0, 2))[:, None] + 1
            # the image goes through the decoder together with vision_start: [1, 1 + N, C]
            x = torch.cat((x, prefill.to(x.dtype)), dim=1)
            positions = torch.cat((positions, slot_positions), dim=2)
        hidden = model.model(x, positions, None, cache, num_outputs=num_slots + 1)
        if num_slots:
            yield "image", model.vision_head(hidden[0, :-1])
            ids = F.pad(ids, (0, num_slots), value=config.image_token_id)
            token = config.vision_end_token_id
        else:
            logits = penalize(model.lm_head(hidden[0, -1]).float(), ids[0], repetition_penalty)
            if not logits.isfinite().all():
                why = f"its weights are broken, or {hidden.dtype} is too narrow for them"
                raise ValueError(f"logits are NaN or infinite: {why}")
            token = int(sample(logits.index_fill(0, banned, -torch.inf)))
        if token in (config.eos_token_id, config.pad_token_id):
            return
        yield "token", token
        ids = F.pad(ids, (0, 1), value=token)
        x, positions = model.model.embed_tokens(ids[:, -1:]), start.expand(3, 1, 1)
        start = start + 1
