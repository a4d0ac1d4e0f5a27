"""actcache run on bad input: each mistake is named in the user's words, nothing is lost."""

import json
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from cache import digests
from transformers import AutoModelForCausalLM, AutoTokenizer

from actcache.data import PackSettings
from actcache.errors import DataError, HookError, HostError, NonFiniteError
from actcache.host import HostSettings
from actcache.run import run
from actcache.sources import DataSettings
from actcache.store import (
    IdentityError,
    OutOfSpaceError,
    SettingsError,
    StoreError,
    open_store,
)

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
        Capture, "take", lambda self, *a: {k: x[:, :1] for k, x in original(self, *a).items()}
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


def test_context_longer_than_the_model(asked):
    with pytest.raises(HostError, match="context=256 is longer than the 128 positions"):
        run(asked(context=256))


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
