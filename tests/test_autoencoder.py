"""The FLUX VAE against the official one (fixtures 10a, 10b), and its own behaviour."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import golden, weights
from tracer import trace

from nexus_min.config import AutoEncoderConfig, NexusGenConfig
from nexus_min.model.autoencoder import AutoEncoder

MANIFESTS = Path(__file__).parent / "manifests"


def micro(meta: dict) -> AutoEncoder:
    """The micro-size VAE a fixture was made with, uninitialized."""
    config = meta["config"] | {"num_groups": meta["config"]["groups"]}
    return AutoEncoder(AutoEncoderConfig.from_dict(config))


def scaled(state: dict, prefix: str) -> dict:
    """The eps probe: `prefix`'s weight and bias times 1e-3; a wrong epsilon shows."""
    return {k: v * 1e-3 if k.startswith(prefix) else v for k, v in state.items()}


@torch.inference_mode()
def test_parity_encoder(assert_parity):
    tensors, meta = golden("10a")
    vae, state = micro(meta), weights(tensors, "encoder.")
    vae.encoder.load_state_dict(state)
    image = tensors["in/image"]
    assert_parity("autoencoder", "10a moments", vae.moments(image), tensors["out/moments"])
    assert_parity("autoencoder", "10a latents", vae.encode(image), tensors["out/latents"])
    vae.encoder.load_state_dict(scaled(state, "conv_in."))
    assert_parity(
        "autoencoder", "10a eps probe", vae.encode(image), tensors["out/eps_probe_latents"]
    )


@torch.inference_mode()
def test_parity_decoder(assert_parity):
    tensors, meta = golden("10b")
    vae, state = micro(meta), weights(tensors, "decoder.")
    vae.decoder.load_state_dict(state)
    latents = tensors["in/latents"]
    assert_parity("autoencoder", "10b image", vae.decode(latents), tensors["out/image"])
    from_encoder = vae.decode(tensors["in/latents_from_encoder"])
    assert_parity(
        "autoencoder", "10b encoder's latents", from_encoder, tensors["out/image_from_encoder"]
    )
    vae.decoder.load_state_dict(scaled(state, "conv_in."))
    assert_parity(
        "autoencoder", "10b eps probe", vae.decode(latents), tensors["out/eps_probe_image"]
    )


def test_names_full_size():
    manifest = json.loads((MANIFESTS / "flux_ae.json").read_text())["tensors"]
    with torch.device("meta"):
        vae = AutoEncoder(AutoEncoderConfig())
    assert {k: list(v.shape) for k, v in vae.state_dict().items()} == manifest


def test_tiny_shapes_and_gradients():
    config = NexusGenConfig.tiny().autoencoder
    torch.manual_seed(0)
    vae, image = AutoEncoder(config), torch.rand(2, 3, 16, 24) * 2 - 1
    assert vae.encode(image).shape == (2, config.z_channels, 2, 3)
    reconstruction = vae(image)
    assert reconstruction.shape == image.shape
    reconstruction.square().mean().backward()
    for name, p in vae.named_parameters():
        logvar_only = name.startswith("encoder.conv_out")  # half of it: `forward` reads the mean
        used = p.grad[: config.z_channels] if logvar_only else p.grad
        # the key's bias moves no attention weight, so its gradient is zero but for rounding
        assert name.endswith("attn_1.k.bias") or used.abs().max() > 0, name


@torch.inference_mode()
def test_batch_equals_loop():
    torch.manual_seed(0)
    vae = AutoEncoder(NexusGenConfig.tiny().autoencoder).double()
    images = torch.rand(3, 3, 16, 16, dtype=torch.float64) * 2 - 1
    loop = torch.cat([vae(image[None]) for image in images])
    torch.testing.assert_close(vae(images), loop, atol=1e-12, rtol=0)


def test_decoding_enters_five_functions():
    vae = AutoEncoder(NexusGenConfig.tiny().autoencoder)
    entered = trace(lambda: vae.decode(torch.zeros(1, 16, 2, 2))).functions
    assert {name for _, name in entered} == {
        "AutoEncoder.decode",
        "Decoder.forward",
        "ResnetBlock.forward",
        "AttnBlock.forward",
        "Upsample.forward",
    }


def test_bad_sizes_are_named():
    vae = AutoEncoder(NexusGenConfig.tiny().autoencoder)
    with pytest.raises(ValueError, match=r"multiples of 8.*\(1, 3, 20, 16\)"):
        vae.encode(torch.zeros(1, 3, 20, 16))
    with pytest.raises(ValueError, match=r"\(3, 16, 16\)"):
        vae.encode(torch.zeros(3, 16, 16))
    with pytest.raises(ValueError, match=r"\[B, 16, h, w\].*\(1, 4, 2, 2\)"):
        vae.decode(torch.zeros(1, 4, 2, 2))
