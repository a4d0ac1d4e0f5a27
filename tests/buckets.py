"""Fixtures for tests of object stores: a bucket behind a proxy, a small store in it and locally.

conftest.py imports the fixtures.
"""

import os

import numpy as np
import pytest
from cache import digests
from faulty_proxy import Proxy, make_bucket, moto_server, serving
from stores import make_store

import actcache.capture
from actcache.store import objects, open_store, verify
from actcache.store.copy import copy_snapshot

SECRET = "not-in-any-file-SECRET-0123456789"
KEY = "AKIAEXAMPLEEXAMPLE77"


@pytest.fixture(scope="session")
def moto():
    """moto's server, with a bucket "lab", behind a proxy."""
    with moto_server() as port:
        make_bucket(port, "lab")
        with serving(Proxy(port)) as proxy:
            yield proxy


@pytest.fixture
def s3(moto, monkeypatch, tmp_path):
    """The proxy, doing nothing wrong yet, and the environment that leads there; quick retries."""
    for name in [n for n in os.environ if n.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_ENDPOINT_URL", moto.url)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "no config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "no credentials"))
    monkeypatch.setattr(objects, "PAUSE", 0.01)
    monkeypatch.setattr(actcache.capture, "POLL", 0.02)
    moto.quiet()
    yield moto
    moto.quiet()


@pytest.fixture(scope="session")
def small_store(tmp_path_factory):
    """A store in a folder: two segments, two hooks."""
    hooks = {"resid.2": 16, "mlp.0": 8}
    folder = tmp_path_factory.mktemp("small") / "s"
    return make_store(folder, hooks=hooks, segments=(64, 32), chunk_bytes=256)


@pytest.fixture(scope="session")
def copied():
    """URL of the copy of `small_store` in the bucket, once a test has asked for it."""
    return []


@pytest.fixture
def there(s3, small_store, copied):
    """A copy of `small_store` in the bucket, opened anew. Not to be changed."""
    if not copied:
        copied.append(copy_snapshot(small_store.snapshot(), "s3://lab/shared/small").store.path)
    return open_store(str(copied[0]))


def whole(store):
    return not [c for c in verify(store.snapshot()) if c.problem]


def same(a, b):
    """Equal rows, tokens and objects."""
    for x, y in zip(a.snapshot().segments, b.snapshot().segments, strict=True):
        assert x.tokens().digest() == y.tokens().digest()
        for hook in x.hooks:
            assert np.array_equal(x.acts(hook).read(), y.acts(hook).read())
    return digests(a) == digests(b)
