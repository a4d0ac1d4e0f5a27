"""Linear layers through oneDNN: the same numbers to rounding, hooks as before, small ones alone."""

import pytest
import torch
from torch import nn

from actcache import products

needs_avx512 = pytest.mark.skipif(not products.available(), reason="no AVX-512 or no oneDNN")


def model(width=512, bias=True):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(width, 2 * width, bias=bias), nn.GELU(), nn.Linear(2 * width, 8))


@needs_avx512
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(3, 7, 512), (1, 512), (40, 512)])
def test_products_agree_with_float64(shape, bias):
    layers = model(bias=bias)
    x = torch.randn(shape)
    exact = layers.double()(x.double())
    layers.float()
    plain = layers(x)
    assert products.speed_up(layers) == 1  # the second layer is small
    with torch.inference_mode():
        fast = layers(x)
        strided = layers(x.transpose(0, -2).contiguous().transpose(0, -2))
    error = (fast - exact).abs().max()
    assert error <= 2 * (plain - exact).abs().max() + 1e-6
    assert torch.allclose(fast, strided, atol=1e-5)


@needs_avx512
def test_a_host_is_loaded_with_them(tmp_path, tiny_host):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from actcache.hooks import resolve
    from actcache.host import Host, HostSettings, new_causal_lm

    wide = new_causal_lm(
        {"model_type": "gpt_neox", "vocab_size": 400, "hidden_size": 256, "num_hidden_layers": 2,
         "num_attention_heads": 4, "intermediate_size": 512},
        seed=0,
    )  # fmt: skip
    wide.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny_host).save_pretrained(tmp_path)
    host = Host(HostSettings(model=str(tmp_path), device="cpu"))
    mine = host.load(resolve("resid", None, host.skeleton()))
    assert "forward" in vars(mine.layers[0].mlp.dense_h_to_4h)
    ids = torch.arange(40).reshape(2, 20)
    with torch.inference_mode():
        plain = AutoModelForCausalLM.from_pretrained(tmp_path).gpt_neox(input_ids=ids)
        fast = mine(input_ids=ids)
    assert torch.allclose(fast.last_hidden_state, plain.last_hidden_state, atol=1e-5)


@needs_avx512
def test_hooks_fire_and_gradients_flow():
    layers, seen = model(), []
    layers[0].register_forward_hook(lambda _m, args, out: seen.append((args[0], out)))
    products.speed_up(layers)
    x = torch.randn(4, 512, requires_grad=True)
    layers(x).sum().backward()
    (got, out), grad = seen[0], x.grad
    assert torch.equal(got, x)
    assert torch.equal(out, nn.functional.linear(x, layers[0].weight, layers[0].bias))
    assert grad is not None
    assert layers[0].weight.grad is not None


def test_what_gains_nothing_stays(monkeypatch):
    monkeypatch.setattr(products, "available", lambda: True)

    class Own(nn.Linear):
        pass

    kept = nn.ModuleList([nn.Linear(8, 8), Own(512, 512), nn.Linear(512, 512).bfloat16()])
    assert products.speed_up(kept) == 0
    assert products.speed_up(nn.ModuleList([nn.Linear(512, 512), *kept])) == 1
    monkeypatch.setattr(products, "available", lambda: False)
    assert products.speed_up(nn.ModuleList([nn.Linear(512, 512)])) == 0
