"""The converter of LLaVA conversations, on local rows; uploads go to a stand-in."""

from typing import ClassVar

import httpx2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from cache import SMALL
from chats import picture, vision_host
from huggingface_hub.errors import HfHubHTTPError

from actcache.host import HostSettings
from actcache.run import CacheSettings, run
from actcache.sources import DataSettings
from actcache.store import FLAG_IMAGE
from pipelines.prepare_llava_clevr import main

RED, BLUE, GREEN = picture(16, 16, 1), picture(24, 16, 2), picture(8, 16, 3)


def turns(*texts):
    return [{"from": ("human", "gpt")[i % 2], "value": t} for i, t in enumerate(texts)]


# One image, none, two; the last is shown by no placeholder.
ROWS = [
    (RED, turns("<image>\nHow many red cubes?", "Two.", "And blue?", "None.")),
    (None, [{"from": "system", "value": "Be brief."}, *turns("  2 + 2?\n", "4")]),
    (
        [RED, BLUE],
        turns("<image>\n<image>\nSame?", "No."),
    ),
    (GREEN, turns("What is it?", "A sphere.")),
]
EXPECTED = [
    [
        ("user", [None, "How many red cubes?"]),
        ("assistant", ["Two."]),
        ("user", ["And blue?"]),
        ("assistant", ["None."]),
    ],
    [("system", ["Be brief."]), ("user", ["  2 + 2?\n"]), ("assistant", ["4"])],
    [("user", [None, None, "Same?"]), ("assistant", ["No."])],
    [("user", [None, "What is it?"]), ("assistant", ["A sphere."])],
]


def write(folder, rows=ROWS, split="train"):
    """A data set of lists of images, as `datasets` stores them."""
    one = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    cells = [i if isinstance(i, list) else [] if i is None else [i] for i, _ in rows]
    images = [[{"bytes": b, "path": "x/y.png"} for b in cell] for cell in cells]
    talks = [t for _, t in rows]
    folder.mkdir(parents=True, exist_ok=True)
    table = pa.table(
        {
            "id": list(map(str, range(len(rows)))),
            "image": pa.array(images, pa.list_(one)),
            "conversations": talks,
            "data_source": ["CLEVR"] * len(rows),
        }
    )
    pq.write_table(table, folder / f"{split}.parquet")
    return folder


def convert(source, result, *words):
    return main(["--hf_repo_path", str(source), "--local_path", str(result), *words])


def simple(messages):
    return [
        (m["role"], [None if p["type"] == "image" else p["text"] for p in m["content"]])
        for m in messages
    ]


def test_rows_become_images_and_messages(tmp_path, capsys):  # F11
    result = tmp_path / "out" / "x.parquet"
    assert convert(write(tmp_path / "in"), result) == 0
    table = pq.read_table(result)
    assert table.column_names == ["images", "text"]
    assert [simple(m) for m in table["text"].to_pylist()] == EXPECTED
    found = [[i["bytes"] for i in row] for row in table["images"].to_pylist()]
    assert found == [[RED], [], [RED, BLUE], [GREEN]]  # the very bytes
    assert table.schema.field("images").type == pa.list_(
        pa.field("item", pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    )
    said = capsys.readouterr().out
    assert "4 rows" in said
    assert "in 1 of them no <image> says where: the images come first" in said
    assert [p.name for p in result.parent.iterdir()] == ["x.parquet"]


def test_datasets_shows_the_result_as_images(tmp_path):  # F11
    import datasets

    result = tmp_path / "x.parquet"
    convert(write(tmp_path / "in"), result)
    first = next(
        iter(
            datasets.load_dataset("parquet", data_files=str(result), split="train", streaming=True)
        )
    )
    assert first["images"][0].size == (16, 16)


def test_a_single_image_per_row_and_renamed_columns(tmp_path):  # F9, F11
    one = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    cells = pa.array([{"bytes": RED, "path": None}, None], one)
    (tmp_path / "in").mkdir()
    talks = [ROWS[0][1], ROWS[1][1]]
    pq.write_table(
        pa.table({"image": cells, "conversations": talks}), tmp_path / "in" / "x.parquet"
    )
    result = tmp_path / "x.parquet"
    assert convert(tmp_path / "in", result, "--images_key", "pics", "--text_key", "chat") == 0
    table = pq.read_table(result)
    assert table.column_names == ["pics", "chat"]
    assert [len(i) for i in table["pics"].to_pylist()] == [1, 0]


def test_subset_split_and_source_are_honoured(tmp_path):  # F11
    name = "CLEVR-Math(MathV360K)"
    write(tmp_path / "in" / name, ROWS[:1])
    write(tmp_path / "in" / name, ROWS[1:3], split="test")
    write(tmp_path / "in" / "other", ROWS[3:])
    result = tmp_path / "x.parquet"
    for words, expected in [
        (("--subset", name, "--split", "train"), EXPECTED[:1]),
        (("--subset", name, "--split", "test"), EXPECTED[1:3]),
        (("--subset", "other"), EXPECTED[3:]),
        (("--subset", name, "--split", "test", "--max_samples", "1"), EXPECTED[1:2]),
    ]:
        assert convert(tmp_path / "in", result, *words) == 0
        assert [simple(m) for m in pq.read_table(result)["text"].to_pylist()] == expected


def test_the_result_is_what_actcache_reads(tmp_path):  # F9, F11, F17
    result = tmp_path / "x.parquet"
    convert(write(tmp_path / "in"), result)
    store = run(
        CacheSettings(
            host=HostSettings(model=str(vision_host(tmp_path / "host"))),
            data=DataSettings(files=str(result), messages_column="text", images_column="images"),
            store=str(tmp_path / "store"),
            hooks=("resid.0",),
            context=128,
            layout=SMALL,
            progress=False,
        )
    ).store
    tables = [s.tokens() for s in store.snapshot().segments]
    image_rows = sum(int(np.sum(t.flags & FLAG_IMAGE != 0)) for t in tables)
    assert image_rows == 4 + (4 + 6) + 2
    assert sum(len(np.unique(t.doc)) for t in tables) == 4


# -- uploading -------------------------------------------------------------------------------------


FORBIDDEN = httpx2.Response(403, request=httpx2.Request("PUT", "https://hub.invalid/x"))


class Hub:
    """Stands in for HfApi: records calls, or fails as told."""

    calls: ClassVar[list] = []
    error: ClassVar[Exception | None] = None

    def create_repo(self, name, **kw):
        self.calls.append(("create_repo", name, kw))

    def upload_file(self, *, path_or_fileobj, path_in_repo, repo_id, repo_type):
        if self.error is not None:
            raise self.error
        rows = pq.read_metadata(path_or_fileobj).num_rows
        self.calls.append(("upload_file", repo_id, path_in_repo, repo_type, rows))


@pytest.fixture
def hub(monkeypatch):
    import huggingface_hub

    fake = type("Fake", (Hub,), {"calls": [], "error": None})
    monkeypatch.setattr(huggingface_hub, "HfApi", fake)
    return fake


def test_upload(tmp_path, hub, capsys):  # F11
    words = ("--push_to_hub", "--target_hf_repo_path", "me/CLEVR-SAE")
    assert convert(write(tmp_path / "in"), tmp_path / "x.parquet", *words) == 0
    assert hub.calls == [
        ("create_repo", "me/CLEVR-SAE", {"repo_type": "dataset", "exist_ok": True}),
        ("upload_file", "me/CLEVR-SAE", "data/train-00000-of-00001.parquet", "dataset", 4),
    ]
    assert "uploaded to https://huggingface.co/datasets/me/CLEVR-SAE" in capsys.readouterr().out


@pytest.mark.parametrize(
    "error",
    [
        HfHubHTTPError("403 Forbidden: no write access", response=FORBIDDEN),
        httpx2.ConnectError("no name for it"),
        ConnectionError("no route to host"),
    ],
)
def test_an_upload_that_fails_says_so_and_keeps_the_result(tmp_path, hub, capsys, error):  # F11
    hub.error = error
    result = tmp_path / "x.parquet"
    words = ("--push_to_hub", "--target_hf_repo_path", "me/CLEVR-SAE")
    assert convert(write(tmp_path / "in"), result, *words) == 1
    said = capsys.readouterr()
    assert "uploaded" not in said.out
    assert f"not uploaded to me/CLEVR-SAE: {type(error).__name__}: {error}" in said.err
    assert f"whole and stays at {result}" in said.err
    assert pq.read_metadata(result).num_rows == 4


def test_push_without_a_target_is_refused_before_any_work(tmp_path, hub, capsys):  # F11
    with pytest.raises(SystemExit) as e:
        convert(write(tmp_path / "in"), tmp_path / "x.parquet", "--push_to_hub")
    assert e.value.code == 2
    assert "--push_to_hub needs --target_hf_repo_path" in capsys.readouterr().err
    assert not (tmp_path / "x.parquet").exists()
    assert convert(tmp_path / "in", tmp_path / "x.parquet", "--target_hf_repo_path", "a/b") == 0
    assert "has no effect without --push_to_hub" in capsys.readouterr().err
    assert hub.calls == []


# -- bad input -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "error"),
    [
        ((RED, turns("<image> and <image>?", "x")), "row 1 has 1 images and 2 <image>"),
        ((None, turns("<image>?", "x")), "row 1 has 0 images and 1 <image>"),
        ((None, [{"from": "robot", "value": "x"}]), "row 1: expected turns {from, value} of human"),
        ((RED, [{"from": "gpt", "value": "x"}]), "row 1 has 1 images and no question"),
    ],
)
def test_rows_that_cannot_be_converted(tmp_path, capsys, row, error):
    result = tmp_path / "x.parquet"
    assert convert(write(tmp_path / "in", [ROWS[0], row]), result) == 1
    assert error in capsys.readouterr().err
    assert list(tmp_path.glob("*.parquet")) + list(tmp_path.glob(".*")) == []


def test_sources_that_are_not_there_or_have_other_columns(tmp_path, capsys):
    assert convert(tmp_path / "nothing", tmp_path / "x.parquet") == 1
    assert "cannot be read" in capsys.readouterr().err
    (tmp_path / "in").mkdir()
    pq.write_table(pa.table({"text": ["x"]}), tmp_path / "in" / "x.parquet")
    assert convert(tmp_path / "in", tmp_path / "x.parquet") == 1
    assert "expected columns image and conversations, it has text" in capsys.readouterr().err
