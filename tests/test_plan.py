"""`actcache plan` against small real runs, loaded models, closed forms, public parameter counts.

Above 400 lines: published configs, a tracer of live tensors and the tests that need both.
"""

import json
import math
import re
import sys
import weakref
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cache import SMALL
from conftest import tiny_texts
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig

from actcache.cli import main
from actcache.demo.train_host import END_OF_TEXT, train_tokenizer
from actcache.errors import ActcacheError, HookError, HostError
from actcache.hooks import resolve
from actcache.host import Host, HostSettings, forward, new_causal_lm, save_host
from actcache.plan import Assumptions, PlanSettings, plan, table
from actcache.plan.table import human_bytes
from actcache.run import LayoutSettings, run
from actcache.store import SettingsError


def text_model(d, layers, heads, kv_heads, wide, vocab):
    return {
        "hidden_size": d,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": wide,
        "vocab_size": vocab,
    }


QWEN = text_model(8192, 80, 64, 8, 29568, 152064)
VISION = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3456, "out_hidden_size": 8192}
CONFIGS = {  # as published
    "llama-3.1-8b": ("llama", text_model(4096, 32, 32, 8, 14336, 128256)),
    "qwen2.5-72b": ("qwen2", QWEN),
    "qwen2.5-vl-72b": ("qwen2_5_vl", {"text_config": QWEN, "vision_config": VISION}),
    "mixtral-8x7b": ("mixtral", {}),  # the library's defaults are that model
}


@pytest.fixture(scope="session")
def config_only(tmp_path_factory):
    """name -> a folder that holds the model's config.json and nothing else."""
    root = tmp_path_factory.mktemp("configs")
    for name, (kind, values) in CONFIGS.items():
        AutoConfig.for_model(kind, **values).save_pretrained(root / name)
        assert [p.name for p in (root / name).iterdir()] == ["config.json"]
    return root


@pytest.fixture(scope="session")
def wide_host(tmp_path_factory):
    """A tiny Llama of d = 48 with grouped heads, so that widths differ."""
    folder = tmp_path_factory.mktemp("wide_host")
    tokenizer = train_tokenizer(tiny_texts(), 400, progress=False)
    config = text_model(48, 4, 4, 2, 112, tokenizer.get_vocab_size())
    config |= {"model_type": "llama", "max_position_embeddings": 128}
    special = dict.fromkeys(("bos_token", "eos_token", "pad_token"), END_OF_TEXT)
    save_host(new_causal_lm(config, seed=0), tokenizer, folder, **special)
    return folder


def of(config_only, name, *, tokens=1_000_000_000, hooks="resid", layers=None, context=128, **kw):
    host = HostSettings(model=str(config_only / name), dtype="bfloat16", batch_tokens=16_384)
    return plan(
        PlanSettings(host=host, tokens=tokens, hooks=hooks, layers=layers, context=context),
        assume=Assumptions(**kw),
    )


# -- disk, against real runs -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("host", "hooks", "layout", "context"),
    [
        ("tiny_host", ("resid.1", "mlp.0"), SMALL, 32),
        ("tiny_host", ("layers.0.mlp.dense_h_to_4h",), replace(SMALL, dtype="bfloat16"), 32),
        ("wide_host", ("resid.3",), replace(SMALL, dtype="float16", segment_rows=384), 48),
        (
            "wide_host",
            "resid",
            LayoutSettings(dtype="bfloat16", chunk_bytes=1000, unit_bytes=1),
            64,
        ),
        ("wide_host", ("resid.3", "mlp.1"), replace(SMALL, dtype="int8"), 32),
        ("wide_host", ("embed", "attn.2"), replace(SMALL, segment_rows=64, order="context"), 16),
    ],
)
def test_disk_of_a_real_run(request, asked, host, hooks, layout, context):  # F113
    """Within 2 % in total, and exact for everything that is not JSON."""
    model = HostSettings(model=str(request.getfixturevalue(host)), batch_tokens=128)
    settings = asked(host=model, hooks=hooks, layout=layout, context=context)
    snapshot = run(settings).store.snapshot()
    rows = [s.n_rows for s in snapshot.segments]
    assert any(n % context for n in rows), "no short segment: the test shows too little"
    found = plan(settings, segments=rows)
    files = [p for p in Path(settings.store).rglob("*") if p.is_file()]
    total = sum(p.stat().st_size for p in files)
    assert abs(found.disk.bytes / total - 1) < 0.02
    assert found.disk.files == len(files)
    assert (found.disk.rows, found.disk.segments) == (snapshot.n_rows, len(rows))
    assert {h.name: h.d for h in found.hooks} == {n: h.d for n, h in snapshot.hooks.items()}

    def size(pattern):
        return sum(p.stat().st_size for p in Path(settings.store).glob(pattern) if p.is_file())

    for hook in found.hooks:
        assert hook.bytes == size(f"segments/*/*/{snapshot.hooks[hook.name].key}/c/**/*")
        info = snapshot.hooks[hook.name]
        assert hook.chunk_rows == info.chunk_rows
        assert hook.chunks == sum(math.ceil(n / info.chunk_rows) for n in rows)
    assert found.disk.token_table == size("segments/*/tokens/*/c/0")
    assert found.disk.array_metadata == size("segments/**/zarr.json")
    assert found.disk.canary == pytest.approx(size("canaries/**/*"), rel=0.02)
    assert found.disk.commits == pytest.approx(size("commits/*.json"), rel=0.02)
    assert found.disk.snapshot == pytest.approx(size("snapshots/*.json"), rel=0.02)


def test_rows_follow_units_and_are_rounded_up_to_segments(config_only):
    """Counted one segment at a time, as the run does it."""
    for tokens in (1, 131_072, 1_900_000, 2_000_000, 10_000_000, 10_000_001):
        unit, rows = round((8 << 20) / 4.2), Counter()
        while sum(n * many for n, many in rows.items()) < tokens:
            left = unit - sum(n * many for n, many in rows.items()) % unit
            rows[min(left, 131_072)] += 1
        disk = of(config_only, "llama-3.1-8b", tokens=tokens, layers=(0,)).disk
        assert disk.rows == sum(n * many for n, many in rows.items())
        assert disk.segments == rows.total()
        assert disk.rows >= tokens


# -- the model, nothing loaded ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("llama-3.1-8b", 8.03),
        ("qwen2.5-72b", 72.7),
        ("qwen2.5-vl-72b", 73.4),
        ("mixtral-8x7b", 46.7),
    ],
)
def test_parameters_of_real_configs(config_only, name, billions):  # F15 F113
    model = of(config_only, name, layers=(0,)).model
    assert model.parameters == pytest.approx(billions * 1e9, rel=0.005)
    assert model.parameters_run < model.parameters / 10
    assert (model.blocks_run, model.weights) == (1, 2 * model.parameters_run)


def test_truncated_llama_by_hand(config_only):
    """Blocks 0 to 16: q and o are d x d, k and v d x d/4, three d x I matrices, two norms."""
    d, wide = 4096, 14336
    block = 2 * d * d + 2 * d * d // 4 + 3 * d * wide
    model = of(config_only, "llama-3.1-8b", layers=(8, 16), context=2048).model
    assert model.parameters_run == 17 * (block + 2 * d) + 128256 * d + d
    assert model.parameters_active == 17 * block
    assert model.flops == 2 * 17 * block + 4 * 17 * 2048 * d


def test_experts_that_a_token_does_not_choose_are_not_counted(config_only):
    """Mixtral 8x7B is published as 12.9e9 active parameters, embeddings included."""
    model = of(config_only, "mixtral-8x7b", layers=(31,)).model
    assert model.parameters_active + 2 * 32000 * 4096 == pytest.approx(12.9e9, rel=0.005)


def test_vision_tower_is_loaded_but_sees_no_text(config_only):
    text = of(config_only, "qwen2.5-72b", layers=(39,)).model
    both = of(config_only, "qwen2.5-vl-72b", layers=(39,)).model
    assert both.parameters_active == text.parameters_active
    assert 0.5e9 < both.parameters_run - text.parameters_run < 0.8e9


@pytest.mark.parametrize("host", ["tiny_host", "wide_host"])
@pytest.mark.parametrize("hooks", [("resid.1",), ("attn.2", "mlp.0"), ("embed",)])
def test_model_against_the_one_that_is_loaded(request, host, hooks):
    """Parameters of what `load` gives, and FLOPs as torch counts them in a forward pass."""
    folder = str(request.getfixturevalue(host))
    settings = HostSettings(model=folder, attention="eager")
    real = Host(settings)
    model = real.load(resolve(hooks, None, real.skeleton()))
    found = plan(
        PlanSettings(host=settings, hooks=hooks, tokens=1000, context=32, layout=SMALL)
    ).model
    assert found.parameters_run == sum(p.numel() for p in model.parameters())
    ids_BT = torch.ones(3, 32, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        forward(model, ids_BT, torch.ones_like(ids_BT), None)
    assert found.flops == pytest.approx(counter.get_total_flops() / ids_BT.numel(), rel=0.01)


# -- memory ----------------------------------------------------------------------------------------


class PeakBytes(TorchDispatchMode):
    """Largest sum of bytes of tensors that are made and alive at once."""

    def __init__(self):
        super().__init__()
        self.live, self.peak, self.seen = 0, 0, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        inputs = {a.untyped_storage()._cdata for a in args if isinstance(a, torch.Tensor)}
        for t in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(t, torch.Tensor):
                storage = t.untyped_storage()
                if storage._cdata not in inputs | self.seen.keys():
                    self.add(storage, storage._cdata, storage.nbytes())
        return out

    def add(self, storage, key, size):
        self.seen[key] = weakref.finalize(storage, self.drop, key, size)
        self.live += size
        self.peak = max(self.peak, self.live)

    def drop(self, key, size):
        del self.seen[key]
        self.live -= size


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("host", ["tiny_host", "wide_host"])
def test_activations_bound_the_measured_peak(request, host, attention):
    """Every tensor of a real forward pass is weighed; the plan may not be below, nor far above."""
    settings = HostSettings(
        model=str(request.getfixturevalue(host)), attention=attention, batch_tokens=512
    )
    real = Host(settings)
    model = real.load(resolve(("resid.2",), None, real.skeleton()))
    ids_BT = torch.ones(8, 64, dtype=torch.long)
    with torch.no_grad(), PeakBytes() as bytes_:
        model(input_ids=ids_BT, attention_mask=torch.ones_like(ids_BT), use_cache=False)
    found = plan(
        PlanSettings(host=settings, hooks=("resid.2",), tokens=1000, context=64, layout=SMALL)
    )
    assert 0 < bytes_.peak <= found.memory.activations <= 2 * bytes_.peak


def test_memory_of_72b_on_eight_gpus(config_only):  # F15 F113
    """Replicated it does not fit 80 GiB, under ZeRO-3 over eight it does; the sums by hand."""
    found = of(config_only, "qwen2.5-72b", layers=(79,), context=2048, gpus=8)
    g, weights = found.memory, found.model.weights
    assert weights == pytest.approx(2 * (72.7e9 - 152064 * 8192), rel=0.005)
    assert g.gathered == 2 * 152064 * 8192  # the embedding is larger than a block
    assert g.replicated == weights + g.activations + g.hook_buffers
    assert g.zero3 == math.ceil(weights / 8) + g.gathered + g.activations + g.hook_buffers
    assert (g.replicated_fits, g.zero3_fits) == (False, True)
    alone = of(config_only, "qwen2.5-72b", layers=(79,), context=2048, gpus=1)
    assert not alone.memory.zero3_fits
    assert any("fits neither" in note for note in alone.notes)
    # 8 contexts: captured and kept in bf16, and one hook on its way to its storage type.
    assert g.hook_buffers == 16384 * 8192 * 3 * 2
    # Two segments in flight, a permuted copy of one, twice the shard that is encoded.
    assert g.segment_buffers == 131072 * 8192 * 2 * (2 + 1 + 2)


def test_gathered_module_is_the_largest_block_when_that_is_larger(config_only):
    block = 4096 * 4096 * 5 // 2 + 3 * 8 * 4096 * 14336 + 8 * 4096 + 2 * 4096
    assert of(config_only, "mixtral-8x7b", layers=(31,)).memory.gathered == 2 * block


# -- time and money --------------------------------------------------------------------------------


def test_hours_and_bandwidth(config_only):
    """An 8B host at 400 TFLOP/s reads about 25,000 tokens a second and writes 205 MB/s a hook."""
    found = of(config_only, "llama-3.1-8b", layers=(31,), gpus=16, tflops=1000.0, mfu=0.4)
    t, k = found.time, found.disk
    assert t.tokens_per_gpu == pytest.approx(400e12 / found.model.flops)
    assert 25_000 < t.tokens_per_gpu < 30_000  # 2 * 8.03e9 FLOPs with the head, 14 without
    assert t.hours == pytest.approx(k.rows * found.model.flops / (16 * 1000e12 * 0.4) / 3600)
    assert t.gpu_hours == pytest.approx(16 * t.hours)
    assert t.write_gb_per_gpu == pytest.approx(t.tokens_per_gpu * 8192e-9, rel=0.01)
    assert t.write_gb_per_node == pytest.approx(8 * t.write_gb_per_gpu)
    assert t.disk_hours == pytest.approx(k.bytes / (2 * 5e9) / 3600)  # two nodes
    assert t.writer_hours == pytest.approx(k.bytes / (16 * 0.2e9) / 3600)
    one = of(config_only, "llama-3.1-8b", layers=(31,), gpus=1).time
    assert one.write_gb_per_node == one.write_gb_per_gpu


@pytest.mark.parametrize(
    ("latents", "disk", "writer", "gpus"),
    [
        (65_536, 5.0, 9.0, 8),  # the disk of a node is shared and sets the pace
        (65_536, 5.0, 9.0, 1),
        (65_536, 5.0, 0.1, 1),  # the writing thread does
        (16_384, 0.5, 9.0, 9),
        (65_536, 0.3, 9.0, 1),
        (65_536, 0.05, 9.0, 1),
    ],
)
def test_break_even_by_trying_every_number_of_runs(config_only, latents, disk, writer, gpus):
    a = Assumptions(latents=latents, disk_gb_s=disk, writer_gb_s=writer, gpus=gpus)
    found = of(config_only, "llama-3.1-8b", layers=(24,), **vars(a))
    speed = a.tflops * 1e12 * a.mfu
    forward, sae, read = found.model.flops / speed, 2 * 4096 * latents / speed, 8192 / (disk * 1e9)
    row, nodes = found.disk.bytes / found.disk.rows, math.ceil(gpus / 8)
    cache = max(forward, row / (writer * 1e9), row * gpus / nodes / (disk * 1e9))
    wins = (n for n in range(1, 1000) if cache + n * max(sae, read) < n * (forward + sae))
    assert found.break_even.runs == next(wins, None)


def test_break_even_in_figures(config_only):
    """P = 500 TFLOP/s and F = 131,072 latents in bf16: 3.8 GB/s keep a trainer busy."""
    found = of(
        config_only,
        "llama-3.1-8b",
        layers=(8,),
        tflops=500.0,
        mfu=1.0,
        latents=131_072,
        disk_gb_s=1.0,
    )
    b = found.break_even
    assert b.read_gb == pytest.approx(3.81, abs=0.01)
    assert b.saes_per_read == pytest.approx(b.read_gb)
    assert b.forward_usd == pytest.approx(found.time.gpu_hours * 2.5)
    assert b.disk_usd_month == pytest.approx(found.disk.bytes / 1e12 * 20)
    assert b.runs_a_month == pytest.approx(b.disk_usd_month / b.forward_usd)
    unread = of(config_only, "llama-3.1-8b", layers=(8,), disk_gb_s=0.001)
    assert unread.break_even.runs is None
    assert "never" in table(unread)


# -- the command -----------------------------------------------------------------------------------


@pytest.fixture
def command(capsys, monkeypatch):
    """Words of the command -> (exit status, stdout, stderr)."""
    monkeypatch.setattr(sys, "argv", ["actcache"])  # Hydra reads it

    def typed(*words):
        with pytest.raises(SystemExit) as ended:
            main(words)
        return ended.value.code, *capsys.readouterr()

    return typed


def test_command(config_only, command):  # F113
    folder = config_only / "llama-3.1-8b"
    words = [
        "host=llama-3.1-8b",
        f"host.model={folder}",
        "tokens=1e9",
        "hooks=resid",
        "layers=[8,16,24]",
        "plan.gpus=8",
    ]
    status, out, err = command("plan", *words, "data=parquet", "--json")
    assert (status, err) == (0, "")
    host = HostSettings(model=str(folder), revision="main", dtype="bfloat16", batch_tokens=16_384)
    found = plan(
        PlanSettings(host=host, tokens=10**9, layers=(8, 16, 24), plan=Assumptions(gpus=8))
    )
    assert json.loads(out) == json.loads(json.dumps(found.to_json()))
    assert [h.name for h in found.hooks] == ["resid.8", "resid.16", "resid.24"]
    for word in (
        "8,030,261,248",
        "25 of 32 blocks",
        "24.6 TB",
        "8,011 segments",
        "the writer sets",
    ):
        assert word in table(found)


def test_command_without_data_and_store(tiny_host, command):
    status, out, _ = command(
        "plan", "host=local", f"host.model={tiny_host}", "tokens=1e6", "layout=small"
    )
    host = HostSettings(model=str(tiny_host))
    small = LayoutSettings(segment_rows=16_384, chunk_bytes=65_536, unit_bytes=262_144)
    found = plan(PlanSettings(host=host, tokens=10**6, layout=small))
    assert (status, out) == (0, table(found) + "\n")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["plan", "host=local", "host.model=HOST"], "tokens is missing"),
        (["plan", "host=llama-9b", "tokens=1e6"], "llama-9b"),
        (["run", "host=demo", "data=pydocs", "plan.gpus=8"], "plan.gpus"),
    ],
)
def test_wrong_words(tiny_host, command, words, message):
    status, _, err = command(*(w.replace("HOST", str(tiny_host)) for w in words))
    assert status == 1
    assert message in err
    assert "Traceback" not in err


def hub_settings(model):
    return PlanSettings(host=HostSettings(model=model), tokens=1000, layers=(0,))


def test_errors_name_what_to_do(config_only, tmp_path):
    with pytest.raises(HostError, match=r"no config\.json"):
        plan(hub_settings(str(tmp_path)))
    with pytest.raises(HostError, match="no such folder"):
        plan(hub_settings(str(tmp_path / "missing")))
    with pytest.raises(HostError, match=r"nobody/nothing.*host\.model=FOLDER"):
        plan(hub_settings("nobody/nothing"))
    with pytest.raises(HostError, match="host=demo is not made yet"):
        plan(hub_settings("demo"))
    (tmp_path / "config.json").write_text('{"model_type": "no_such_kind"}')
    with pytest.raises(HostError, match=re.escape(f"host.model={tmp_path} cannot be loaded")):
        plan(hub_settings(str(tmp_path)))
    with pytest.raises(HookError, match="32 blocks, 0 to 31"):
        of(config_only, "llama-3.1-8b", hooks=("resid.32",))
    with pytest.raises(HookError, match="matches nothing"):
        of(config_only, "llama-3.1-8b", hooks=("layers.3.mlpp",))
    with pytest.raises(HookError, match="belongs to the vision tower"):
        of(config_only, "qwen2.5-vl-72b", hooks=("visual.blocks.0",))
    with pytest.raises(SettingsError, match="tokens: expected at least 1, got 0"):
        of(config_only, "llama-3.1-8b", tokens=0)
    with pytest.raises(ActcacheError, match="multiple of context=100"):
        of(config_only, "llama-3.1-8b", context=100)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("gpus", 0, "at least 1, got 0"),
        ("mfu", 0.0, "more than 0, got 0.0"),
        ("tflops", -1.0, "more than 0"),
        ("disk_gb_s", math.nan, "more than 0, got nan"),
        ("mfu", 1.5, "a share up to 1"),
        ("latents", 0, "at least 1"),
    ],
)
def test_impossible_assumptions(key, value, message):
    with pytest.raises(SettingsError, match=f"plan.{key}: expected {re.escape(message)}"):
        Assumptions(**{key: value})


def test_a_hub_model_needs_its_config_only(config_only, tmp_path, monkeypatch):
    """What is fetched of a repository: config.json and code, never weights."""
    asked = {}

    def fetch(name, **kw):
        asked.update(kw, name=name)
        return str(config_only / "llama-3.1-8b")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    found = plan(replace(hub_settings("meta-llama/Llama-3.1-8B")))
    assert found.model.parameters == 8_030_261_248
    assert asked["name"] == "meta-llama/Llama-3.1-8B"
    assert asked["allow_patterns"] == ["config.json", "*.py"]


def scale_row(config_only, power):
    """A line of the table in docs/scale.md."""
    both = [
        of(config_only, name, tokens=10**power, layers=layers, context=1024, gpus=8)
        for name, layers in (("llama-3.1-8b", (8, 16, 24)), ("qwen2.5-72b", (20, 40, 60)))
    ]
    k, more = both[0].disk, [p.disk for p in both]
    pairs = [
        [human_bytes(d.commits) for d in more],
        [human_bytes(d.bytes) for d in more],
        [f"{p.time.gpu_hours:,.2g}" if power < 8 else f"{p.time.gpu_hours:,.0f}" for p in both],
        [
            f"{p.time.writer_hours * 8:,.1f}" if power < 8 else f"{p.time.writer_hours * 8:,.0f}"
            for p in both
        ],
        [f"{p.break_even.disk_usd_month:,.0f}" for p in both],
    ]
    cells = [f"1e{power}", f"{k.segments:,}", f"{k.files:,}", human_bytes(k.snapshot)]
    return f"| {' | '.join(cells + [' / '.join(pair) for pair in pairs])} |"


@pytest.mark.parametrize("power", range(6, 13))
def test_table_of_docs_scale(config_only, power):
    page = Path(__file__).resolve().parents[1] / "docs" / "scale.md"
    assert scale_row(config_only, power) in page.read_text().splitlines()
