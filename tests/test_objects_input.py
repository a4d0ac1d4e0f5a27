"""Stores on a web server, the catalog in an object store, bad input, credentials.  # F110"""

import logging
import os
import sys

import pytest
from buckets import KEY, SECRET, same, whole
from faulty_proxy import Proxy, folder_server, serving

from actcache.catalog import Catalog
from actcache.cli import main
from actcache.run import run
from actcache.store import (
    DamagedError,
    StoreError,
    StoreMissingError,
    listing,
    open_store,
)
from actcache.store.canaries import canaries
from actcache.store.copy import copy_snapshot
from actcache.store.errors import RemoteError
from actcache.store.places import place

TOKENS = 128


pytestmark = pytest.mark.usefixtures("s3")


# -- the web ---------------------------------------------------------------------------------------


@pytest.fixture
def web(small_store, monkeypatch):
    monkeypatch.setattr(listing, "PROBE", 4)
    with folder_server(small_store.path.parent) as port, serving(Proxy(port)) as proxy:
        yield proxy


def test_a_store_on_a_web_server_is_read_and_copied(small_store, web, tmp_path, capsys):
    url = f"{web.url}/s"
    for kind in ("503", "truncate"):
        web.spoil(kind, r"GET .*/(commits|acts|tokens)/", each=1)
    store = open_store(url)
    assert same(store, small_store)
    assert whole(store)
    assert web.quiet()["truncate"] > 10
    web.spoil("503", "mlp", times=10**9)
    with pytest.raises(RemoteError, match=r"http://127.*/acts/mlp\.0/c/0/0"):
        copy_snapshot(store.snapshot(), tmp_path / "copy")
    web.quiet()
    copy = copy_snapshot(store.snapshot(), tmp_path / "copy")
    assert copy.kept > 10  # of the attempt before
    assert same(copy.store, small_store)
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


def test_a_web_server_without_ranges_is_named(small_store):
    with folder_server(small_store.path.parent, ranges=False) as port:
        store = open_store(f"http://127.0.0.1:{port}/s")
        with pytest.raises(RemoteError, match=r"http://127\..*/acts/"):
            store.snapshot().segments[0].acts("resid.2").read()


def test_nothing_is_written_to_a_web_server(asked, small_store, web):
    with pytest.raises(StoreError, match=r"http\(s\):// is for reading. Name a folder or s3://"):
        copy_snapshot(small_store.snapshot(), f"{web.url}/new")
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


def test_a_server_that_ignores_conditions_is_not_written_to(asked, small_store, s3, tmp_path):
    s3.spoil("ignore", "PUT ")
    url = f"s3://lab/{tmp_path.name}/ignored"
    with pytest.raises(StoreError, match=r"s3://lab at http://127.* ignores If-None-Match"):
        run(asked(store=url, tokens=TOKENS))
    with pytest.raises(StoreError, match="ignores If-None-Match"):
        copy_snapshot(small_store.snapshot(), url)
    assert place(url).names() == []


def test_an_endpoint_where_nobody_listens(monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(
        RemoteError, match=r"s3://lab/x/store\.json: .*endpoint http://127\.0\.0\.1:9"
    ):
        open_store("s3://lab/x")


def test_an_endpoint_that_is_no_object_store(small_store, monkeypatch):
    with folder_server(small_store.path) as port:
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
