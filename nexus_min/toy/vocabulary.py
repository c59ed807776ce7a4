"""The toy tokenizer: byte-level BPE over the toy world's words, with Qwen's special tokens.

Any text can be encoded (bytes are always there); every word of the toy world is one token, whatever
stands beside it, so that new combinations of known words are made of known tokens. The special
tokens come last, in Qwen's order, as in the official `tokenizer.json`.
"""

from __future__ import annotations

import json
import re

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from ..config import NexusGenConfig
from ..tokenizer import SYSTEM_PROMPT
from .edits import EDITS
from .language import CELL_NAMES, NUMBERS, ZH, ZH_CELLS, ZH_NUMBERS
from .prompts import CATEGORIES
from .questions import QUESTIONS
from .tasks import example

SPECIAL = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>",
    "<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>",
    "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>", "<tool_call>",
    "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>",
    "<|repo_name|>", "<|file_sep|>",
)  # fmt: skip
# How Qwen cuts text before BPE: contractions, words with leading space, digits, punctuation.
PRETOKEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def corpus() -> list[str]:
    """Text that holds every word of the toy world, with its leading space where it can have one."""
    rng = np.random.default_rng(0)
    kinds = [("generate", k) for k in (*CATEGORIES, "caption")]
    kinds += [("understand", k) for k in (*QUESTIONS, "describe")] + [("edit", k) for k in EDITS]
    texts = [SYSTEM_PROMPT, "system\n", "user\n", "assistant\n"]
    for task, kind in kinds:
        for zh in (False, True):
            for _ in range(150):
                found = example(rng, task, kind, zh)
                texts += [m["content"].replace("<image>", "") for m in found.messages]
    return texts


def words() -> list[str]:
    """Every English word and every Chinese word of the corpus, once."""
    chinese = sorted({*ZH.values(), *ZH_CELLS, *ZH_NUMBERS}, key=len, reverse=True)
    pieces = re.compile("|".join(chinese) + r"|[\u4e00-\u9fff]|[^\u4e00-\u9fff]+")
    found: dict[str, None] = {}
    for text in corpus():
        for piece in pieces.findall(text):
            found.update(dict.fromkeys([piece] if "\u4e00" <= piece[0] else _english(piece)))
    return list(found)


def _english(text: str) -> list[str]:
    return re.findall(r" ?[A-Za-z]+|[^A-Za-z\s]+|\s", text)


def _train(every: list[str], room: int) -> Tokenizer:
    """A byte-level BPE of at most `room` tokens that knows every word whole."""
    bpe = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(PRETOKEN), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=room, initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator(every, trainer)
    if torn := [w for w in every if len(bpe.encode(w).ids) > 1]:
        raise ValueError(f"{room} tokens are too few: {len(torn)} words are torn, as {torn[:5]}")
    return bpe


def build_tokenizer(config: NexusGenConfig | None = None) -> Tokenizer:
    """The tokenizer of the tiny model. ValueError when its vocabulary is too small."""
    room = (config or NexusGenConfig.tiny()).ar.pad_token_id
    spec = json.loads(_train(words(), room).to_str())
    vocabulary = spec["model"]["vocab"]
    for k in range(len(vocabulary), room):
        vocabulary[f"<unused{k}>"] = k
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    spec["added_tokens"] = [
        {"id": room + k, "content": name, "special": "tool_call" not in name, **flags}
        for k, name in enumerate(SPECIAL)
    ]
    return Tokenizer.from_str(json.dumps(spec))


def translations(tokenizer: Tokenizer) -> dict[int, list[int]]:
    """Token of every Chinese word for a thing, quality, place or number -> its English tokens."""
    pairs = [*((zh, en) for en, zh in ZH.items()), *zip(ZH_CELLS, CELL_NAMES, strict=True)]
    pairs += zip(ZH_NUMBERS, NUMBERS, strict=True)
    found = {}
    for zh, en in pairs:
        (token,) = tokenizer.encode(zh, add_special_tokens=False).ids
        found[token] = tokenizer.encode(f" {en}", add_special_tokens=False).ids
    return found
