"""The chain: the official pipelines step by step (12a, 12b), and what ours does at toy size."""

from __future__ import annotations

import json
import logging
import lzma
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import GOLDEN, golden, weights
from PIL import Image
from safetensors.torch import load_file, save_file
from test_tokenizer import byte_tokenizer
from tiny_model import make_tiny, save_tiny

from nexus_min.config import (
    ARConfig,
    AutoEncoderConfig,
    CLIPConfig,
    MMDiTConfig,
    NexusGenConfig,
    T5Config,
    TextConfig,
)
from nexus_min.model import autoregressive, flow
from nexus_min.model.autoencoder import AutoEncoder
from nexus_min.model.mmdit import MMDiT, context_ids_generation
from nexus_min.model.projector import GenerationAdapter, ImageEmbeddingMerger
from nexus_min.model.text_encoders import CLIPTextModel, T5Encoder
from nexus_min.parts import TextEncoders
from nexus_min.pipeline import NexusGen
from nexus_min.sampling import Context, SamplingParams, velocity_field
from nexus_min.weights import (
    EditingDecoder,
    GenerationDecoder,
    diffsynth_name,
    is_swapped,
    swap_halves,
)

# ---- the official pipelines at micro size ------------------------------------------------------


def micro_config(meta: dict) -> NexusGenConfig:
    """The sizes of a fixture, whose JSON speaks DiffSynth."""
    dit, vae, clip, t5 = (meta["config"][k] for k in ("dit", "vae", "clip", "t5"))
    return NexusGenConfig(
        ar=ARConfig(text=TextConfig.from_dict(meta["config"].get("merger", {"hidden_size": 32}))),
        mmdit=MMDiTConfig(
            vec_in_dim=dit["pooled"],
            context_in_dim=dit["ctx"],
            hidden_size=dit["dim"],
            num_heads=dit["heads"],
            depth=dit["joint"],
            depth_single_blocks=dit["single"],
            axes_dim=tuple(dit["axes"]),
        ),
        autoencoder=AutoEncoderConfig.from_dict(vae),
        clip=CLIPConfig(
            vocab_size=clip["vocab"],
            hidden_size=clip["dim"],
            intermediate_size=clip["inter"],
            num_hidden_layers=clip["layers"],
            num_attention_heads=clip["heads"],
        ),
        t5=T5Config.from_dict(t5),
        num_steps=meta["config"]["steps"],
    )


def filled(model: torch.nn.Module, state: dict) -> torch.nn.Module:
    model.load_state_dict(state)
    return model.eval().requires_grad_(False)


def micro_mmdit(config: NexusGenConfig, tensors: dict) -> MMDiT:
    model, state = MMDiT(config.mmdit), weights(tensors, "pipe.dit.")
    names = {name: diffsynth_name(name) for name in model.state_dict()}
    assert len(names) == len(state)
    return filled(
        model, {n: swap_halves(state[k]) if is_swapped(n) else state[k] for n, k in names.items()}
    )


def micro_model(name: str) -> tuple[NexusGen, dict]:
    """A NexusGen without AR model, with everything the fixture holds."""
    tensors, meta = golden(name)
    config = micro_config(meta)
    model = NexusGen(config, autoencoder=AutoEncoder(config.autoencoder))
    filled(model.autoencoder.decoder, weights(tensors, "vae/decoder."))
    clip = filled(CLIPTextModel(config.clip), weights(tensors, "clip/"))
    t5 = filled(T5Encoder(config.t5), weights(tensors, "t5/"))
    ids = {"": "empty", "bad": "neg_bad"}
    model.text_encoders = TextEncoders(
        clip,
        t5,
        lambda text: tensors[f"in/clip_ids_{ids[text]}"],
        lambda text: tensors[f"in/t5_ids_{ids[text]}"],
    )
    empty = model.text_encoders.context("")
    model.empty_prompt = {"pooled": empty.pooled, "context": empty.txt}
    mmdit, context_dim = micro_mmdit(config, tensors), config.mmdit.context_in_dim
    if name == "12a":
        adapter = GenerationAdapter(config.ar.text.hidden_size, context_dim)
        state = {k: v for k, v in weights(tensors).items() if k.startswith("adapter.")}
        model.generation = GenerationDecoder(mmdit, filled(adapter, state))
    else:
        merger = ImageEmbeddingMerger(config.ar.text, context_dim)
        model.editing = EditingDecoder(mmdit, filled(merger, weights(tensors, "embedding_merger.")))
    return model, tensors


@pytest.fixture(scope="module")
def generation():
    return micro_model("12a")


@pytest.fixture(scope="module")
def editing():
    return micro_model("12b")


def official(model: NexusGen, cfg_scale: float, negative_prompt: str = "") -> SamplingParams:
    sampling = SamplingParams(
        64, 96, cfg_scale=cfg_scale, negative_prompt=negative_prompt, seed=1000
    )
    return sampling.resolve(model.config, 1.0)


def walk(model: NexusGen, mmdit: MMDiT, context: Context, sampling: SamplingParams) -> torch.Tensor:
    """All latents of the walk: [steps, z, h, w]."""
    noise = sampling.noise(model.config)
    return torch.cat([s.x for s in model.denoise_steps(mmdit, context, noise, sampling)])


def first_velocity(model: NexusGen, mmdit: MMDiT, context: Context, sampling: SamplingParams):
    """Velocity at pure noise, from the first step's prediction x0 = noise - v."""
    noise = sampling.noise(model.config)
    return noise - next(model.denoise_steps(mmdit, context, noise, sampling)).x0


def check_picture(assert_parity, tower, reference, model, latents, tensors, key):
    """VAE output and 8-bit image; a float at the edge of a level may fall on either side."""
    raw = model.autoencoder.decode(latents).detach()
    assert_parity(tower, f"{reference} vae output", raw, tensors[f"out/{key}/vae_output"])
    if f"out/{key}/image_hwc_uint8" in tensors:
        got = np.asarray(model.decode(latents)[0]).astype(int)
        want = tensors[f"out/{key}/image_hwc_uint8"].numpy().astype(int)
        assert got.shape == want.shape and abs(got - want).max() <= 1
        assert (got != want).mean() < 1e-3


def test_parity_noise_of_the_seed(assert_parity, generation):
    model, tensors = generation
    noise = official(model, 1.0).noise(model.config)
    assert_parity("pipeline", "12a noise", noise, tensors["in/noise"], 0.0)


def test_parity_generation_contexts(assert_parity, generation):
    model, tensors = generation
    context = model.generation_context(tensors["in/image_embeddings"])
    assert_parity("pipeline", "12a prompt_emb", context.txt, tensors["out/prompt_emb"])
    assert_parity("pipeline", "12a positive pooled", context.pooled, tensors["out/positive_pooled"])
    assert context.txt_ids.shape == (1, 81, 3) and not context.txt_ids.any()
    negative = model.negative_context("")
    assert negative.txt.shape == (1, 512, 32)
    head = negative.txt[:, :16]
    assert_parity("pipeline", "12a negative t5", head, tensors["out/negative_t5_first16"], 1e-4)
    assert_parity(
        "pipeline", "12a negative pooled", negative.pooled, tensors["out/negative_pooled"]
    )


@pytest.mark.parametrize(
    ("key", "scale", "negative"),
    [("cfg3", 3.0, ""), ("cfg1", 1.0, ""), ("cfg3_negbad", 3.0, "bad")],
)
def test_parity_generation_steps(assert_parity, generation, key, scale, negative):
    model, tensors = generation
    sampling = official(model, scale, negative)
    context = model.generation_context(tensors["in/image_embeddings"])
    latents = walk(model, model.generation.mmdit, context, sampling)
    if key == "cfg3":
        want = tensors["out/cfg3/velocity_step0"]
        got = first_velocity(model, model.generation.mmdit, context, sampling)
        assert_parity("pipeline", "12a cfg3 velocity", got, want)
        assert_parity("pipeline", "12a cfg3 steps", latents, tensors["out/cfg3/latents_per_step"])
    else:
        assert_parity(
            "pipeline", f"12a {key} latents", latents[-1], tensors[f"out/{key}/latents_final"]
        )
    if key != "cfg3_negbad":
        check_picture(assert_parity, "pipeline", f"12a {key}", model, latents[-1:], tensors, key)


def test_parity_editing_context(assert_parity, editing):
    model, tensors = editing
    context = model.editing_context(
        tensors["in/image_embeddings"], tensors["in/ref_embeddings"], 8, 12
    )
    assert_parity("pipeline", "12b prompt_emb", context.txt, tensors["out/prompt_emb"])
    assert_parity("pipeline", "12b text_ids", context.txt_ids, tensors["out/text_ids_expected"])


@pytest.mark.parametrize(("key", "scale"), [("cfg1", 1.0), ("cfg3", 3.0), ("noref_cfg1", 1.0)])
def test_parity_editing_steps(assert_parity, editing, key, scale):
    model, tensors = editing
    reference = None if key == "noref_cfg1" else tensors["in/ref_embeddings"]
    context = model.editing_context(tensors["in/image_embeddings"], reference, 8, 12)
    sampling = official(model, scale)
    latents = walk(model, model.editing.mmdit, context, sampling)
    if key == "cfg1":
        want = tensors["out/cfg1/velocity_step0"]
        got = first_velocity(model, model.editing.mmdit, context, sampling)
        assert_parity("pipeline", "12b cfg1 velocity", got, want)
        assert_parity("pipeline", "12b cfg1 steps", latents, tensors["out/cfg1/latents_per_step"])
        check_picture(assert_parity, "pipeline", "12b cfg1", model, latents[-1:], tensors, key)
    else:
        assert_parity(
            "pipeline", f"12b {key} latents", latents[-1], tensors[f"out/{key}/latents_final"]
        )


@pytest.mark.parametrize("name", ["12a", "12b"])
@pytest.mark.parametrize("level", [10, 500, 990])
def test_parity_training_loss(assert_parity, request, name, level):
    """One level of the official schedule: plain MSE, then times the level's weight."""
    model, tensors = request.getfixturevalue("generation" if name == "12a" else "editing")
    embeds = tensors["in/image_embeddings"]
    if name == "12a":
        mmdit, context = model.generation.mmdit, model.generation_context(embeds)
    else:
        mmdit = model.editing.mmdit
        context = model.editing_context(embeds, tensors["in/ref_embeddings"], 8, 12)
    sigmas = flow.training_sigmas()
    field = velocity_field(mmdit, context, 8, 12)
    pair = tensors["in/train_latents"], tensors["in/train_noise"]
    t = sigmas[level, None]
    mse = flow.rf_loss(field, *pair, t)
    loss = flow.rf_loss(field, *pair, t, flow.training_weights(sigmas)[level, None])
    assert_parity(
        "pipeline", f"{name} mse {level}", mse.detach(), tensors[f"out/train/mse_id{level}"]
    )
    assert_parity(
        "pipeline", f"{name} loss {level}", loss.detach(), tensors[f"out/train/loss_id{level}"]
    )


# ---- settings ----------------------------------------------------------------------------------


def test_defaults_and_rounding():
    full = SamplingParams(height=500, width=1).resolve(NexusGenConfig.v2(), 3.0)
    assert (full.height, full.width, full.num_steps, full.cfg_scale) == (512, 16, 50, 3.0)
    tiny = SamplingParams(height=57).resolve(NexusGenConfig.tiny(), 1.0)
    assert (tiny.height, tiny.width, tiny.num_steps) == (64, 64, 3)
    assert tiny.latent_shape(NexusGenConfig.tiny()) == (1, 16, 8, 8)


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ({"height": 0}, "height must be a whole number from 1 to"),
        ({"width": -8}, "got -8"),
        ({"height": 10**9}, "got 1000000000"),
        ({"num_steps": 0}, "num_steps must be a whole number from 1 to 1000, got 0"),
        ({"num_steps": 1001}, "got 1001"),
        ({"cfg_scale": float("nan")}, "cfg_scale must be a number"),
        ({"guidance": float("inf")}, "guidance"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**63}, "seed"),
    ],
)
def test_settings_out_of_range(bad, says):
    with pytest.raises(ValueError, match=says):
        SamplingParams(**bad).resolve(NexusGenConfig.tiny(), 1.0)


def test_seeds_differ_and_repeat():
    config = NexusGenConfig.tiny()
    a, b, c = (SamplingParams(64, 64, seed=s).noise(config) for s in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c)


# ---- the toy-sized chain -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny() -> NexusGen:
    return make_tiny()


@pytest.fixture
def photo() -> Image.Image:
    gradient = Image.linear_gradient("L").resize((90, 70))
    return Image.merge("RGB", (gradient, gradient.rotate(90), gradient.rotate(180)))


def draws(model: NexusGen, monkeypatch, reply: list[int]) -> None:
    """Let the AR model say `reply`, whatever its random weights prefer."""
    words = iter(reply)
    inner = autoregressive.generate
    monkeypatch.setattr(
        autoregressive,
        "generate",
        lambda *a, **k: inner(*a, **k, sample=lambda logits: next(words)),
    )


def test_generation_prompt_follows_the_template(tiny):
    text = tiny.tokenizer.decode(tiny.generation_inputs("a {red} circle").input_ids[0])
    assert "Generate an image according to the following description: a {red} circle" in text
    text = tiny.tokenizer.decode(tiny.generation_inputs("一个红色的圆").input_ids[0])
    assert "根据以下描述生成一张图像：一个红色的圆" in text
    text = tiny.tokenizer.decode(tiny.generation_inputs("一", language="en").input_ids[0])
    assert "Generate an image" in text


def test_editing_prompt_places_the_picture_unless_the_user_did(tiny, photo):
    def text(instruction):
        inputs = tiny.editing_inputs(photo, instruction)
        assert inputs.image_grid_thw.prod(1).sum() // 4 == len(inputs.image_embeds)
        return tiny.tokenizer.decode(inputs.input_ids[0])

    assert "user\n<image> make it red" in text("make it red")
    assert "user\nIn <image> make it red" in text("In <image> make it red")
    with pytest.raises(ValueError, match="2 <image> placeholders for 1 images"):
        text("<image> and <image>")


def test_special_tokens_in_a_prompt_are_plain_text(tiny):
    config = tiny.config.ar
    ids = tiny.generation_inputs("<|vision_start|><|image_pad|><|im_end|>").input_ids
    assert not (ids == config.vision_start_token_id).any()
    assert not (ids == config.image_token_id).any()
    assert (ids == config.eos_token_id).sum() == 2  # the system's and the user's turn


def test_the_models_own_preamble_precedes_the_picture(tiny, monkeypatch):
    words = tiny.tokenizer.encode("Here: ")
    draws(tiny, monkeypatch, [*words, tiny.config.ar.vision_start_token_id])
    inputs = tiny.generation_inputs("a circle")
    text, embeds = tiny.predict_embeddings(inputs, "unused <image>")
    assert text == "Here: "
    assert embeds.shape == (1, 16, 128)
    torch.testing.assert_close(embeds, tiny.prefill(inputs, "Here: "), atol=2e-5, rtol=0)


def test_fast_preamble_is_the_training_sentence(tiny):
    events = dict(tiny.generate_steps("a circle", fast_preamble=True, num_steps=1))
    assert events["text"] == "Here is an image based on the description: "
    inputs = tiny.generation_inputs("a circle")
    torch.testing.assert_close(events["embeddings"], tiny.prefill(inputs, events["text"]))
    events = dict(
        tiny.edit_steps(Image.new("RGB", (9, 9)), "变红", fast_preamble=True, num_steps=1)
    )
    assert events["text"] == "以下为编辑后的图像："


def test_a_reply_without_picture_falls_back_with_a_warning(tiny, monkeypatch, caplog):
    draws(tiny, monkeypatch, [tiny.config.ar.eos_token_id])
    with caplog.at_level(logging.WARNING):
        events = dict(tiny.generate_steps("a circle", num_steps=1))
    assert "holds no image" in caplog.text
    assert events["text"].startswith("Here is an image") and events["image"].size == (64, 64)


def test_steps_yield_every_intermediate(tiny):
    events = list(tiny.generate_steps("a circle", fast_preamble=True, num_steps=3, width=80))
    names = [name for name, _ in events]
    assert names == ["text", "embeddings", "sampling", "context", *["step"] * 3, "image"]
    seen = dict(events)
    assert seen["context"].txt.shape == (1, 16, 96)
    assert seen["step"].x.shape == (1, 16, 8, 10) and seen["step"].t == 0
    assert seen["image"].size == (80, 64)
    torch.testing.assert_close(seen["step"].x, seen["step"].x0)


def test_generate_is_the_last_of_its_steps_and_repeats(tiny):
    options = {"fast_preamble": True, "num_steps": 2, "seed": 5}
    a, b = (tiny.generate("a circle", **options) for _ in range(2))
    c = dict(tiny.generate_steps("a circle", **options))["image"]
    d = tiny.generate("a circle", **options | {"seed": 6})
    assert a.tobytes() == b.tobytes() == c.tobytes() != d.tobytes()


def test_edit_reads_the_source_with_the_editing_decoder_only(tiny, photo):
    """The editing context has a token for each reference embedding, the other's has none."""
    options = {"fast_preamble": True, "num_steps": 1}
    events = dict(tiny.edit_steps(photo, "make it red", **options))
    assert events["context"].txt.shape[1] == 16 + 64
    assert events["sampling"].cfg_scale == 1.0
    assert events["context"].txt_ids[0, :, 0].tolist() == [0.0] * 16 + [1.0] * 64
    other = dict(tiny.edit_steps(photo, "make it red", decoder="generation", **options))
    assert other["context"].txt.shape[1] == 16
    assert torch.equal(events["embeddings"], other["embeddings"])
    assert events["image"].tobytes() != other["image"].tobytes()


def test_a_batch_of_noise_shares_one_context(tiny):
    context = tiny.generation_context(torch.randn(1, 16, 128))
    sampling = SamplingParams(num_steps=2, cfg_scale=2.0).resolve(tiny.config, 1.0)
    noise = torch.randn(3, 16, 8, 8)
    mmdit = tiny.generation.mmdit
    *_, batch = tiny.denoise_steps(mmdit, context, noise, sampling)
    *_, single = tiny.denoise_steps(mmdit, context, noise[1:2], sampling)
    torch.testing.assert_close(batch.x[1:2], single.x, atol=2e-5, rtol=1e-5)
    assert len(tiny.decode(batch.x)) == 3


@pytest.mark.parametrize("decoder", ["generation", "editing"])
def test_a_batch_of_pictures_is_the_pictures_one_by_one(tiny, decoder):
    """Contexts of several prompts and noise of several seeds at once, within 2e-5; with cfg."""
    embeds, refs = torch.randn(3, 16, 128), torch.randn(3, 64, 128)
    sampling = SamplingParams(num_steps=2, cfg_scale=2.0, height=48).resolve(tiny.config, 1.0)
    size = sampling.latent_shape(tiny.config)[2:]
    seeds = [replace(sampling, seed=seed).noise(tiny.config) for seed in (7, 8, 9)]
    mmdit = getattr(tiny, decoder).mmdit

    def draw(rows):
        with torch.no_grad():
            if decoder == "generation":
                context = tiny.generation_context(embeds[rows])
            else:
                context = tiny.editing_context(embeds[rows], refs[rows], *size)
        *_, last = tiny.denoise_steps(mmdit, context, torch.cat(seeds[rows]), sampling)
        return last.x

    together = draw(slice(None))
    for i in range(3):
        alone = draw(slice(i, i + 1))
        torch.testing.assert_close(together[i : i + 1], alone, atol=2e-5, rtol=1e-5)
    assert (together[0] - together[1]).abs().max() > 0.1


def test_bf16_stays_near_fp32_and_half_as_wide_weights_are_told():
    """bf16 has fp32's range; where float16 is left, the image is refused, not black."""
    options = {"fast_preamble": True, "num_steps": 2, "cfg_scale": 2.0}
    draws_of = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = make_tiny()
        for part in (model.ar, model.autoencoder, *model.generation):
            part.to(dtype)
        *_, last = (
            x.x for name, x in model.generate_steps("a circle", **options) if name == "step"
        )
        assert last.dtype == torch.float32 and last.isfinite().all()
        draws_of[dtype] = last
    error = draws_of[torch.bfloat16] - draws_of[torch.float32]
    assert 0 < error.norm() / draws_of[torch.float32].norm() < 0.05
    with torch.no_grad():
        model.generation.mmdit.img_in.bias.fill_(1e5)  # more than float16 holds
    model.generation.mmdit.half()
    with pytest.raises(
        ValueError, match=r"NaN or infinite values: the weights are broken, or thei"
    ):
        model.generate("a circle", **options)


@pytest.mark.parametrize("where", ["vision_head", "adapter", "mmdit", "autoencoder"])
def test_broken_weights_draw_nothing(where):
    model = make_tiny()
    module = {
        "vision_head": model.ar.vision_head,
        "adapter": model.generation.adapter,
        "mmdit": model.generation.mmdit.single_blocks[-1],
        "autoencoder": model.autoencoder.decoder.conv_out,
    }[where]
    with torch.no_grad():
        next(module.parameters()).view(-1)[0] = float("nan")
    with pytest.raises(ValueError, match="NaN or infinite values"):
        model.generate("a circle", fast_preamble=True, num_steps=1)


def test_understand_takes_none_one_or_several_pictures(tiny, photo, monkeypatch):
    seen = []
    monkeypatch.setattr(tiny, "reply", lambda inputs, n: seen.append(inputs) or iter(()))
    for images in (None, photo, [photo, photo.rotate(90)]):
        assert tiny.understand(images, "what is it?") == ""
    assert [0 if i.image_embeds is None else len(i.image_grid_thw) for i in seen] == [0, 1, 2]
    text = tiny.tokenizer.decode(seen[1].input_ids[0])
    assert "user\n<image>what is it?" in text


def test_understand_decodes_the_reply(tiny, photo, monkeypatch):
    draws(tiny, monkeypatch, [*tiny.tokenizer.encode(" red"), tiny.config.ar.eos_token_id])
    assert tiny.understand(photo, "what color?") == "red"


@pytest.mark.parametrize("size", [(1, 1), (3, 400), (200, 1), (5, 7), (1200, 900)])
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "1"])
def test_any_picture_can_be_edited(tiny, size, mode):
    image = tiny.edit(Image.new(mode, size, 0), "red", fast_preamble=True, num_steps=1)
    assert image.size == (64, 64) and image.mode == "RGB"


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda m, p: m.generate(" \n"), "prompt is empty"),
        (
            lambda m, p: m.generate("red " * 2000),
            r"prompt is \d+ tokens long; the limit is 1968",
        ),
        (lambda m, p: m.generate("a \udcff"), "not valid Unicode"),
        (lambda m, p: m.generate("a", language="fr"), "language must be one of"),
        (lambda m, p: m.generate("a <image>"), "1 <image> placeholders for 0 images"),
        (lambda m, p: m.generate("a", num_steps=0), "steps"),
        (lambda m, p: m.generate("a", max_new_tokens=0), "max_new_tokens"),
        (
            lambda m, p: m.generate("a", fast_preamble=True, cfg_scale=2.0, negative_prompt="b"),
            "CLIP",
        ),
        (lambda m, p: m.edit(p, ""), "instruction is empty"),
        (lambda m, p: m.edit("missing.png", "red"), "missing.png"),
        (lambda m, p: m.edit(Image.new("L", (201, 1)), "red"), "by a factor of 200, got 1 x 201"),
        (lambda m, p: m.understand(Image.new("L", (0, 5)), "what?"), "0 x 5 is not within"),
        (lambda m, p: m.edit(p, "red", decoder="both"), "decoder must be editing or generation"),
        (lambda m, p: m.understand(p, ""), "question is empty"),
        (lambda m, p: NexusGen(m.config).generate("a"), "has no generation decoder"),
        (lambda m, p: NexusGen.load("/nowhere"), "no model folder '/nowhere'"),
    ],
)
def test_bad_input_is_a_clear_error(tiny, photo, call, says):
    with pytest.raises(ValueError, match=says):
        call(tiny, photo)


# ---- loading -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("tiny"))


def test_load_gives_back_what_was_saved(tiny, photo, tiny_folder):
    loaded = NexusGen.load(tiny_folder)
    assert loaded.config == tiny.config
    options = {"fast_preamble": True, "num_steps": 2, "cfg_scale": 2.0}
    drawn = [m.generate("红圆", **options) for m in (loaded, tiny)]
    edited = [m.edit(photo, "red", **options) for m in (loaded, tiny)]
    for got, want in (drawn, edited):  # mapped weights are aligned otherwise: kernels may round so
        assert np.abs(np.asarray(got, int) - np.asarray(want, int)).max() <= 1


def test_load_reads_only_the_parts_asked_for(tiny_folder, photo):
    model = NexusGen.load(tiny_folder, parts=["ar"])
    assert model.generation is model.editing is model.autoencoder is model.empty_prompt is None
    assert isinstance(model.understand(photo, "what is it?", max_new_tokens=3), str)
    with pytest.raises(ValueError, match="parts are"):
        NexusGen.load(tiny_folder, parts=["vae"])


def test_load_takes_a_dtype(tiny_folder):
    model = NexusGen.load(tiny_folder, dtype=torch.bfloat16)
    assert {p.dtype for p in model.ar.parameters()} == {torch.bfloat16}
    events = dict(model.generate_steps("a circle", fast_preamble=True, num_steps=2))
    assert events["step"].x.dtype == torch.float32 and events["image"].size == (64, 64)


def test_a_tokenizer_of_another_model_is_refused(tiny_folder, tmp_path):
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    file = folder / "Nexus-GenV2" / "tokenizer.json"
    byte_tokenizer(first_special=700).save(str(file))
    with pytest.raises(ValueError, match="tokenizer and config disagree"):
        NexusGen.load(folder)
    file.write_text('{"model": 3}')
    with pytest.raises(ValueError, match="cannot be read as a tokenizer"):
        NexusGen.load(folder)
    file.unlink()
    with pytest.raises(ValueError, match="tokenizer.json: no such file"):
        NexusGen.load(folder)


@pytest.fixture
def released_folder(tiny_folder, tmp_path_factory):
    """A folder as downloaded: text encoders (tiny, official vocabularies), no constants of ""."""
    folder = shutil.copytree(tiny_folder, tmp_path_factory.mktemp("released") / "model")
    (folder / "empty_prompt.safetensors").unlink()
    clip = CLIPConfig(hidden_size=32, intermediate_size=8, num_hidden_layers=1)
    clip = replace(clip, num_attention_heads=2)
    t5 = T5Config(d_model=96, d_kv=8, d_ff=8, num_layers=1, num_heads=2)
    config = replace(NexusGenConfig.tiny(), clip=clip, t5=t5)
    (folder / "nexus_min.json").write_text(json.dumps(config.to_dict()))
    flux = folder / "FLUX" / "FLUX.1-dev"
    towers = {"text_encoder": CLIPTextModel(clip), "text_encoder_2": T5Encoder(t5)}
    for name, tower in towers.items():
        (flux / name).mkdir()
        save_file(tower.state_dict(), flux / name / "model.safetensors")
    files = ("tokenizer/vocab.json", "tokenizer/merges.txt", "tokenizer_2/tokenizer.json")
    packed = ("clip_vocab.json.xz", "clip_merges.txt.xz", "t5_tokenizer.json.xz")
    for file, source in zip(files, packed, strict=True):
        (flux / file).parent.mkdir(exist_ok=True)
        (flux / file).write_bytes(lzma.decompress((GOLDEN / "tokenizers" / source).read_bytes()))
    return folder


def test_the_empty_prompt_does_not_depend_on_who_ran_first(released_folder):
    file, parts = released_folder / "empty_prompt.safetensors", ["generation"]
    expected = {}
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        file.unlink(missing_ok=True)
        model = NexusGen.load(released_folder, dtype=dtype, parts=parts)
        assert {x.dtype for x in model.empty_prompt.values()} == {dtype}
        stored = load_file(file)
        expected = expected or stored
        assert all(x.dtype == torch.float32 for x in stored.values())
        assert all(torch.equal(stored[name], x) for name, x in expected.items())
    save_file({k: v * torch.nan for k, v in expected.items()}, file)  # as fp16 once made them
    again = NexusGen.load(released_folder, parts=parts).empty_prompt
    assert all(torch.equal(again[name], x) for name, x in expected.items())


def test_text_encoders_are_read_for_each_negative_prompt_and_freed(released_folder):
    model = NexusGen.load(released_folder, parts=["ar", "generation", "autoencoder"])
    assert model.empty_prompt["context"].shape == (1, 512, 96)
    encoders, reads = model.read_text_encoders(), []
    model.read_text_encoders = lambda: reads.append(1) or encoders
    options = {"fast_preamble": True, "num_steps": 1, "cfg_scale": 2.0}
    empty = model.generate("a circle", **options)
    assert not reads
    negative = model.generate("a circle", negative_prompt="blurry", **options)
    assert len(reads) == 1 and negative.tobytes() != empty.tobytes()
    assert model.text_encoders is None
    computed = encoders.context("")
    assert torch.equal(computed.txt, model.empty_prompt["context"])
    assert torch.equal(computed.pooled, model.empty_prompt["pooled"])
    with pytest.raises(ValueError, match="negative prompt is not valid Unicode"):
        model.negative_context("\udcff")


def test_constants_of_the_empty_prompt_are_kept_until_the_encoders_change(released_folder):
    kept = released_folder / "empty_prompt.safetensors"
    parts = ["generation"]
    first = NexusGen.load(released_folder, parts=parts).empty_prompt
    written = kept.stat().st_mtime_ns
    again = NexusGen.load(released_folder, parts=parts).empty_prompt
    assert kept.stat().st_mtime_ns == written
    assert all(torch.equal(first[k], again[k]) for k in first)
    file = released_folder / "FLUX/FLUX.1-dev/text_encoder/model.safetensors"
    save_file({k: v + 1 for k, v in load_file(file).items()}, file)
    other = NexusGen.load(released_folder, parts=parts).empty_prompt
    assert not torch.equal(first["pooled"], other["pooled"])
    shutil.rmtree(released_folder / "FLUX/FLUX.1-dev/text_encoder_2")
    for name in ("text_encoder", "tokenizer", "tokenizer_2"):
        shutil.rmtree(released_folder / "FLUX/FLUX.1-dev" / name)
    alone = NexusGen.load(released_folder, parts=parts).empty_prompt
    assert torch.equal(alone["pooled"], other["pooled"])


def test_positions_go_where_the_network_is(monkeypatch):
    """A context's positions may lie on the CPU, as the negative one's do; the network need not."""
    config = NexusGenConfig.tiny().mmdit
    with torch.device("meta"):
        mmdit = MMDiT(config)
    places = []
    monkeypatch.setattr(mmdit, "rope", lambda *ids: places.extend(i.device.type for i in ids))
    txt, pooled = torch.zeros(1, 5, config.context_in_dim), torch.zeros(1, config.vec_in_dim)
    velocity_field(mmdit, Context(txt, context_ids_generation(5), pooled), 8, 8)
    assert places == ["meta", "meta"]
