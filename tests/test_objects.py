"""Stores in an object store and on the web: moto's S3 server, a folder over HTTP, and a proxy in
front of each that spoils answers. What happens there must be what happens in a folder.  # F110
"""

import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from cache import digests, overrides
from faulty_proxy import Proxy, folder_server, make_bucket, moto_server, serving
from stores import identity, make_store, token_table

import actcache.fill
from actcache.catalog import Catalog
from actcache.cli import main
from actcache.run import run
from actcache.store import (
    DamagedError,
    HookInfo,
    Layout,
    StoreError,
    StoreMissingError,
    files,
    listing,
    open_store,
    verify,
)
from actcache.store import objects as requests
from actcache.store.canaries import canaries
from actcache.store.claims import Claims
from actcache.store.collect import find_garbage, remove
from actcache.store.copy import copy_snapshot
from actcache.store.errors import RemoteError
from actcache.store.ids import digest
from actcache.store.layout import VOCAB_JSON
from actcache.store.places import each, place
from actcache.store.vocab import encode_vocab
from actcache.store.writer import StoreWriter

SECRET = "not-in-any-file-SECRET-0123456789"
KEY = "AKIAEXAMPLEEXAMPLE77"
TOKENS = 128


@pytest.fixture(scope="module")
def moto():
    with moto_server() as port:
        make_bucket(port, "lab")
        yield port


@pytest.fixture(scope="module")
def s3(moto):
    """A proxy in front of moto."""
    with serving(Proxy(moto)) as proxy:
        yield proxy


@pytest.fixture(autouse=True)
def environment(s3, monkeypatch, tmp_path):
    for name in [n for n in os.environ if n.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3.url)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "no config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "no credentials"))
    monkeypatch.setattr(requests, "PAUSE", 0.01)
    monkeypatch.setattr(actcache.fill, "POLL", 0.02, raising=False)
    s3.quiet()
    yield
    s3.quiet()


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A store in a folder: two segments, two hooks."""
    hooks = {"resid.2": 16, "mlp.0": 8}
    folder = tmp_path_factory.mktemp("small") / "s"
    return make_store(folder, hooks=hooks, segments=(64, 32), chunk_bytes=256)


@pytest.fixture(scope="module")
def bucket():
    """URL of a copy of `small` in the bucket, once a test has asked for it."""
    return []


@pytest.fixture
def there(small, bucket):
    """A copy of `small` in the bucket, opened anew."""
    if not bucket:
        bucket.append(str(copy_snapshot(small.snapshot(), "s3://lab/shared/small").store.path))
    return open_store(bucket[0])


def whole(store):
    return not [c for c in verify(store.snapshot()) if c.problem]


def same(a, b):
    """Equal rows, tokens and statistics."""
    for x, y in zip(a.snapshot().segments, b.snapshot().segments, strict=True):
        assert x.tokens().digest() == y.tokens().digest()
        for hook in x.hooks:
            assert np.array_equal(x.acts(hook).read(), y.acts(hook).read())
    return digests(a) == digests(b)


# -- as in a folder --------------------------------------------------------------------------------


def test_a_run_into_a_bucket_is_the_run_into_a_folder(asked, tmp_path, capsys):
    local = run(asked(tokens=TOKENS)).store
    url = f"s3://lab/{tmp_path.name}/run"
    settings = asked(store=url, tokens=TOKENS, catalog=str(tmp_path / "catalog"))
    result = run(settings)
    assert str(result.store.path) == url
    assert same(result.store, local)
    assert whole(open_store(url))
    assert [c.record.rows for c in canaries(open_store(url))] == [
        c.record.rows for c in canaries(local)
    ]
    again = run(settings)
    assert again.computed == 0
    more = run(asked(store=url, tokens=2 * TOKENS, catalog=str(tmp_path / "catalog")))
    assert 0 < more.computed < more.tokens
    assert same(more.store, run(asked(tokens=2 * TOKENS)).store)
    for words in (["info", url], ["verify", url], ["ls"]):
        with pytest.raises(SystemExit) as e:
            main([*words, "--catalog", str(tmp_path / "catalog")])
        assert e.value.code == 0
        assert url in capsys.readouterr().out or words[0] == "verify"


def test_zarr_python_reads_the_bucket(there, small):
    import obstore.store
    import zarr
    from zarr.storage import ObjectStore

    prefix = str(there.path).removeprefix("s3://lab/")
    bucket = obstore.store.S3Store("lab", prefix=prefix, client_options={"allow_http": True})
    segment = there.snapshot().segments[0]
    group = zarr.open_group(
        ObjectStore(bucket, read_only=True), path=segment.commits[0].folder, mode="r"
    )
    rows = small.snapshot().segments[0].acts("resid.2").read()
    assert np.array_equal(group["acts/resid.2"][:], rows)


def test_copies_to_a_bucket_and_back(small, there, tmp_path):
    back = copy_snapshot(there.snapshot(), tmp_path / "back")
    assert same(back.store, small)
    names = {p.relative_to(small.path) for p in small.path.rglob("*.json")}
    assert all((back.store.path / f).read_bytes() == (small.path / f).read_bytes() for f in names)
    assert copy_snapshot(there.snapshot(), tmp_path / "back").copied == 0
    again = copy_snapshot(small.snapshot(), str(there.path))
    assert (again.copied, again.kept) == (0, back.copied)
    some = copy_snapshot(there.snapshot(), f"s3://lab/{tmp_path.name}/some", ["mlp.0"])
    assert "mlp.0" in some.store.snapshot().hooks
    with pytest.raises(StoreError, match="one lies in the other"):
        copy_snapshot(there.snapshot(), f"{there.path}/below")


def test_many_ranges_from_many_threads(small, there):
    segment, local = there.snapshot().segments[0], small.snapshot().segments[0]
    reader, file = segment.acts("resid.2"), local.acts("resid.2").path.read_bytes()
    assert reader.n_chunks > 3
    found = {}

    def read(seed):
        rng = np.random.default_rng(seed)
        starts = rng.integers(0, len(file) - 300, 20)
        asked = [(int(s), int(n)) for s, n in zip(starts, rng.integers(1, 300, 20), strict=True)]
        parts = reader.read_ranges(asked)
        found[seed] = all(
            bytes(p) == file[s : s + n] for p, (s, n) in zip(parts, asked, strict=True)
        )

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == dict.fromkeys(range(8), True)
    chunks = [3, 0, 2]
    for chunk, rows in zip(chunks, reader.read_chunks(chunks), strict=True):
        assert np.array_equal(rows, local.acts("resid.2").read_chunk(chunk))
    buffer = np.empty(reader.chunk_bytes + 4, np.uint8)
    assert np.array_equal(reader.read_into(1, buffer), reader.read_chunk(1))


# -- answers that are spoilt -----------------------------------------------------------------------

MENDED = ["503", "reset", "truncate", "flip"]


@pytest.mark.parametrize("kind", MENDED)
def test_reading_mends_what_goes_wrong_on_the_way(small, there, s3, kind):
    # A flipped bit of store.json is seen where the snapshot is opened: a test of its own.
    names = "snapshots/1|commits/|tokens/|acts/" + ("" if kind == "flip" else r"|store\.json")
    s3.spoil(kind, f"GET .*/({names})", each=2)
    assert same(open_store(str(there.path)), small)
    assert s3.quiet()[kind] > 30


def test_a_connection_that_stands_still_is_given_up(there, s3, monkeypatch):
    monkeypatch.setattr(requests, "STALL", 0.3)
    store = open_store(str(there.path))
    s3.spoil("stall", r"GET .*/snapshots/1", 1)
    begin = time.monotonic()
    assert store.snapshot().n_rows > 0
    assert time.monotonic() - begin < 2.5
    assert s3.quiet() == {"stall": 1}


@pytest.mark.parametrize("kind", ["503", "reset", "lost"])
def test_writing_mends_what_goes_wrong_on_the_way(small, s3, tmp_path, kind):
    """`lost`: the server has taken the object and the writer cannot know."""
    s3.spoil(kind, r"PUT .*/(tokens|acts|commits|snapshots|store)", each=2)
    copy = copy_snapshot(small.snapshot(), f"s3://lab/{tmp_path.name}/{kind}")
    assert s3.quiet()[kind] > 30
    assert same(copy.store, small)
    assert whole(copy.store)


def test_a_run_among_random_faults(asked, s3, tmp_path):
    expected = digests(run(asked(tokens=TOKENS)).store)
    for kind, part in (("503", "PUT"), ("lost", "commits"), ("reset", "GET"), ("503", "claims")):
        s3.spoil(kind, part, each=1)
    result = run(asked(store=f"s3://lab/{tmp_path.name}/faults", tokens=TOKENS))
    assert sum(s3.quiet().values()) >= 9
    assert digests(result.store) == expected
    assert whole(result.store)


def test_damage_that_stays_is_named(there, s3):
    snapshot = there.snapshot()
    folder = snapshot.segments[1].commits[0].folder
    s3.spoil("flip", rf"GET .*{re.escape(folder)}/acts/mlp\.0/c/0/0")
    with pytest.raises(DamagedError, match=r"segment u00001-0000, hook mlp\.0, shard index: check"):
        snapshot.segments[1].acts("mlp.0").read()
    assert [c.key for c in verify(snapshot) if c.problem] == [f"{folder}/acts/mlp.0/c/0/0"]


@pytest.mark.parametrize("kind", ["503", "reset", "truncate"])
def test_a_server_that_stays_broken_is_named(there, s3, kind):
    s3.spoil(kind, r"GET .*/snapshots/1")
    with pytest.raises(RemoteError, match=r"s3://lab/.*/snapshots/1\.json: .*endpoint http://127"):
        open_store(str(there.path)).snapshot()
    assert s3.quiet()[kind] == requests.TRIES


def test_lost_objects_are_named_and_never_zeros(there, tmp_path):
    copy = copy_snapshot(there.snapshot(), f"s3://lab/{tmp_path.name}/lost").store
    snapshot = copy.snapshot()
    key = snapshot.segments[0].commits[0].folder + "/acts/mlp.0/c/0/0"
    files.remove(copy.path / key)
    with pytest.raises(DamagedError, match=r"segment u00000-0000, hook mlp\.0.* is missing"):
        snapshot.segments[0].acts("mlp.0").read()
    assert [(c.key, c.problem) for c in verify(snapshot) if c.problem] == [(key, "is missing")]


def test_a_store_json_that_changed_on_its_way(there, s3):
    s3.spoil("flip", r"GET .*/store\.json")
    with pytest.raises(StoreError, match=r"store\.json"):
        open_store(str(there.path)).snapshot()


# -- several writers -------------------------------------------------------------------------------


def writers(url, n):
    """Writers of one new store."""
    vocab = encode_vocab([b"x"] * 50)
    layout = Layout(context=32, segment_rows=64, chunk_bytes=512)
    return [StoreWriter(url, identity(layout, vocab), {VOCAB_JSON: vocab}) for _ in range(n)]


def segment_of(writer):
    tokens = token_table(np.random.default_rng(0), 64, 32, 50, 0, 20)
    x = np.random.default_rng(0).normal(size=(64, 8)).astype(np.float32)
    info = HookInfo(
        name="resid.0",
        module="layers.0",
        io="out",
        d=8,
        dtype="float32",
        chunk_rows=16,
        activation_id=digest([writer.identity.store_id, "resid.0"]),
    )
    return {"unit": 0, "index": 0, "last_in_unit": True, "tokens": tokens, "acts": [(info, x)]}


def test_two_writers_race_for_one_segment(small, s3, tmp_path):
    """Both believe it is theirs: one commit, whose objects are those that are left."""
    url = f"s3://lab/{tmp_path.name}/race"
    a, b = writers(url, 2)
    gate, commits = threading.Barrier(2), []

    def write(writer):
        gate.wait()
        commits.append(writer.write_segment(**segment_of(writer), writer={"who": str(writer)}))

    threads = [threading.Thread(target=write, args=(w,)) for w in (a, b)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert commits[0] == commits[1]
    a.snapshot([commits[0].segment])
    store = open_store(url)
    assert whole(store)
    assert (store.path / "segments").names() == [commits[0].folder.removeprefix("segments/")]


def test_a_commit_whose_answer_is_lost_is_ours(s3, tmp_path):
    (writer,) = writers(f"s3://lab/{tmp_path.name}/lost", 1)
    s3.spoil("lost", "PUT .*/commits/", 1)
    commit = writer.write_segment(**segment_of(writer), writer={})
    assert s3.quiet() == {"lost": 1}
    assert (writer.path / commit.folder / "zarr.json").exists()


def test_claims_are_leases_by_the_clock_of_the_bucket(s3, tmp_path):
    folder = place(f"s3://lab/{tmp_path.name}/claims")
    with Claims(folder, "a", lease=2.0) as a, Claims(folder, "b", lease=2.0) as b:
        assert a.acquire("u1")
        assert not b.acquire("u1")
        assert b.others() == ["u1"]
        time.sleep(3.1)
        assert not b.acquire("u1")  # a is alive and touches it
        a._stop.set()
        time.sleep(3.1)
        assert b.acquire("u1")
        a.release("u1")  # no longer a's to let go
        assert a.others() == ["u1"]
    assert folder.names() == []


def test_claims_of_the_dead_are_taken_over_at_once_and_by_one(s3, tmp_path):
    folder = place(f"s3://lab/{tmp_path.name}/claims")
    dead = Claims(folder, "dead")
    dead._mine = dead._mine.replace(str(os.getpid()).encode(), b"999999999")
    assert dead._create(folder / "u1.json")
    before = dead._mine
    rivals = [Claims(folder, name) for name in "abcd"]
    got = each(folder, lambda rival: rival.acquire("u1"), rivals)
    for rival in rivals:
        rival._stop.set()
    assert sum(got) == 1
    assert not files.swap(folder / "u1.json", before, b"mine")


def killed(settings, moment):
    """A run in a process of its own, dead by SIGKILL at its `moment`-th put; its exit status."""
    script = (
        "import os, signal, sys\n"
        "from actcache.cli import main\n"
        "from actcache.store.s3 import S3\n"
        "put, left = S3.create, [int(sys.argv.pop(1))]\n"
        "def create(self, key, data):\n"
        "    left[0] -= 1\n"
        "    if left[0] < 0: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    put(self, key, data)\n"
        "S3.create = create\n"
        "main(sys.argv[1:])\n"
    )
    command = [sys.executable, "-c", script, str(moment), *overrides(settings)]
    return subprocess.run(command, capture_output=True, timeout=120).returncode


def test_kill_9_then_the_same_command_gives_the_same_store(asked, s3, tmp_path):  # F106
    expected = digests(run(asked(tokens=2 * TOKENS)).store)
    settings = asked(store=f"s3://lab/{tmp_path.name}/killed", tokens=2 * TOKENS)
    assert [killed(settings, moment) for moment in (30,)] == [-signal.SIGKILL]
    result = run(settings)
    assert digests(result.store) == expected
    garbage = find_garbage(result.store.path, grace=0)
    assert garbage  # the first writer's folder
    assert find_garbage(result.store.path) == []  # too young to be sure
    assert remove(garbage) > 0
    assert whole(open_store(str(settings.store)))
    named = {c.folder for s in result.store.snapshot().segments for c in s.commits}
    assert {f"segments/{n}" for n in (result.store.path / "segments").names()} == named
    with pytest.raises(SystemExit) as e:
        main(["gc", str(settings.store), "--json"])
    assert e.value.code == 0


# -- the web ---------------------------------------------------------------------------------------


@pytest.fixture
def web(small, monkeypatch):
    monkeypatch.setattr(listing, "PROBE", 4)
    with folder_server(small.path.parent) as port, serving(Proxy(port)) as proxy:
        yield proxy


def test_a_store_on_a_web_server_is_read_and_copied(small, web, tmp_path, capsys):
    url = f"{web.url}/s"
    for kind in ("503", "truncate"):
        web.spoil(kind, r"GET .*/(commits|acts|tokens)/", each=1)
    store = open_store(url)
    assert same(store, small)
    assert whole(store)
    assert web.quiet()["truncate"] > 10
    web.spoil("503", "mlp", times=10**9)
    with pytest.raises(RemoteError, match=r"http://127.*/acts/mlp\.0/c/0/0"):
        copy_snapshot(store.snapshot(), tmp_path / "copy")
    web.quiet()
    copy = copy_snapshot(store.snapshot(), tmp_path / "copy")
    assert copy.kept > 10  # of the attempt before
    assert same(copy.store, small)
    with pytest.raises(SystemExit) as e:
        main(["verify", url, "--catalog", str(tmp_path / "catalog")])
    assert e.value.code == 0
    assert [k.state for k in Catalog(tmp_path / "catalog").known()] == ["ok"]


def test_snapshots_and_canaries_are_found_where_nothing_is_listed(asked, monkeypatch):
    monkeypatch.setattr(listing, "PROBE", 4)
    store = run(asked(tokens=TOKENS)).store
    store = run(asked(tokens=2 * TOKENS)).store
    with folder_server(store.path.parent) as port:
        web = open_store(f"http://127.0.0.1:{port}/{store.path.name}")
        assert web.snapshot_names() == store.snapshot_names() == ["1", "2"]
        assert len(list(canaries(web))) == len(list(canaries(store))) == 1
        assert whole(web)
        # The copy of a late snapshot alone has a gap in its numbers; naming it is the way.
        (store.path / "snapshots" / "2.json").rename(store.path / "snapshots" / "200.json")
        assert web.snapshot_names() == ["1"]
        with pytest.raises(DamagedError, match="says that it is snapshot '2'"):
            web.snapshot("200")
        with pytest.raises(StoreMissingError, match="has no snapshot '7'; it has 1"):
            web.snapshot("7")


def test_a_web_server_without_ranges_is_named(small):
    with folder_server(small.path.parent, ranges=False) as port:
        store = open_store(f"http://127.0.0.1:{port}/s")
        with pytest.raises(RemoteError, match=r"http://127\..*/acts/"):
            store.snapshot().segments[0].acts("resid.2").read()


def test_nothing_is_written_to_a_web_server(asked, small, web):
    with pytest.raises(StoreError, match=r"http\(s\):// is for reading. Name a folder or s3://"):
        copy_snapshot(small.snapshot(), f"{web.url}/new")
    with pytest.raises(StoreError, match=r"http\(s\):// is for reading"):
        run(asked(store=f"{web.url}/new", tokens=TOKENS))


# -- the catalog -----------------------------------------------------------------------------------


def test_a_catalog_that_machines_share(asked, s3, tmp_path, capsys):
    catalog = f"s3://lab/{tmp_path.name}/catalog"
    url = f"s3://lab/{tmp_path.name}/work"
    run(asked(store=url, tokens=TOKENS, catalog=catalog))
    said = []
    again = run(asked(store=None, tokens=TOKENS, catalog=catalog), said.append)
    assert (str(again.store.path), again.computed) == (url, 0)
    assert any(line.startswith(f"store from the catalog: {url}") for line in said)
    with pytest.raises(SystemExit):
        main(["ls", "--catalog", catalog])
    assert url in capsys.readouterr().out
    s3.spoil("503", "/work/")
    (known,) = Catalog(catalog).known()
    assert known.state == "unreachable"
    assert "503" in known.problem
    s3.quiet()
    Catalog(catalog).forget(known.entry)
    assert Catalog(catalog).entries() == ([], [])


# -- bad input -------------------------------------------------------------------------------------


def test_a_bucket_that_does_not_exist(asked):
    words = r"s3://nobody: there is no such bucket at http://127.*Create it, or correct the name"
    with pytest.raises(RemoteError, match=words):
        open_store("s3://nobody/store")
    with pytest.raises(RemoteError, match=words):
        run(asked(store="s3://nobody/store"))


def test_no_permission(there, asked, s3, tmp_path):
    s3.spoil("403", "GET .*/snapshots/1")
    with pytest.raises(
        RemoteError, match=r"no permission for s3://.*/snapshots/1\.json: AccessDen"
    ):
        open_store(str(there.path)).snapshot()
    assert s3.quiet() == {"403": 1}  # it is not asked again
    s3.spoil("403", "PUT ")
    with pytest.raises(
        RemoteError, match=r"no permission for s3://lab/.*AccessDenied.*Check the k"
    ):
        run(asked(store=f"s3://lab/{tmp_path.name}/denied"))


def test_an_endpoint_where_nobody_listens(monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(
        RemoteError, match=r"s3://lab/x/store\.json: .*endpoint http://127\.0\.0\.1:9"
    ):
        open_store("s3://lab/x")


def test_an_endpoint_that_is_no_object_store(small, monkeypatch):
    with folder_server(small.path) as port:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
        with pytest.raises(StoreError, match="s3://lab/x"):
            open_store("s3://lab/x")


def test_missing_credentials(monkeypatch):
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_METADATA_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(RemoteError, match="no credentials for s3://lab: set AWS_ACCESS_KEY_ID and"):
        open_store("s3://lab/x")


ADDRESSES = {
    "gs://bucket/x": "gs:// is not supported; expected a folder, s3://bucket/prefix, or http",
    "s3://": "expected s3://bucket/prefix",
    "s3:///x": "expected s3://bucket/prefix",
    "http://host/x?token=SECRETWORD": r"expected http\(s\)://host/path, without \? and #",
    "https://me:SECRETWORD@host/x": "no credentials in an address",
    "s3://me:SECRETWORD@lab/x": "expected s3://bucket/prefix",
}


@pytest.mark.parametrize("url", ADDRESSES)
def test_addresses_that_cannot_be_one(url):
    with pytest.raises(StoreError, match=ADDRESSES[url]) as e:
        open_store(url)
    assert "SECRETWORD" not in str(e.value) or "token=" in url


def test_obstore_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "obstore", None)
    with pytest.raises(StoreError, match="which is not installed: pip install obstore"):
        open_store("s3://lab/x")


def test_a_forked_process_is_refused_instead_of_hanging(there):
    child = os.fork()
    if child == 0:
        try:
            there.snapshot()
        except StoreError as e:
            os._exit(7 if "spawn" in str(e) else 1)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


# -- credentials -----------------------------------------------------------------------------------


def test_the_profile_of_the_aws_tools(there, monkeypatch, tmp_path, s3):
    file = tmp_path / "credentials"
    file.write_text(
        f"[team]\naws_access_key_id = {KEY}\naws_secret_access_key = {SECRET}\n[bare]\n"
    )
    config = tmp_path / "config"
    config.write_text(f"[profile team]\nregion = eu-west-3\nendpoint_url = {s3.url}\n")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(file))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(config))
    monkeypatch.setenv("AWS_PROFILE", "team")
    assert open_store(str(there.path)).store_id == there.store_id
    for name in ("bare", "nobody"):
        monkeypatch.setenv("AWS_PROFILE", name)
        with pytest.raises(StoreError, match=rf"AWS_PROFILE={name}: no keys .*export-credentials"):
            open_store(str(there.path))
    file.write_text(f"{SECRET}\n")
    with pytest.raises(StoreError, match="is not a file of AWS profiles") as e:
        open_store(str(there.path))
    assert SECRET not in str(e.value)


def test_no_credential_is_in_a_store_a_catalog_or_a_log(
    asked, s3, tmp_path, monkeypatch, capfd, caplog
):
    store, catalog = f"s3://lab/{tmp_path.name}/secret", str(tmp_path / "catalog")
    settings = asked(store=store, tokens=TOKENS, catalog=catalog)
    monkeypatch.setenv("RUST_LOG", "trace")
    monkeypatch.setenv("AWS_SESSION_TOKEN", f"{SECRET}-token")
    caplog.set_level(logging.DEBUG)
    run(settings, print)
    s3.spoil("403", "GET .*/snapshots/")
    with pytest.raises(SystemExit) as e:
        main(["info", store])
    assert e.value.code == 1
    s3.quiet()
    root = place(store)
    text = [root.client.read(o["path"], 1 << 30) for o in root.client._tree(root.key)]
    text += [p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()]
    out, err = capfd.readouterr()
    assert "AccessDenied" in err
    said = out + err + caplog.text + repr(place(store))
    assert len(text) > 10
    for word in (SECRET, KEY):
        assert not [t for t in text if word.encode() in t]
        assert word not in said
