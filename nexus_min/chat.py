"""A conversation: turns of text and images, in which an image just drawn is seen like any other.

    user: text, images -> AR model -> text and image embeddings -> decoders -> images, seen next

The history is one growing list of token ids, never text that is encoded again: an image is entered
once, as many tokens as it has embeddings, and the cache of keys and values goes on from turn to
turn. What the AR model later sees of an image that it drew is one of `KEEP`:

    slots      the prefilled slots as they stand in the cache: what training showed, and free
    predicted  the embeddings it predicted, read as if they were a user's image
    reencoded  the drawn image through the vision tower: what the decoder made of it

Figure 1 of the paper (one model, interleaved turns). The official code has no counterpart: its
scripts answer one turn.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from .images import bound_image, load_image
from .model.decoder import KVCache
from .offload import explain_oom
from .sampling import ImageRequest, SamplingParams
from .tokenizer import GENERATION_REPLY, IMAGE, VISION_START, QwenTokenizer, check_text

KEEP = ("slots", "predicted", "reencoded")
SPELLED = IMAGE.replace(">", " >")  # `<image>` that the model wrote as words: no image is there
DECODERS = ("auto", "generation", "editing")


class ChatInputs(NamedTuple):
    """What the AR model reads: a conversation up to the assistant's turn."""

    input_ids: Tensor  # [1, L]
    image_embeds: Tensor | None  # [n, C], all images in reading order
    image_grid_thw: Tensor | None  # [images, 3]


@dataclass
class Picture:
    """One image of a conversation, and what the AR model reads in its place."""

    image: Image.Image
    embeds: Tensor  # [n, C]
    grid: tuple[int, int, int]  # in patches


class TextStream:
    """Ids in, text out as soon as its characters are whole: one may come in several tokens.

    In it `<image>` is an image and nothing else: words that spell it come as `SPELLED`.
    """

    def __init__(self, tokenizer: QwenTokenizer):
        self.tokenizer, self.text = tokenizer, ""
        self.start = tokenizer.special_ids[VISION_START]
        self.runs: list[list[int]] = [[]]  # ids between the images

    def push(self, token: int) -> str:
        """The text that this id completes, perhaps none."""
        if token == self.start:
            self.runs.append([])
        else:
            self.runs[-1].append(token)
        whole = IMAGE.join(self.tokenizer.decode(r).replace(IMAGE, SPELLED) for r in self.runs)
        if whole.endswith("\ufffd"):
            return ""
        new, self.text = whole[len(self.text) :], whole
        return new


class Chat:
    """A conversation with `model` (a `pipeline.NexusGen`); made by `NexusGen.chat`.

    keep: one of `KEEP`. decoder: which one draws; "auto" takes the editing decoder, with the latest
    image as its source, unless there is none or the reply says the sentence that announces a new
    image in training. The other options are fields of `SamplingParams`; every further image takes
    the next seed. ValueError for another keep or decoder.
    """

    def __init__(
        self,
        model: Any,
        keep: str = "predicted",
        decoder: str = "auto",
        max_new_tokens: int = 1024,
        **sampling,
    ):
        for name, value, known in (("keep", keep, KEEP), ("decoder", decoder, DECODERS)):
            if value not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
        self.model, self.keep, self.decoder = model, keep, decoder
        self.max_new_tokens, self.sampling = max_new_tokens, SamplingParams(**sampling)
        self.sampling.resolve(model.config, 1.0)  # now, not after the reply
        self.clear()

    def clear(self) -> None:
        """Begin anew."""
        self.ids: list[int] = []
        self.pictures: list[Picture] = []
        self.messages: list[dict] = []  # in the official format, `<image>` marking the images
        self.cache, self.known, self.drawn = KVCache(), 0, 0

    # ---- a turn --------------------------------------------------------------------------------

    @torch.no_grad()
    def say(self, text: str, images: Sequence[Any] = ()) -> Iterator[tuple[str, Any]]:
        """One turn of the user; yields the reply as it comes.

        Events: ("text", str) piece by piece; ("embeddings", [1, N, C]) of each image; when the
        text is done, for each of them what `NexusGen.draw` yields, the last of which is
        ("image", PIL). `<image>` in the text places the images, else they stand before it. A turn
        that fails, or is not read to its end, leaves the conversation as it was. ValueError for an
        empty text, an image that cannot be read, or a conversation that has become too long.
        """
        with explain_oom(self.model.advice):
            text = text if IMAGE in text else IMAGE * len(images) + text
            shown = [self._look(load_image(image)) for image in images]
            self.cache.crop(min(self.known, self.cache.length))  # what a turn that failed has added
            prompt, pictures = self.ids + self._turn(text, shown), [*self.pictures, *shown]
            ids, reply, embeds = yield from self._reply(prompt, pictures)
            drawn = yield from self._draw(reply, embeds, pictures)
            seen = [self._seen(*pair) for pair in zip(drawn, embeds, strict=True)]
            self.ids = self._enter(ids, len(prompt), seen)
            self.pictures, self.drawn = pictures + seen, self.drawn + len(seen)
            self.known = self.cache.length
            turns = zip(("user", "assistant"), (text, reply), strict=True)
            self.messages += [{"role": role, "content": content} for role, content in turns]

    def _turn(self, text: str, shown: list[Picture]) -> list[int]:
        """Ids of the user's turn and the opening of the reply. ValueError when out of room."""
        check_text(text, "message")
        message, counts = {"role": "user", "content": text}, [len(p.embeds) for p in shown]
        new = self.model.part_on_device("tokenizer").encode_chat(
            [message], counts, continued=bool(self.ids)
        )
        if (length := len(self.ids) + len(new)) > (room := self.model.room()):
            raise ValueError(
                f"the conversation is {length} tokens long; this model reads {room}: begin anew"
            )
        return new

    def _reply(self, ids: list[int], pictures: list[Picture]) -> Iterator[tuple[str, Any]]:
        """Yield the reply; return all ids with it, its text, and the embeddings of its images."""
        config, stream, found = self.model.config.ar, TextStream(self.model.tokenizer), []
        inputs = self._inputs(ids, pictures)
        for kind, value in self.model.reply(inputs, self.max_new_tokens, self.cache):
            if kind == "image":
                found.append(value)
                ids = ids + [config.image_token_id] * len(value)
                yield "embeddings", value[None]
            else:
                ids = [*ids, value]
                if piece := stream.push(value):
                    yield "text", piece
        if ids[-1] == config.vision_start_token_id:  # out of tokens: announced, not read
            ids, stream.text = ids[:-1], stream.text.removesuffix(IMAGE)
        return [*ids, *self.model.tokenizer.turn_end], stream.text, found

    def _inputs(self, ids: list[int], pictures: list[Picture]) -> ChatInputs:
        """All ids, and all that stands at their images."""
        tensor = torch.tensor([ids], device=self.model.part_on_device("ar").lm_head.weight.device)
        if not pictures:
            return ChatInputs(tensor, None, None)
        grids = torch.tensor([p.grid for p in pictures])
        return ChatInputs(tensor, torch.cat([p.embeds for p in pictures]), grids)

    def _draw(
        self, reply: str, embeds: list[Tensor], pictures: list[Picture]
    ) -> Iterator[tuple[str, Any]]:
        """Draw the reply's images one after the other; return them."""
        drawn: list[Image.Image] = []
        for sentence, one in zip(reply.split(IMAGE), embeds, strict=False):
            before = [p.image for p in pictures] + drawn
            decoder = self._decoder(sentence, before)
            reference = self.model.reference_embeds(before[-1]) if decoder == "editing" else None
            scale = 1.0 if decoder == "editing" else self.model.config.cfg_scale
            seed = self.sampling.seed + self.drawn + len(drawn)
            settings = replace(self.sampling, seed=seed).resolve(self.model.config, scale)
            for event in self.model.draw(ImageRequest("", one[None], reference, decoder, settings)):
                yield event
            drawn.append(event[1])
        return drawn

    def _decoder(self, sentence: str, before: list[Image.Image]) -> str:
        """Which decoder draws the image that `sentence` announces."""
        if self.decoder == "editing" and not before:
            raise ValueError("the editing decoder needs an image to start from; give one")
        if self.decoder != "auto":
            return self.decoder
        news = [known.removesuffix(IMAGE).strip() for known in GENERATION_REPLY.values()]
        return "generation" if not before or sentence.strip().endswith(tuple(news)) else "editing"

    # ---- what is remembered --------------------------------------------------------------------

    def _look(self, image: Image.Image) -> Picture:
        """An image as the AR model reads it."""
        config = self.model.config
        view = bound_image(image, min_pixels=config.min_pixels, max_pixels=config.max_pixels)
        embeds, grid = self.model.embed_images([view])
        return Picture(image, embeds, tuple(grid[0].tolist()))

    def _seen(self, image: Image.Image, embeds: Tensor) -> Picture:
        """What the AR model will see of an image that it drew."""
        if self.keep == "reencoded":
            return self._look(image)
        return Picture(image, embeds, self.model.config.ar.slot_grid)

    def _enter(self, ids: list[int], start: int, seen: list[Picture]) -> list[int]:
        """The ids with as many tokens for each new image, from `start` on, as it will be read in.

        The cache forgets what comes after the first slot that is to be read otherwise.
        """
        config, at = self.model.config.ar, start
        for picture in seen:
            at = ids.index(config.image_token_id, at)
            if picture is seen[0] and self.keep != "slots":
                self.cache.crop(min(at, self.cache.length))
            pads = [config.image_token_id] * len(picture.embeds)
            ids = [*ids[:at], *pads, *ids[at + config.num_image_slots :]]
            at += len(pads)
        return ids
