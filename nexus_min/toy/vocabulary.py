"""The toy tokenizer: byte-level BPE in which every word of the toy world is one token.

Qwen's special tokens come last, in the order of the official `tokenizer.json`.
"""

import json
import re
from itertools import product

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from ..config import NexusGenConfig
from ..tokenizer import IMAGE, SYSTEM_PROMPT
from .language import ZH_WORDS
from .tasks import KINDS, sample_example

SPECIAL = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>",
    "<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>",
    "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>", "<tool_call>",
    "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>",
    "<|repo_name|>", "<|file_sep|>",
)  # fmt: skip
# How Qwen splits text before BPE: contractions, words with leading space, digits, punctuation.
PRETOKEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def words() -> list[str]:
    """Every English and every Chinese word of the toy world, once, also with a leading space."""
    rng = np.random.default_rng(0)
    texts = [SYSTEM_PROMPT, "system\n", "user\n", "assistant\n"]
    for task, kinds in KINDS.items():
        for kind, zh, _ in product(kinds, (False, True), range(150)):
            ex = sample_example(rng, task, kind, zh)
            texts += [m["content"].replace(IMAGE, "") for m in ex.messages]
    chinese = "|".join(sorted(set(ZH_WORDS.values()), key=len, reverse=True))
    piece = chinese + r"|[\u4e00-\u9fff]| ?[A-Za-z]+|[^A-Za-z\s\u4e00-\u9fff]+|\s"
    return list(dict.fromkeys(w for text in texts for w in re.findall(piece, text)))


def build_tokenizer(config: NexusGenConfig | None = None) -> Tokenizer:
    """The tokenizer of the tiny model, with the vocabulary size of its configuration."""
    vocab_size = (config or NexusGenConfig.tiny()).ar.pad_token_id  # without the special tokens
    bpe = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(PRETOKEN), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    bpe.decoder = decoders.ByteLevel()
    options = {"initial_alphabet": byte_level.alphabet(), "show_progress": False}
    every = words()
    bpe.train_from_iterator(every, trainers.BpeTrainer(vocab_size=vocab_size, **options))
    if broken := [w for w in every if len(bpe.encode(w).ids) > 1]:
        examples = f"{len(broken)} words, as {broken[:5]}"
        raise ValueError(f"{vocab_size} tokens are too few: they split {examples}")
    spec = json.loads(bpe.to_str())
    num_words = len(spec["model"]["vocab"])
    spec["model"]["vocab"] |= {f"<unused{k}>": k for k in range(num_words, vocab_size)}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    spec["added_tokens"] = [
        {"id": vocab_size + k, "content": name, "special": "tool_call" not in name, **flags}
        for k, name in enumerate(SPECIAL)
    ]
    return Tokenizer.from_str(json.dumps(spec))


def translations(tokenizer: Tokenizer) -> dict[int, list[int]]:
    """The token of each Chinese word -> the tokens of its English translation."""
    found: dict[int, list[int]] = {}
    for english, chinese in ZH_WORDS.items():
        (token,) = tokenizer.encode(chinese).ids
        found.setdefault(token, tokenizer.encode(f" {english}").ids)
    return found
