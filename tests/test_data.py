"""Documents and packing: which texts are read, and into which contexts they are cut."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import tiny_texts
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from actcache.data import PackSettings, chunk_and_tokenize, contexts, resolve_packing
from actcache.errors import DataError, HostError
from actcache.sources import DataSettings, Document, find_text_columns, open_source
from actcache.store import FLAG_BOS, FLAG_DOC_START, FLAG_SPECIAL
from actcache.store.split import doc_key


@pytest.fixture(scope="module")
def tokenizer(tiny_host):
    return AutoTokenizer.from_pretrained(tiny_host)


def ids_of(tokenizer, texts):
    """Plain Python: tokens of every text, EOS behind each, in one list."""
    stream = []
    for text in texts:
        stream += [*tokenizer(text, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
    return stream


# -- packing ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [7, 31, 62])
def test_chunk_and_tokenize_equals_plain_python(tokenizer, length):  # F47
    texts = tiny_texts()
    stream = ids_of(tokenizer, texts)
    whole = len(stream) // length
    expected = [stream[i * length : (i + 1) * length] for i in range(whole)]
    assert chunk_and_tokenize(texts, tokenizer, length).tolist() == expected
    assert len(stream) % length  # a tail was there to drop


def test_chunk_and_tokenize_of_too_little_text(tokenizer):
    assert chunk_and_tokenize(["a"], tokenizer, 64).shape == (0, 64)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.text(max_size=60), max_size=12), st.integers(3, 40), st.booleans())
def test_every_token_is_packed_once_and_in_order(tokenizer, texts, length, bos):
    """Contexts joined are the stream; all but the last are full; borders are marked."""
    pack = PackSettings(bos="context" if bos else "none")
    packing = resolve_packing(pack, tokenizer, length)
    found = list(contexts((Document(f"{i}", t) for i, t in enumerate(texts)), tokenizer, packing))
    assert all(len(c) == length for c in found[:-1])  # F31 F52
    rows = [(t, d, f) for c in found for t, d, f in zip(c.token_id, c.doc, c.flags, strict=True)]
    fed = [r for r in rows if not r[2] & FLAG_BOS]
    assert len(rows) - len(fed) == (len(found) if bos else 0)
    assert [int(t) for t, _, _ in fed] == ids_of(tokenizer, texts)
    starts = [int(d) for _, d, f in fed if f & FLAG_DOC_START]
    assert starts == [doc_key(str(i)) for i in range(len(texts))]
    eos = tokenizer.eos_token_id
    assert all(bool(f & FLAG_SPECIAL) == (t == eos) for t, _, f in fed)


def test_drop_tail_drops_only_the_short_context(tokenizer):
    documents = [Document(t, t) for t in tiny_texts()]
    keep = resolve_packing(PackSettings(), tokenizer, 31)
    drop = resolve_packing(PackSettings(drop_tail=True), tokenizer, 31)
    kept = list(contexts(documents, tokenizer, keep))
    dropped = list(contexts(documents, tokenizer, drop))
    assert len(kept) == len(dropped) + 1
    assert len(kept[-1]) < 31
    for a, b in zip(kept, dropped, strict=False):
        assert np.array_equal(a.token_id, b.token_id)


def test_tokens_that_the_tokenizer_lacks(tiny_host):
    tokenizer = AutoTokenizer.from_pretrained(tiny_host)
    tokenizer.eos_token = None
    with pytest.raises(HostError, match="has no EOS token"):
        resolve_packing(PackSettings(), tokenizer, 32)
    tokenizer.bos_token = None
    with pytest.raises(HostError, match="has no BOS token"):
        resolve_packing(PackSettings(separator="none", bos="context"), tokenizer, 32)
    with pytest.raises(DataError, match="at least 2"):
        resolve_packing(PackSettings(separator="none"), tokenizer, 1)


# -- text columns ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("columns", "found", "said"),
    [
        ({"n": 1, "content": "c", "text": "t"}, ("text",), "text column: text (found by name)"),
        ({"title": "x", "content": "c"}, ("content",), "content (found by name)"),
        (
            {"output": "o", "id": "i", "instruction": "q"},
            ("instruction", "output"),
            "instruction+output (found by name)",
        ),
        ({"n": 1, "poem": "p", "b": "q"}, ("poem",), "poem (the first column of strings;"),
    ],
)
def test_text_column_is_found_and_said_aloud(columns, found, said):  # F30
    schema = pa.Table.from_pylist([columns]).schema
    names, note = find_text_columns(schema, None)
    assert names == found
    assert said in note


def test_text_column_by_choice(tmp_path):  # F30
    rows = [{"q": "one", "a": "two", "text": "no"}, {"q": None, "a": "three", "text": "no"}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "x.parquet")
    source = open_source(DataSettings(files=str(tmp_path), text_column="q+a"))
    (unit,) = source.units(1 << 20)
    assert [d.text for d in source.read(unit)] == ["one\ntwo", "three"]
    with pytest.raises(
        DataError, match=r"data\.text_column=txt: no text column.*Did you mean text"
    ):
        open_source(DataSettings(files=str(tmp_path), text_column="txt"))


# -- units -----------------------------------------------------------------------------------------


def read_all(source, unit_bytes=1):
    found = []
    for unit in source.units(unit_bytes):
        documents = list(source.read(unit))
        if not documents:
            break
        found += documents
    return found


def test_units_cover_the_files_once(tiny_parquet):
    expected = [Document(f"doc/{i}", t) for i, t in enumerate(tiny_texts())]
    for unit_bytes in (1, 500, 1 << 30):
        source = open_source(DataSettings(files=str(tiny_parquet), id_column="id"))
        assert read_all(source, unit_bytes) == expected
    assert len(list(source.units(1))) == 6  # two files of three row groups
    assert len(list(source.units(1 << 30))) == 2


@pytest.mark.parametrize("n", [1, 5, 7, 13, 24, 99])
def test_max_samples_stops_exactly(tiny_parquet, n):  # F29
    for settings_ in (
        DataSettings(files=str(tiny_parquet), max_samples=n),
        DataSettings(kind="hub", dataset=str(tiny_parquet), max_samples=n),
    ):
        assert [d.text for d in read_all(open_source(settings_))] == tiny_texts()[:n]


def test_streamed_and_local_reading_give_the_same_documents(tiny_parquet):  # F29
    streamed = open_source(DataSettings(kind="hub", dataset=str(tiny_parquet), id_column="id"))
    local = open_source(DataSettings(files=str(tiny_parquet), id_column="id"))
    assert read_all(streamed) == read_all(local)
    assert read_all(streamed) == read_all(streamed)


def test_identity_is_content_not_place(tiny_parquet, tmp_path):
    import shutil

    shutil.copytree(tiny_parquet, tmp_path / "moved")
    for kind, key in (("parquet", "files"), ("hub", "dataset")):
        here = open_source(DataSettings(kind=kind, **{key: str(tiny_parquet)})).identity
        there = open_source(DataSettings(kind=kind, **{key: str(tmp_path / "moved")})).identity
        assert here == there
        assert str(tmp_path) not in str(there)


def test_data_sets_that_are_not_there(tmp_path):
    with pytest.raises(DataError, match=r"needs data\.dataset=NAME"):
        open_source(DataSettings(kind="hub"))
    with pytest.raises(DataError, match=r"data\.dataset=.*cannot be opened"):
        open_source(DataSettings(kind="hub", dataset=str(tmp_path / "nothing")))
    with pytest.raises(DataError, match=r"data\.files is empty"):
        open_source(DataSettings())
    with pytest.raises(DataError, match="max_samples: expected at least 1"):
        open_source(DataSettings(files="x", max_samples=0))
