"""Chat template and special ids around a `tokenizers` file; user text never becomes special.

A conversation is `<|im_start|>role\\ncontent<|im_end|>\\n` per message (ChatML); an image in it is
`<|vision_start|>`, one `<|image_pad|>` per embedding, `<|vision_end|>`, and is written `<image>` in
a message. Official counterpart: `Qwen2_5_VLProcessor` with the chat template of Nexus-GenV2.

Special ids are looked up in the file by their content, then the special tokens are taken out of the
encoder: text that spells one is encoded as the ordinary characters it consists of. (Upstream, a
prompt that says "<|im_end|>" ends the user's turn.)
"""

from __future__ import annotations

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
MAX_TEXT = 2_000_000  # characters encoded at once; at ten million spaces the library panics
IMAGE = "<image>"  # how a message says "here is an image"

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
IGNORE = -100  # label of a token that is not to be learned

Message = dict[str, str]  # {"role": one of ROLES, "content": text with <image> placeholders}


def count_placeholders(messages: Sequence[Message]) -> int:
    """Number of placeholders in all messages."""
    return sum(m["content"].count(IMAGE) for m in messages)


def locate_placeholders(messages: Sequence[Message]) -> str:
    """Which messages hold placeholders, for an error: " (messages[0], user: 2)"."""
    held = [
        (f"messages[{i}], {m['role']}", count_placeholders([m])) for i, m in enumerate(messages)
    ]
    told = "; ".join(f"{name}: {n}" for name, n in held if n)
    return told and f" ({told})"


class TrainingExample(NamedTuple):
    """One encoded conversation, three lists of one length."""

    ids: list[int]
    labels: list[int]  # the id where it is to be learned as text, else IGNORE
    slot_mask: list[bool]  # True at image tokens that are to be generated


def check_text(text: str, name: str) -> None:
    """ValueError when a text is empty, or no Unicode at all (undecodable bytes of a shell)."""
    if not text.strip():
        raise ValueError(f"the {name} is empty")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"the {name} is not valid Unicode text") from error


def language(text: str) -> str:
    """ "zh" when the text holds a Han character, else "en": the key of the prompt tables."""
    return "zh" if any("\u4e00" <= c <= "\u9fff" for c in text) else "en"


@contextmanager
def rust_panic_as_error() -> Iterator[None]:
    """Within, a panic of the tokenizers' Rust code, which is no Exception, is a ValueError."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise ValueError(f"the tokenizer gave up: {str(error)[:200]}") from None


class QwenTokenizer:
    """Text <-> ids, and conversations -> ids.

    `source` is the path of a tokenizer.json or a `tokenizers.Tokenizer`. ValueError when it lacks
    one of the special tokens that the chat template needs.
    """

    def __init__(self, source: str | Path | Tokenizer):
        text = source.to_str() if isinstance(source, Tokenizer) else Path(source).read_text("utf-8")
        spec = json.loads(text)
        added = spec.pop("added_tokens", None) or []
        self.special_ids = {token["content"]: token["id"] for token in added}
        self._names = {token["id"]: token["content"] for token in added}
        self._hidden = {token["id"] for token in added if token["special"]}
        needed = (ENDOFTEXT, IM_START, IM_END, VISION_START, VISION_END, IMAGE_PAD)
        if missing := [name for name in needed if name not in self.special_ids]:
            raise ValueError(f"the tokenizer file lacks the special tokens {', '.join(missing)}")
        whole = {"added_tokens": [], "truncation": None, "padding": None}  # texts stay as they are
        self._text = Tokenizer.from_str(json.dumps(spec | whole))
        self._newline, self._assistant = self.encode("\n"), self.encode("assistant\n")

    def check(self, config: ARConfig) -> None:
        """ValueError when the special ids are not those of the model's config."""
        pairs = {
            ENDOFTEXT: config.pad_token_id,
            IM_END: config.eos_token_id,
            VISION_START: config.vision_start_token_id,
            VISION_END: config.vision_end_token_id,
            IMAGE_PAD: config.image_token_id,
        }
        ids = self.special_ids
        if wrong := [f"{k} {ids[k]} != {v}" for k, v in pairs.items() if ids[k] != v]:
            raise ValueError(f"tokenizer and config disagree on {', '.join(wrong)}")
        most = max([*self._text.get_vocab().values(), *ids.values()])
        if most >= config.text.vocab_size:
            raise ValueError(f"the tokenizer has the id {most}, the model {config.text.vocab_size}")

    def encode(self, text: str) -> list[int]:
        """Ids of plain text; never a special one, whatever the text spells.

        ValueError for half a character (a lone surrogate), which no encoding of text can hold, and
        for more than MAX_TEXT characters.
        """
        if len(text) > MAX_TEXT:
            raise ValueError(f"a text of {len(text)} characters; at most {MAX_TEXT} are read")
        try:
            with rust_panic_as_error():
                return self._text.encode(text, add_special_tokens=False).ids
        except TypeError:
            raise ValueError("not valid Unicode text: it holds half a character") from None

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """Text of ids; an image becomes `<image>`, other special tokens vanish unless kept."""
        out = []
        for is_named, run in groupby(map(int, ids), self._names.__contains__):
            if is_named:
                out += [self._name(i, skip_special) for i in run]
            else:
                out.append(self._text.decode(list(run), skip_special_tokens=False))
        return "".join(out)

    def _name(self, i: int, skip_special: bool) -> str:
        if not skip_special or i not in self._hidden:
            return self._names[i]
        return IMAGE if i == self.special_ids[VISION_START] else ""

    def encode_chat(
        self,
        messages: Sequence[Message],
        image_token_counts: Sequence[int] = (),
        add_generation_prompt: bool = True,
        continued: bool = False,
    ) -> list[int]:
        """Ids of a conversation, which starts with the default system prompt unless it has its own.

        image_token_counts: embeddings of each image, in the order of their placeholders. With
        `add_generation_prompt` the assistant's turn is opened. `continued` messages follow others
        and take no system prompt. ValueError for another number of images than of placeholders
        (naming the messages that hold some), or a malformed message.
        """
        turns = self._turns(messages, image_token_counts, continued)
        ids = [i for _, turn in turns for i in turn]
        opening = [self.special_ids[IM_START], *self._assistant]
        return ids + opening if add_generation_prompt else ids

    def encode_training(
        self, messages: Sequence[Message], image_token_counts: Sequence[int] = ()
    ) -> TrainingExample:
        """Ids, labels and slots of a conversation for `ar_loss`; arguments as in `encode_chat`.

        Learned is what the assistant says, im_end included, neither its header nor the newline
        after it. Images in the assistant's turns are targets: no label, but a slot; the
        vision_start and vision_end around them have labels.
        """
        ids, labels, slots = [], [], []
        image, header = self.special_ids[IMAGE_PAD], 1 + len(self._assistant)
        for role, turn in self._turns(messages, image_token_counts):
            spoken = range(header, len(turn) - len(self._newline)) if role == "assistant" else ()
            ids += turn
            slots += [k in spoken and i == image for k, i in enumerate(turn)]
            labels += [i if k in spoken and i != image else IGNORE for k, i in enumerate(turn)]
        return TrainingExample(ids, labels, slots)

    def _turns(
        self, messages: Sequence[Message], counts: Sequence[int], continued: bool = False
    ) -> Iterator[tuple[str, list[int]]]:
        """(role, ids) of each message, the system prompt first unless they are `continued`."""
        for m in messages:
            fits = isinstance(m, dict) and m.get("role") in ROLES
            if not (fits and isinstance(m.get("content"), str)):
                raise ValueError(f"a message needs a role of {ROLES} and a text content, got {m}")
        if (places := count_placeholders(messages)) != len(counts):
            told = f"{places} {IMAGE} placeholders for {len(counts)} images"
            raise ValueError(told + locate_placeholders(messages))
        if not continued and (not messages or messages[0]["role"] != "system"):
            messages = [{"role": "system", "content": SYSTEM_PROMPT}, *messages]
        counts = iter(counts)
        for m in messages:
            yield m["role"], self._turn(m["role"], m["content"], counts)

    def _turn(self, role: str, content: str, counts: Iterator[int]) -> list[int]:
        """Ids of one message. The assistant's header stands alone, as it does when it is a prompt;
        the others are encoded with their text, as upstream (a leading newline would merge)."""
        special, (first, *rest) = self.special_ids, content.split(IMAGE)
        head = self._assistant if role == "assistant" else []
        ids = [special[IM_START], *head, *self.encode(first if head else f"{role}\n{first}")]
        for text in rest:
            pads = [special[IMAGE_PAD]] * next(counts)
            ids += [special[VISION_START], *pads, special[VISION_END], *self.encode(text)]
        return [*ids, *self.turn_end]

    @property
    def turn_end(self) -> list[int]:
        """Ids that close a message."""
        return [self.special_ids[IM_END], *self._newline]
