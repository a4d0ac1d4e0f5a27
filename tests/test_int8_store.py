"""Stores of int8: made by `actcache run`, read by us, zarr-python, zarrs, TensorStore."""  # F112

import json
import os
import shutil
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import google_crc32c
import numpy as np
import pytest
import tensorstore
import zarr
from cache import SMALL, contexts_of, digests
from numpy.testing import assert_array_equal
from test_kill import start

from actcache import calibrate, canary, capture
from actcache.add_hooks import AddHooksSettings, add_hooks
from actcache.errors import NonFiniteError
from actcache.host import HostSettings
from actcache.run import CacheSettings, run
from actcache.segments import SegmentBuilder
from actcache.sources import DataSettings
from actcache.store import DamagedError, IdentityError, dequantise, open_store, verify
from actcache.store.claims import Claims
from actcache.store.copy import copy_snapshot
from actcache.store.schema import Commit, load


@pytest.fixture(scope="module")
def int8_store(tiny_host, tiny_parquet, tmp_path_factory):
    """The store of `actcache run layout.dtype=int8`, and one of the same tokens in float32."""

    def make(dtype):
        settings = CacheSettings(
            host=HostSettings(model=str(tiny_host), batch_tokens=128),
            data=DataSettings(files=str(tiny_parquet), id_column="id"),
            store=str(tmp_path_factory.mktemp(dtype) / "store"),
            hooks=("resid.1", "mlp.0"),
            context=32,
            layout=replace(SMALL, dtype=dtype),
            progress=False,
        )
        return run(settings).store

    return make("int8"), make("float32")


def test_run_makes_a_store_of_int8_that_reads_as_float32(int8_store):
    store, exact = int8_store
    snapshot, wanted = store.snapshot(), contexts_of(exact.snapshot())
    found = contexts_of(snapshot)
    assert found.keys() == wanted.keys()
    assert snapshot.store_id == exact.store_id
    for hook, info in snapshot.hooks.items():
        assert info.dtype == "int8"
        assert info.activation_id != exact.snapshot().hooks[hook].activation_id
        x = np.concatenate([wanted[c][2][hook] for c in wanted])
        back = np.concatenate([found[c][2][hook] for c in wanted])
        fvu = np.square(x - back).sum() / np.square(x - x.mean(0)).sum()
        assert fvu < 1e-3
        stats = snapshot.stats(hook, special=True)  # of what readers get
        np.testing.assert_allclose(stats.mean, back.mean(0, dtype=np.float64), atol=1e-6)
        assert stats.n == snapshot.n_rows
        error = snapshot.storage_error(hook)
        np.testing.assert_allclose(error.fvu, fvu, rtol=0.2)  # that one has special tokens
        assert 0 < error.max_relative_error < 0.05
    assert exact.snapshot().storage_error("resid.1") is None
    assert not [c for c in verify(snapshot) if c.problem]


def test_others_decode_it_by_the_formula_in_the_metadata(int8_store):
    snapshot = int8_store[0].snapshot()
    for segment in snapshot.segments[:2]:
        group = zarr.open_group(segment.path, mode="r")
        assert "calibration/NAME[0]" in group["acts/resid.1"].attrs["decode"]
        parts = {p: group[f"{p}/resid.1"][...] for p in ("acts", "scales", "calibration")}
        with zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"}):
            again = zarr.open_group(segment.path, mode="r")
            for part, x in parts.items():
                assert_array_equal(again[f"{part}/resid.1"][...], x)
        for part, x in parts.items():
            kvstore = {"driver": "file", "path": str(segment.path / part / "resid.1")}
            theirs = tensorstore.open({"driver": "zarr3", "kvstore": kvstore}).result()
            assert_array_equal(theirs.read().result(), x)
        mean, std = parts["calibration"]
        x = mean + std * (parts["scales"][:, None] * parts["acts"])
        assert_array_equal(segment.acts("resid.1").read(), x)


def test_a_reader_gives_codes_and_scales_to_whoever_decodes_elsewhere(int8_store):
    for segment in int8_store[0].snapshot().segments[:2]:
        reader = segment.acts("resid.1")
        assert reader.dtype == np.float32
        buffer = np.empty(reader.chunk_bytes + 4, np.uint8)
        for i in range(reader.n_chunks):
            codes, scale = reader.read_codes(i)
            assert (codes.dtype, scale.shape) == (np.int8, (reader.rows_in(i),))
            x = dequantise(codes, scale, reader.mean, reader.std)
            assert_array_equal(reader.read_chunk(i), x)
            assert_array_equal(reader.read_into(i, buffer), x)


def test_the_calibration_is_that_of_the_plan_without_special_tokens(int8_store):
    store, exact = int8_store
    stats = exact.snapshot().stats("resid.1")
    assert 0 < stats.n < exact.snapshot().n_rows
    for segment in store.snapshot().segments:
        reader = segment.acts("resid.1")
        np.testing.assert_allclose(reader.mean, stats.mean, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(reader.std, np.sqrt(stats.m2 / stats.n), rtol=1e-5)


def test_it_stays_when_the_store_grows_or_gains_hooks_or_is_copied(asked, tmp_path, monkeypatch):
    quantised = replace(SMALL, dtype="int8")
    some = run(asked(layout=quantised, tokens=100, hooks=("resid.1",))).store
    first = digest_of(some)
    assert first.keys() == {"resid.1"}
    copy = copy_snapshot(some.snapshot(), tmp_path / "copy").store
    monkeypatch.setattr(calibrate, "_measure", lambda *_: pytest.fail("calibrated again"))
    for store in (some, copy):  # the copy has no calibrations/, only segments
        again = run(asked(layout=quantised, hooks=("resid.1",), store=str(store.path))).store
        assert len(again.snapshot().segments) > 1
        assert digest_of(again) == first
    monkeypatch.undo()
    more = add_hooks(AddHooksSettings(host=asked().host, store=str(some.path), hooks=("mlp.0",)))
    snapshot = more.store.snapshot()
    assert {h: i.dtype for h, i in snapshot.hooks.items()} == {"resid.1": "int8", "mlp.0": "int8"}
    assert digest_of(more.store)["resid.1"] == first["resid.1"]
    assert snapshot.storage_error("mlp.0").fvu < 1e-3


def digest_of(store):
    """The one calibration of each hook."""
    found = {
        (h.info.name, h.int8.calibration)
        for s in store.snapshot().segments
        for c in s.commits
        for h in c.hooks
    }
    assert len(found) == len(dict(found))
    return dict(found)


def test_rows_that_fit_are_not_computed_twice(asked, monkeypatch):
    built = []
    build = SegmentBuilder.build

    def count(self, contexts, advance):
        built.append(sum(map(len, contexts)))
        return build(self, contexts, advance)

    monkeypatch.setattr(SegmentBuilder, "build", count)
    monkeypatch.setattr(canary, "write", lambda *_: None)
    quantised = replace(SMALL, dtype="int8")
    kept = run(asked(layout=quantised)).store
    assert sum(built) == kept.snapshot().n_rows
    built.clear()
    monkeypatch.setattr(calibrate, "KEEP_BYTES", 0)
    again = run(asked(layout=quantised, store=asked().store + "-again")).store
    assert sum(built) == 2 * kept.snapshot().n_rows
    assert digests(again) == digests(kept)


def test_a_second_writer_waits_for_the_first_ones_calibration(asked, monkeypatch):
    quantised = replace(SMALL, dtype="int8")
    alone = run(asked(layout=quantised, store=asked().store + "-alone")).store
    measured, waited = [], threading.Event()
    measure = calibrate._measure

    def slow(*args):
        measured.append(threading.get_ident())
        assert waited.wait(20)
        return measure(*args)

    acquire = Claims.acquire

    def watched(self, name):
        held = acquire(self, name)
        if name == calibrate.CLAIM and not held:
            waited.set()
        return held

    monkeypatch.setattr(calibrate, "_measure", slow)
    monkeypatch.setattr(Claims, "acquire", watched)
    monkeypatch.setattr(capture, "POLL", 0.05)
    with ThreadPoolExecutor(2) as pool:
        both = [pool.submit(run, asked(layout=quantised)) for _ in range(2)]
        store = next(b.result() for b in both).store
    assert len(measured) == 1
    assert digests(store) == digests(alone)


def test_nan_in_a_host_is_refused_before_anything_is_stored(asked, monkeypatch):
    build = SegmentBuilder._run

    def broken(self, batch):
        found = build(self, batch)
        return found | {"resid.1": found["resid.1"] * float("nan")}

    monkeypatch.setattr(SegmentBuilder, "_run", broken)
    settings_ = asked(layout=replace(SMALL, dtype="int8"))
    with pytest.raises(NonFiniteError, match=r"'resid\.1' is not finite"):
        run(settings_)
    root = Path(settings_.store)
    assert not any(
        (root / d).exists() and any((root / d).iterdir()) for d in ("commits", "calibrations")
    )


@pytest.mark.parametrize("part", ["acts", "scales", "calibration"])
def test_damage_is_named(int8_store, part, tmp_path):
    store = open_store(shutil.copytree(int8_store[0].path, tmp_path / "store"))
    segment = store.snapshot().segments[0]
    path = next(p for p in (segment.path / part / "resid.1" / "c").rglob("*") if p.is_file())
    data = bytearray(path.read_bytes())
    data[3] ^= 1
    path.write_bytes(data)
    with pytest.raises(DamagedError, match=rf"{segment.id}, hook resid.1.*checksum"):
        segment.acts("resid.1").read()
    problems = [c.key for c in verify(store.snapshot()) if c.problem]
    assert problems == [str(path.relative_to(store.path))]


def test_a_calibration_that_another_segment_does_not_share_is_refused(int8_store):
    segments = int8_store[0].snapshot().segments
    good = segments[1].commits[0]
    quantised = replace(good.hooks[0].int8, calibration="sha256:" + 64 * "0")
    other = replace(good, hooks=(replace(good.hooks[0], int8=quantised), *good.hooks[1:]))
    segments[1].__dict__["commits"] = (other,)
    with pytest.raises(DamagedError, match="calibration is not the one of segment"):
        segments[1].acts(good.hooks[0].info.name)


def test_one_type_per_hook(asked):
    run(asked(tokens=100))
    with pytest.raises(IdentityError, match=r"float32, you asked for int8.*layout.dtype=float32"):
        run(asked(tokens=100, layout=replace(SMALL, dtype="int8")))


def test_killed_while_calibrations_are_published_and_the_rerun_gives_the_quiet_store(asked):
    quantised = replace(SMALL, dtype="int8")
    quiet = asked(layout=quantised, tokens=100, store=asked().store + "-quiet")
    wanted, calibrations = digests(run(quiet).store), calibration_files(quiet)
    found = set()
    for objects in (3, 4, 5):  # behind two root files and the claim: calibrations, then segments
        settings = replace(quiet, store=f"{asked().store}-{objects}")
        end = os.waitpid(start(settings, objects), 0)[1]
        assert os.waitstatus_to_exitcode(end) == -signal.SIGKILL
        found.add(len(calibration_files(settings)))
        assert digests(run(settings).store) == wanted
        assert calibration_files(settings) == calibrations
    assert found == {0, 1, 2}  # before, between and after


def calibration_files(settings):
    folder = Path(settings.store) / "calibrations"
    return {p.name: p.read_bytes() for p in folder.glob("[0-9a-f]*.json")}


# -- stores from others ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        ("scales", np.inf, "a scale is not finite"),
        ("scales", np.nan, "a scale is not finite"),
        ("calibration", np.nan, "finite means and positive standard deviations"),
        ("calibration", -1.0, "finite means and positive standard deviations"),
        ("calibration", 2.0, "is not the calibration that the commit names"),
    ],
)
def test_impossible_values_with_good_checksums_are_refused(
    int8_store, tmp_path, part, value, message
):
    store = open_store(shutil.copytree(int8_store[0].path, tmp_path / "store"))
    segment = store.snapshot().segments[0]
    path = next(p for p in (segment.path / part / "resid.1" / "c").rglob("*") if p.is_file())
    info = segment.hooks["resid.1"]
    size = 4 * info.chunk_rows if part == "scales" else 8 * info.d  # of the first chunk
    data = bytearray(path.read_bytes())
    data[size - 4 : size] = np.float32(value).tobytes()  # the last std, or a scale
    data[size : size + 4] = int(google_crc32c.value(bytes(data[:size]))).to_bytes(4, "little")
    path.write_bytes(data)
    with pytest.raises(DamagedError, match=message):
        segment.acts("resid.1").read()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["objects"].pop(names(c).index("scales")), "not name exactly its files"),
        (lambda c: c["objects"].pop(names(c).index("calibration")), "not name exactly its files"),
        (lambda c: c["hooks"][0].update(int8=None), "int8 without its error"),
        (lambda c: c["hooks"][0]["info"].update(dtype="float32"), "not name exactly its files"),
        (lambda c: c["hooks"][0]["int8"].update(fvu=-1.0), "an error of storage is negative"),
        (lambda c: c["hooks"][0]["int8"].update(calibration="x"), "is not a digest"),
    ],
)
def test_impossible_commits_are_refused(int8_store, change, message):
    segment = int8_store[0].snapshot().segments[0]
    [path] = (int8_store[0].path / "commits").glob(f"{segment.id}.*.json")
    record = json.loads(path.read_text())
    load(Commit, json.dumps(record).encode(), path)
    change(record)
    with pytest.raises(DamagedError, match=message):
        load(Commit, json.dumps(record).encode(), path)


def names(record):
    """What each object of a commit is a part of: tokens, acts, scales, calibration."""
    return [o["key"].split("/")[2] for o in record["objects"]]
