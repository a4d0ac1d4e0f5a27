"""Hosts whose ranks may run different modules: experts by token, a vision tower by image."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cache import SMALL
from chats import vision_host, write_chats
from conftest import END_OF_TEXT, tiny_texts
from launch import launch
from test_ranks import assert_same_rows, sharing
from transformers import AutoConfig, AutoModelForSeq2SeqLM

from actcache import ranks, sharded
from actcache.demo.train_host import train_tokenizer
from actcache.errors import HostError
from actcache.host import Host, HostSettings, new_causal_lm, save_host
from actcache.run import CacheSettings, run
from actcache.sources import DataSettings
from actcache.store import open_store

MIXTRAL = {
    "model_type": "mixtral",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 4,
    "max_position_embeddings": 128,
}
T5 = {"model_type": "t5", "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 3, "num_heads": 4}
SPECIAL = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}


def text_host(folder, config):
    tokenizer = train_tokenizer(tiny_texts(), 400, progress=False)
    sizes = {"vocab_size": tokenizer.get_vocab_size(), **SPECIAL}
    if config["model_type"] == "t5":
        sizes["decoder_start_token_id"] = 0
        values = {k: v for k, v in config.items() if k != "model_type"} | sizes
        torch.manual_seed(0)
        model = AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model("t5", **values))
    else:
        model = new_causal_lm(config | sizes, seed=0)
    names = dict.fromkeys(("bos_token", "eos_token", "pad_token"), END_OF_TEXT)
    save_host(model, tokenizer, folder, **names)
    return folder


def settings_for(model, data, store, **kw):
    defaults = {
        "host": HostSettings(model=str(model), batch_tokens=128),
        "data": data,
        "store": str(store),
        "hooks": ("resid.1", "mlp.0"),
        "context": 32,
        "layout": SMALL,
        "progress": False,
    }
    return CacheSettings(**(defaults | kw))


def assert_two_ranks_agree(settings, sharding, tmp_path):
    whole = run(replace(settings, store=str(tmp_path / "whole"))).store
    shared = sharing(settings, sharding)
    ends = launch(lambda rank: run(shared).computed, 2, tmp_path)
    assert [e.code for e in ends] == [0, 0], ends[0].err + ends[1].err
    assert_same_rows(open_store(settings.store).snapshot(), whole.snapshot())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "sharding"), [(MIXTRAL, "zero3"), (MIXTRAL, "fsdp2"), (T5, "zero3")]
)
def test_families(config, sharding, tiny_parquet, tmp_path):  # F103
    """Experts that a rank's tokens do not choose are gathered with the others all the same."""
    model = text_host(tmp_path / "host", config)
    data = DataSettings(files=str(tiny_parquet), id_column="id")
    assert_two_ranks_agree(settings_for(model, data, tmp_path / "s"), sharding, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("sharding", ["zero3", "fsdp2"])
def test_ranks_with_and_without_images(sharding, tmp_path):  # F17 F103
    """Of three conversations two show images: the ranks see them at different times."""
    chats = write_chats(tmp_path / "chats", id=["a", "b", "c"])
    columns = {"messages_column": "messages", "images_column": "images", "id_column": "id"}
    data = DataSettings(files=str(chats), **columns)
    settings = settings_for(
        vision_host(tmp_path / "host"), data, tmp_path / "s", context=128, hooks=("resid.1",)
    )
    assert_two_ranks_agree(settings, sharding, tmp_path)


def test_an_encoder_alone_is_refused_by_fsdp2(tmp_path, monkeypatch):
    host = Host(HostSettings(model=str(text_host(Path(tmp_path), T5))))
    monkeypatch.setattr(ranks, "current", lambda: ranks.Ranks(0, 2, None, 1.0))
    with pytest.raises(HostError, match=r"only the encoder runs.*use host.sharding=zero3"):
        sharded.load("fsdp2", lambda **_: pytest.fail("loaded"), "float32", host.skeleton())


def test_one_process_cannot_load_slices(asked):
    host = Host(replace(asked().host, sharding="zero3"))
    with pytest.raises(HostError, match="only actcache run and actcache add-hooks"):
        host.load([])
