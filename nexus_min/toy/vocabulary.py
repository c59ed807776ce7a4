"""The toy tokenizer: byte-level BPE in which every word of the toy world is one token.

What users write is folded first: lower case, half width, single spaces, no final punctuation.

Qwen's special tokens come last, in the order of the official `tokenizer.json`.
"""

import json
import re
from itertools import product

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from ..config import NexusGenConfig
from ..tokenizer import GENERATION_PROMPT, IMAGE, SYSTEM_PROMPT
from .language import NUMBERS, WORDINGS, ZH_WORDS, plural
from .tasks import KINDS, sample_example
from .world import BACKGROUNDS, CANVAS, COLORS, RADIUS, SHAPES

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


# Commas and apostrophes of all kinds become one; a Latin word begins with its space.
REPLACED = (
    (r"[’‘`´]", "'"), (r"[\"“”()]", " "),
    (r"[、;]", ","), (r"\s+", " "), (r"[\s.!?。]+$", ""), (r"^\s+", ""),
    (r" ?, ?", ", "), (r"(?<=[一-鿿]) (?=[一-鿿])|(?<=[,:]) (?=[一-鿿0-9])", ""),
    (r"^(?=[a-z0-9])", " "),
)  # fmt: skip


def folding() -> normalizers.Normalizer:
    """The normalizer of what users write."""
    replaced = [normalizers.Replace(Regex(pattern), new) for pattern, new in REPLACED]
    return normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase(), *replaced])


def words() -> list[str]:
    """Every English and every Chinese word of the toy world, once, as texts hold them."""
    rng, fold, typed = np.random.default_rng(0), folding().normalize_str, [WORDINGS]
    for part in typed:  # grows while it is read
        if not isinstance(part, str):
            typed += part.values() if isinstance(part, dict) else part
    typed = [re.sub(r"{\w*}", " ", part) for part in typed if isinstance(part, str)]
    typed += [plural(x) for name in SHAPES for x in WORDINGS["en"]["words"][name]]
    # a reply may begin with a word, without a space before it
    texts = [SYSTEM_PROMPT, "system\n", "user\n", "assistant\n", "The", *ZH_WORDS]
    texts += map(fold, [*typed, *GENERATION_PROMPT.values()])
    for task, kinds in KINDS.items():
        for kind, zh, _ in product(kinds, (False, True), range(60)):
            messages = sample_example(rng, task, kind, zh).messages
            texts += [m["content"].replace(IMAGE, "") for m in messages[1::2]]
    chinese = "|".join(sorted(set(ZH_WORDS.values()), key=len, reverse=True))
    piece = chinese + r"|[\u4e00-\u9fff]| ?[A-Za-z]+|[^A-Za-z\s\u4e00-\u9fff]+|\s"
    return list(dict.fromkeys(w for text in texts for w in re.findall(piece, text)))


def known_facts() -> dict:
    """What `toy_words.json` beside the tiny model says that it knows."""

    def names(*known: str) -> list[str]:
        return [x for lang in ("en", "zh") for k in known for x in WORDINGS[lang]["words"][k]]

    things, outlined = (WORDINGS["en"][k] + WORDINGS["zh"][k] for k in ("thing", "outlined"))
    nouns = [x for x in names(*SHAPES) + things if x not in ("one", "那个")]
    about = [", ".join(part) for part in (map(plural, SHAPES), COLORS, BACKGROUNDS)]
    more = {f"{x}个": k for k, x in enumerate("五六七八九十", 5)}
    return {
        "about": "{} in {} on {}".format(*about),
        "words": sorted({word.strip() for word in words()} - {""}),
        "objects": nouns + [plural(x) for x in nouns if x.isascii()],
        "conjunctions": ["plus"],  # unless more is said of it
        "colors": names(*COLORS),
        "backgrounds": names(*BACKGROUNDS),
        "background": ["background", "behind", "背景", "底"],
        "adjectives": names(*RADIUS) + outlined,
        "numbers": {x: k for k, name in enumerate(NUMBERS) for x in names(name)} | more,
        "rgb": {"colors": list(COLORS.values()), "backgrounds": list(BACKGROUNDS.values())},
        "sizes": [CANVAS],
        "most_objects": len(NUMBERS) - 1,
    }


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
    bpe.normalizer = folding()
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
    """The token of each Chinese word and of each synonym -> the tokens of the English word."""
    pairs = [(chinese, english) for english, chinese in ZH_WORDS.items()]
    for language in ("zh", "en"):
        for english, synonyms in WORDINGS[language]["words"].items():
            forms = [x if language == "zh" else f" {x}" for x in synonyms]
            pairs += [(x, english) for x in forms]
            if english in SHAPES and language == "en":
                pairs += [(plural(x), english) for x in forms]
    found, plain = {}, Tokenizer.from_str(tokenizer.to_str())
    plain.normalizer = None  # these are folded words; `tokenizers` panics where it inserts a space
    for word, english in pairs:
        ids, meaning = plain.encode(word).ids, plain.encode(f" {english}").ids
        if len(ids) == 1 and ids != meaning:
            found.setdefault(ids[0], meaning)
    return found
