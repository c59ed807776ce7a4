"""Decoder: parity with the official tower, and the equivalences its cache and masks rest on."""

from __future__ import annotations

import pytest
import torch
from conftest import golden, weights

from nexus_min.config import TextConfig
from nexus_min.model.decoder import (
    Attention,
    KVCache,
    QwenDecoder,
    causal_attention,
)
from nexus_min.model.packing import Packed, packed_hidden
from nexus_min.model.rope import apply_rope_half

TINY = TextConfig(
    hidden_size=48,
    intermediate_size=64,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
    vocab_size=50,
    rope_theta=10_000.0,
    mrope_section=(1, 2, 1),
)


@pytest.fixture(scope="module")
def official():
    """The fixture's tensors, and its decoder with lm_head's weight."""
    tensors, meta = golden("04")
    with torch.device("meta"):
        decoder = QwenDecoder(TextConfig.from_dict(meta["config"]))
    decoder.load_state_dict(weights(tensors, "model."), strict=True, assign=True)
    return tensors, decoder.requires_grad_(False), tensors["weights/lm_head.weight"]


@pytest.fixture(scope="module")
def decoder():
    torch.manual_seed(0)
    return QwenDecoder(TINY).requires_grad_(False)


def batch(B: int = 2, L: int = 11):
    """Random embeddings and positions with unequal axes."""
    g = torch.Generator().manual_seed(1)
    x = torch.randn(B, L, TINY.hidden_size, generator=g)
    return x, torch.randint(0, 30, (3, B, L), generator=g)


def image_inputs(tensors, decoder):
    """The fixture's inputs with the official vision embeddings put in."""
    x = decoder.embed_tokens(tensors["in/input_ids"])
    is_image = tensors["in/input_ids"] == 153
    return x.masked_scatter(is_image[..., None], tensors["out/visual_merged"])


def test_parity_hidden_states_and_heads(official, assert_parity):
    t, decoder, lm_head = official
    trace = []
    hidden = decoder(image_inputs(t, decoder), t["out/position_ids"], trace=trace)
    assert len(trace) == 3
    for i, state in enumerate(trace):
        assert_parity("decoder", f"04 hidden_states.{i}", state, t[f"out/hidden_states.{i}"])
    assert_parity("decoder", "04 logits", hidden @ lm_head.T, t["out/logits"])
    image = hidden @ t["weights/vision_head.weight"].T
    assert_parity("decoder", "04 image_embeddings", image, t["out/image_embeddings"])


def test_parity_prefill_then_cached_steps(official, assert_parity):
    t, decoder, lm_head = official
    x, positions, n = image_inputs(t, decoder), t["out/position_ids"], int(t["in/prefill_len"])
    cache = KVCache()
    out = [decoder(x[:, :n], positions[..., :n], cache=cache)]
    for i in range(n, x.shape[1]):
        out.append(decoder(x[:, i : i + 1], positions[..., i : i + 1], cache=cache))
    assert_parity("decoder", "04 logits_kv", torch.cat(out, 1) @ lm_head.T, t["out/logits_kv"])


@pytest.mark.parametrize("key, factor", [("", 1.0), ("eps_probe_", 1e-3)])
def test_parity_text_only_tail_and_eps_probe(official, assert_parity, key, factor):
    t, decoder, lm_head = official
    x = decoder.embed_tokens(t["in/input_ids"][:, 32:]) * factor
    positions = torch.arange(x.shape[1]).expand(3, 1, -1)
    want = t[f"out/{key}text_only_tail_logits"]
    assert_parity("decoder", f"04 {key}tail", decoder(x, positions) @ lm_head.T, want)


def test_attention_is_softmax_over_shared_key_heads():
    """Query heads 0-2 read key head 0, heads 3-5 key head 1, written out without SDPA."""
    torch.manual_seed(0)
    attn, (x, _) = Attention(TINY), batch()
    B, L, D = 2, 11, TINY.head_dim
    got = attn(x, torch.ones(1, 1, 1, D), torch.zeros(1, 1, 1, D), causal_attention(L, L))
    q = attn.q_proj(x).view(B, L, 6, D)
    k, v = (p(x).view(B, L, 2, D).repeat_interleave(3, 2) for p in (attn.k_proj, attn.v_proj))
    score = torch.einsum("blhd,bshd->bhls", q, k) / D**0.5
    score = score.masked_fill(~torch.ones(L, L).tril().bool(), -torch.inf)
    want = attn.o_proj(torch.einsum("bhls,bshd->blhd", score.softmax(-1), v).flatten(2))
    assert torch.allclose(got, want, atol=1e-6)


@pytest.mark.parametrize("chunks", [[1] * 11, [4, 1, 6], [5, 6]])
def test_cached_equals_uncached(decoder, chunks):
    x, positions = batch()
    want, cache, got, i = decoder(x, positions), KVCache(), [], 0
    for n in chunks:
        got.append(decoder(x[:, i : i + n], positions[..., i : i + n], cache=cache))
        i += n
        assert cache.length == i
    assert torch.allclose(torch.cat(got, 1), want, atol=1e-5)


def test_cropped_cache_continues_as_if_the_rest_had_not_been(decoder):
    x, positions = batch()
    cache = KVCache()
    decoder(x, positions, cache=cache)
    cache.crop(6)
    got = decoder(x[:, 6:], positions[..., 6:], cache=cache)
    assert torch.allclose(got, decoder(x, positions)[:, 6:], atol=1e-5)
    with pytest.raises(ValueError, match="11 tokens to 12"):
        cache.crop(12)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_batch_equals_singles(decoder, side):
    x, positions = batch()
    keep = torch.ones(2, 11, dtype=torch.long)
    real = slice(4, None) if side == "left" else slice(0, 7)
    keep[1] = 0
    keep[1, real] = 1
    got = decoder(x, positions, keep)
    assert torch.isfinite(got).all()
    assert torch.allclose(got[:1], decoder(x[:1], positions[:, :1]), atol=1e-5)
    alone = decoder(x[1:, real], positions[:, 1:, real])
    assert torch.allclose(got[1:, real], alone, atol=1e-5)
    if side == "right":  # no mask is needed
        assert torch.allclose(decoder(x, positions)[1:, real], alone, atol=1e-5)


def test_packed_rows_do_not_see_each_other(decoder):
    x, positions = batch()
    packed = Packed((11, 7), (3, 7))
    keep = torch.ones(2, 11, dtype=torch.bool)
    keep[1, 7:] = False
    got = packed_hidden(decoder, x[keep][None], positions[:, None, keep], packed)
    want = decoder(x[:1], positions[:, :1])[:, 8:], decoder(x[1:, :7], positions[:, 1:, :7])
    torch.testing.assert_close(got, torch.cat(want, 1), atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match=r"packed rows of \(11, 7\) tokens do not fill \(1, 11\)"):
        packed_hidden(decoder, x[:1], positions[:, :1], packed)


def test_left_padded_cached_equals_uncached(decoder):
    x, positions = batch()
    keep = torch.ones(2, 11, dtype=torch.bool)
    keep[1, :4] = False
    want, cache = decoder(x, positions, keep), KVCache()
    got = [decoder(x[:, :6], positions[..., :6], keep[:, :6], cache)]
    for i in range(6, 11):
        step = x[:, i : i + 1], positions[..., i : i + 1], keep[:, : i + 1]
        got.append(decoder(*step, cache))
    assert torch.allclose(torch.cat(got, 1), want, atol=1e-5)


def test_fully_padded_row_is_finite_in_value_and_gradient():
    torch.manual_seed(0)
    decoder, (x, positions) = QwenDecoder(TINY), batch()
    keep = torch.tensor([[1] * 11, [0] * 11])
    decoder(x, positions, keep).sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in decoder.layers.parameters())


def test_causal_mask_shape_and_content():
    for count in (1, 7):  # one token, and the whole sequence, need no mask
        assert "attn_mask" not in causal_attention(count, 7).keywords
    assert causal_attention(7, 7).keywords["is_causal"]
    mask = causal_attention(2, 5).keywords["attn_mask"]
    assert mask.tolist() == [[True] * 4 + [False], [True] * 5]
    padded = causal_attention(2, 3, torch.tensor([[0, 0, 1]])).keywords["attn_mask"][0, 0]
    assert padded.tolist() == [[False, True, False], [False, False, True]]


def test_dtype_of_activations_is_kept(decoder):
    x, positions = batch()
    half = QwenDecoder(TINY).bfloat16()
    assert half(x.bfloat16(), positions).dtype == torch.bfloat16


@pytest.mark.parametrize(
    "x, positions, mask, message",
    [
        ((2, 5, 48), (3, 2, 6), None, r"\(3, 2, 6\) should be \(3, 2, 5\)"),
        ((2, 5, 48), (3, 2, 5), (2, 4), r"\(2, 4\) should be \(2, 5\)"),
    ],
)
def test_wrong_sizes_are_named(decoder, x, positions, mask, message):
    mask = None if mask is None else torch.ones(mask)
    with pytest.raises(ValueError, match=message):
        decoder(torch.zeros(x), torch.zeros(positions), mask)


def test_rotation_of_one_vector_to_many_positions():
    x, (cos, sin) = torch.randn(32), torch.randn(2, 24, 32)
    turned = apply_rope_half(x, cos, sin)
    assert torch.allclose(turned, x * cos + torch.cat((-x[16:], x[:16])) * sin, atol=1e-6)
    assert apply_rope_half(x.bfloat16(), cos, sin).dtype == torch.float32
