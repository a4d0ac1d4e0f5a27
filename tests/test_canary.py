"""Canaries: the reader's own model is told from another one, and from the same one elsewhere."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
import zarr
from cache import SMALL, contexts_of
from conftest import tiny_texts
from transformers import AutoModelForCausalLM

from actcache.canary import check, relative_errors
from actcache.cli import main
from actcache.data import PackSettings
from actcache.demo.train_host import END_OF_TEXT, train_tokenizer
from actcache.errors import HookError, HostError, NonFiniteError
from actcache.hooks import resolve
from actcache.host import Host, HostSettings, new_causal_lm, save_host
from actcache.run import CacheSettings, run
from actcache.sources import DataSettings
from actcache.store import DamagedError, StoreMissingError, open_store, verify
from actcache.store.canaries import canaries, canary_files
from actcache.store.collect import find_garbage, remove

HOOKS = ("resid.0", "resid.1")
ROPE = {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 1.0}


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    """The tiny host with weights that make attention look somewhere in particular."""
    folder = tmp_path_factory.mktemp("sharp") / "host"
    tokenizer = train_tokenizer(tiny_texts(), 400, progress=False)
    config = {
        "model_type": "gpt_neox",
        "vocab_size": tokenizer.get_vocab_size(),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
        "initializer_range": 0.3,
        "rope_parameters": ROPE,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
    }
    special = dict.fromkeys(("bos_token", "eos_token", "pad_token"), END_OF_TEXT)
    save_host(new_causal_lm(config, seed=0), tokenizer, folder, **special)
    return folder


@pytest.fixture
def settings(asked, host):
    return asked(host=HostSettings(model=str(host), batch_tokens=128), hooks=HOOKS)


@pytest.fixture(scope="module")
def original(host, tiny_parquet, tmp_path_factory):
    """A store of the first segments of `settings`."""
    settings = CacheSettings(
        host=HostSettings(model=str(host), batch_tokens=128),
        data=DataSettings(files=str(tiny_parquet), id_column="id"),
        store=str(tmp_path_factory.mktemp("original") / "store"),
        hooks=HOOKS,
        tokens=128,
        context=32,
        layout=SMALL,
        progress=False,
    )
    return run(settings).store


@pytest.fixture
def stored(original, tmp_path):
    """A copy of `original`, at the place that `settings` names."""
    shutil.copytree(original.path, tmp_path / "store")
    return open_store(tmp_path / "store")


def changed(host, folder, **config):
    """A copy of the host with other values in its config.json."""
    shutil.copytree(host, folder)
    file = folder / "config.json"
    values = json.loads(file.read_text())
    for key, value in config.items():
        values[key] = values[key] | value if isinstance(value, dict) else value
    file.write_text(json.dumps(values))
    return HostSettings(model=str(folder))


# -- what is written -------------------------------------------------------------------------------


def test_a_canary_holds_the_first_contexts_each_run_alone(stored, host):  # F106
    store = stored
    (canary,) = canaries(store)
    first = store.snapshot().segments[0]
    assert canary.record.segment == first.id
    lengths = np.bincount(first.tokens().ctx)
    expected = [n for n, length in enumerate(lengths) if length == 32][:8]
    assert list(canary.record.contexts) == expected
    in_store = contexts_of(store.snapshot())
    model = AutoModelForCausalLM.from_pretrained(host).eval()
    table, acts = canary.tokens(), {h: canary.acts(h) for h in canary.hooks}
    for here, number in enumerate(expected):
        mine = table.ctx == here
        ids, docs, _ = in_store[first.id, number]
        assert np.array_equal(table.token_id[mine], ids)
        assert np.array_equal(table.doc[mine], docs)
        with torch.no_grad():
            alone = model(torch.from_numpy(ids.astype(np.int64))[None], output_hidden_states=True)
        for layer, hook in enumerate(("resid.0", "resid.1")):
            assert np.array_equal(acts[hook][mine], alone.hidden_states[layer + 1][0].numpy())


def test_a_canary_is_plain_zarr_in_float32_whatever_is_stored(settings):
    half = replace(settings, tokens=128, layout=replace(settings.layout, dtype="bfloat16"))
    store = run(half).store
    (canary,) = canaries(store)
    theirs = zarr.open_group(store.path / canary.record.folder, mode="r")
    assert theirs["acts/resid.1"].dtype == np.float32
    assert np.array_equal(theirs["acts/resid.1"][...], canary.acts("resid.1"))
    assert np.array_equal(theirs["tokens/token_id"][...], canary.tokens().token_id)


def test_a_canary_for_each_set_of_hooks_and_no_second_for_the_same(stored, settings):
    assert run(replace(settings, tokens=256)).computed > 0
    store = run(replace(settings, tokens=128, hooks=("mlp.2",))).store
    assert sorted(tuple(c.hooks) for c in canaries(store)) == [("mlp.2",), ("resid.0", "resid.1")]
    assert [r.hook for r in check(store.path, settings.host)] == ["mlp.2", "resid.0", "resid.1"]


def test_a_run_that_computes_nothing_writes_no_canary(stored, settings, monkeypatch):
    shutil.rmtree(stored.path / "canaries")
    monkeypatch.setattr("actcache.host.Host.load", lambda *a: pytest.fail("the model was loaded"))
    assert run(replace(settings, tokens=128)).computed == 0
    with pytest.raises(StoreMissingError, match="no canary contexts"):
        check(stored.path, settings.host)


def test_writers_of_parts_write_the_canary_of_one(settings, original):
    run(replace(settings, part="2/2"))
    assert canary_files(open_store(settings.store).path) == []  # the first unit is not its own
    run(replace(settings, part="1/2"))
    (mine,), (theirs,) = canaries(open_store(settings.store)), canaries(original)
    digest_of = [[o.sha256 for o in c.record.objects] for c in (mine, theirs)]
    assert digest_of[0] == digest_of[1]
    assert mine.record.contexts == theirs.record.contexts


# -- the verdict -----------------------------------------------------------------------------------


def test_the_same_model_passes(stored, host, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(host, elsewhere)
    for result in check(stored.path, HostSettings(model=str(elsewhere), batch_tokens=7)):
        assert result.ok
        assert result.largest == 0.0  # the same machine: not even rounding
        assert (result.tolerance, result.differs) == (1e-4, ())


def test_another_attention_kernel_passes_and_is_named(stored, host):
    for result in check(stored.path, HostSettings(model=str(host), attention="eager")):
        assert result.ok
        assert 0 < result.largest < 1e-5
        assert result.differs == ("host.attention: the store has sdpa, your model has eager",)


@pytest.mark.parametrize(
    "rope",
    [{"rope_theta": 500.0}, {"rope_theta": 1_000_000.0}, {"partial_rotary_factor": 0.25}],
)
def test_another_rope_setting_is_caught(stored, host, tmp_path, rope):
    other = changed(host, tmp_path / "rope", rope_parameters=rope)
    results = check(stored.path, other)
    assert [r.ok for r in results] == [False, False]
    assert all(r.largest > 10 * r.tolerance for r in results)
    assert all(line.startswith("host.config") for r in results for line in r.differs)
    # The first token has nothing to rotate against: only later positions differ.
    assert all(r.worst[1] > 0 for r in results)


def test_another_revision_is_caught(stored, host, tmp_path):
    """Every weight off by one part in a hundred, as after a short fine-tuning."""
    model = AutoModelForCausalLM.from_pretrained(host)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1 + 0.01 * torch.randn(weight.shape, generator=generator))
    shutil.copytree(host, tmp_path / "revision")
    model.save_pretrained(tmp_path / "revision")
    for result in check(stored.path, HostSettings(model=str(tmp_path / "revision"))):
        assert not result.ok
        assert result.median > 1e-3
        assert len(result.differs) == 1
        assert result.differs[0].startswith("host.weights: the store has")


def test_a_lower_number_type_passes_by_its_own_tolerance(stored, host, settings, tmp_path):
    results = check(stored.path, HostSettings(model=str(host), dtype="bfloat16"))
    assert [(r.ok, r.tolerance) for r in results] == [(True, 2e-2)] * 2
    assert all(r.largest > 1e-4 for r in results)  # float32's would have caught it
    assert all(
        "host.dtype: the store has float32, your model has bfloat16" in r.differs for r in results
    )
    # Nor is a wrong rope setting excused by bfloat16.
    low = HostSettings(model=str(host), dtype="bfloat16")
    wrong = changed(host, tmp_path / "rope", rope_parameters={"rope_theta": 500.0})
    assert not all(r.ok for r in check(stored.path, replace(wrong, dtype="bfloat16")))
    # A store of a bfloat16 host is held against a float32 reader in the same way.
    theirs = run(replace(settings, host=low, tokens=128, store=str(tmp_path / "low"))).store
    assert all(r.ok and r.largest == 0 for r in check(theirs.path, low))
    assert all(r.ok and r.largest > 0 for r in check(theirs.path, HostSettings(model=str(host))))


def test_attention_inside_documents_is_computed_again_so(settings, monkeypatch):
    packing = PackSettings(attend_across_documents=False)
    store = run(replace(settings, tokens=128, pack=packing)).store
    assert all(r.ok and r.largest == 0 for r in check(store.path, settings.host))
    # Were the store's setting ignored, contexts of several documents would differ.
    (canary,) = canaries(store)
    table = canary.tokens()
    assert any(len(set(table.doc[table.ctx == c])) > 1 for c in set(table.ctx.tolist()))
    monkeypatch.setattr("actcache.canary._attends_across", lambda store: True)
    assert not any(r.ok for r in check(store.path, settings.host))


def test_relative_errors_by_hand():
    b = np.array([[3.0, 4.0], [0.0, 0.0], [0.0, 0.0], [1.0, 0.0]], dtype=np.float32)
    a = np.array([[3.0, 4.5], [0.0, 0.0], [0.0, 1e-9], [0.0, 1.0]], dtype=np.float32)
    assert np.allclose(relative_errors(a, b), [0.1, 0.0, np.inf, 2**0.5])


# -- models that cannot be compared ----------------------------------------------------------------


def test_models_that_do_not_fit_are_refused_in_words(stored, host, tmp_path):
    fewer = changed(host, tmp_path / "fewer", num_hidden_layers=1)
    with pytest.raises(HookError, match=r"resid\.1: your model has no module 'layers\.1'"):
        check(stored.path, fewer)
    model = new_causal_lm(json.loads((host / "config.json").read_text()) | {"hidden_size": 64}, 0)
    shutil.copytree(host, tmp_path / "wide")
    model.save_pretrained(tmp_path / "wide")
    with pytest.raises(HostError, match="gives 64 channels, the store has 32"):
        check(stored.path, HostSettings(model=str(tmp_path / "wide")))


def test_a_model_that_gives_nan_is_an_error_and_no_number(stored, host, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(host)
    with torch.no_grad():
        model.gpt_neox.layers[0].mlp.dense_h_to_4h.weight[0] = float("nan")
    shutil.copytree(host, tmp_path / "nan")
    model.save_pretrained(tmp_path / "nan")
    with pytest.raises(NonFiniteError, match=r"resid\.0"):
        check(stored.path, HostSettings(model=str(tmp_path / "nan")))


# -- trust -----------------------------------------------------------------------------------------


def test_verify_names_every_damaged_object_of_a_canary(stored, settings):  # F107
    snapshot = stored.snapshot()
    (canary,) = canaries(stored)
    keys = [o.key for o in canary.record.objects]
    assert set(keys) <= {c.key for c in verify(snapshot)}
    record = canary_files(stored.path)[0].relative_to(stored.path)
    for key in (*keys, str(record)):
        path = stored.path / key
        whole = path.read_bytes()
        for damaged in (whole[:-1], bytes([whole[0] ^ 1]) + whole[1:], None):
            path.unlink()
            if damaged is not None:
                path.write_bytes(damaged)
            found = [c.key for c in verify(snapshot) if c.problem]
            # Without its record a canary is not there at all: garbage, and nothing is named.
            assert found == ([] if key == str(record) and damaged is None else [key])
            if "/acts/" in key and "/c/" in key:
                with pytest.raises(DamagedError, match="canary"):
                    check(stored.path, settings.host)
            path.unlink(missing_ok=True)
            path.write_bytes(whole)
    assert not [c for c in verify(snapshot) if c.problem]


def test_garbage_never_holds_a_canary_only_attempts_at_one(stored):
    folder = stored.path / "canaries"
    (record,) = canary_files(stored.path)
    attempt = folder / f"{record.stem}.01234567"
    (attempt / "tokens").mkdir(parents=True)
    (attempt / "tokens" / "zarr.json").write_text("{}")
    half = folder / f".{record.name}.half.partial"
    half.write_text("{")
    (folder / "notes.txt").write_text("mine")
    garbage = find_garbage(stored.path, grace=0)
    assert {g.path for g in garbage} == {attempt, half}
    remove(garbage)
    assert not [c for c in verify(stored.snapshot()) if c.problem]
    assert len(list(canaries(stored))) == 1


def test_a_canary_of_another_store_is_refused(stored, settings, tmp_path):
    other = run(replace(settings, store=str(tmp_path / "other"), context=64, tokens=64)).store
    shutil.rmtree(stored.path / "canaries")
    shutil.copytree(other.path / "canaries", stored.path / "canaries")
    with pytest.raises(DamagedError, match="another store"):
        check(stored.path, settings.host)
    assert [c for c in verify(stored.snapshot()) if "another store" in c.problem]


def test_no_weights_are_read_for_a_damaged_canary(stored, settings, monkeypatch):
    """The record is checked before the model is loaded."""
    (file,) = canary_files(stored.path)
    file.write_text(file.read_text().replace('"rows"', '"Rows"'))
    monkeypatch.setattr("actcache.host.Host.load", lambda *a: pytest.fail("the model was loaded"))
    with pytest.raises(DamagedError, match=r"canaries/.*Did you mean rows"):
        check(stored.path, settings.host)


def test_the_points_of_a_canary_are_those_of_the_run(stored, host):
    (canary,) = canaries(stored)
    points = resolve(("resid.0", "resid.1"), None, Host(HostSettings(model=str(host))).skeleton())
    assert [(h.name, h.module) for h in canary.record.hooks] == [(p.name, p.module) for p in points]


# -- the command -----------------------------------------------------------------------------------


def said(capsys, monkeypatch, *words):
    """Exit status, output and errors of `actcache verify STORE --canary`."""
    monkeypatch.setattr("sys.argv", ["actcache"])
    with pytest.raises(SystemExit) as e:
        main(["verify", *words])
    return (e.value.code, *capsys.readouterr())


def test_the_command_says_which_model_it_is(stored, host, tmp_path, capsys, monkeypatch):
    words = [str(stored.path), "--canary", "host=local", f"host.model={host}"]
    code, out, _ = said(capsys, monkeypatch, *words)
    assert code == 0
    assert out.count("the same model") == 2
    code, out, _ = said(capsys, monkeypatch, *words, "host.dtype=bfloat16", "--json")
    assert code == 0
    rows = json.loads(out)
    assert [(r["hook"], r["ok"], r["tolerance"]) for r in rows] == [(h, True, 2e-2) for h in HOOKS]
    assert [line.split(":")[0] for line in rows[0]["differs"]] == ["host.dtype"]
    other = changed(host, tmp_path / "rope", rope_parameters={"rope_theta": 500.0}).model
    code, out, _ = said(capsys, monkeypatch, *words[:3], f"host.model={other}")
    assert code == 1
    assert out.count("ANOTHER MODEL, differs most at context") == 2
    assert "host.config: the store has sha256:" in out


def test_the_command_takes_a_store_and_a_host(stored, host, capsys, monkeypatch):
    words = ["--canary", "host=local", f"host.model={host}"]
    for more in ([], [str(stored.path), "tokens=5"], [str(stored.path), "--snapshot", "1"]):
        code, _, err = said(capsys, monkeypatch, *more, *words)
        assert code == 1
        assert "expected: actcache verify STORE --canary host=HOST" in err
    code, _, err = said(capsys, monkeypatch, str(stored.path), *words, "host.modl=x")
    assert (code, "unknown key 'host.modl'. Did you mean model" in err) == (1, True)
