"""The autoregressive half: text and images in; text, or image embeddings read from slots, out.

Prefilled autoregression (Nexus-Gen figure 2b): at the positions of an image to be generated the
input is N learned vectors, in training and in inference alike, so no output is ever fed back and
one causal pass reads the whole image. The hidden state at `vision_start` predicts slot 0; prefill k
predicts slot k + 1. The loss is the paper's equation 3.
Official class: `Qwen2_5_VLForConditionalGeneration` of modelscope/Nexus-Gen.

Positions are (t, h, w). Text has t = h = w; an image that starts at p holds (p, p + row, p +
column) on its merged grid, and what follows continues at p + max(rows, columns). The official
generate loop instead counts every slot of a *generated* image as one text token, so that text after
it sits 72 too far right of where it sat in training (slot positions are right); here inference
follows training.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import ARConfig
from .decoder import KVCache, Packed, QwenDecoder
from .vision import QwenViT

Grid = tuple[int, int, int]


class AROutput(NamedTuple):
    logits: Tensor  # [B, L, vocab]: position i predicts token i + 1
    image_embeddings: Tensor  # [B, L, C]: position i predicts the image embedding at i + 1
    hidden: Tensor  # [B, L, C], final-normed


class ARLoss(NamedTuple):
    loss: Tensor  # 3 ce + 1.5 mse + 1.5 one_minus_cos
    ce: Tensor
    mse: Tensor
    one_minus_cos: Tensor


class NexusGenAR(nn.Module):
    """Vision tower, decoder, and two heads on the decoder's final-normed hidden state."""

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

        Slots (slot_mask [B, L], True) take the learned prefill vectors, numbered from 0 in each
        image; the other image tokens take `image_embeds` [n, C] in reading order. ValueError when
        the number n does not fit.
        """
        x = self.model.embed_tokens(input_ids)
        seen = input_ids == self.config.image_token_id
        if slot_mask is not None:
            prefill = self.image_prefill_embeds(self._slot_numbers(slot_mask))
            x = _put(x, slot_mask, prefill)
            seen = seen & ~slot_mask
        have, need = 0 if image_embeds is None else len(image_embeds), int(seen.sum())
        if have != need:
            raise ValueError(f"{have} image embeddings for {need} image tokens in the text")
        return _put(x, seen, image_embeds) if need else x

    def _slot_numbers(self, slot_mask: Tensor) -> Tensor:
        """Number of each slot within its run of slots, in reading order: [slots]."""
        place = torch.arange(slot_mask.shape[1], device=slot_mask.device).expand_as(slot_mask)
        before = (
            torch.where(slot_mask, -1, place).cummax(dim=1).values
        )  # last token that is no slot
        numbers = (place - before - 1)[slot_mask]
        most = self.config.num_image_slots
        if numbers.numel() and int(numbers.max()) >= most:
            raise ValueError(f"an image of {int(numbers.max()) + 1} slots; the model has {most}")
        return numbers

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


def rope_index(
    input_ids: Tensor,
    image_grid_thw: Tensor | None = None,
    attention_mask: Tensor | None = None,
    *,
    config: ARConfig,
) -> tuple[Tensor, Tensor]:
    """M-RoPE positions [3, B, L], and deltas [B, 1] = next free position - L.

    input_ids [B, L]; image_grid_thw [n, 3] in patches, one row an image in reading order over the
    batch; attention_mask [B, L], 0 or False at padding, which gets position 1. ValueError when the
    image tokens in the text are not those of the grids.

    Every token moves the running position on: text by 1, an image as a whole, at its first token,
    by the longer side of its merged grid. A token starts where the sum up to and with it, less its
    own move, is.
    """
    _check_mask(input_ids, attention_mask)
    keep = torch.ones_like(input_ids) if attention_mask is None else attention_mask.long()
    is_image = (input_ids == config.image_token_id) & (keep > 0)
    where = is_image.flatten().nonzero().squeeze(1)  # index in the flattened batch
    move, size = keep.flatten(), torch.ones_like(keep).flatten()
    L, merge = input_ids.shape[1], config.vision.spatial_merge_size
    moves, sizes, offsets = _image_offsets(where, image_grid_thw, L, merge)
    total = move.index_copy(0, where, moves).view_as(keep).cumsum(1)
    start = total.flatten() - size.index_copy(0, where, sizes)
    positions = start.repeat(3, 1).index_add(1, where, offsets).view(3, *keep.shape)
    if attention_mask is not None:
        positions = positions.masked_fill(keep == 0, 1)
    return positions, total[:, -1:] - L


def _check_mask(input_ids: Tensor, attention_mask: Tensor | None) -> None:
    if input_ids.ndim != 2:
        raise ValueError(f"input_ids {tuple(input_ids.shape)} should be [B, L]")
    if attention_mask is not None and attention_mask.shape != input_ids.shape:
        sizes = tuple(attention_mask.shape), tuple(input_ids.shape)
        raise ValueError(f"attention_mask {sizes[0]} should be as input_ids {sizes[1]}")


def _image_offsets(
    where: Tensor, grid_thw: Tensor | None, L: int, merge: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Of image tokens at `where` [m]: move [m], size of the image [m], offset (t, h, w) [3, m]."""
    grid = where.new_empty(0, 3) if grid_thw is None else grid_thw.to(where)
    if grid.ndim != 2 or grid.shape[1] != 3:
        raise ValueError(f"image_grid_thw {tuple(grid.shape)} should be [images, 3]")
    t, h, w = (grid // grid.new_tensor([1, merge, merge])).unbind(1)
    counts = t * h * w
    if not torch.equal(counts * merge**2, grid.prod(1)) or (counts < 1).any():
        raise ValueError(f"grids {grid.tolist()} should be positive multiples of {merge}")
    if (need := int(counts.sum())) != len(where):
        raise ValueError(
            f"{len(where)} image tokens in the text; the {len(grid)} grids have {need}"
        )
    image = torch.arange(len(grid), device=grid.device).repeat_interleave(counts)
    starts = counts.cumsum(0) - counts
    number = torch.arange(len(where), device=grid.device) - starts[image]
    first, last = where[starts], where[starts + counts - 1]
    if not torch.equal(last - first, counts - 1) or not torch.equal(first // L, last // L):
        raise ValueError(f"the runs of image tokens do not have the sizes of grids {grid.tolist()}")
    size = torch.maximum(h, w)[image]
    columns, rows = number % w[image], number // w[image] % h[image]
    return size * (number == 0), size, torch.stack((torch.zeros_like(rows), rows, columns))


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
    """Loss of the AR model, equation 3: 3 CE + 1.5 MSE + 1.5 (1 - cos); the 1 is the code's.

    input_ids [B, L]; labels [B, L], the token itself where it is to be learned, else -100 (the
    shift by one happens here; labels at slots are ignored); slot_mask [B, L], True at image tokens
    to be generated; image_embeds [n, C], the vision tower's output for all image tokens of the
    batch in reading order, read ones and targets alike. CE is one mean over all labels of the
    batch, MSE and cos over all its slots; a term without any is 0. With right padding
    attention_mask may be None. ValueError when sizes disagree.
    """
    for name, x in (("labels", labels), ("slot_mask", slot_mask)):
        if x is not None and x.shape != input_ids.shape:
            raise ValueError(
                f"{name} {tuple(x.shape)} should be as input_ids {tuple(input_ids.shape)}"
            )
    slots = torch.zeros_like(input_ids, dtype=torch.bool) if slot_mask is None else slot_mask.bool()
    read, targets = _split_embeds(model, input_ids, image_embeds, slots)
    if position_ids is None:
        position_ids, _ = rope_index(input_ids, image_grid_thw, attention_mask, config=model.config)
    labels = labels.masked_fill(slots, -100)
    learned = F.pad((labels != -100)[:, 1:] | slots[:, 1:], (0, 1))  # one before what it predicts
    x = model.embed(input_ids, read, slots)
    hidden = _hidden_where(model, learned, x, position_ids, attention_mask)
    ce = _text_loss(model, hidden, labels)
    mse, one_minus_cos = _image_loss(
        model.vision_head(_take(hidden[:, :-1], slots[:, 1:])), targets
    )
    return ARLoss(3.0 * ce + 1.5 * mse + 1.5 * one_minus_cos, ce, mse, one_minus_cos)


def _split_embeds(
    model: NexusGenAR, input_ids: Tensor, image_embeds: Tensor | None, slots: Tensor
) -> tuple[Tensor, Tensor]:
    """Embeddings [n, C] of all image tokens -> (those that are read, those that are targets)."""
    is_image = input_ids == model.config.image_token_id
    if (slots & ~is_image).any() or slots[:, 0].any():
        raise ValueError("slot_mask marks tokens that are no image tokens, or the first of a row")
    is_target = slots[is_image]
    width = model.config.text.hidden_size
    have = (0, width) if image_embeds is None else tuple(image_embeds.shape)
    if have != (len(is_target), width):
        raise ValueError(f"image_embeds {have} should be {(len(is_target), width)}")
    if image_embeds is None:
        image_embeds = model.vision_head.weight.new_empty(have)
    image_embeds = image_embeds.detach()
    return image_embeds[~is_target], image_embeds[is_target]


def _hidden_where(
    model: NexusGenAR,
    learned: Tensor,
    x: Tensor,
    position_ids: Tensor,
    attention_mask: Tensor | None,
) -> Tensor:
    """Hidden states [B, L, C] that are right where learned [B, L] is True.

    With attention_mask, all of them are. Without, what follows a row's last such place cannot move
    any: the rows are laid one behind the other without it, and so without padding. The top layer
    starts at the first such place of each.
    """
    if attention_mask is not None:
        return model.model(x, position_ids, attention_mask)
    if not learned.any():
        learned = F.pad(learned[:, 1:], (1, 0), value=True)  # other ranks wait in every block
    kept = learned.flip(1).cumsum(1).flip(1) > 0
    wanted = kept & (learned.cumsum(1) > 0)
    lengths, last = (rows.sum(1)[kept[:, 0]].tolist() for rows in (kept, wanted))
    asked = sum(last)
    ends = _missing(asked)
    fill = ends + _missing(sum(lengths) + ends)
    if fill:  # by one more row, which sees itself alone and which nobody reads
        lengths, last = [*lengths, fill], [*last, ends]
    tokens, positions = (
        F.pad(_take(x, kept), (0, 0, 0, fill)),
        F.pad(position_ids[:, kept], (0, fill)),
    )
    packed = Packed(tuple(lengths), tuple(last))
    hidden = model.model(tokens[None], positions[:, None], packed=packed)
    return _put(hidden.new_zeros(x.shape), wanted, hidden[0, :asked])


def _take(x: Tensor, where: Tensor) -> Tensor:
    """Rows [n, C] of x [B, L, C] where [B, L] is True, in reading order.

    By their indices: on a CPU, masks and their gradients take two to five times as long.
    """
    return x.flatten(0, 1).index_select(0, where.flatten().nonzero().squeeze(1))


def _put(x: Tensor, where: Tensor, rows: Tensor) -> Tensor:
    """x [B, L, C] with `rows` [n, C] where [B, L] is True, in reading order."""
    index = where.flatten().nonzero().squeeze(1)
    return x.flatten(0, 1).index_copy(0, index, rows.to(x.dtype)).view_as(x)


def _text_loss(model: NexusGenAR, hidden: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy in fp32; lm_head is evaluated only where the next token has a label."""
    learned = labels[:, 1:] != -100
    rows, wanted = _take(hidden[:, :-1], learned), labels[:, 1:][learned]
    rows = F.pad(rows, (0, 0, 0, _missing(len(rows))))
    logits = model.lm_head(rows)[: len(wanted)].float()
    return F.cross_entropy(logits, wanted, reduction="sum") / max(len(wanted), 1)


def _missing(rows: int) -> int:
    """How many more rows make a size that comes again: of 512 and more, a multiple of 64.

    Else nearly every step has sizes of its own, for which oneDNN compiles kernels and keeps them.
    """
    return -rows % 64 if rows >= 512 else 0


def _image_loss(predicted: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """(MSE, 1 - cos) over slots [n, C] in fp32; zeros when there is none."""
    if not len(target):
        zero = predicted.float().sum()
        return zero, zero
    predicted, target = predicted.float(), target.float()
    cos = F.cosine_similarity(predicted, target, dim=-1, eps=1e-8)
    return F.mse_loss(predicted, target), (1 - cos).mean()


def _slot_positions(start: Tensor, grid: Grid, merge: int) -> Tensor:
    """Positions [3, B, N] of an image on `grid` (patches) whose first token is at start [B, 1]."""
    h, w = grid[1] // merge, grid[2] // merge
    number = torch.arange(h * w, device=start.device)
    return start + torch.stack((torch.zeros_like(number), number // w, number % w))[:, None]


def _prompt(
    model: NexusGenAR,
    input_ids: Tensor,
    image_embeds: Tensor | None,
    image_grid_thw: Tensor | None,
    attention_mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs [B, L, C], positions [3, B, L], and the next free position [B, 1] of a prompt."""
    positions, deltas = rope_index(input_ids, image_grid_thw, attention_mask, config=model.config)
    return model.embed(input_ids, image_embeds), positions, deltas + input_ids.shape[1]


def _slot_inputs(
    model: NexusGenAR, input_ids: Tensor, start: Tensor, slot_grid: Grid | None
) -> tuple[Tensor, Tensor]:
    """Prefill vectors [B, N, C] and positions [3, B, N] of the image that follows the prompt."""
    grid, merge = slot_grid or model.config.slot_grid, model.config.vision.spatial_merge_size
    N, most = grid[1] * grid[2] // merge**2, model.config.num_image_slots
    if not 0 < N <= most:
        raise ValueError(f"grid {grid} has {N} slots; the model has {most}")
    if (input_ids[:, -1] != model.config.vision_start_token_id).any():
        raise ValueError("each row must end with vision_start: pad prompts on the left")
    prefill = model.image_prefill_embeds.weight[:N].expand(len(input_ids), -1, -1)
    return prefill, _slot_positions(start, grid, merge)


def _extend(attention_mask: Tensor | None, length: int) -> Tensor | None:
    """attention_mask [B, L] with `length` visible tokens appended."""
    return None if attention_mask is None else F.pad(attention_mask.long(), (0, length), value=1)


def prefill_image_slots(
    model: NexusGenAR,
    input_ids: Tensor,
    image_embeds: Tensor | None = None,
    image_grid_thw: Tensor | None = None,
    attention_mask: Tensor | None = None,
    slot_grid: Grid | None = None,
) -> Tensor:
    """Embeddings [B, N, C] of the image that the prompts announce, in ONE causal pass.

    input_ids [B, L] end with vision_start (rows of unequal length: padded on the left, with
    attention_mask); image_embeds and image_grid_thw belong to the images *in* the prompts;
    slot_grid (t, h, w) in patches is the new image's, by default the configured square. ValueError
    when a size does not fit.
    """
    embeds, positions, start = _prompt(
        model, input_ids, image_embeds, image_grid_thw, attention_mask
    )
    prefill, slot_positions = _slot_inputs(model, input_ids, start, slot_grid)
    N = prefill.shape[1]
    hidden = model.model(
        torch.cat((embeds, prefill[:, :-1].to(embeds.dtype)), dim=1),
        torch.cat((positions, slot_positions[..., :-1]), dim=2),
        _extend(attention_mask, N - 1),
        last=N,  # from vision_start to the last slot but one; the last would predict vision_end
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
    """The same numbers one slot at a time, as the official loop has them: N passes, not one."""
    embeds, positions, start = _prompt(
        model, input_ids, image_embeds, image_grid_thw, attention_mask
    )
    prefill, slot_positions = _slot_inputs(model, input_ids, start, slot_grid)
    cache, out = KVCache(), []
    for k in range(prefill.shape[1]):
        hidden = model.model(embeds, positions, _extend(attention_mask, k), cache, last=1)
        out.append(model.vision_head(hidden))
        embeds, positions = prefill[:, k : k + 1], slot_positions[:, :, k : k + 1]
    return torch.cat(out, dim=1)


def greedy(logits: Tensor) -> int:
    """The most likely token of logits [vocab]."""
    return int(logits.argmax())


def penalize(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """logits [vocab] of the tokens `seen` [n]: / penalty where positive, else * penalty (CTRL)."""
    x = logits[seen]
    return logits.index_copy(0, seen, torch.where(x > 0, x / penalty, x * penalty))


@torch.no_grad()
def generate(
    model: NexusGenAR,
    input_ids: Tensor,
    image_embeds: Tensor | None = None,
    image_grid_thw: Tensor | None = None,
    max_new_tokens: int = 1024,
    repetition_penalty: float = 1.05,
    sample: Callable[[Tensor], int] = greedy,
    cache: KVCache | None = None,
) -> Iterator[tuple[str, int | Tensor]]:
    """Continue one prompt, yielding ("token", id) and ("image", embeddings [N, C]) as they come.

    input_ids [1, L], which may itself end with vision_start; image_embeds and image_grid_thw as in
    `embed` and `rope_index`. Whenever vision_start comes, one pass over [vision_start, slots] reads
    the image and vision_end is forced; a reply may hold several. Stops at im_end or endoftext,
    which are not yielded, or after max_new_tokens text tokens. The penalty sees the prompt too;
    `sample` maps the penalised logits [vocab] (fp32) to an id. `cache` holds the first tokens of
    the prompt, or none, and is extended: a conversation goes on from it. ValueError for a batch.
    """
    if len(input_ids) != 1:
        raise ValueError(f"generate continues one prompt, not {len(input_ids)}")
    config, cache, ids = model.config, cache or KVCache(), input_ids
    x, positions, start = _prompt(model, ids, image_embeds, image_grid_thw, None)
    x, positions = x[:, cache.length :], positions[:, :, cache.length :]
    for _ in range(max_new_tokens):
        slots = 0
        if ids[0, -1] == config.vision_start_token_id:
            prefill, places = _slot_inputs(model, ids, start, None)
            slots, start = prefill.shape[1], places.amax(dim=(0, 2))[:, None] + 1
            x = torch.cat((x, prefill.to(x.dtype)), dim=1)
            positions = torch.cat((positions, places), dim=2)
        hidden = model.model(x, positions, None, cache, last=slots + 1)
        if slots:
            yield "image", model.vision_head(hidden[0, :-1])
            ids = F.pad(ids, (0, slots), value=config.image_token_id)
            token = config.vision_end_token_id
        else:
            token = sample(_text_logits(model, hidden[0, -1], ids[0], repetition_penalty))
        if token in (config.eos_token_id, config.pad_token_id):
            return
        yield "token", token
        ids = F.pad(ids, (0, 1), value=token)
        x, positions = model.model.embed_tokens(ids[:, -1:]), start.expand(3, 1, 1)
        start = start + 1


def _text_logits(model: NexusGenAR, hidden: Tensor, ids: Tensor, penalty: float) -> Tensor:
    """Penalised fp32 logits [vocab]; tokens that only the image pass may write are ruled out."""
    logits = penalize(model.lm_head(hidden).float(), ids, penalty)
    if not logits.isfinite().all():
        raise ValueError(
            f"what the model says next is not finite: its weights are broken, or {hidden.dtype} is "
            "too narrow for them"
        )
    forbidden = [model.config.vision_end_token_id, model.config.image_token_id]
    return logits.index_fill(0, torch.tensor(forbidden, device=ids.device), -torch.inf)
