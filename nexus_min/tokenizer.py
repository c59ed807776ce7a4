"""Chat template and special ids around a `tokenizers` file; user text never becomes special.

A conversation is `<|im_start|>role\\ncontent<|im_end|>\\n` per message (ChatML). The placeholder
`<image>` in a message becomes `<|vision_start|>`, one `<|image_pad|>` per embedding and
`<|vision_end|>`. Official counterpart: `Qwen2_5_VLProcessor`, chat template of Nexus-GenV2.

A file's normalizer of several steps (the toy's: case, width, spaces, final punctuation) applies to
what users write only; Qwen's own single step (NFC) to all text.

The encoder has no special tokens, so text that spells one becomes ordinary tokens. (Upstream, a
prompt that contains "<|im_end|>" ends the user's turn.)
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from tokenizers import Tokenizer

from .config import ARConfig

ENDOFTEXT = "<|endoftext|>"
IM_START = "<|im_start|>"
IM_END = "<|im_end|>"
VISION_START = "<|vision_start|>"
VISION_END = "<|vision_end|>"
IMAGE_PAD = "<|image_pad|>"
IMAGE = "<image>"  # the placeholder of an image in a message
MAX_TEXT = 2_000_000  # characters; the library panics at ten million spaces
SYSTEM_PROMPT = "You are a helpful assistant."
GENERATION_PROMPT = {
    "en": "Generate an image according to the following description: {}",
    "zh": "根据以下描述生成一张图像：{}",
}
EDITING_PROMPT = IMAGE + " {}"
GENERATION_REPLY = {
    "en": f"Here is an image based on the description: {IMAGE}",
    "zh": f"这是根据您的描述生成的图像：{IMAGE}",
}
EDITING_REPLY = {"en": f"Here is the image: {IMAGE}", "zh": f"以下为编辑后的图像：{IMAGE}"}

ROLES = ("system", "user", "assistant")
IGNORE = -100  # label of a token without a loss
Message = dict[str, str]  # {"role": one of ROLES, "content": text with <image> placeholders}


class TrainingExample(NamedTuple):
    """One encoded conversation, three lists of one length."""

    ids: list[int]
    labels: list[int]  # the id of a text token with a loss, else IGNORE
    slot_mask: list[bool]  # True at image tokens that the model is to generate


def locate_placeholders(messages: Sequence[Message]) -> str:
    """Which messages contain placeholders, for an error: " (messages[0], user: 2)"."""
    counts = [(i, m["role"], m["content"].count(IMAGE)) for i, m in enumerate(messages)]
    found = "; ".join(f"messages[{i}], {role}: {n}" for i, role, n in counts if n)
    return f" ({found})" if found else ""


def check_text(text: str, name: str) -> None:
    """ValueError when a text is empty, or no Unicode (undecodable bytes of a shell)."""
    if not text.strip():
        raise ValueError(f"the {name} is empty")
    if any("\ud800" <= c <= "\udfff" for c in text):  # a lone surrogate
        raise ValueError(f"the {name} is not valid Unicode text")


def language_of(text: str, language: str | None = None) -> str:
    """The given key of the prompt tables, else "zh" if the text has a Han character, else "en"."""
    if language is None:
        return "zh" if any("\u4e00" <= c <= "\u9fff" for c in text) else "en"
    if language not in GENERATION_PROMPT:
        raise ValueError(f"language must be one of {list(GENERATION_PROMPT)}, got {language!r}")
    return language


@contextmanager
def rust_panic_as_error() -> Iterator[None]:
    """Turn a panic of the tokenizers' Rust code, which is no Exception, into a ValueError."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise ValueError(f"the tokenizer failed: {str(error)[:200]}") from None


class QwenTokenizer:
    """Text <-> ids, and conversations -> ids, from a tokenizer.json or a `tokenizers.Tokenizer`."""

    def __init__(self, source: str | Path | Tokenizer):
        text = source.to_str() if isinstance(source, Tokenizer) else Path(source).read_text("utf-8")
        spec = json.loads(text)
        added = spec.pop("added_tokens", None) or []
        self.special_ids = {token["content"]: token["id"] for token in added}
        needed = (ENDOFTEXT, IM_START, IM_END, VISION_START, VISION_END, IMAGE_PAD)
        if missing := [name for name in needed if name not in self.special_ids]:
            raise ValueError(f"the tokenizer file lacks the special tokens {', '.join(missing)}")
        self._names = {token["id"]: token["content"] for token in added}
        hidden = {token["id"]: "" for token in added if token["special"]}
        self._shown = self._names | hidden | {self.special_ids[VISION_START]: IMAGE}
        plain = {"added_tokens": [], "truncation": None, "padding": None}
        self._text, self.fold = Tokenizer.from_str(json.dumps(spec | plain)), str
        if (spec.get("normalizer") or {}).get("type") == "Sequence":  # what users write, as read
            self.fold, self._text.normalizer = self._text.normalizer.normalize_str, None
        self._assistant = self.encode("assistant\n")
        self.turn_end = [self.special_ids[IM_END], *self.encode("\n")]  # closes a message

    def check(self, config: ARConfig) -> None:
        """ValueError when the special ids are not those of the model's config."""
        wanted = {
            ENDOFTEXT: config.pad_token_id,
            IM_END: config.eos_token_id,
            VISION_START: config.vision_start_token_id,
            VISION_END: config.vision_end_token_id,
            IMAGE_PAD: config.image_token_id,
        }
        ids = self.special_ids
        if wrong := [f"{k} {ids[k]} != {v}" for k, v in wanted.items() if ids[k] != v]:
            raise ValueError(f"tokenizer and config disagree on {', '.join(wrong)}")
        last = max(*self._text.get_vocab().values(), *ids.values())
        if last >= config.text.vocab_size:
            raise ValueError(f"the tokenizer has the id {last}, the model {config.text.vocab_size}")

    def encode(self, text: str) -> list[int]:
        """Ids of plain text; never a special one, whatever the text spells."""
        if len(text) > MAX_TEXT:
            raise ValueError(f"a text of {len(text)} characters; at most {MAX_TEXT} are allowed")
        try:
            with rust_panic_as_error():
                return self._text.encode(text, add_special_tokens=False).ids
        except TypeError:
            raise ValueError("not valid Unicode text: it contains a lone surrogate") from None

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """Text of ids; `skip_special` turns an image into `<image>` and drops other special ids."""
        text, names = "", self._shown if skip_special else self._names
        for is_special, run in groupby(map(int, ids), names.__contains__):
            run = list(run)
            text += "".join(map(names.get, run)) if is_special else self._text.decode(run, False)
        return text

    def encode_chat(
        self,
        messages: Sequence[Message],
        image_token_counts: Sequence[int] = (),
        add_generation_prompt: bool = True,
        continued: bool = False,
    ) -> list[int]:
        """Ids of a conversation; a system prompt is added unless it has one or is `continued`.

        image_token_counts: number of embeddings of each image, in the order of the placeholders.
        `add_generation_prompt` opens the assistant's turn.
        """
        for m in messages:
            is_valid = isinstance(m, dict) and m.get("role") in ROLES
            if not (is_valid and isinstance(m.get("content"), str)):
                raise ValueError(f"a message needs a role of {ROLES} and a text content, got {m}")
        found = sum(m["content"].count(IMAGE) for m in messages)
        if found != (n := len(image_token_counts)):
            where = locate_placeholders(messages)
            raise ValueError(f"{found} {IMAGE} placeholders for {n} images{where}")
        if not continued and (not messages or messages[0]["role"] != "system"):
            messages = [{"role": "system", "content": SYSTEM_PROMPT}, *messages]
        counts, special, ids = iter(image_token_counts), self.special_ids, []
        for m in messages:
            first, *rest = m["content"].split(IMAGE)
            if m["role"] == "user":
                first, *rest = self.fold(first), *map(self.fold, rest)
            # only the assistant's header is encoded apart from the text, as it is in a prompt
            if m["role"] == "assistant":
                ids += [special[IM_START], *self._assistant, *self.encode(first)]
            else:
                ids += [special[IM_START], *self.encode(f"{m['role']}\n{first}")]
            for text in rest:
                pads = [special[IMAGE_PAD]] * next(counts)
                ids += [special[VISION_START], *pads, special[VISION_END], *self.encode(text)]
            ids += self.turn_end
        return [*ids, special[IM_START], *self._assistant] if add_generation_prompt else ids

    def encode_training(
        self, messages: Sequence[Message], image_token_counts: Sequence[int] = ()
    ) -> TrainingExample:
        """Ids, labels and slots of a conversation for `ar_loss`; arguments as in `encode_chat`.

        The assistant's turns have labels, from after the header to im_end; their images have slots.
        """
        ids = self.encode_chat(messages, image_token_counts, add_generation_prompt=False)
        labels, slots = [IGNORE] * len(ids), [False] * len(ids)
        start, end, image = (self.special_ids[name] for name in (IM_START, IM_END, IMAGE_PAD))
        starts = [k for k, i in enumerate(ids) if i == start]
        # from the last to the first, because the default system prompt has no message
        for message, first in zip(reversed(messages), reversed(starts), strict=False):
            if message["role"] == "assistant":
                first += 1 + len(self._assistant)
                for k in range(first, ids.index(end, first) + 1):
                    slots[k] = ids[k] == image
                    labels[k] = IGNORE if slots[k] else ids[k]
        return TrainingExample(ids, labels, slots)
