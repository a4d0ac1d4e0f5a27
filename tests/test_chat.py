"""Conversations without images: from parquet through a chat template into contexts and rows."""

import dataclasses

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from cache import SMALL, contexts_of
from chats import markers_tokenizer, say, vision_host, write_chats
from conftest import tiny_texts
from transformers import AutoModel, AutoTokenizer, PreTrainedTokenizerFast

from actcache.add_hooks import AddHooksSettings, add_hooks
from actcache.canary import check
from actcache.chat import ChatPacking
from actcache.columns import Document, without_nulls
from actcache.errors import DataError, HostError
from actcache.host import HostSettings
from actcache.roles import render, role_code
from actcache.run import CacheSettings, PackSettings, run
from actcache.sources import DataSettings, open_source
from actcache.store import FLAG_BOS, FLAG_DOC_START, FLAG_SPECIAL, ROLES, IdentityError, roles_of

PLAIN = "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}"
TALKS = [
    [{"role": "system", "content": "Every reader"}, {"role": "user", "content": "A store keeps?"}],
    [{"role": "user", "content": "user"}, {"role": "assistant", "content": " assistant  "}],
    [{"role": "user", "content": t} for t in tiny_texts(3)],
    [{"role": "tool", "content": "42 bytes"}, {"role": "critic", "content": "“all” data ε"}],
]


@pytest.fixture
def template(tmp_path):
    file = tmp_path / "chat.jinja"
    file.write_text(PLAIN)
    return str(file)


@pytest.fixture
def wanted(tiny_host, template, tmp_path):
    """Settings for a store of TALKS; `data_…` replaces fields of data, the others of all."""
    folder = write_chats(tmp_path / "talks", TALKS, None, names=("talk", ""), id=list("abcd"))

    def make(**kw):
        data = {"files": str(folder), "messages_column": "talk", "id_column": "id"}
        data |= {"chat_template": template}
        data |= {k.removeprefix("data_"): kw.pop(k) for k in list(kw) if k.startswith("data_")}
        defaults = {
            "host": HostSettings(model=str(tiny_host), batch_tokens=256),
            "data": DataSettings(**data),
            "store": str(tmp_path / "store"),
            "hooks": ("resid.1", "mlp.0"),
            "context": 128,
            "layout": SMALL,
            "progress": False,
        }
        return CacheSettings(**(defaults | kw))

    return make


def by_document(snapshot):
    """{doc key: (token ids, flags, {hook: rows})}, in position order."""
    found = {}
    for segment in snapshot.segments:
        t = segment.tokens()
        acts = {h: np.asarray(segment.acts(h).read(), np.float32) for h in snapshot.hooks}
        for doc in np.unique(t.doc):
            mine = np.flatnonzero(t.doc == doc)
            mine = mine[np.argsort(t.pos[mine])]
            assert t.pos[mine].tolist() == list(range(len(mine)))
            rows = {h: x[mine] for h, x in acts.items()}
            found[int(doc)] = t.token_id[mine], t.flags[mine], rows
    return found


# -- what is stored --------------------------------------------------------------------------------


def test_a_conversation_is_a_context_with_the_ids_of_apply_chat_template(wanted, tiny_host):
    # F9, F10, F31: a renamed column; equal ids; one BOS; padding is no row
    from actcache.store.split import doc_key

    tokenizer = AutoTokenizer.from_pretrained(tiny_host)
    model = AutoModel.from_pretrained(tiny_host, dtype=torch.float32).eval()
    found = by_document(run(wanted()).store.snapshot())
    assert len(found) == len(TALKS)
    for name, talk in zip("abcd", TALKS, strict=True):
        tokens, flags, acts = found[doc_key(name)]
        ids = tokenizer.apply_chat_template(talk, chat_template=PLAIN)["input_ids"]
        assert tokens.tolist() == ids
        assert ids.count(tokenizer.bos_token_id) == 1
        assert flags[0] == FLAG_SPECIAL | FLAG_DOC_START | FLAG_BOS
        assert not (flags[1:] & (FLAG_SPECIAL | FLAG_DOC_START | FLAG_BOS)).any()
        caught = []
        handle = model.layers[1].register_forward_hook(
            lambda _m, _i, o, caught=caught: caught.append(o[0] if isinstance(o, tuple) else o)
        )
        with torch.no_grad():
            model(torch.tensor([ids]))
        handle.remove()
        own = caught[0].reshape(len(ids), -1).numpy()
        np.testing.assert_allclose(acts["resid.1"], own, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("writes_bos", [True, False])
def test_no_bos_is_doubled_by_a_tokenizer_that_adds_one(tmp_path, writes_bos):  # F10
    from tokenizers.processors import TemplateProcessing

    raw = markers_tokenizer()
    raw.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", raw.token_to_id("<|im_start|>"))]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<|im_start|>")
    assert tokenizer("x").input_ids[0] == tokenizer.bos_token_id  # it does add one
    template = PLAIN if writes_bos else PLAIN.replace("{{ bos_token }}", "")
    packing = ChatPacking(
        128, None, None, True, False, frozenset(tokenizer.all_special_ids), "cut", template
    )
    (context,) = packing.contexts([Document("x", "", tuple(TALKS[0]))], tokenizer)
    ids = tokenizer.apply_chat_template(TALKS[0], chat_template=template)["input_ids"]
    assert context.token_id.tolist() == ids
    assert ids.count(tokenizer.bos_token_id) == int(writes_bos)


def test_parts_that_parquet_filled_with_nulls_render_as_before(tmp_path):  # F9
    """Texts and images in one struct, tool calls beside texts: keys that are null must go."""
    host = vision_host(tmp_path / "host")
    tokenizer = AutoTokenizer.from_pretrained(host)
    own = [
        [say("user", "One", "stream"), {**say("assistant", "it"), "calls": [{"n": 1}, {"m": "x"}]}],
        [{**say("user", ...), "name": "ε"}, say("assistant", "names", ..., " done")],
    ]
    pq.write_table(pa.table({"messages": own}), tmp_path / "x.parquet")
    back = pq.read_table(tmp_path / "x.parquet")["messages"].to_pylist()
    assert back != own  # nulls were filled in
    assert without_nulls(back) == own
    for before, after in zip(own, back, strict=True):
        clean = tokenizer.apply_chat_template(without_nulls(after), tokenize=False)
        assert clean == tokenizer.apply_chat_template(before, tokenize=False)
    inline = [{"type": "text", "text": "a"}, {"type": "image", "image": "x"}]
    pq.write_table(pa.table({"m": [[{"role": "user", "content": inline}]]}), tmp_path / "y.parquet")
    (filled,) = pq.read_table(tmp_path / "y.parquet")["m"].to_pylist()
    wrong = tokenizer.apply_chat_template(filled, tokenize=False)
    assert wrong.count("<|image_pad|>") == 2  # what would happen otherwise
    right = tokenizer.apply_chat_template(without_nulls(filled), tokenize=False)
    assert right.count("<|image_pad|>") == 1
    assert without_nulls({"a": {}, "b": [None, {"c": None}]}) == {"a": {}, "b": [None, {}]}


def test_segments_hold_whole_conversations(wanted):
    snapshot = run(wanted(layout=dataclasses.replace(SMALL, unit_bytes=1 << 20))).store.snapshot()
    sizes = {k: len(v[0]) for k, v in contexts_of(snapshot).items()}
    assert sum(sizes.values()) == snapshot.n_rows
    assert all(s.n_rows <= 128 for s in snapshot.segments)
    for first, second in zip(snapshot.segments, snapshot.segments[1:], strict=False):
        assert first.n_rows + sizes[second.id, 0] > 128  # no room was left for the next one
    again = run(wanted(layout=dataclasses.replace(SMALL, unit_bytes=1 << 20)))
    assert again.computed == 0


# -- roles -----------------------------------------------------------------------------------------


def pieces(talk):
    """What PLAIN makes of a conversation, as (text, role), written down by hand."""
    found = [("<|endoftext|>", "none")]
    for message in talk:
        role = message["role"] if message["role"] in ROLES else "other"
        text = message["content"]
        lead, core = text[: len(text) - len(text.lstrip())], text.strip()
        tail = text[len(lead) + len(core) :]
        head = f"[{message['role']}] "
        found += [(head + lead, "none"), (core, role), (tail + "\n", "none")]
    return found


def test_roles_of_tokens(wanted, tiny_host):
    from actcache.store.split import doc_key

    tokenizer = AutoTokenizer.from_pretrained(tiny_host)
    found = by_document(run(wanted()).store.snapshot())
    seen = set()
    for name, talk in zip("abcd", TALKS, strict=True):
        tokens, flags, _ = found[doc_key(name)]
        text = "".join(t for t, _ in pieces(talk))
        by_char = [ROLES.index(r) for t, r in pieces(talk) for _ in t]
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        assert encoded.input_ids == tokens.tolist()
        expected = [next((c for c in by_char[a:b] if c), 0) for a, b in encoded.offset_mapping]
        assert roles_of(flags).tolist() == expected
        seen |= set(expected)
    assert seen == set(range(len(ROLES)))  # every role occurs


@pytest.mark.parametrize(
    ("body", "known"),
    [
        ("{{ m['content'] | trim }}", True),
        ("{{ m['content'].split('keeps')[-1] }}", False),  # one mark of two
        ("{{ m['content'] | upper }}", True),  # marks survive it, and so do the places
        ("{{ m['content'][:5] }}", False),
        ("{{ m['content'] | length }}", False),
    ],
)
def test_templates_that_rewrite_a_text_leave_its_tokens_without_roles(tiny_host, body, known):
    tokenizer = AutoTokenizer.from_pretrained(tiny_host)
    template = "{% for m in messages %}" + body + "\n{% endfor %}"
    messages = ({"role": "user", "content": "  A store keeps its tokens.  "},)
    text, roles = render(tokenizer, template, Document("x", "", messages))
    assert text == tokenizer.apply_chat_template(
        list(messages), chat_template=template, tokenize=False
    )
    if known:
        written = "".join(c for c, r in zip(text, roles, strict=True) if r == role_code("user"))
        assert written == text.strip() or written.strip() == text.strip()
    else:
        assert roles is None


def test_conversations_without_roles_are_counted_and_said(wanted, tmp_path):
    (tmp_path / "cut.jinja").write_text("{% for m in messages %}{{ m['content'][:9] }}{% endfor %}")
    said = []
    store = run(wanted(data_chat_template=str(tmp_path / "cut.jinja")), said.append).store
    assert "4 conversations have no roles: the chat template rewrites their text" in said
    assert not any(roles_of(s.tokens().flags).any() for s in store.snapshot().segments)


def test_roles_by_other_names():
    names = ["developer", "model", "human", "gpt", "assistant", "ipython", "none"]
    codes = [ROLES[role_code(n)] for n in names]
    assert codes == ["system", "assistant", "user", "assistant", "assistant", "other", "other"]


# -- longer than a context -------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["cut", "drop", "error"])
def test_conversations_longer_than_a_context(wanted, tiny_host, how):
    tokenizer = AutoTokenizer.from_pretrained(tiny_host)
    sizes = [len(tokenizer.apply_chat_template(t, chat_template=PLAIN)["input_ids"]) for t in TALKS]
    settings = wanted(context=64, pack=PackSettings(long_chat=how))
    assert sum(n > 64 for n in sizes) == 1
    said = []
    if how == "error":
        with pytest.raises(DataError, match=r"conversation 'c' has \d+ tokens, context=64"):
            run(settings)
        return
    result = run(settings, said.append)
    kept = [min(n, 64) for n in sizes] if how == "cut" else [n for n in sizes if n <= 64]
    assert result.tokens == sum(kept)
    what = "cut at context=64" if how == "cut" else "left out: longer than context=64"
    assert f"1 conversations {what}" in said


# -- what stores of chats can do -------------------------------------------------------------------


def test_add_hooks_and_canary_work_without_the_data(wanted, tiny_host, tmp_path):
    store = run(wanted(hooks=("resid.1",))).store
    host = HostSettings(model=str(tiny_host), batch_tokens=256)
    add_hooks(AddHooksSettings(host=host, store=str(store.path), hooks="mlp.0", progress=False))
    at_once = run(wanted(store=str(tmp_path / "both"))).store
    both = by_document(at_once.snapshot())
    for doc, (_, _, acts) in by_document(store.snapshot()).items():
        assert np.array_equal(acts["mlp.0"], both[doc][2]["mlp.0"])
    assert all(r.ok for r in check(store.path, host))


def test_another_template_is_another_store(wanted, tmp_path):
    run(wanted())
    (tmp_path / "other.jinja").write_text(PLAIN + " ")
    with pytest.raises(IdentityError, match=r"packing\.chat_template: the store has sha256"):
        run(wanted(data_chat_template=str(tmp_path / "other.jinja")))


def test_settings_without_effect_are_said(wanted, asked, template, tmp_path):
    said = []
    run(wanted(pack=PackSettings(separator="none", drop_tail=True)), said.append)
    for key in ("separator", "drop_tail"):
        assert f"pack.{key} has no effect on chats: one conversation is one context" in said
    plain = asked(pack=PackSettings(long_chat="drop"), store=str(tmp_path / "plain"))
    said.clear()
    run(
        dataclasses.replace(plain, data=dataclasses.replace(plain.data, chat_template=template)),
        said.append,
    )
    assert sum("has no effect on plain text" in line for line in said) == 2


# -- which column ----------------------------------------------------------------------------------


def test_a_column_of_messages_is_found_by_its_form(tmp_path):  # F30
    rows = [{"prompt": "p", "messages": TALKS[0]}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "x.parquet")
    source = open_source(DataSettings(files=str(tmp_path)))
    assert source.columns.messages == "messages"
    assert "found by its form" in source.notes[0]
    chosen = open_source(DataSettings(files=str(tmp_path), text_column="prompt"))
    assert chosen.columns.messages is None
    (unit,) = source.units(1)
    (document,) = source.read(unit)
    assert document.messages == tuple(TALKS[0])
    assert document.id.startswith('{"images":[],"messages":[{"content":"Every reader"')


def test_empty_conversations_are_left_out(tmp_path):
    pq.write_table(pa.table({"messages": [[], TALKS[0], None]}), tmp_path / "x.parquet")
    source = open_source(DataSettings(files=str(tmp_path)))
    (unit,) = source.units(1)
    assert len(list(source.read(unit))) == 1


# -- bad input -------------------------------------------------------------------------------------


def test_a_host_without_a_chat_template(wanted):
    with pytest.raises(
        HostError, match=r"nor its tokenizer has a chat template.*chat_template=FILE"
    ):
        run(wanted(data_chat_template=None))


def test_a_template_that_is_not_there(wanted):
    with pytest.raises(DataError, match=r"data\.chat_template=nowhere\.jinja cannot be read"):
        run(wanted(data_chat_template="nowhere.jinja"))


def test_a_template_that_refuses_a_conversation(wanted, tmp_path):
    (tmp_path / "strict.jinja").write_text("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(
        DataError, match=r"conversation '.' *: the chat template refuses.*alternate"
    ):
        run(wanted(data_chat_template=str(tmp_path / "strict.jinja")))


def test_a_template_that_prints_parts(wanted, tmp_path):
    folder = write_chats(tmp_path / "parts", [[say("user", "A")]], None, id=["x"])
    with pytest.raises(DataError, match=r"prints the parts of a content"):
        run(wanted(data_files=str(folder), data_messages_column="messages"))


@pytest.mark.parametrize(
    ("column", "message"),
    [
        (["a text"], r"expected a list of \{role, content\}, the column is string"),
        ([[{"from": "human", "value": "x"}]], r"\{from, value\} are not messages yet: see pipel"),
        ([["a", "b"]], r"expected a list of \{role, content\}"),
    ],
)
def test_a_column_that_is_not_messages(tmp_path, column, message):
    pq.write_table(pa.table({"messages": column}), tmp_path / "x.parquet")
    with pytest.raises(DataError, match=r"data\.messages_column=messages: .*" + message):
        open_source(DataSettings(files=str(tmp_path), messages_column="messages"))


@pytest.mark.parametrize(
    ("message", "error"),
    [
        ({"role": None, "content": "x"}, "which is no message"),
        ({"role": "user", "content": [{"type": "video"}]}, "video and audio are not supported"),
        (
            {"role": "user", "content": [{"type": "image", "url": "http://x"}]},
            "brings 'url' itself",
        ),
        (
            {"role": "user", "content": [{"type": "sound", "text": "x"}]},
            "parts of type text or image",
        ),
    ],
)
def test_a_row_that_is_no_conversation(tmp_path, message, error):
    rows = [{"messages": [message], "id": "x"}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "x.parquet")
    settings = DataSettings(files=str(tmp_path), messages_column="messages", id_column="id")
    source = open_source(settings)
    (unit,) = source.units(1)
    with pytest.raises(DataError, match=error):
        list(source.read(unit))


def test_columns_that_exclude_each_other(tmp_path, tiny_parquet):
    pq.write_table(pa.table({"messages": TALKS[:1], "t": ["x"]}), tmp_path / "x.parquet")
    with pytest.raises(DataError, match="choose one of them"):
        open_source(DataSettings(files=str(tmp_path), messages_column="messages", text_column="t"))
    with pytest.raises(DataError, match=r"data\.messages_column=chat: no such column"):
        open_source(DataSettings(files=str(tiny_parquet), messages_column="chat"))
