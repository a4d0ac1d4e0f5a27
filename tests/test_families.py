"""Every family of hosts through `run`: the store holds what plain hooks on the whole model give."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers
from cache import contexts_of
from conftest import tiny_texts
from hosts import FAMILIES, Oracle, save_family, whole
from safetensors.torch import load_file, save_file

from actcache.data import PackSettings
from actcache.demo.train_host import END_OF_TEXT, train_tokenizer
from actcache.errors import HookError, HostError
from actcache.families import block_list
from actcache.hooks import resolve
from actcache.host import Host, HostSettings, save_host
from actcache.masks import check_isolation
from actcache.run import run

ALONE = PackSettings(attend_across_documents=False)


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    """Families by name, made once."""
    made = {}

    def make(name):
        if name not in made:
            made[name] = save_family(name, tiny_texts(), tmp_path_factory.mktemp(name))
        return made[name]

    return make


@pytest.fixture
def stored(asked, folder_of):
    """Run a family and give the contexts of its store."""

    def make(name, hooks, tokens=200, attention="auto", **kw):
        host = HostSettings(model=str(folder_of(name)), attention=attention, batch_tokens=128)
        result = run(asked(host=host, hooks=tuple(hooks), tokens=tokens, **kw))
        return contexts_of(result.store.snapshot())

    return make


def assert_equal(rows, expected):
    assert rows.keys() == expected.keys()
    for hook, x in rows.items():
        torch.testing.assert_close(
            torch.from_numpy(x), expected[hook].float(), rtol=1e-4, atol=2e-5, msg=hook
        )


# -- what is stored --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_rows_equal_plain_hooks_on_the_whole_model(name, stored, folder_of):  # F17, F104, F105
    oracle = Oracle(whole(folder_of(name), name), name)
    contexts = stored(name, oracle.paths())
    assert len({len(ids) for ids, _, _ in contexts.values()}) > 1  # short ones ran with padding
    for ids, _, rows in contexts.values():
        assert_equal(rows, oracle(ids))


@pytest.mark.parametrize("name", [n for n, f in FAMILIES.items() if f.attn])
def test_attention_and_mlp_are_what_a_block_adds(name, folder_of):  # F69
    """The residual stream is the oracle: an alias on another tensor would not add up."""
    host = Host(HostSettings(model=str(folder_of(name))))
    points = {
        p.name: p for p in resolve(["resid", "resid_pre", "attn", "mlp"], [1], host.skeleton())
    }
    oracle = Oracle(whole(folder_of(name), name), name)
    found = oracle(range(5, 25))
    block = block_list(oracle.model.base_model)[1][1]
    total = found["resid_pre.1"] + found["attn.1"]
    if name == "bert":
        total = block.attention.output.LayerNorm(total) + found["mlp.1"]
        total = block.output.LayerNorm(total)
    else:
        total = total + found["mlp.1"]
    torch.testing.assert_close(total, found["resid.1"], rtol=1e-4, atol=1e-5)
    assert {n: p.module for n, p in points.items()} == {
        n: FAMILIES[name].blocks + ".1" + (f".{part}" if part else "")
        for n, part in (
            ("resid.1", ""),
            ("resid_pre.1", ""),
            ("attn.1", FAMILIES[name].attn),
            ("mlp.1", FAMILIES[name].mlp),
        )
    }


@pytest.mark.parametrize("name", FAMILIES)
def test_names_of_transformerlens_and_of_the_model_with_its_head(name, folder_of):  # F69
    skeleton, family = Host(HostSettings(model=str(folder_of(name)))).skeleton(), FAMILIES[name]
    lens = ["blocks.1.hook_resid_post", "blocks.0.hook_resid_pre", "hook_embed"]
    ours = ["resid.1", "resid_pre.0", "embed"]
    if family.attn:
        lens += ["blocks.2.hook_attn_out", "blocks.2.hook_mlp_out"]
        ours += ["attn.2", "mlp.2"]
    assert resolve(lens, None, skeleton) == resolve(ours, None, skeleton)
    paths = [f"{family.blocks}.1", f"{family.blocks}.0:in", family.embed]
    paths += [f"{family.blocks}.2.{part}" for part in (family.attn, family.mlp) if part]
    for base in ("", family.base):
        assert resolve([base + p for p in paths], None, skeleton) == resolve(ours, None, skeleton)


# -- truncation ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_blocks_above_the_deepest_hook_are_not_loaded(name, folder_of, tmp_path):  # F105
    """A checkpoint without the upper blocks is enough; with a hook up there it is refused."""
    family, source = FAMILIES[name], folder_of(name)
    for file in source.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    above = f"{family.base}{family.blocks}.2."
    tensors = load_file(source / "model.safetensors")
    if name == "qwen2_5_vl":  # the checkpoint has the names of older versions
        above = above.replace("language_model.", "")
    left = {k: v for k, v in tensors.items() if not k.startswith((above, "decoder."))}
    assert len(left) < len(tensors)
    save_file(left, tmp_path / "model.safetensors", {"format": "pt"})
    host = Host(HostSettings(model=str(tmp_path)))
    full = Host(HostSettings(model=str(source)))
    skeleton = host.skeleton()
    model = host.load(resolve(["resid.1"], None, skeleton))
    names = {n for n, _ in skeleton.named_parameters()}
    path = f"{family.blocks}.2."
    decoder = ("decoder.block.", "decoder.final")
    expected = {n for n in names if not n.startswith((path, *decoder))}
    loaded = {n: p for n, p in model.named_parameters() if not n.startswith(decoder)}
    assert loaded.keys() == expected
    uncut = full.load(resolve(["resid.2"], None, skeleton))
    for n, p in loaded.items():
        assert "pooler" in n or torch.equal(p, uncut.get_parameter(n)), n
    with pytest.raises(HostError, match=r"its files lack \d+ of the weights"):
        host.load(resolve(["resid.2"], None, skeleton))


# -- documents apart -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "attention"),
    [(n, "auto") for n, f in FAMILIES.items() if not f.stateful]
    + [("llama", "eager"), ("bert", "eager"), ("t5", "eager"), ("modernbert", "eager")],
)
def test_documents_are_kept_apart(name, attention, stored, folder_of):
    """Also within windows of 8 tokens (Gemma 2, ModernBERT), which documents are longer than."""
    oracle = Oracle(whole(folder_of(name), name), name)
    contexts = stored(name, ["resid.1"], tokens=200, attention=attention, pack=ALONE)
    several = longest = 0
    for ids, docs, rows in contexts.values():
        for doc in np.unique(docs):
            mine = np.flatnonzero(docs == doc)  # [CLS] goes with the first
            expected = oracle(ids[mine])["resid.1"]
            torch.testing.assert_close(
                torch.from_numpy(rows["resid.1"][mine]), expected, rtol=1e-4, atol=2e-5
            )
            several += len(mine) < len(ids)
            longest = max(longest, len(mine))
    assert several >= 2
    assert longest > 8


def test_a_state_cannot_restart_at_a_document(asked, folder_of):
    host = HostSettings(model=str(folder_of("mamba")))
    with pytest.raises(HostError, match="mamba carries a state from token to token"):
        run(asked(host=host, hooks=("resid.0",), pack=ALONE))


def test_flash_attention_takes_no_documents(asked, folder_of):
    host = HostSettings(model=str(folder_of("llama")), attention="flash_attention_2")
    with pytest.raises(HostError, match="flash_attention_2 takes no mask of documents"):
        run(asked(host=host, hooks=("resid.0",), pack=ALONE))


def test_a_host_that_does_not_heed_the_mask_is_found_out():
    def heeding(starts, ids):
        pieces = np.split(ids[0], np.flatnonzero(starts[0])[1:])
        return {"h": torch.tensor(np.concatenate([np.cumsum(p) for p in pieces]))[None, :, None]}

    def leaking(starts, ids):
        return {"h": torch.tensor(np.cumsum(ids[0]))[None, :, None]}

    check_isolation(heeding, 400, torch.float32)
    with pytest.raises(HostError, match=r"does not keep documents apart.*'h'.*% off"):
        check_isolation(leaking, 400, torch.float32)


# -- what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "hook", "message"),
    [
        ("t5", "decoder.block.0", "the encoder runs alone .encoder.*needs a target text"),
        ("t5", "shared", "lies outside of it"),
        ("mixtral", "layers.0.mlp.experts.act_fn", "only the tokens that are routed to it"),
        ("mamba", "attn.0", r"no attention that an alias.*norm, mixer.*layers\.0\.mixer"),
        ("mamba", "mlp", "no MLP that an alias could name"),
        ("llama", "rotary_emb:out.1", "does not carry one vector per token"),
        ("qwen2_5_vl", "visual.blocks.0", "belongs to the vision tower"),
    ],
)
def test_modules_that_do_not_see_every_token(name, hook, message, asked, folder_of):  # F104
    host = HostSettings(model=str(folder_of(name)))
    with pytest.raises(HookError, match=message):
        run(asked(host=host, hooks=(hook,)))


def other_host(folder, model):
    tokenizer = train_tokenizer(tiny_texts(), 400, progress=False)
    save_host(model, tokenizer, folder, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT)
    return HostSettings(model=str(folder))


def test_a_module_that_runs_at_several_depths(asked, tmp_path):
    config = transformers.AlbertConfig(
        vocab_size=400,
        embedding_size=16,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
    )
    host = other_host(tmp_path / "albert", transformers.AlbertModel(config))
    hook = "encoder.albert_layer_groups.0.albert_layers.0"
    with pytest.raises(HookError, match="fired more than once in a forward pass"):
        run(asked(host=host, hooks=(hook,)))


def test_a_model_that_does_not_read_text(asked, tmp_path):
    config = transformers.WhisperConfig(
        vocab_size=400, d_model=24, encoder_layers=1, decoder_layers=1, pad_token_id=0
    )
    host = other_host(tmp_path / "whisper", transformers.WhisperModel(config))
    with pytest.raises(HostError, match="reads input_features, not tokens of text"):
        run(asked(host=host, hooks=("resid.0",)))
