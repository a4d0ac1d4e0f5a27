"""Images that cannot be used: each is one sentence that says which and what to do."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from chats import IMAGE, PICTURES, SHOWN, picture, say, write_chats

import actcache.data
from actcache.errors import DataError, HostError
from actcache.host import HostSettings
from actcache.run import run
from actcache.sources import DataSettings, open_source


def broken(folder, messages, pictures):
    return {"data_files": str(write_chats(folder, messages, pictures, id=["x"]))}


def test_fewer_images_than_parts_that_show_one(pictured, tmp_path):
    bad = broken(tmp_path / "bad", SHOWN[:1], [PICTURES[0][:1]])
    with pytest.raises(DataError, match=r"conversation 'x' shows 2 images.*brings 1"):
        run(pictured(**bad))


def test_images_that_no_message_shows(pictured, tmp_path):
    bad = broken(tmp_path / "bad", SHOWN[1:2], [[picture(8, 8)]])
    with pytest.raises(DataError, match=r"shows 0 images.*brings 1"):
        run(pictured(**bad))


def test_a_text_that_spells_the_placeholder(pictured, tmp_path):
    bad = broken(tmp_path / "bad", [[say("user", ..., f"what is {IMAGE}?")]], [[picture(8, 8)]])
    with pytest.raises(DataError, match=r"2 times <\|image_pad\|>, for 1 images.*spell"):
        run(pictured(**bad))


@pytest.mark.parametrize(
    "data", [b"no image", b"", picture(24, 16)[:-40], picture(64, 64, format="JPEG")[:900]]
)
def test_an_image_that_does_not_decode(pictured, tmp_path, data):
    bad = broken(tmp_path / "bad", SHOWN[:1], [[picture(8, 8), data]])
    with pytest.raises(DataError, match=r"image 1 of conversation 'x' does not decode"):
        run(pictured(**bad))


def test_images_that_are_only_named(pictured, tmp_path):
    write_chats(tmp_path / "bad", SHOWN[2:], PICTURES[2:], id=["x"])
    kind = pa.list_(pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    table = pq.read_table(tmp_path / "bad").set_column(
        2, "images", pa.array([[{"bytes": None, "path": "x.png"}]], kind)
    )
    pq.write_table(table, tmp_path / "bad" / "chats.parquet")
    with pytest.raises(DataError, match=r"holds a path and no bytes \('x\.png'"):
        run(pictured(data_files=str(tmp_path / "bad")))


def test_a_host_that_takes_no_images(pictured, tiny_host):
    with pytest.raises(HostError, match=r"data\.images_column=images.*takes no images"):
        run(pictured(host=HostSettings(model=str(tiny_host))))


def test_messages_that_show_images_without_a_column_of_them(pictured):
    with pytest.raises(DataError, match=r"shows 2 images.*brings 0 in data\.images_column=None"):
        run(pictured(data_images_column=None))


def test_an_images_column_that_holds_something_else(pictured, shown):
    with pytest.raises(DataError, match=r"data\.images_column=id: expected images as bytes"):
        open_source(pictured(data_images_column="id").data)
    with pytest.raises(DataError, match=r"data\.images_column=image: no such.*Did you mean images"):
        open_source(pictured(data_images_column="image").data)
    with pytest.raises(DataError, match=r"needs data\.messages_column too"):
        open_source(DataSettings(files=str(shown), images_column="images"))


def test_without_pillow_there_is_one_sentence(pictured, monkeypatch):
    def missing(*_):
        raise ImportError("it requires Pillow")

    monkeypatch.setattr(actcache.data, "_processor", missing)
    with pytest.raises(HostError, match=r"images need Pillow: pip install"):
        run(pictured())
