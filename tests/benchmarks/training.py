"""A training step of the AR model on a multi-task batch: loss, gradients, AdamW; time and memory.

Peer: transformers' Qwen2.5-VL on the same weights and the same loss (the paper's equation 3),
written as its users write it: logits at every position, and the image terms from the hidden states
it returns. Every run is a process of its own, ours and the peer's in turn, so that the peak of
resident memory is each one's; what the imports take is not counted. The vision tower is frozen and
its output given.

    python -m tests.benchmarks.training ours "150 M"      one run: seconds, bytes, loss, gradient
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F

from nexus_min.model.autoregressive import NexusGenAR, rope_index
from nexus_min.model.packing import packed_ar_loss

from .common import Row, clock, peak_rss
from .peers import ar_config, our_ar, their_ar

ROUNDS = 2  # processes a side
STEPS = {"tiny": 15, "150 M": 3}  # in each, after one that is not counted
# (task, tokens of text before, tokens of the reply): questions, images, edits as 1 : 2 : 1
TASKS = {
    "tiny": [("und", 20, 12)] * 4 + [("gen", 30, 12)] * 8 + [("edit", 26, 12)] * 4,
    "150 M": [("und", 24, 60)] + [("gen", 40, 12), ("gen", 120, 12)] + [("edit", 40, 14)],
}


def batch(size: str, model: NexusGenAR) -> dict[str, torch.Tensor]:
    """Right-padded rows as `data.collate` makes them; the ids and embeddings are noise."""
    config, draw = model.config, torch.Generator().manual_seed(2)
    target, source = config.num_image_slots, 4 * config.num_image_slots
    rows, grids = [], []
    for task, before, after in TASKS[size]:
        text = torch.randint(4, config.text.vocab_size // 2, (before + after,), generator=draw)
        source_tokens = {"und": target, "gen": 0, "edit": source}[task]
        target_tokens = 0 if task == "und" else target
        image = [torch.full((n,), config.image_token_id) for n in (source_tokens, target_tokens)]
        ids = torch.cat((text[:4], image[0], text[4:], image[1], text[-2:]))
        reply = torch.arange(len(ids)) >= 4 + source_tokens + before
        grids += [grid(config, n) for n in (source_tokens, target_tokens) if n]
        rows.append((ids, torch.where(reply, ids, -100), reply & (ids == config.image_token_id)))
    ids, labels, slots = (
        torch.nn.utils.rnn.pad_sequence(column, True, fill)
        for column, fill in zip(zip(*rows, strict=True), (0, -100, False), strict=True)
    )
    count = int((ids == config.image_token_id).sum())
    embeds = torch.randn(count, config.text.hidden_size, generator=draw)
    grid_thw = torch.tensor(grids)
    names = ("input_ids", "labels", "slot_mask", "image_embeds", "image_grid_thw")
    return dict(zip(names, (ids, labels, slots, embeds, grid_thw), strict=True))


def grid(config, tokens: int) -> tuple[int, int, int]:
    """(t, h, w) in patches of a square image of so many tokens."""
    side = round(tokens**0.5) * config.vision.spatial_merge_size
    return 1, side, side


def their_loss(model: NexusGenAR, peer, b: dict[str, torch.Tensor]) -> torch.Tensor:
    """Equation 3 over the peer's model: all logits, shifted by one; heads of ours for the image."""
    ids, slots = b["input_ids"], b["slot_mask"]
    positions, _ = rope_index(ids, b["image_grid_thw"], config=model.config)
    is_image = ids == model.config.image_token_id
    target = slots[is_image]
    x = model.embed(ids, b["image_embeds"][~target], slots)
    hidden = peer.model.language_model(
        inputs_embeds=x, position_ids=positions, use_cache=False
    ).last_hidden_state
    logits = peer.lm_head(hidden).float()
    labels = b["labels"].masked_fill(slots, -100)[:, 1:]
    ce = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels.flatten(), ignore_index=-100)
    predicted, true = model.vision_head(hidden)[:, :-1][slots[:, 1:]], b["image_embeds"][target]
    cos = F.cosine_similarity(predicted, true, dim=-1, eps=1e-8)
    return 3 * ce + 1.5 * F.mse_loss(predicted, true) + 1.5 * (1 - cos).mean()


def run(side: str, size: str) -> dict[str, float]:
    """Median seconds of a step, bytes at the peak, and loss and norm of the first gradient."""
    model = our_ar(ar_config(size))
    peer = their_ar(model).train() if side == "theirs" else None
    model.visual.requires_grad_(False)
    b, parameters = batch(size, model), [p for p in model.parameters() if p.requires_grad]
    warm_up()
    base = resident() - sum(p.numel() * p.element_size() for p in parameters)
    adam, seconds, found = torch.optim.AdamW(parameters, lr=1e-4, fused=True), [], {}
    for k in range(STEPS[size] + 1):
        start = clock()
        loss = their_loss(model, peer, b) if peer else packed_ar_loss(model, **b).loss
        loss.backward()
        if not k:
            norm = torch.stack([p.grad.norm() for p in parameters]).norm()
            found = {"loss": loss.item(), "gradient": norm.item()}
        adam.step()
        adam.zero_grad()
        seconds.append(clock() - start)
    return found | {"seconds": median(seconds[1:]), "bytes": peak_rss() - base}


def warm_up() -> None:
    """A step of almost nothing: torch imports much at the first, which is no step's memory."""
    one = torch.nn.Parameter(torch.ones(1))
    (one * one).sum().backward()
    torch.optim.AdamW([one], fused=True).step()


def resident() -> float:
    """Bytes this process has in memory now."""
    return 4096.0 * int(Path("/proc/self/statm").read_text().split()[1])


def rows() -> Iterator[Row]:
    for size in TASKS:
        found: dict[str, list[dict]] = {"ours": [], "theirs": []}
        for side in ("ours", "theirs") * ROUNDS:
            command = [sys.executable, "-m", "tests.benchmarks.training", side, size]
            found[side].append(json.loads(subprocess.check_output(command)))
        a, b = (
            {name: median(x[name] for x in runs) for name in runs[0]} for runs in found.values()
        )
        error = max(abs(a[n] - b[n]) / b[n] for n in ("loss", "gradient"))
        note = (
            f"peak memory {a['bytes'] / b['bytes']:.2f} of the peer's, "
            f"{a['bytes'] / 1e6:.0f} MB against {b['bytes'] / 1e6:.0f}"
        )
        yield Row(
            f"AR training step, {size}", "float32", "transformers",
            a["seconds"], b["seconds"], 1.3, error, note=note,
        )  # fmt: skip


if __name__ == "__main__":
    print(json.dumps(run(*sys.argv[1:])))
