"""Conversations with images on ranks that share a model: all run its vision tower, or none does."""

from dataclasses import replace

import numpy as np
import pytest
from cache import SMALL, contexts_of
from chats import PICTURES, SHOWN, say, vision_host, write_chats
from launch import launch

from actcache.host import HostSettings
from actcache.run import CacheSettings, run
from actcache.sources import DataSettings
from actcache.store import open_store


@pytest.mark.parametrize("sharding", ["zero3", "fsdp2"])
def test_ranks_with_and_without_images_fill_the_store_of_one(tmp_path, sharding):  # F103, F114
    """Row groups of two conversations: one rank has images while the other has text alone."""
    texts = [[say("user", f"The parser {i}"), say("assistant", "names a segment")] for i in "abcd"]
    data = write_chats(tmp_path / "data", SHOWN[:2] + texts, PICTURES[:2] + [[]] * 4)
    settings = CacheSettings(
        host=HostSettings(model=str(vision_host(tmp_path / "host")), batch_tokens=256),
        data=DataSettings(files=str(data), messages_column="messages", images_column="images"),
        store=str(tmp_path / "alone"),
        hooks=("resid.0", "mlp.1"),
        context=128,
        layout=SMALL,
        progress=False,
    )
    alone = contexts_of(run(settings).store.snapshot())
    host = replace(settings.host, sharding=sharding, rank_timeout=30.0)
    shared = replace(settings, host=host, store=str(tmp_path / "shared"))

    def job(rank):
        return run(shared).computed

    ends = launch(job, 2, tmp_path)
    assert [e.code for e in ends] == [0, 0], ends[0].err + ends[1].err
    found = contexts_of(open_store(shared.store).snapshot())
    assert list(found) == list(alone)
    assert len(found) == 6
    for key, (ids, docs, acts) in alone.items():
        assert np.array_equal(found[key][0], ids)
        assert np.array_equal(found[key][1], docs)
        for hook, rows in acts.items():
            np.testing.assert_allclose(found[key][2][hook], rows, rtol=1e-4, atol=1e-4)
