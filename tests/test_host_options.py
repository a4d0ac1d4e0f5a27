"""Adapters, quantised hosts, device maps, number types: passed on, and part of the identity."""

from __future__ import annotations

import json
from dataclasses import replace

import peft
import pytest
import torch
import transformers
from cache import contexts_of, overrides
from conftest import tiny_texts
from hosts import Oracle, save_family, whole

from actcache.cli import main
from actcache.errors import HostError
from actcache.hooks import resolve
from actcache.host import Host, HostSettings
from actcache.plan import PlanSettings, plan
from actcache.run import run
from actcache.store import IdentityError, SettingsError, open_store

# peft 0.21 on transformers 5.23, when it makes a model to be trained.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")

HOOKS = ("resid_pre.1", "mlp.1", "resid.1")


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    made = {}

    def make(name, **changes):
        key = (name, *changes.items())
        if key not in made:
            made[key] = save_family(name, tiny_texts(), tmp_path_factory.mktemp(name), **changes)
        return made[key]

    return make


@pytest.fixture(scope="module")
def adapter_of(folder_of, tmp_path_factory):
    """A LoRA of random weights on a family, saved as peft saves it."""

    def make(name, targets, **kw):
        model = whole(folder_of(name), name)
        config = peft.LoraConfig(
            r=4, lora_alpha=16, target_modules=targets, init_lora_weights=False, **kw
        )
        torch.manual_seed(1)
        folder = tmp_path_factory.mktemp("adapter")
        peft.get_peft_model(model, config).save_pretrained(folder)
        return folder

    return make


def adapted(folder, adapter, name):
    """Plain hooks on peft's own model, uncut."""
    outer = peft.PeftModel.from_pretrained(whole(folder, name), adapter).eval()
    return Oracle(outer.get_base_model(), name)


def rows_of(asked, hooks=HOOKS, **kw):
    say = []
    result = run(asked(host=HostSettings(**kw), hooks=hooks, tokens=128), say.append)
    return contexts_of(result.store.snapshot()), result.store, say


def assert_equal(contexts, oracle, rtol=1e-4, atol=2e-5):
    for ids, _, rows in contexts.values():
        expected = oracle(ids)
        for hook, x in rows.items():
            torch.testing.assert_close(
                torch.from_numpy(x), expected[hook].float(), rtol=rtol, atol=atol, msg=hook
            )


# -- adapters --------------------------------------------------------------------------------------

ADAPTERS = {
    "all blocks": ("llama", ["q_proj", "down_proj"], {}),
    "a pattern of the whole model": ("llama", r"model\.layers\.[02]\.self_attn\.v_proj", {}),
    "dora and ranks": ("qwen3", ["k_proj", "up_proj"], {"use_dora": True, "rank_pattern": {
        "model.layers.1.mlp.up_proj": 2}, "alpha_pattern": {"model.layers.0.mlp.up_proj": 3}}),
    "with the embedding and the head": ("gpt_neox", ["dense"], {
        "modules_to_save": ["embed_in", "embed_out"]}),
    "an encoder-decoder": ("t5", ["q", "wi"], {}),
    "experts": ("mixtral", ["o_proj"], {"target_parameters": ["mlp.experts.down_proj"]}),
}  # fmt: skip


@pytest.mark.parametrize("case", ADAPTERS)
def test_rows_equal_hooks_on_the_adapted_model(case, asked, folder_of, adapter_of):
    """The adapter has weights for block 2 too, which the host has lost."""
    name, targets, kw = ADAPTERS[case]
    folder, adapter = folder_of(name), adapter_of(name, targets, **kw)
    contexts, store, _ = rows_of(asked, model=str(folder), adapter=str(adapter))
    oracle = adapted(folder, adapter, name)
    assert_equal(contexts, oracle)
    plain = Oracle(whole(folder, name), name)
    ids, _, rows = next(iter(contexts.values()))
    assert (torch.from_numpy(rows["resid.1"]) - plain(ids)["resid.1"]).norm() > 0.1
    assert store.identity.host["adapter"].startswith("sha256:")


def test_an_adapter_above_the_deepest_hook_changes_nothing_below(asked, folder_of, adapter_of):
    folder = folder_of("llama")
    adapter = adapter_of("llama", ["q_proj"], layers_to_transform=[2])
    contexts, _, _ = rows_of(asked, model=str(folder), adapter=str(adapter))
    assert_equal(contexts, Oracle(whole(folder, "llama"), "llama"))


def test_the_adapter_is_part_of_the_identity(asked, folder_of, adapter_of, tmp_path):
    folder = str(folder_of("llama"))
    adapter = adapter_of("llama", ["q_proj"])
    rows_of(asked, model=folder)
    with pytest.raises(IdentityError, match=r"host\.adapter: the store has \(absent\), you asked"):
        rows_of(asked, model=folder, adapter=str(adapter))
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in adapter.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    config = json.loads((copy / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "elsewhere/" + folder.split("/")[-1]
    (copy / "adapter_config.json").write_text(json.dumps(config))

    def identity():
        return Host(HostSettings(model=folder, adapter=str(copy))).identity["adapter"]

    first = identity()
    assert first == Host(HostSettings(model=folder, adapter=str(adapter))).identity["adapter"]
    config["lora_alpha"] = 8
    (copy / "adapter_config.json").write_text(json.dumps(config))
    assert identity() != first


@pytest.mark.parametrize(
    ("host", "message"),
    [
        ("gpt2", r"is for another model: the host has no module for \d+ of its tensors, such as"),
        ("wide", r"does not fit the host, it is for another model: size mismatch for"),
        ("shallow", r"is for another model: .* such as model\.layers\.2"),
    ],
)
def test_adapter_for_another_model(host, message, asked, folder_of, adapter_of, monkeypatch):
    adapter = adapter_of("llama", ["q_proj", "down_proj"])
    other = {
        "gpt2": lambda: folder_of("gpt2"),
        "wide": lambda: folder_of("llama", hidden_size=64),
        "shallow": lambda: folder_of("llama", num_hidden_layers=2),
    }[host]()
    monkeypatch.setattr("actcache.host.Host.load", lambda *a: pytest.fail("weights were loaded"))
    with pytest.raises(HostError, match=message):
        rows_of(asked, model=str(other), adapter=str(adapter))


def test_adapters_that_are_none(asked, folder_of, adapter_of, tmp_path):
    folder = str(folder_of("llama"))
    with pytest.raises(HostError, match=r"host\.adapter=.*nothing: there is no such folder"):
        rows_of(asked, model=folder, adapter=str(tmp_path / "nothing"))
    with pytest.raises(HostError, match=r"no adapter_config\.json"):
        rows_of(asked, model=folder, adapter=folder)
    with pytest.raises(HostError, match=r"holds a PEFT adapter: say host\.adapter="):
        rows_of(asked, model=str(adapter_of("llama", ["q_proj"])))
    prompt = peft.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    peft.get_peft_model(whole(folder, "llama"), prompt).save_pretrained(tmp_path / "prompt")
    with pytest.raises(HostError, match="PROMPT_TUNING cannot be put into a host's modules"):
        rows_of(asked, model=folder, adapter=str(tmp_path / "prompt"))


def test_another_base_is_said(asked, folder_of, adapter_of):
    adapter = adapter_of("llama", ["q_proj"])
    config = json.loads((adapter / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "lab/other-llama"
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    _, _, said = rows_of(asked, model=str(folder_of("llama")), adapter=str(adapter))
    assert any("names lab/other-llama as its base" in line for line in said)


# -- number types and devices ----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_dtype_is_that_of_the_forward_pass(dtype, asked, folder_of):  # F39
    folder = folder_of("llama")
    contexts, store, _ = rows_of(asked, model=str(folder), dtype=dtype)
    half = whole(folder, "llama", dtype=getattr(torch, dtype))
    assert_equal(contexts, Oracle(half, "llama"), rtol=5e-2, atol=5e-2)
    for _, _, rows in contexts.values():  # values of that type, and not of float32
        x = torch.from_numpy(rows["resid.1"])
        assert torch.equal(x, x.to(getattr(torch, dtype)).float())
    assert store.identity.host["dtype"] == dtype


HEADED = {
    "model.embed_tokens": "cpu",
    "model.layers": "cpu",
    "model.norm": "cpu",
    "model.rotary_emb": "cpu",
    "lm_head": "cpu",
}


@pytest.mark.parametrize("device_map", ["auto", "cpu", {"": "cpu"}, HEADED])
def test_device_map(device_map, asked, folder_of):  # F39
    folder = folder_of("llama")
    contexts, store, _ = rows_of(asked, model=str(folder), device_map=device_map)
    assert_equal(contexts, Oracle(whole(folder, "llama"), "llama"))
    assert "device_map" not in store.identity.host


@pytest.mark.parametrize(
    ("device_map", "message"),
    [
        ("everywhere", r"with host\.device_map=everywhere: "),
        ({"": "gpu:0"}, r"with host\.device_map=\{'': 'gpu:0'\}: "),
        ({"layer.0": "cpu"}, r"no module 'layer\.0'\. Did you mean layers\.0"),
        ({"embed_tokens": "cpu"}, r"host\.device_map names no device for layers\.0\."),
    ],
)
def test_device_map_that_does_not_exist(device_map, message, asked, folder_of):
    with pytest.raises(HostError, match=message):
        rows_of(asked, model=str(folder_of("llama")), device_map=device_map)


def test_one_way_to_say_where(asked, folder_of):
    folder = str(folder_of("llama"))
    with pytest.raises(HostError, match=r"device=cpu and host\.device_map=auto both say"):
        rows_of(asked, model=folder, device="cpu", device_map="auto")
    with pytest.raises(HostError, match=r"host\.device=tpu9"):
        rows_of(asked, model=folder, device="tpu9")


def test_revision_of_a_folder_has_no_effect_and_says_so(asked, folder_of):
    _, _, said = rows_of(asked, model=str(folder_of("llama")), revision="v2")
    assert [line for line in said if line.startswith("host.revision=v2 has no effect")]


def test_attention_that_the_family_lacks(asked, folder_of):
    folder = str(folder_of("gemma2"))
    with pytest.raises(HostError, match=r"gemma2 has no such attention; use host\.attention=auto"):
        rows_of(asked, model=folder, attention="sdpa")
    assert Host(HostSettings(model=folder)).identity["attention"] == "eager"
    assert Host(HostSettings(model=str(folder_of("llama")))).identity["attention"] == "sdpa"


# -- quantised hosts -------------------------------------------------------------------------------

EIGHT = {"load_in_8bit": True}


def test_quantization_is_passed_on(asked, folder_of, monkeypatch):  # F54
    seen = {}

    def spy(cls, folder, **kw):
        seen.update(kw)
        raise ImportError("stop here")

    monkeypatch.setattr(transformers.PreTrainedModel, "from_pretrained", classmethod(spy))
    config = EIGHT | {"llm_int8_threshold": 4.0}
    with pytest.raises(HostError, match=r"with host\.quantization=.*load_in_8bit.*: stop here"):
        rows_of(asked, model=str(folder_of("llama")), quantization=config)
    assert seen["quantization_config"] == config
    assert seen["device_map"] == {"": "cuda" if torch.cuda.is_available() else "cpu"}


def eight_bits(asked, folder):
    bits = transformers.BitsAndBytesConfig(**EIGHT)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    contexts, store, _ = rows_of(asked, model=str(folder), quantization=EIGHT)
    half = whole(folder, "llama", quantization_config=bits, device_map={"": device})
    assert_equal(contexts, Oracle(half, "llama"), rtol=2e-2, atol=2e-2)
    assert store.identity.host["quantization"] == EIGHT
    plain = Oracle(whole(folder, "llama"), "llama")
    ids, _, rows = next(iter(contexts.values()))
    assert (torch.from_numpy(rows["resid.1"]) - plain(ids)["resid.1"]).norm() > 1e-3


@pytest.mark.filterwarnings("ignore:MatMul8bitLt")
def test_a_host_in_eight_bits(asked, folder_of):  # F54
    pytest.importorskip("bitsandbytes")
    host = Host(HostSettings(model=str(folder_of("llama")), quantization=EIGHT))
    model = host.load(resolve(["resid.1"], None, host.skeleton()))
    assert model.layers[1].mlp.up_proj.weight.dtype == torch.int8
    assert len(model.layers) == 2
    eight_bits(asked, folder_of("llama"))


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:MatMul8bitLt")
def test_a_host_in_eight_bits_on_a_gpu(asked, folder_of):  # F54
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    pytest.importorskip("bitsandbytes")
    eight_bits(asked, folder_of("llama", hidden_size=64))


def test_quantization_that_does_not_exist(asked, folder_of):
    with pytest.raises(HostError, match=r"quantization=.*nonsense.*: Unknown quantization type"):
        rows_of(asked, model=str(folder_of("llama")), quantization={"quant_method": "nonsense"})


# -- the command -----------------------------------------------------------------------------------


def test_options_of_the_command(asked, folder_of, adapter_of, tmp_path, capsys):  # F39, F54
    settings = asked(host=HostSettings(model=str(folder_of("llama"))), tokens=128)
    words = [*overrides(settings), "tokens=128", f"host.adapter={adapter_of('llama', ['q_proj'])}"]
    with pytest.raises(SystemExit) as done:
        main(
            [
                *words,
                "host.device_map={embed_tokens: cpu, layers: cpu, norm: cpu}",
                "host.dtype=bfloat16",
                "host.revision=v2",
            ]
        )
    out = capsys.readouterr()
    assert done.value.code == 0, out.err
    assert "host.revision=v2 has no effect" in out.out
    recorded = open_store(settings.store).identity.host
    assert (recorded["dtype"], "adapter" in recorded) == ("bfloat16", True)
    with pytest.raises(SystemExit) as done:
        main([*words, "host.quantization={load_in_8bit: true}", "host.dtype=bfloat16"])
    assert done.value.code == 1
    assert 'host.quantization: the store has (absent), you asked for {"load_in_8bit": true}' in (
        capsys.readouterr().err
    )


@pytest.mark.parametrize("key", ["load_in_8bit", "load_in_4bit"])
def test_plan_counts_the_bytes_of_a_quantised_host(key, folder_of):  # F54
    pytest.importorskip("bitsandbytes")
    settings = HostSettings(
        model=str(folder_of("llama")), quantization={key: True}, dtype="bfloat16"
    )
    host = Host(settings)
    model = host.load(resolve(["resid.1"], None, host.skeleton()))
    held = sum(p.numel() * p.element_size() for p in model.parameters())
    asked = PlanSettings(host=settings, tokens=1000, hooks=("resid.1",), context=32)
    assert plan(asked).model.weights == held
    strange = replace(settings, quantization={"quant_method": "awq"})
    with pytest.raises(SettingsError, match="only load_in_8bit and load_in_4bit can be planned"):
        plan(replace(asked, host=strange))
