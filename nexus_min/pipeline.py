"""Figure 2 of the paper, from top to bottom: text and images in, text and images out.

    prompt, image -> AR model -> image embeddings [B, N, C] -> projector -> MMDiT <- noise
                                                                 latents -> autoencoder -> image

The numbered functions come first; `NexusGen` below has options and helpers. A "decoder" here is a
projector and an MMDiT. `parts` loads the towers: part(name) is one of them, part_on_device(name)
the same on the GPU. Official modules: `NexusGenGenerationPipeline`, `NexusGenEditingPipeline` and
the `image_*.py` scripts of modelscope/Nexus-Gen.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from .images import bound_image, load_image, reference_view, to_image, to_patches
from .model import autoregressive, flow
from .model.decoder import KVCache
from .model.mmdit import MMDiT, context_ids_editing, context_ids_generation
from .offload import explain_oom
from .parts import Answer, Parts
from .sampling import (
    TEXT_OPTIONS,
    ChatInputs,
    Context,
    ImageRequest,
    SamplingParams,
    in_range,
    velocity_field,
)
from .tokenizer import (
    EDITING_PROMPT,
    EDITING_REPLY,
    GENERATION_PROMPT,
    GENERATION_REPLY,
    IMAGE,
    check_text,
    language_of,
)

logger = logging.getLogger(__name__)

ImageLike = Any  # a path, bytes, an array or a PIL image: see `load_image`
Event = tuple[str, Any]  # the name of an intermediate, and its value


# ---- understand, generate, edit ----------------------------------------------------------------


@torch.no_grad()
def understand(
    model: NexusGen, images: Sequence[ImageLike], question: str, max_new_tokens: int = 1024
) -> Answer:
    """Images and a question -> the answer."""
    check_text(question, "question")
    # 1. The vision tower embeds the images. The text becomes ids, with image tokens in their place.
    text = question if IMAGE in question else IMAGE * len(images) + question
    inputs = model.chat_inputs(text, images)
    model.known.check(question, images)
    # 2. The AR model continues, one token after the other.
    ids = [value for kind, value in model.reply(inputs, max_new_tokens) if kind == "token"]
    # 3. The ids become text.
    return Answer.of(model.tokenizer.decode(ids).strip(), bool(model.known.facts))


@torch.no_grad()
def plan_generation(
    model: NexusGen,
    prompt: str,
    *,
    language: str | None = None,
    fast_preamble: bool = False,
    max_new_tokens: int = 1024,
    **sampling,
) -> ImageRequest:
    """First half of `generate`: prompt -> image embeddings. `sample_images` is the second half."""
    model.part("generation")  # fail now if the decoder is missing, not after the reply
    params = SamplingParams.of(*TEXT_OPTIONS, **sampling)
    params = params.resolve(model.config, model.config.cfg_scale)
    language = language_of(prompt, language)
    # 1. The prompt, in the template of its language, becomes ids.
    inputs = model.generation_inputs(prompt, language)
    model.known.check(prompt, (), params)
    # 2. The AR model replies: text, then the embeddings of all image slots in one causal pass.
    text, embeds = model.predict_embeddings(
        inputs, GENERATION_REPLY[language], fast_preamble, max_new_tokens
    )
    return ImageRequest(text, embeds, None, "generation", params)


@torch.no_grad()
def plan_edit(
    model: NexusGen,
    image: ImageLike,
    instruction: str,
    *,
    decoder: str = "editing",
    language: str | None = None,
    fast_preamble: bool = False,
    max_new_tokens: int = 1024,
    **sampling,
) -> ImageRequest:
    """First half of `edit`: image and instruction -> image embeddings."""
    if decoder not in ("editing", "generation"):
        raise ValueError(f"decoder must be editing or generation, got {decoder!r}")
    model.part(decoder)
    cfg_scale = 1.0 if decoder == "editing" else model.config.cfg_scale
    params = SamplingParams.of("decoder", *TEXT_OPTIONS, **sampling)
    params = params.resolve(model.config, cfg_scale)
    sentence = EDITING_REPLY[language_of(instruction, language)]
    # 1. The vision tower embeds the source image; the instruction becomes ids.
    source = load_image(image)
    inputs = model.editing_inputs(source, instruction)
    model.known.check(instruction, [source], params)
    # 2. The AR model predicts the embeddings of the target, as for a prompt.
    text, embeds = model.predict_embeddings(inputs, sentence, fast_preamble, max_new_tokens)
    # The editing decoder also reads the source, at twice the side: 324 embeddings beside 81.
    reference = model.reference_embeds(source) if decoder == "editing" else None
    return ImageRequest(text, embeds, reference, decoder, params)


@torch.no_grad()
def sample_images(model: NexusGen, requests: Sequence[ImageRequest]) -> Iterator[Event]:
    """`generate` and `edit`, second half: one batch of requests of one decoder and one size.

    Yields ("sampling", SamplingParams), ("context", Context), ("step", Step)... and an
    ("image", PIL) for each request.
    """
    # all requests share decoder and params, except for the seeds
    decoder, params = requests[0].decoder, requests[0].sampling
    negative = model.negative_context(params.negative_prompt) if params.cfg_scale != 1 else None
    # 3. The projector turns the embeddings into context tokens of the MMDiT.
    embeds = torch.cat([request.embeds for request in requests])
    if decoder == "generation":
        context = model.generation_context(embeds)
    else:
        reference = torch.cat([request.reference for request in requests])
        context = model.editing_context(embeds, reference, *params.latent_shape(model.config)[2:])
    yield "sampling", params
    yield "context", context
    # 4. Euler steps follow the velocity of the MMDiT from noise to latents.
    noise = torch.cat([request.sampling.noise(model.config) for request in requests])
    for step in model.denoise_steps(model.part(decoder).mmdit, context, noise, params, negative):
        yield "step", step
    # 5. The autoencoder decodes the latents into pixels.
    for image in model.decode(step.x):
        yield "image", image


# ---- the model ---------------------------------------------------------------------------------


class NexusGen(Parts):
    """All towers of one model, and the tasks they do; `NexusGen.load` reads them from a folder."""

    def understand(
        self, image: ImageLike | Sequence[ImageLike], question: str, *, max_new_tokens: int = 1024
    ) -> Answer:
        """Answer a question about one image, several (a list) or none (None or []).

        The reply is a text with the attributes `answer` and `reasoning`.
        """
        images = list(image) if isinstance(image, (list, tuple)) else [image]
        images = [load_image(i) for i in images if i is not None]
        with explain_oom(self.advice):
            return understand(self, images, question, max_new_tokens)

    def generate(
        self,
        prompt: str,
        *,
        height: int | None = None,
        width: int | None = None,
        num_steps: int | None = None,
        cfg_scale: float | None = None,
        guidance: float = 3.5,
        negative_prompt: str = "",
        seed: int = 0,
        language: str | None = None,
        fast_preamble: bool = False,
        max_new_tokens: int = 1024,
        **unknown,
    ) -> Image.Image:
        """Generate the image of a description, English or Chinese.

        language: "en" or "zh", by default by the characters. fast_preamble: reply with the training
        data's sentence instead of generating one. The other options: see `SamplingParams`.
        """
        options = {k: v for k, v in locals().items() if k not in ("self", "unknown")} | unknown
        *_, (_, image) = self.generate_steps(**options)
        return image

    def generate_steps(self, prompt: str, **options) -> Iterator[Event]:
        """`generate`, step by step: ("text", str), ("embeddings", [1, N, C]), `sample_images`."""
        with explain_oom(self.advice):
            request = plan_generation(self, prompt, **options)
            yield "text", request.text
            yield "embeddings", request.embeds
            yield from sample_images(self, [request])

    def edit(
        self, image: ImageLike, instruction: str, *, decoder: str = "editing", **options
    ) -> Image.Image:
        """Change an image by an instruction.

        decoder: "editing" preserves what the instruction leaves alone; "generation" makes the image
        anew, for conceptual edits. The other options: see `generate`.
        """
        *_, (_, edited) = self.edit_steps(image, instruction, decoder=decoder, **options)
        return edited

    def edit_steps(self, image: ImageLike, instruction: str, **options) -> Iterator[Event]:
        """`edit`, step by step, as `generate_steps`."""
        with explain_oom(self.advice):
            request = plan_edit(self, image, instruction, **options)
            yield "text", request.text
            yield "embeddings", request.embeds
            yield from sample_images(self, [request])

    # ---- steps 1 and 2: the autoregressive model -----------------------------------------------

    def embed_images(self, images: Sequence[Image.Image]) -> tuple[Tensor, Tensor]:
        """Images with sides of whole tokens -> embeddings [n, C] of all, grids [images, 3]."""
        visual = self.part_on_device("ar").visual
        pixels, grid = to_patches(list(images))
        return visual(pixels.to(visual.patch_embed.proj.weight), grid), grid

    def chat_inputs(self, text: str, images: Sequence[ImageLike] = ()) -> ChatInputs:
        """One user message, with `<image>` where each image stands -> what the AR model reads."""
        bounds = {"min_pixels": self.config.min_pixels, "max_pixels": self.config.max_pixels}
        # images of any size -> multiples of 28 px; each embedding stands for 28 x 28 pixels
        views = [bound_image(load_image(image), **bounds) for image in images]
        embeds, grid = self.embed_images(views) if views else (None, None)
        merge = self.config.ar.vision.spatial_merge_size
        counts = [t * h * w // merge**2 for t, h, w in grid.tolist()] if views else []
        message = {"role": "user", "content": text}
        ids = self.part_on_device("tokenizer").encode_chat([message], counts)
        if len(ids) > (limit := self.max_prompt_tokens()):
            raise ValueError(f"the prompt is {len(ids)} tokens long; the limit is {limit}")
        device = self.part_on_device("ar").lm_head.weight.device
        return ChatInputs(torch.tensor([ids], device=device), embeds, grid)

    def generation_inputs(self, prompt: str, language: str | None = None) -> ChatInputs:
        """A description in the template of its language ("en", "zh"; None: by its characters)."""
        check_text(prompt, "prompt")
        return self.chat_inputs(GENERATION_PROMPT[language_of(prompt, language)].format(prompt))

    def editing_inputs(self, image: ImageLike, instruction: str) -> ChatInputs:
        """The source image, then the instruction, unless that places the image (`<image>`)."""
        check_text(instruction, "instruction")
        text = instruction if IMAGE in instruction else EDITING_PROMPT.format(instruction)
        return self.chat_inputs(text, [image])

    def reply(
        self, inputs: ChatInputs, max_new_tokens: int = 1024, cache: KVCache | None = None
    ) -> Iterator[Event]:
        """The AR model's reply: ("token", id) and ("image", embeddings [N, C])."""
        most = in_range("max_new_tokens", max_new_tokens, 1024)
        left = self.config.ar.text.max_position_embeddings - inputs.input_ids.shape[1]
        return autoregressive.generate(
            self.part_on_device("ar"),
            *inputs,
            max_new_tokens=min(most, left - self.config.ar.num_image_slots),
            repetition_penalty=self.config.repetition_penalty,
            cache=cache,
        )

    @torch.no_grad()
    def predict_embeddings(
        self, inputs: ChatInputs, sentence: str, fast: bool = False, max_new_tokens: int = 1024
    ) -> tuple[str, Tensor]:
        """The reply's text before its image, and the image's embeddings [1, N, C].

        fast: take the training data's `sentence` ("Here is the image: <image>") as the reply. A
        reply without an image falls back to it as well.
        """
        ids, preamble = [], sentence.removesuffix(IMAGE)
        for kind, value in () if fast else self.reply(inputs, max_new_tokens):
            if kind == "image":
                text = self.tokenizer.decode(ids)  # vision_start, the last id, shows as <image>
                return text.removesuffix(IMAGE), value[None]
            ids.append(value)
        if not fast:
            logger.warning("the reply holds no image; the image follows %r instead", preamble)
        return preamble, self.prefill(inputs, preamble)

    def prefill(self, inputs: ChatInputs, preamble: str) -> Tensor:
        """Embeddings [1, N, C] of the image that follows a fixed sentence, in one pass."""
        start = self.config.ar.vision_start_token_id
        tail = [*self.part_on_device("tokenizer").encode(preamble), start]
        ids = torch.cat((inputs.input_ids, inputs.input_ids.new_tensor([tail])), dim=1)
        return autoregressive.prefill_image_slots(self.part_on_device("ar"), ids, *inputs[1:])

    @torch.no_grad()
    def reference_embeds(self, image: ImageLike) -> Tensor:
        """The source as the editing decoder sees it, at `config.reference_size`: [1, M, C]."""
        view = reference_view(load_image(image), self.config.reference_size)  # squeezed
        return self.embed_images([view])[0].unsqueeze(0)

    # ---- step 3: the context -------------------------------------------------------------------

    def generation_context(self, embeds: Tensor) -> Context:
        """Embeddings [B, N, C] -> N context tokens, all at position 0."""
        txt = self.part_on_device("generation").adapter(embeds)
        ids = context_ids_generation(txt.shape[1]).to(txt.device)
        # CLIP's vector of the empty prompt: Nexus-Gen's positive prompt is never text
        return Context(txt, ids, self.part_on_device("empty_prompt")["pooled"].to(txt.device))

    def editing_context(
        self, embeds: Tensor, ref_embeds: Tensor | None, height: int, width: int
    ) -> Context:
        """Target [B, N, C] and source embeddings [B, M, C] (or None) -> N + M context tokens.

        Their positions are spread over the height x width latent cells of the image.
        """
        grid = self.config.ar.slot_grid
        side = self.config.reference_size // self.config.ar.vision.patch_size
        ref_grid = None if ref_embeds is None else (1, side, side)
        txt = self.part_on_device("editing").merger(embeds, grid, ref_embeds, ref_grid)
        ids = context_ids_editing(grid, ref_grid, height, width).to(txt.device)
        return Context(txt, ids, self.part_on_device("empty_prompt")["pooled"].to(txt.device))

    # ---- steps 4 and 5: latents and pixels -----------------------------------------------------

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

        negative: what cfg leads away from, by default the context of `sampling.negative_prompt`.
        """
        scale, is_guided = sampling.cfg_scale, sampling.cfg_scale != 1
        if is_guided and negative is None:
            negative = self.negative_context(sampling.negative_prompt)
        if self.offloader is not None:
            self.offloader.onload(mmdit)
        sigmas = flow.schedule(sampling.num_steps)
        settings = (*noise.shape[-2:], sampling.guidance, sigmas[:-1].tolist())
        v_neg = velocity_field(mmdit, negative, *settings) if is_guided else None
        field = v_pos = velocity_field(mmdit, context, *settings)
        if is_guided:
            field = lambda x, t: flow.cfg(v_neg(x, t), v_pos(x, t), scale)  # noqa: E731
        yield from flow.denoise(field, noise.to(mmdit.img_in.weight.device), sigmas)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> list[Image.Image]:
        """Latents [B, z, h, w] -> B images."""
        vae = self.part_on_device("autoencoder")
        return [to_image(x) for x in vae.decode(latents.to(vae.decoder.conv_in.weight)).float()]
