"""A conversation: turns of text and images; an image of the model is read like one of the user.

    user: text, images -> AR model -> text and image embeddings -> decoders -> images of the history

The history is one growing list of token ids; no text is encoded twice. Each image fills as many
tokens as it has embeddings, and one KV cache serves all turns. What the AR model reads of an image
that it generated is one of `HISTORY_MODES`:

    slots      the prefilled slots that the cache already holds, as in training
    predicted  the embeddings that it predicted, read like those of a user's image
    reencoded  the decoded image, through the vision tower

Figure 1 of the paper (one model, interleaved turns). The official scripts answer one turn only.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from .images import bound_image, load_image
from .model.decoder import KVCache
from .offload import explain_oom
from .pipeline import Event, sample_images
from .sampling import ChatInputs, ImageRequest, SamplingParams, in_range
from .tokenizer import (
    GENERATION_PROMPT,
    GENERATION_REPLY,
    IMAGE,
    VISION_START,
    QwenTokenizer,
    check_text,
    language_of,
)

HISTORY_MODES = ("slots", "predicted", "reencoded")
ESCAPED_IMAGE = IMAGE.replace(">", " >")  # a literal `<image>` in the model's text
DECODERS = ("auto", "generation", "editing")
ANNOUNCEMENTS = tuple(text.removesuffix(IMAGE).strip() for text in GENERATION_REPLY.values())


@dataclass
class ChatImage:
    """One image of a conversation, and what the AR model reads of it."""

    image: Image.Image
    embeds: Tensor  # [n, C]
    grid: tuple[int, int, int]  # in patches


def reply_text(tokenizer: QwenTokenizer, ids: Sequence[int]) -> str:
    """The model's text, `<image>` only where an image starts: a literal `<image>` is escaped."""
    runs = [[]]
    for i in ids:
        if i == tokenizer.special_ids[VISION_START]:
            runs.append([])
        else:
            runs[-1].append(i)
    return IMAGE.join(tokenizer.decode(run).replace(IMAGE, ESCAPED_IMAGE) for run in runs)


class Chat:
    """A conversation with `model`, a `pipeline.NexusGen`.

    keep: one of `HISTORY_MODES`. decoder: one of `DECODERS`; "auto" edits the latest image, unless
    there is none or the reply announces a new image with the sentence of the training data. The
    other options are fields of `SamplingParams`; the seed grows by one with every image.
    """

    def __init__(
        self,
        model: Any,
        keep: str = "predicted",
        decoder: str = "auto",
        max_new_tokens: int = 1024,
        **sampling,
    ):
        for name, value, known in (("keep", keep, HISTORY_MODES), ("decoder", decoder, DECODERS)):
            if value not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
        self.model, self.keep, self.decoder = model, keep, decoder
        self.max_new_tokens = in_range("max_new_tokens", max_new_tokens, 1024)
        self.sampling = SamplingParams.of("keep", "decoder", "max_new_tokens", **sampling)
        self.sampling.resolve(model.config, 1.0)  # a bad option fails here, not after a reply
        self.clear()

    def clear(self) -> None:
        """Start a new conversation."""
        self.ids: list[int] = []
        self.images: list[ChatImage] = []
        self.messages: list[dict] = []  # in the format of training data
        self.cache, self.num_cached = KVCache(), 0
        self.num_images = 0  # that the model has generated

    @torch.no_grad()
    def say(self, text: str, images: Sequence[Any] = ()) -> Iterator[Event]:
        """One turn of the user; yields the reply as it comes.

        Events: ("text", str) piece by piece; ("embeddings", [1, N, C]) of each image; after the
        text, the events of `pipeline.sample_images` for each image, up to ("image", PIL). `<image>`
        in the text places the user's images; without it they precede the text. A turn that fails,
        or is not read to its end, leaves the conversation unchanged. A small model answers a text
        that asks for nothing that it knows ("hello") with what it can do; it draws the first other.
        """
        with explain_oom(self.model.advice):
            text = text if IMAGE in text else IMAGE * len(images) + text
            check_text(text, "message")
            given = [self._encode(load_image(image)) for image in images]
            message, counts = {"role": "user", "content": text}, [len(i.embeds) for i in given]
            tokenizer, limit = self.model.part("tokenizer"), self.model.max_prompt_tokens()
            turn = tokenizer.encode_chat([message], counts, continued=bool(self.ids))
            self.model.known.check(text, [i.image for i in given])
            if said := self.model.known.introduction(text, bool(self.images or given)):
                yield "text", said
                self.messages += [message, {"role": "assistant", "content": said}]
                return
            if self.model.known.facts and not (self.images or given):  # nothing else to talk about
                yield from self.draw(text)
                return
            prompt, history = self.ids + turn, self.images + given
            if (n := len(prompt)) > limit:
                raise ValueError(f"the conversation has {n} tokens, over {limit}: start a new one")
            self.cache.crop(min(self.num_cached, self.cache.length))  # drops a turn that failed
            tokens, reply, embeds = yield from self._reply(prompt, history)
            if embeds:
                self.model.known.check("", (), self.sampling.resolve(self.model.config, 1.0))
            drawn = yield from self._sample_images(reply, embeds, history)
            grid = self.model.config.ar.slot_grid
            new = [ChatImage(i, e, grid) for i, e in zip(drawn, embeds, strict=True)]
            if self.keep == "reencoded":
                new = [self._encode(image) for image in drawn]
            # The conversation changes only here, once the turn is complete.
            self.ids = self._splice(prompt, tokens, new)
            self.images, self.num_images = history + new, self.num_images + len(new)
            self.num_cached = self.cache.length
            self.messages += [message, {"role": "assistant", "content": reply}]

    @torch.no_grad()
    def draw(self, prompt: str) -> Iterator[Event]:
        """A turn that draws a description anew; what was said before plays no part.

        Yields the events of `generate_steps`. Later turns read the image as they read a user's.
        """
        options, seed = asdict(self.sampling), (self.sampling.seed or 0) + self.num_images
        options, result = options | {"seed": seed, "max_new_tokens": self.max_new_tokens}, {}
        for kind, value in self.model.generate_steps(prompt, **options):
            result[kind] = value
            yield kind, value
        content = GENERATION_PROMPT[language_of(prompt)].format(prompt)
        reply = result["text"].replace(IMAGE, ESCAPED_IMAGE) + IMAGE
        turn = [{"role": "user", "content": content}, {"role": "assistant", "content": reply}]
        new = ChatImage(result["image"], result["embeddings"][0], self.model.config.ar.slot_grid)
        new = self._encode(new.image) if self.keep == "reencoded" else new
        encode, counts = self.model.tokenizer.encode_chat, [len(new.embeds)]
        self.ids = self.ids + encode(turn, counts, False, continued=bool(self.ids))
        self.images, self.num_images = [*self.images, new], self.num_images + 1
        self.messages += turn

    def _reply(self, prompt: list[int], images: list[ChatImage]) -> Iterator[Event]:
        """Yield the reply; return its ids, none of them an image's, its text and the embeddings."""
        ar, tokenizer = self.model.part_on_device("ar"), self.model.tokenizer
        ids = torch.tensor([prompt], device=ar.lm_head.weight.device)
        image_embeds = torch.cat([i.embeds for i in images]) if images else None
        grids = torch.tensor([i.grid for i in images], device="cpu") if images else None
        inputs = ChatInputs(ids, image_embeds, grids)
        tokens, text, embeds = [], "", []
        for kind, value in self.model.reply(inputs, self.max_new_tokens, self.cache):
            if kind == "image":
                embeds.append(value)
                yield "embeddings", value[None]
                continue
            tokens.append(value)
            whole = reply_text(tokenizer, tokens)
            if len(whole) > len(text) and not whole.endswith("\ufffd"):  # no partial character
                yield "text", whole[len(text) :]
                text = whole
        if tokens[-1:] == [tokenizer.special_ids[VISION_START]]:  # no tokens left for the image
            tokens, text = tokens[:-1], text.removesuffix(IMAGE)
        return tokens + tokenizer.turn_end, text, embeds

    def _sample_images(
        self, reply: str, embeds: list[Tensor], history: list[ChatImage]
    ) -> Iterator[Event]:
        """Sample the reply's images one after the other; return them."""
        images = [i.image for i in history]
        for sentence, image_embeds in zip(reply.split(IMAGE), embeds, strict=False):
            decoder, reference, cfg_scale = self.decoder, None, self.model.config.cfg_scale
            if decoder == "auto":
                is_new = not images or sentence.strip().endswith(ANNOUNCEMENTS)
                decoder = "generation" if is_new else "editing"
            if decoder == "editing":
                if not images:
                    raise ValueError("the editing decoder needs an image to start from; give one")
                reference, cfg_scale = self.model.reference_embeds(images[-1]), 1.0
            seed = self.sampling.seed + self.num_images + len(images) - len(history)
            sampling = replace(self.sampling, seed=seed).resolve(self.model.config, cfg_scale)
            request = ImageRequest("", image_embeds[None], reference, decoder, sampling)
            for kind, value in sample_images(self.model, [request]):
                yield kind, value
            images.append(value)
        return images[len(history) :]

    def _encode(self, image: Image.Image) -> ChatImage:
        """The image as the vision tower reads it."""
        config = self.model.config
        view = bound_image(image, min_pixels=config.min_pixels, max_pixels=config.max_pixels)
        embeds, grid = self.model.embed_images([view])
        return ChatImage(image, embeds, tuple(grid[0].tolist()))

    def _splice(self, prompt: list[int], tokens: list[int], images: list[ChatImage]) -> list[int]:
        """All ids, with as many image tokens for each image as it has embeddings.

        Unless the slots stay, the cache is cropped to what precedes the first of the images.
        """
        config, ids, embeds = self.model.config.ar, list(prompt), iter([i.embeds for i in images])
        for token in tokens:
            ids.append(token)
            if token == config.vision_start_token_id:
                if self.keep != "slots":
                    self.cache.crop(min(len(ids), self.cache.length))
                ids += [config.image_token_id] * len(next(embeds))
        return ids
