"""LoRA: nothing changes at first, only the corrections learn, and merging is what was learned."""

from __future__ import annotations

import pytest
import torch
from tiny_model import make_tiny
from torch import nn

from nexus_min.train.lora import LoRALinear, add_lora, merge_lora


def decoder():
    return make_tiny().ar.model


def test_corrections_start_at_nothing_and_merge_to_what_they_add():
    model = decoder()
    names = list(model.state_dict())
    x, positions = torch.randn(2, 5, 128), torch.arange(5).expand(3, 2, 5)
    with torch.no_grad():
        plain = model(x, positions)
        add_lora(model, rank=4)
        assert torch.equal(model(x, positions), plain)
        for module in model.modules():
            if isinstance(module, LoRALinear):
                nn.init.normal_(module.lora_B, std=0.05)
        learned = model(x, positions)
        merge_lora(model)
        merged = model(x, positions)
    assert not torch.allclose(learned, plain, atol=1e-2)
    torch.testing.assert_close(merged, learned, atol=2e-5, rtol=1e-4)
    assert list(model.state_dict()) == names


def test_only_the_corrections_learn():
    model = add_lora(decoder(), rank=2)
    learning = [n for n, p in model.named_parameters() if p.requires_grad]
    assert len(learning) == 4 * 7 * 2 and all(".lora_" in n for n in learning)
    share = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert share < 0.05 * sum(p.numel() for p in model.parameters())
    model(torch.randn(1, 3, 128), torch.arange(3).expand(3, 1, 3)).square().sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("rank", [0, 129])
def test_bad_ranks(rank):
    with pytest.raises(ValueError, match="the rank must be 1 to"):
        add_lora(decoder(), rank=rank)


def test_a_model_without_targets():
    with pytest.raises(ValueError, match="no Linear named q_proj"):
        add_lora(nn.Sequential(nn.Linear(2, 2)))
