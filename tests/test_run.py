"""actcache run: what is stored is what the host computed on the text that went in."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import tiny_texts
from transformers import AutoModelForCausalLM, AutoTokenizer

import actcache.segments
import actcache.store.writer as writer_module
from actcache.data import PackSettings
from actcache.errors import DataError, HookError, HostError, NonFiniteError
from actcache.host import HostSettings
from actcache.run import CacheSettings, LayoutSettings, run
from actcache.sources import DataSettings
from actcache.store import (
    IdentityError,
    OutOfSpaceError,
    SettingsError,
    StoreBusyError,
    StoreError,
    open_store,
    verify,
)
from actcache.store.split import doc_key

SMALL = LayoutSettings(dtype="float32", segment_rows=128, chunk_bytes=2048, unit_bytes=1)


@pytest.fixture
def asked(tiny_host, tiny_parquet, tmp_path):
    """Settings for a small store; keyword arguments replace fields."""

    def make(**kw):
        defaults = {
            "host": HostSettings(model=str(tiny_host), batch_tokens=128),
            "data": DataSettings(files=str(tiny_parquet), id_column="id"),
            "store": str(tmp_path / "store"),
            "hooks": ("resid.1", "mlp.0"),
            "context": 32,
            "layout": SMALL,
            "progress": False,
        }
        return CacheSettings(**(defaults | kw))

    return make


def contexts_of(snapshot):
    """{(segment, ctx): (token ids, doc keys, {hook: rows})} in position order."""
    found = {}
    for segment in snapshot.segments:
        tokens = segment.tokens()
        rows = {h: np.asarray(segment.acts(h).read(), dtype=np.float32) for h in snapshot.hooks}
        for ctx in np.unique(tokens.ctx):
            mine = np.flatnonzero(tokens.ctx == ctx)
            mine = mine[np.argsort(tokens.pos[mine])]
            found[segment.id, int(ctx)] = (
                tokens.token_id[mine],
                tokens.doc[mine],
                {h: x[mine] for h, x in rows.items()},
            )
    return found


def digests(store):
    return {
        (commit.segment, o.key): o.sha256
        for segment in store.snapshot().segments
        for commit in segment.commits
        for o in commit.objects
    }


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


def overrides(settings):
    return [
        "run",
        "host=local",
        f"host.model={settings.host.model}",
        "host.batch_tokens=128",
        "data=parquet",
        f"data.files={settings.data.files}",
        "data.id_column=id",
        f"store={settings.store}",
        "hooks=[resid.1,mlp.0]",
        "context=32",
        "layout.dtype=float32",
        "layout.segment_rows=128",
        "layout.chunk_bytes=2048",
        "layout.unit_bytes=1",
        "progress=false",
    ]


def command(settings, *more):
    return [sys.executable, "-m", "actcache", *overrides(settings), *more]


def killed_after(settings, objects):
    """Run in a forked child that dies by SIGKILL half-way through writing one more object."""
    child = os.fork()
    if child == 0:
        left = [objects]

        def dying(path, data, original=writer_module.publish):
            left[0] -= 1
            if left[0] < 0:
                path.parent.mkdir(parents=True, exist_ok=True)
                half = path.parent / f".{path.name}.half.partial"
                half.write_bytes(bytes(data)[: len(data) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            original(path, data)

        writer_module.publish = dying
        run(settings)
        os._exit(0)
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


def test_a_second_writer_is_refused(asked, tmp_path):
    from actcache.store.writer import _lock

    settings = asked()
    Path(settings.store).mkdir()
    held = _lock(Path(settings.store))
    try:
        with pytest.raises(StoreBusyError, match=f"pid.*{os.getpid()}"):
            run(settings)
    finally:
        os.close(held)
    assert run(settings).tokens > 0


# -- bad input -------------------------------------------------------------------------------------


def test_other_work_in_the_store_is_a_diff(asked, tiny_host):
    run(asked(tokens=128))
    with pytest.raises(IdentityError) as e:
        run(
            asked(
                context=64,
                host=HostSettings(model=str(tiny_host), dtype="bfloat16"),
                pack=PackSettings(separator="none"),
            )
        )
    for line in (
        "packing.context: the store has 32, you asked for 64",
        "host.dtype: the store has float32, you asked for bfloat16",
        "packing.separator: the store has 0, you asked for null",
    ):
        assert line in str(e.value)


def test_a_hook_that_does_not_exist(asked):
    with pytest.raises(HookError, match=r"layers\.1\.mpl.*Did you mean layers\.1\.mlp"):
        run(asked(hooks=("layers.1.mpl",)))
    with pytest.raises(HookError, match="has 3 blocks, 0 to 2"):
        run(asked(hooks=("resid.7",)))
    with pytest.raises(HookError, match=r"layers=.* has no effect"):
        run(asked(hooks=("resid.1",), layers=(1,)))


def test_a_hook_that_never_fires(asked):
    with pytest.raises(HookError, match="'layers' did not fire"):
        run(asked(hooks=("layers",)))  # a list of modules, which nobody calls
    with pytest.raises(HookError, match=r"input of layers\.0\.mlp holds no such tensor"):
        run(asked(hooks=("layers.0.mlp:in.nothing",)))


def test_a_hook_that_is_not_one_vector_per_token(asked, monkeypatch):
    from actcache.hooks import Capture

    original = Capture.take
    monkeypatch.setattr(
        Capture, "take", lambda self: {k: x[:, :1] for k, x in original(self).items()}
    )
    with pytest.raises(HookError, match="does not carry one vector per token"):
        run(asked())


def parquet(path, **columns):
    pq.write_table(pa.table(columns), path)
    return DataSettings(files=str(path))


def test_parquet_without_text(asked, tmp_path):
    data = parquet(tmp_path / "n.parquet", number=[1, 2], score=[0.5, 0.1])
    with pytest.raises(DataError, match=r"no column of text; it has: number \(int64\), score"):
        run(asked(data=data))


def test_empty_parquet(asked, tmp_path):
    data = parquet(tmp_path / "e.parquet", text=pa.array([], pa.string()))
    with pytest.raises(DataError, match="no rows"):
        run(asked(data=data))
    data = parquet(tmp_path / "n.parquet", text=["", None])
    with pytest.raises(DataError, match="every document is empty"):
        run(asked(data=data))


def test_missing_and_unreadable_files(asked, tmp_path):
    with pytest.raises(DataError, match=r"data\.files=.*no parquet file there"):
        run(asked(data=DataSettings(files=str(tmp_path / "*.parquet"))))
    (tmp_path / "bad.parquet").write_text("not parquet")
    with pytest.raises(DataError, match="not a readable parquet file"):
        run(asked(data=DataSettings(files=str(tmp_path / "bad.parquet"))))
    with pytest.raises(DataError, match=r"data\.id_column=ID: no such column.*Did you mean id"):
        run(asked(data=DataSettings(files=asked().data.files, id_column="ID")))


def test_tokenizer_that_does_not_fit_the_model(asked, tiny_host, tmp_path):
    import shutil

    folder = tmp_path / "host"
    shutil.copytree(tiny_host, folder)
    config = json.loads((folder / "config.json").read_text())
    config["vocab_size"] = 100
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(HostError, match=r"token ids up to \d+, the model embeds 100"):
        run(asked(host=HostSettings(model=str(folder))))


def test_host_that_is_not_there(asked, tmp_path):
    with pytest.raises(HostError, match="there is no such folder"):
        run(asked(host=HostSettings(model=str(tmp_path / "nothing"))))
    (tmp_path / "empty").mkdir()
    with pytest.raises(HostError, match=r"no config\.json"):
        run(asked(host=HostSettings(model=str(tmp_path / "empty"))))
    with pytest.raises(HostError, match=r"host\.model=some/repository cannot be loaded"):
        run(asked(host=HostSettings(model="some/repository")))


def test_not_finite_names_the_context(asked, tiny_host, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_host)
    with torch.no_grad():
        model.gpt_neox.embed_in.weight[0] = float("nan")
    model.save_pretrained(tmp_path / "nan")
    AutoTokenizer.from_pretrained(tiny_host).save_pretrained(tmp_path / "nan")
    with pytest.raises(NonFiniteError, match=r"'resid\.1' is not finite.*position \d+.*tokens"):
        run(asked(host=HostSettings(model=str(tmp_path / "nan")), hooks=("resid.1",)))


def test_segments_must_hold_whole_contexts(asked):
    with pytest.raises(SettingsError, match="must be a multiple of context=48"):
        run(asked(context=48))


def test_disk_full_keeps_what_is_committed(asked, monkeypatch):
    """Writes fail as on a full disk after some objects; then there is space again."""
    import errno

    import actcache.store.publish as publishing

    settings = asked()
    original, left = os.link, [60]

    def link(src, dst):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        original(src, dst)

    monkeypatch.setattr(publishing.os, "link", link)
    with pytest.raises(OutOfSpaceError, match="Everything committed before is intact"):
        run(settings)
    monkeypatch.undo()
    assert run(settings).computed > 0
    assert digests(open_store(settings.store)) == digests(
        run(asked(store=settings.store + "-whole")).store
    )


def test_folder_that_is_something_else(asked, tmp_path):
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "thesis.tex").write_text("precious")
    with pytest.raises(StoreError, match=r"is not a store; it holds 'thesis\.tex'"):
        run(asked())
    assert (tmp_path / "store" / "thesis.tex").read_text() == "precious"


# -- the command -----------------------------------------------------------------------------------


def test_command_run_info_verify(asked):
    settings = asked(tokens=200)
    done = subprocess.run(command(settings, "tokens=200"), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "text column: text (found by name)" in done.stdout
    info = subprocess.run(
        [sys.executable, "-m", "actcache", "info", settings.store, "--json"],
        capture_output=True,
        text=True,
    )
    facts = json.loads(info.stdout)
    snapshot = open_store(settings.store).snapshot()
    assert facts["tokens"] == snapshot.n_rows
    assert set(facts["hooks"]) == {"resid.1", "mlp.0"}
    files = [p for p in (snapshot.store.path / "segments").rglob("*") if p.is_file()]
    assert facts["bytes"] == sum(p.stat().st_size for p in files)
    shards = [p for p in files if "acts/resid.1/c" in str(p)]
    meta = [p for p in files if str(p).endswith("acts/resid.1/zarr.json")]
    sizes = sum(p.stat().st_size for p in shards + meta)
    assert facts["hooks"]["resid.1"]["bytes"] == sizes
    plain = subprocess.run(
        [sys.executable, "-m", "actcache", "info", settings.store], capture_output=True, text=True
    )
    for word in ("store id", "resid.1", "contexts of 32", "snapshot"):
        assert word in plain.stdout
    verified = subprocess.run(
        [sys.executable, "-m", "actcache", "verify", settings.store], capture_output=True, text=True
    )
    assert (verified.returncode, "all whole" in verified.stdout) == (0, True)
    next(snapshot.store.path.rglob("acts/resid.1/c/0/0")).unlink()
    damaged = subprocess.run(
        [sys.executable, "-m", "actcache", "verify", settings.store], capture_output=True, text=True
    )
    assert damaged.returncode == 1
    assert "acts/resid.1/c/0/0: is missing" in damaged.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["store="], "store is empty"),
        (["hosts=demo"], "hosts"),
        (["+host.modell=x"], "unknown key 'host.modell'"),
        (["context=banana"], "context: expected a whole number, got 'banana'"),
        (["layout.dtype=int3"], "layout.dtype: expected one of 'bfloat16'"),
    ],
)
def test_wrong_arguments_are_named_without_a_traceback(asked, words, message):
    done = subprocess.run(command(asked(), *words), capture_output=True, text=True)
    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_progress_bar_shows_rate_and_time_left(asked):  # F126
    words = [w for w in overrides(asked()) if w != "progress=false"]
    done = subprocess.run(
        [sys.executable, "-m", "actcache", *words, "tokens=400"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "caching" in done.stderr
    assert "tok/s" in done.stderr


def test_ctrl_c_on_the_command(asked):
    """A real SIGINT while it runs: exit status 130 and a store that continues."""
    settings = asked()
    slow = "import time, actcache.segments as s; b = s.SegmentBuilder.build\n"
    slow += "s.SegmentBuilder.build = lambda *a: (time.sleep(0.3), b(*a))[1]\n"
    slow += "from actcache.cli import main; main()"
    process = subprocess.Popen(
        [sys.executable, "-c", slow, *overrides(settings)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    commits = Path(settings.store) / "commits"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not list(commits.glob("u*.json")):
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "the same command continues" in out
    assert open_store(settings.store).snapshot().n_rows > 0
