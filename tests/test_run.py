"""actcache run: what is stored is what the host computed on the text that went in."""

import os
import signal

import numpy as np
import pytest
import torch
from cache import contexts_of, digests
from conftest import tiny_texts
from transformers import AutoModelForCausalLM, AutoTokenizer

import actcache.segments
import actcache.store.writer as writer_module
from actcache.data import PackSettings
from actcache.run import run
from actcache.store import (
    open_store,
    verify,
)
from actcache.store.collect import find_garbage, remove
from actcache.store.split import doc_key

# -- the rows are right ----------------------------------------------------------------------------


def test_rows_equal_a_manual_forward_hook(asked, tiny_host):  # F101
    store = run(asked()).store
    model = AutoModelForCausalLM.from_pretrained(tiny_host).eval()
    caught = {}
    model.gpt_neox.layers[1].register_forward_hook(
        lambda m, a, out: caught.update({"resid.1": out[0] if isinstance(out, tuple) else out})
    )
    model.gpt_neox.layers[0].mlp.register_forward_hook(lambda m, a, o: caught.update({"mlp.0": o}))
    found = contexts_of(store.snapshot())
    assert len(found) > 10
    for ids, _, rows in found.values():
        with torch.no_grad():
            model(torch.from_numpy(ids.astype(np.int64))[None])
        for hook, x in rows.items():
            # Batched and single forward passes use other matmul kernels: equal to rounding.
            torch.testing.assert_close(torch.from_numpy(x), caught[hook].reshape(len(ids), -1))


def test_decoded_rows_equal_the_corpus(asked):
    snapshot = run(asked()).store.snapshot()
    vocab = snapshot.vocab()
    texts = {}
    for ids, docs, _ in (contexts_of(snapshot)[k] for k in sorted(contexts_of(snapshot))):
        for token, doc in zip(ids, docs, strict=True):
            texts[int(doc)] = texts.get(int(doc), b"") + vocab[token]
    expected = {
        doc_key(f"doc/{i}"): t.encode() + b"<|endoftext|>" for i, t in enumerate(tiny_texts())
    }
    assert texts == expected


def test_vocab_bytes_of_every_token_decode_as_the_tokenizer_does(tiny_host, asked):
    vocab = run(asked(tokens=128)).store.snapshot().vocab()
    tokenizer = AutoTokenizer.from_pretrained(tiny_host)
    for text in ("naïve “all” ε\n\tdone", *tiny_texts()[:5]):
        ids = tokenizer(text).input_ids
        assert b"".join(vocab[i] for i in ids).decode() == text


def test_hooks_by_path_input_and_alias_agree(asked, tiny_host):
    names = (
        "gpt_neox.layers.2",
        "layers.2:in",
        "resid_pre.1",
        "blocks.0.hook_attn_out",
        "layers.1.mlp:in",
        "embed",
    )
    snapshot = run(asked(hooks=names, tokens=128)).store.snapshot()
    # One tensor, one name: paths that have an alias are stored under it.
    assert sorted(snapshot.hooks) == sorted(
        ["resid.2", "resid_pre.2", "resid_pre.1", "attn.0", "layers.1.mlp:in", "embed"]
    )
    for name in ("gpt_neox.layers.2", "layers.2", "blocks.2.hook_resid_post"):  # F69
        assert snapshot.resolve_hook(name) == "resid.2"
    assert snapshot.resolve_hook("gpt_neox.layers.2:in") == "resid_pre.2"
    for _, _, rows in contexts_of(snapshot).values():
        assert np.isfinite(rows["resid_pre.2"]).all()


def test_residual_entering_a_block_is_the_one_leaving_the_block_before(asked):
    snapshot = run(asked(hooks=("resid.1", "resid_pre.2"), tokens=128)).store.snapshot()
    for _, _, rows in contexts_of(snapshot).values():
        assert np.array_equal(rows["resid.1"], rows["resid_pre.2"])


def test_a_kind_of_hook_stands_for_its_layers(asked):
    snapshot = run(asked(hooks="resid", layers=(0, 2), tokens=128)).store.snapshot()
    assert sorted(snapshot.hooks) == ["resid.0", "resid.2"]


def test_attention_stops_at_documents_when_asked(asked, tiny_host):
    packed = PackSettings(attend_across_documents=False)
    snapshot = run(asked(pack=packed, hooks=("resid.1",))).store.snapshot()
    model = AutoModelForCausalLM.from_pretrained(tiny_host).eval().gpt_neox
    checked = 0
    for ids, docs, rows in contexts_of(snapshot).values():
        for doc in np.unique(docs):
            mine = docs == doc
            alone = torch.from_numpy(ids[mine].astype(np.int64))[None]
            with torch.no_grad():
                # hidden_states[2] is the residual stream after block 1, not yet normed.
                expected = model(alone, output_hidden_states=True).hidden_states[2][0]
            torch.testing.assert_close(torch.from_numpy(rows["resid.1"][mine]), expected)
            checked += mine.sum() < len(ids)
    assert checked > 5  # contexts with several documents were among them


def test_the_host_is_cut_above_the_deepest_hook(asked, monkeypatch):
    seen = {}
    original = actcache.segments.SegmentBuilder.__init__

    def spy(self, model, *args, **kw):
        seen["blocks"] = len(model.layers)
        original(self, model, *args, **kw)

    monkeypatch.setattr(actcache.segments.SegmentBuilder, "__init__", spy)
    run(asked(hooks=("resid.0",), tokens=128))
    assert seen["blocks"] == 1


# -- continuing ------------------------------------------------------------------------------------


def test_same_command_again_computes_nothing_and_loads_no_model(asked, monkeypatch):
    first = run(asked())
    monkeypatch.setattr(
        "actcache.host.Host.load", lambda *a: pytest.fail("the model was loaded again")
    )
    second = run(asked())
    assert (second.computed, second.snapshot) == (0, first.snapshot)
    assert second.tokens == first.tokens


def test_more_tokens_append_and_old_snapshots_stay(asked):
    first = run(asked(tokens=200))
    rows = first.store.snapshot().n_rows
    assert rows >= 200
    more = run(asked(tokens=500))
    assert more.tokens >= 500
    assert more.computed == more.tokens - rows
    assert open_store(first.store.path).snapshot("1").n_rows == rows
    assert digests(run(asked(store=str(first.store.path) + "-fresh", tokens=500)).store) == digests(
        more.store
    )


def test_hooks_added_later_equal_hooks_captured_at_once(asked, tmp_path):
    run(asked(hooks=("resid.1",)))
    added = run(asked(hooks=("mlp.0",))).store
    at_once = run(asked(store=str(tmp_path / "once"))).store
    both = added.snapshot()
    assert sorted(both.hooks) == ["mlp.0", "resid.1"]
    acts = {k: v for k, v in digests(at_once).items() if "/acts/" in k[1]}
    mine = digests(added)
    assert all(mine[k] == v for k, v in acts.items())
    assert not [c for c in verify(both) if c.problem]


def killed_after(settings, objects):
    """Run in a forked child that dies by SIGKILL half-way through writing one more object."""
    child = os.fork()
    if child == 0:
        left, original = [objects], writer_module.publish

        def dying(path, data, *more):
            left[0] -= 1
            if left[0] < 0:
                path.parent.mkdir(parents=True, exist_ok=True)
                half = path.parent / f".{path.name}.half.partial"
                half.write_bytes(bytes(data)[: len(data) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            original(path, data, *more)

        writer_module.publish = dying
        code = 1
        try:
            run(settings)
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_kill_9_then_the_same_command_gives_the_same_store(asked, tmp_path):  # F106
    """Killed over and over, at every kind of object; each rerun continues where it can."""
    whole = digests(run(asked(store=str(tmp_path / "whole"))).store)
    settings = asked()
    kills = 0
    for objects in (0, 1, 2, 3, 9, 15, 26, 27, 40):
        kills += killed_after(settings, objects) == -signal.SIGKILL
    assert kills >= 8
    assert run(settings).computed > 0
    store = open_store(settings.store)
    assert digests(store) == whole
    assert not [c for c in verify(store.snapshot()) if c.problem]
    garbage = find_garbage(store.path, grace=0)
    assert garbage  # the killed attempts
    assert remove(garbage) > 0
    named = {store.path / o.key for s in store.snapshot().segments for o in s.commits[0].objects}
    assert {p for p in (store.path / "segments").rglob("*") if p.is_file()} == named
    assert not list(store.path.rglob("*.partial"))


def test_ctrl_c_keeps_what_is_committed(asked, monkeypatch):
    settings = asked()
    original = actcache.segments.SegmentBuilder.build
    calls = []

    def interrupting(self, contexts, advance):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(self, contexts, advance)

    monkeypatch.setattr(actcache.segments.SegmentBuilder, "build", interrupting)
    result = run(settings)
    assert result.interrupted
    assert len(result.store.snapshot().segments) == 2
    monkeypatch.undo()
    again = run(settings)
    assert not again.interrupted
    assert again.tokens > result.tokens
