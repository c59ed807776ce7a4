"""The whole chain: words and images in, words and images out.

    prompt, image -> AR model -> image embeddings [B, N, C] -> projector -> MMDiT <- noise
                                                                 latents -> autoencoder -> image

Figure 2 of the paper. Understanding reads the AR model's text; generation and editing read the
embeddings of one image from its prefilled slots and hand them to the generation or the editing
decoder. Official modules: `NexusGenGenerationPipeline`, `NexusGenEditingPipeline` and the
`image_*.py` scripts of modelscope/Nexus-Gen.

`generate` and `edit` only drive `generate_steps` and `edit_steps`, which yield every intermediate.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import wraps
from inspect import isgeneratorfunction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor

from . import batch as batches
from .chat import Chat, ChatInputs
from .config import NexusGenConfig
from .images import bound_image, load_image, reference_view, to_image, to_patches
from .model import autoregressive, flow
from .model.decoder import KVCache
from .model.mmdit import MMDiT, context_ids_editing, context_ids_generation
from .offload import PROFILES, Offloader, Target, advice, explain_oom, memory_needed, to_fp8
from .sampling import (
    Context,
    ImageRequest,
    SamplingParams,
    classifier_free_guidance,
    velocity_field,
)
from .tokenizer import (
    EDITING_PROMPT,
    EDITING_REPLY,
    GENERATION_PROMPT,
    GENERATION_REPLY,
    IMAGE,
    QwenTokenizer,
    check_text,
)
from .tokenizer import language as detect_language
from .weights import (
    PARTS,
    EditingDecoder,
    GenerationDecoder,
    TextEncoders,
    has_text_encoders,
    model_folder,
    read_part,
    read_text_encoders,
    read_tokenizer,
    text_context,
)

if TYPE_CHECKING:
    from .model.autoencoder import AutoEncoder
    from .model.autoregressive import NexusGenAR

logger = logging.getLogger(__name__)

NOUNS = {
    "ar": "autoregressive model",
    "generation": "generation decoder",
    "editing": "editing decoder",
    "text_encoders": "text encoders (CLIP and T5), which a negative prompt needs",
    "empty_prompt": "constants of the empty prompt",
}

ImageLike = Any  # a path, bytes, an array or a PIL image: see `load_image`
Event = tuple[str, Any]


def pick_language(language: str | None, text: str) -> str:
    """ "en" or "zh" as asked, else by the text's characters. ValueError for another language."""
    language = language or detect_language(text)
    if language not in GENERATION_PROMPT:
        raise ValueError(f"language must be one of {list(GENERATION_PROMPT)}, got {language!r}")
    return language


def with_oom_advice(method: Callable) -> Callable:
    """A method of NexusGen, also a generator, whose MemoryError names the next smaller profile."""

    @wraps(method)
    def steps(self, *args, **options):
        with explain_oom(self.advice):
            yield from method(self, *args, **options)

    @wraps(method)
    def call(self, *args, **options):
        with explain_oom(self.advice):
            return method(self, *args, **options)

    return steps if isgeneratorfunction(method) else call


@dataclass
class NexusGen:
    """All components of one model; what no task needs may be None."""

    config: NexusGenConfig
    tokenizer: QwenTokenizer | None = None
    ar: NexusGenAR | None = None
    autoencoder: AutoEncoder | None = None
    generation: GenerationDecoder | None = None
    editing: EditingDecoder | None = None
    empty_prompt: dict[str, Tensor] | None = None  # CLIP's pooled [1, V], T5's context [1, L, C]
    text_encoders: TextEncoders | None = None
    read_text_encoders: Callable[[], TextEncoders] | None = None  # for one negative prompt each
    offloader: Offloader | None = None  # None: every part works where its weights are

    @classmethod
    def load(
        cls,
        model: str | Path = "tiny",
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
        parts: Sequence[str] = PARTS,
        memory: str = "auto",
        fp8: bool = False,
    ) -> NexusGen:
        """The shipped tiny model, or a folder laid out as the official release.

        dtype None is fp32 on the CPU and bf16 elsewhere. `parts` says what to load, of `PARTS`:
        understanding needs "ar" alone. `memory` is a profile of `offload` ("auto": the first that
        fits the device), fp8 stores the decoders' matrices in 8 bits. ValueError for a folder that
        is not there, lacks a file, or holds one of other sizes than its configuration says.
        """
        from . import weights as loader

        if memory not in PROFILES:
            raise ValueError(f"memory must be one of {', '.join(PROFILES)}, got {memory!r}")
        folder, device = model_folder(model), torch.device(device)
        config = loader.load_config(folder)
        dtype = dtype or (torch.float32 if device.type == "cpu" else torch.bfloat16)
        goal = {"device": device, "dtype": dtype}
        at_once = not fp8 and memory in (("auto", "resident") if device.type == "cpu" else ())
        stored = {"dtype": loader.AS_STORED}
        place = goal if at_once else stored  # else mapped on the host, cast when they travel
        self = cls(config, read_tokenizer(folder, config))

        def advise() -> str:  # by the sizes of all parts, also of those that are not there yet
            sizes = stored | {"device": "meta"}
            read = {name: read_part(name, folder, config, sizes) for name in parts}
            return advice("resident" if at_once else memory, memory_needed(read, dtype))

        with explain_oom(advise):
            for name in parts:
                setattr(self, name, read_part(name, folder, config, place))
        for decoder in (self.generation, self.editing) if fp8 else ():
            if decoder is not None:
                to_fp8(decoder.mmdit)
        if not at_once:
            loaded = {name: getattr(self, name) for name in parts}
            with explain_oom(advise):
                self.offloader = Offloader(memory, loaded, Target(device, dtype))
        if has_text_encoders(folder):
            self.read_text_encoders = lambda: read_text_encoders(folder, config, place)
        if "generation" in parts or "editing" in parts:
            self.empty_prompt = loader.load_empty_prompt(folder, config, **goal)
            if self.empty_prompt is None:
                self.empty_prompt = self.make_empty_prompt(folder)
        return self

    def make_empty_prompt(self, folder: Path) -> dict[str, Tensor]:
        """What CLIP and T5 make of "", computed once and kept in the model's folder: 4 MB."""
        from . import weights as loader

        txt, _, pooled = self.encode_text("")
        tensors = {"pooled": pooled, "context": txt}
        try:
            loader.save_empty_prompt(folder, tensors)
        except OSError as error:
            logger.warning("cannot keep the constants of the empty prompt: %s", error)
        return tensors

    def advice(self) -> str:
        """What to do when a call runs out of memory."""
        parts = {name: part for name in PARTS if (part := getattr(self, name)) is not None}
        if self.offloader is None:
            return advice("resident", memory_needed(parts, None))
        return advice(self.offloader.profile, memory_needed(parts, self.offloader.target.dtype))

    def part(self, name: str) -> Any:
        """The component of that name. ValueError when this model was loaded without it."""
        if (part := getattr(self, name)) is None:
            raise ValueError(f"this model has no {NOUNS.get(name, name)}")
        return part

    def part_on_device(self, name: str) -> Any:
        """The component of that name, where it works. ValueError when this model has none."""
        part = self.part(name)
        if self.offloader is not None:
            self.offloader.onload(part)
        return part

    # ---- the autoregressive half ---------------------------------------------------------------

    def embed_images(self, images: Sequence[Image.Image]) -> tuple[Tensor, Tensor]:
        """Images with sides of whole tokens -> embeddings [n, C] of all, grids [images, 3]."""
        visual = self.part_on_device("ar").visual
        pixels, grid = to_patches(list(images))
        return visual(pixels.to(visual.patch_embed.proj.weight), grid), grid

    def chat_inputs(self, text: str, images: Sequence[ImageLike] = ()) -> ChatInputs:
        """One user message, with `<image>` where each image stands -> what the AR model reads.

        Images are brought within the config's `min_pixels` and `max_pixels`. ValueError when
        placeholders and images differ in number, or for more tokens than there are positions.
        """
        bounds = {"min_pixels": self.config.min_pixels, "max_pixels": self.config.max_pixels}
        views = [bound_image(load_image(image), **bounds) for image in images]
        embeds, grid = self.embed_images(views) if views else (None, None)
        merge = self.config.ar.vision.spatial_merge_size
        counts = [t * h * w // merge**2 for t, h, w in grid.tolist()] if views else []
        ids = self.part_on_device("tokenizer").encode_chat(
            [{"role": "user", "content": text}], counts
        )
        if len(ids) > (room := self.room()):
            raise ValueError(f"the prompt is {len(ids)} tokens long; this model reads {room}")
        device = self.part_on_device("ar").lm_head.weight.device
        return ChatInputs(torch.tensor([ids], device=device), embeds, grid)

    def room(self) -> int:
        """Positions for a prompt: all but those of a fixed sentence and an image."""
        ar = self.config.ar
        return ar.text.max_position_embeddings - ar.num_image_slots - 64

    def generation_inputs(self, prompt: str, language: str | None = None) -> ChatInputs:
        """A description in the template of its language ("en", "zh"; None: by its characters)."""
        check_text(prompt, "prompt")
        return self.chat_inputs(GENERATION_PROMPT[pick_language(language, prompt)].format(prompt))

    def editing_inputs(self, image: ImageLike, instruction: str) -> ChatInputs:
        """The source image, then the instruction, which may place it itself (`<image>`)."""
        check_text(instruction, "instruction")
        text = instruction if IMAGE in instruction else EDITING_PROMPT.format(instruction)
        return self.chat_inputs(text, [image])

    def reply(
        self, inputs: ChatInputs, max_new_tokens: int = 1024, cache: KVCache | None = None
    ) -> Iterator[Event]:
        """The AR model's reply as it comes: ("token", id) and ("image", embeddings [N, C])."""
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
        left = self.config.ar.text.max_position_embeddings - inputs.input_ids.shape[1]
        return autoregressive.generate(
            self.part_on_device("ar"),
            inputs.input_ids,
            image_embeds=inputs.image_embeds,
            image_grid_thw=inputs.image_grid_thw,
            max_new_tokens=min(max_new_tokens, left - self.config.ar.num_image_slots),
            repetition_penalty=self.config.repetition_penalty,
            cache=cache,
        )

    @torch.no_grad()
    def predict_embeddings(
        self, inputs: ChatInputs, sentence: str, fast: bool = False, max_new_tokens: int = 1024
    ) -> tuple[str, Tensor]:
        """What the model says before its image, and the image's embeddings [1, N, C].

        The text is generated, then all slots come from one pass. `fast` takes the training data's
        `sentence` ("Here is the image: <image>") instead; so does a reply without an image.
        """
        preamble = sentence.removesuffix(IMAGE)
        ids = []
        for kind, value in () if fast else self.reply(inputs, max_new_tokens):
            if kind == "image":
                return self.tokenizer.decode(ids).removesuffix(IMAGE), value[None]
            ids.append(value)
        if not fast:
            logger.warning("the model's reply holds no image; drawing after %r", preamble)
        return preamble, self.prefill(inputs, preamble)

    def prefill(self, inputs: ChatInputs, preamble: str) -> Tensor:
        """Embeddings [1, N, C] of the image that follows a fixed sentence, in one pass."""
        tail = [
            *self.part_on_device("tokenizer").encode(preamble),
            self.config.ar.vision_start_token_id,
        ]
        return autoregressive.prefill_image_slots(
            self.part_on_device("ar"),
            torch.cat((inputs.input_ids, inputs.input_ids.new_tensor([tail])), dim=1),
            image_embeds=inputs.image_embeds,
            image_grid_thw=inputs.image_grid_thw,
        )

    # ---- what the decoders are told ------------------------------------------------------------

    def generation_context(self, embeds: Tensor) -> Context:
        """Embeddings [B, N, C] -> N context tokens of the generation decoder, all at position 0."""
        txt = self.part_on_device("generation").adapter(embeds)
        return self.context(txt, context_ids_generation(txt.shape[1]))

    def editing_context(
        self, embeds: Tensor, ref_embeds: Tensor | None, height: int, width: int
    ) -> Context:
        """Target [B, N, C] and source embeddings [B, M, C] (or None) -> N + M context tokens.

        Their positions are spread over the image, which has height x width latent cells.
        """
        grid = self.config.ar.slot_grid
        side = self.config.reference_size // self.config.ar.vision.patch_size
        ref_grid = None if ref_embeds is None else (1, side, side)
        txt = self.part_on_device("editing").merger(embeds, grid, ref_embeds, ref_grid)
        return self.context(txt, context_ids_editing(grid, ref_grid, height, width))

    def context(self, txt: Tensor, ids: Tensor) -> Context:
        """With CLIP's vector of the empty prompt: Nexus-Gen's positive prompt is never text."""
        return Context(
            txt, ids.to(txt.device), self.part_on_device("empty_prompt")["pooled"].to(txt.device)
        )

    def negative_context(self, prompt: str = "") -> Context:
        """T5's states [1, L, C] of a negative prompt, at position 0, and CLIP's vector of it."""
        if prompt:
            check_text(prompt, "negative prompt")
            return self.encode_text(prompt)
        empty = self.part_on_device("empty_prompt")
        txt = empty["context"]
        return Context(txt, context_ids_generation(txt.shape[1]), empty["pooled"])

    @torch.no_grad()
    def encode_text(self, prompt: str) -> Context:
        """T5's states and CLIP's vector; encoders that must be read first are freed again."""
        encoders = self.text_encoders
        if encoders is None and self.read_text_encoders:
            encoders = self.read_text_encoders()
        if encoders is None:
            raise ValueError(f"this model has no {NOUNS['text_encoders']}")
        with self.offloader.temporary(encoders) if self.offloader else nullcontext():
            return text_context(encoders, *encoders.ids(prompt))

    @torch.no_grad()
    def reference_embeds(self, image: ImageLike) -> Tensor:
        """The source as the editing decoder sees it, at `config.reference_size`: [1, M, C]."""
        view = reference_view(load_image(image), self.config.reference_size)
        return self.embed_images([view])[0].unsqueeze(0)

    # ---- drawing -------------------------------------------------------------------------------

    def negative_of(self, sampling: SamplingParams) -> Context | None:
        """What cfg leads away from; None when it is off."""
        on = sampling.cfg_scale != 1
        return self.negative_context(sampling.negative_prompt) if on else None

    @torch.no_grad()
    def denoise_steps(
        self,
        mmdit: MMDiT,
        context: Context,
        noise: Tensor,
        sampling: SamplingParams,
        negative: Context | None = None,
    ) -> Iterator[flow.Step]:
        """Euler steps (i, t, x_t, x0) from noise [B, z, h, w] to latents; `sampling` is resolved.

        `negative` is what cfg leads away from; default: the context of `sampling.negative_prompt`.
        """
        negative = negative or self.negative_of(sampling)
        if self.offloader is not None:
            self.offloader.onload(mmdit)
        sigmas = flow.schedule(sampling.num_steps)
        settings = (*noise.shape[-2:], sampling.guidance, sigmas[:-1].tolist())
        away = None
        if sampling.cfg_scale != 1:
            away = velocity_field(mmdit, negative, *settings)
        field = classifier_free_guidance(
            velocity_field(mmdit, context, *settings), away, sampling.cfg_scale
        )
        yield from flow.denoise(field, noise.to(mmdit.img_in.weight.device), sigmas)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> list[Image.Image]:
        """Latents [B, z, h, w] -> B images."""
        vae = self.part_on_device("autoencoder")
        return [to_image(x) for x in vae.decode(latents.to(vae.decoder.conv_in.weight)).float()]

    def draw(self, drawing: ImageRequest) -> Iterator[Event]:
        """Yield ("sampling", Sampling), ("context", Context), ("step", Step)..., ("image", PIL)."""
        sampling = drawing.sampling
        negative, context = self.negative_of(sampling), self.drawing_context(drawing)
        yield "sampling", sampling
        yield "context", context
        mmdit, noise = self.part(drawing.decoder).mmdit, sampling.noise(self.config)
        for step in self.denoise_steps(mmdit, context, noise, sampling, negative):
            yield "step", step
        yield "image", self.decode(step.x)[0]

    def drawing_context(self, drawing: ImageRequest) -> Context:
        """What the decoder of a drawing, or of a batch of them, is told."""
        if drawing.decoder == "generation":
            return self.generation_context(drawing.embeds)
        size = drawing.sampling.latent_shape(self.config)[2:]
        return self.editing_context(drawing.embeds, drawing.reference, *size)

    # ---- the three tasks -----------------------------------------------------------------------

    @with_oom_advice
    @torch.no_grad()
    def understand(
        self, image: ImageLike | Sequence[ImageLike], question: str, *, max_new_tokens: int = 1024
    ) -> str:
        """Answer a question about an image, or several; None or an empty list asks without any.

        ValueError for an empty or overlong question and for what is no image.
        """
        check_text(question, "question")
        images = list(image) if isinstance(image, (list, tuple)) else [image]
        images = [i for i in images if i is not None]
        text = question if IMAGE in question else IMAGE * len(images) + question
        events = self.reply(self.chat_inputs(text, images), max_new_tokens)
        return self.tokenizer.decode([value for kind, value in events if kind == "token"]).strip()

    @with_oom_advice
    @torch.no_grad()
    def plan_generation(
        self,
        prompt: str,
        *,
        language: str | None = None,
        fast_preamble: bool = False,
        max_new_tokens: int = 1024,
        **sampling,
    ) -> ImageRequest:
        """The AR model's half of `generate`, and the settings of the other."""
        self.part("generation")
        settings = SamplingParams(**sampling).resolve(self.config, self.config.cfg_scale)
        sentence = GENERATION_REPLY[pick_language(language, prompt)]
        inputs = self.generation_inputs(prompt, language)
        text, embeds = self.predict_embeddings(inputs, sentence, fast_preamble, max_new_tokens)
        return ImageRequest(text, embeds, None, "generation", settings)

    @with_oom_advice
    @torch.no_grad()
    def generate_steps(self, prompt: str, **options) -> Iterator[Event]:
        """`generate` in steps: ("text", str), ("embeddings", [1, N, C]), then those of `draw`."""
        drawing = self.plan_generation(prompt, **options)
        yield "text", drawing.text
        yield "embeddings", drawing.embeds
        yield from self.draw(drawing)

    def generate(self, prompt: str, **options) -> Image.Image:
        """Draw a description, English or Chinese.

        Options: language "en" or "zh" (default: by the characters); fast_preamble, which says the
        training data's sentence instead of generating it; max_new_tokens; and the fields of
        `SamplingParams`: height, width, num_steps, cfg_scale, guidance, negative_prompt, seed.
        ValueError for an empty or overlong prompt and for options out of range.
        """
        return last_image(self.generate_steps(prompt, **options))

    @with_oom_advice
    @torch.no_grad()
    def plan_edit(
        self,
        image: ImageLike,
        instruction: str,
        *,
        decoder: str = "editing",
        language: str | None = None,
        fast_preamble: bool = False,
        max_new_tokens: int = 1024,
        **sampling,
    ) -> ImageRequest:
        """The AR model's half of `edit`, and the settings of the other."""
        if decoder not in ("editing", "generation"):
            raise ValueError(f"decoder must be editing or generation, got {decoder!r}")
        self.part(decoder)
        cfg_scale = 1.0 if decoder == "editing" else self.config.cfg_scale
        settings = SamplingParams(**sampling).resolve(self.config, cfg_scale)
        sentence = EDITING_REPLY[pick_language(language, instruction)]
        source = load_image(image)
        inputs = self.editing_inputs(source, instruction)
        text, embeds = self.predict_embeddings(inputs, sentence, fast_preamble, max_new_tokens)
        reference = self.reference_embeds(source) if decoder == "editing" else None
        return ImageRequest(text, embeds, reference, decoder, settings)

    @with_oom_advice
    @torch.no_grad()
    def edit_steps(self, image: ImageLike, instruction: str, **options) -> Iterator[Event]:
        """`edit` in steps: ("text", str), ("embeddings", [1, N, C]), then those of `draw`."""
        drawing = self.plan_edit(image, instruction, **options)
        yield "text", drawing.text
        yield "embeddings", drawing.embeds
        yield from self.draw(drawing)

    def edit(self, image: ImageLike, instruction: str, **options) -> Image.Image:
        """Change an image as told.

        Options: decoder "editing" (keeps what is not told to change; default) or "generation" (for
        conceptual edits: the image is drawn anew); else as `generate`. ValueError also for what
        is no image.
        """
        return last_image(self.edit_steps(image, instruction, **options))

    def batch(self, items: Sequence[dict], **options) -> list[batches.Result]:
        """Tasks of any kinds in one call, one result each: see `batches.run`."""
        return sorted(batches.run(self, items, **options), key=lambda result: result.index)

    def chat(self, **options) -> Chat:
        """A conversation, empty so far: see `conversation.Chat` for the options."""
        return Chat(self, **options)


def last_image(events: Iterator[Event]) -> Image.Image:
    """Run a generator of events to its end, which is the image."""
    return dict(events)["image"]
