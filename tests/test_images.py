"""Conversations with images, from parquet through a tiny Qwen2.5-VL into a store.

Shapes: t tokens of a conversation, d = 32 channels, n rows of a store.
"""

import dataclasses

import numpy as np
import pytest
import torch
from cache import SMALL, contexts_of
from chats import (
    IMAGE,
    PICTURES,
    SHOWN,
    TEMPLATE,
    write_chats,
)
from PIL import Image

from actcache.add_hooks import AddHooksSettings, add_hooks
from actcache.canary import check
from actcache.chat import ChatPacking, decode_image
from actcache.data import Context, load_processor
from actcache.errors import DataError, HookError
from actcache.host import Host, HostSettings
from actcache.inputs import alike, joined
from actcache.run import PackSettings, run
from actcache.sources import DataSettings, open_source
from actcache.store import FLAG_IMAGE, FLAG_SPECIAL, ROLES, StoreMissingError, eligible, roles_of

HOOKS = ("resid.0", "resid.1", "mlp.1", "resid_pre.0")


# -- an independent way from messages to activations -----------------------------------------------


def by_hand(host, messages, pictures):
    """(token ids, is an image, inputs of the model): the placeholder is put in by hand, as often as
    the image has merged patches, and the text is tokenized as it is."""
    from transformers import AutoTokenizer
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    tokenizer = AutoTokenizer.from_pretrained(host)
    text = tokenizer.apply_chat_template(messages, chat_template=TEMPLATE, tokenize=False)
    inputs = {}
    if pictures:
        images = [decode_image(p, "it") for p in pictures]
        inputs = dict(Qwen2VLImageProcessorPil.from_pretrained(host)(images, return_tensors="pt"))
        counts = [int(g.prod()) // 4 for g in inputs["image_grid_thw"]]
        pieces = text.split(IMAGE)
        assert len(pieces) == len(counts) + 1
        text = pieces[0] + "".join(IMAGE * n + p for n, p in zip(counts, pieces[1:], strict=True))
    ids = torch.tensor(tokenizer(text, add_special_tokens=False).input_ids)
    image = ids == tokenizer.convert_tokens_to_ids(IMAGE)
    return ids, image, inputs | ({"mm_token_type_ids": image[None].int()} if pictures else {})


def whole_model(host):
    from transformers import AutoModel

    return AutoModel.from_pretrained(host, dtype=torch.float32).eval()


def activations(model, ids, inputs):
    """{hook: (t, d)} of the whole model for one conversation, from hooks of our own."""
    blocks = model.language_model.layers
    places = {"resid.0": blocks[0], "resid.1": blocks[1], "mlp.1": blocks[1].mlp}
    found = {}

    def keep(name):
        return lambda _m, _i, o: found.__setitem__(name, o[0] if isinstance(o, tuple) else o)

    handles = [m.register_forward_hook(keep(n)) for n, m in places.items()]
    handles.append(
        blocks[0].register_forward_pre_hook(
            lambda _m, args, kw: found.__setitem__("resid_pre.0", (*args, *kw.values())[0]),
            with_kwargs=True,
        )
    )
    with torch.no_grad():
        model(input_ids=ids[None], attention_mask=torch.ones_like(ids[None]), **inputs)
    for handle in handles:
        handle.remove()
    return {name: x[0].numpy() for name, x in found.items()}


# -- what is stored --------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_tokens", [1, 512])
def test_stored_activations_equal_a_manual_forward(pictured, vision, batch_tokens):  # F114, F17
    settings = pictured(host=HostSettings(model=str(vision), batch_tokens=batch_tokens))
    store = run(
        dataclasses.replace(settings, layout=dataclasses.replace(SMALL, unit_bytes=1 << 20))
    ).store
    found = sorted(contexts_of(store.snapshot()).values(), key=lambda c: c[0].tolist())
    model = whole_model(vision)
    expected = []
    for messages, pictures in zip(SHOWN, PICTURES, strict=True):
        ids, _, inputs = by_hand(vision, messages, pictures)
        expected.append((ids.numpy(), activations(model, ids, inputs)))
    expected.sort(key=lambda c: c[0].tolist())
    for (tokens, _, acts), (ids, own) in zip(found, expected, strict=True):
        assert tokens.tolist() == ids.tolist()
        for hook in HOOKS:
            np.testing.assert_allclose(acts[hook], own[hook], rtol=2e-4, atol=2e-5)


def test_token_types_decide_the_activations_behind_an_image(vision):  # F114
    """What would be stored if mm_token_type_ids were not passed is something else."""
    model = whole_model(vision)
    ids, image, inputs = by_hand(vision, SHOWN[0], PICTURES[0])
    right = activations(model, ids, inputs)["resid.1"]
    inputs.pop("mm_token_type_ids")
    wrong = activations(model, ids, inputs)["resid.1"]
    error = np.linalg.norm(right - wrong, axis=1) / np.linalg.norm(right, axis=1)
    first = int(np.flatnonzero(image)[0])
    assert error[: first + 1].max() < 1e-5
    assert error[first + 2 :].min() > 1e-2


def test_image_rows_and_roles(pictured, vision):  # F17, F114
    snapshot = run(pictured()).store.snapshot()
    tables = [s.tokens() for s in snapshot.segments]
    flags = np.concatenate([t.flags for t in tables])
    ids = np.concatenate([t.token_id for t in tables])
    image = Host(HostSettings(model=str(vision))).tokenizer.convert_tokens_to_ids(IMAGE)
    assert np.array_equal((flags & FLAG_IMAGE) != 0, ids == image)
    assert (flags & FLAG_IMAGE != 0).sum() == 6 + 8 + 1
    assert not (flags[ids == image] & FLAG_SPECIAL).any()
    assert set(roles_of(flags[ids == image]).tolist()) == {ROLES.index("user")}
    assert eligible(flags, modality="image").sum() == 15
    assert eligible(flags, roles=["user"]).sum() > 15
    assert not (eligible(flags, modality="text") & eligible(flags, modality="image")).any()


def test_token_ids_are_those_of_apply_chat_template(vision, shown):  # F10
    from transformers import AutoTokenizer

    folder = Host(HostSettings(model=str(vision)))
    processor = load_processor(folder.folder, folder.config, folder.tokenizer, False)
    packing = packing_of(vision, shown)
    source = open_source(
        DataSettings(files=str(shown), messages_column="messages", images_column="images")
    )
    documents = [d for unit in source.units(1) for d in source.read(unit)]
    for document, messages, pictures in zip(documents, SHOWN, PICTURES, strict=True):
        (context,) = packing.contexts([document], folder.tokenizer)
        images = [decode_image(p, "it") for p in pictures]
        parts = iter(images)
        inline = [
            m
            | {
                "content": [
                    p | ({"image": next(parts)} if p["type"] == "image" else {})
                    for p in m["content"]
                ]
            }
            for m in messages
        ]
        theirs = processor.apply_chat_template(inline, tokenize=True, return_dict=True)
        assert context.token_id.tolist() == theirs["input_ids"][0]
        rendered = AutoTokenizer.from_pretrained(vision).apply_chat_template(
            messages, chat_template=TEMPLATE, tokenize=False
        )
        assert rendered.count(IMAGE) == len(pictures)
        if pictures:
            grids = theirs["image_grid_thw"]
            assert sum(theirs["mm_token_type_ids"][0]) == sum(int(np.prod(g)) // 4 for g in grids)


def packing_of(host, shown, **kw):
    from actcache.chat import resolve_chat

    data = DataSettings(files=str(shown), messages_column="messages", images_column="images")
    found, _ = resolve_chat(
        PackSettings(**{k: v for k, v in kw.items() if k != "context"}),
        open_source(data).columns,
        data,
        Host(HostSettings(model=str(host))),
        kw.get("context", 128),
    )
    return found


def test_a_run_that_is_repeated_computes_nothing_and_new_hooks_share_the_rows(pictured):
    first = run(pictured(hooks=("resid.1",)))
    again = run(pictured(hooks=("resid.1",)))
    assert (first.computed > 0, again.computed) == (True, 0)
    more = run(pictured(hooks=("resid.0",)))
    assert more.computed == first.computed
    both = run(pictured(hooks=("resid.0", "resid.1")))
    assert both.computed == 0
    assert set(both.store.snapshot().hooks) == {"resid.0", "resid.1"}


def test_images_streamed_are_the_same_documents(shown):  # F29
    columns = {"messages_column": "messages", "images_column": "images", "id_column": "id"}
    local = open_source(DataSettings(files=str(shown), **columns))
    streamed = open_source(DataSettings(kind="hub", dataset=str(shown), **columns))
    (unit,) = local.units(1 << 20)
    first = next(streamed.units(1))
    assert list(local.read(unit)) == list(streamed.read(first))
    assert [len(d.images) for d in local.read(unit)] == [2, 0, 1]


def test_store_identity_covers_template_processor_and_columns(pictured, vision, shown, tmp_path):
    import json
    import shutil

    from actcache.run import prepare

    own = prepare(pictured()).identity
    assert own.token_stream["data"]["images_column"] == "images"
    other = shutil.copytree(vision, tmp_path / "other")
    settings = json.loads((other / "preprocessor_config.json").read_text())
    settings["size"]["longest_edge"] = 256
    (other / "preprocessor_config.json").write_text(json.dumps(settings))
    changed = prepare(pictured(host=HostSettings(model=str(other)))).identity
    assert own.token_stream["packing"]["images"] != changed.token_stream["packing"]["images"]
    assert own.host == changed.host
    (tmp_path / "t.jinja").write_text(TEMPLATE + " ")
    spaced = prepare(pictured(data_chat_template=str(tmp_path / "t.jinja"))).identity
    packings = own.token_stream["packing"], spaced.token_stream["packing"]
    assert [k for k in packings[0] if packings[0][k] != packings[1][k]] == ["chat_template"]


# -- cutting ---------------------------------------------------------------------------------------


def test_a_conversation_is_cut_behind_its_images_only(pictured, vision, shown, tmp_path):
    lengths = [len(by_hand(vision, m, p)[0]) for m, p in zip(SHOWN, PICTURES, strict=True)]
    image = np.flatnonzero(by_hand(vision, SHOWN[0], PICTURES[0])[1])
    limit = int(image[-1]) + 1
    assert limit < lengths[0]
    said = []
    cut = run(pictured(context=limit), said.append).store
    assert any(f"conversations cut at context={limit}" in line for line in said)
    ids, _, inputs = by_hand(vision, SHOWN[0], PICTURES[0])
    inputs["mm_token_type_ids"] = inputs["mm_token_type_ids"][:, :limit]
    own = activations(whole_model(vision), ids[:limit], inputs)
    found = [
        c for c in contexts_of(cut.snapshot()).values() if c[0].tolist() == ids[:limit].tolist()
    ]
    np.testing.assert_allclose(found[0][2]["resid.1"], own["resid.1"], rtol=2e-4, atol=2e-5)
    with pytest.raises(DataError, match=r"conversation 'a' has \d+ tokens.*would cut an image"):
        run(pictured(context=limit - 1, store=str(tmp_path / "no")))


def test_long_conversations_are_left_out_or_refused(pictured, vision, tmp_path):
    lengths = [len(by_hand(vision, m, p)[0]) for m, p in zip(SHOWN, PICTURES, strict=True)]
    limit = sorted(lengths)[1]
    said = []
    result = run(pictured(context=limit, pack=PackSettings(long_chat="drop")), said.append)
    assert result.tokens == sum(n for n in lengths if n <= limit)
    assert f"1 conversations left out: longer than context={limit}" in said
    with pytest.raises(DataError, match=r"raise context, or cut or leave it out"):
        run(
            pictured(context=limit, pack=PackSettings(long_chat="error"), store=str(tmp_path / "e"))
        )


# -- what needs pixels again -----------------------------------------------------------------------


def test_add_hooks_says_that_pixels_are_missing(pictured, vision):
    store = run(pictured()).store
    settings = AddHooksSettings(
        host=HostSettings(model=str(vision)), store=str(store.path), hooks="attn", progress=False
    )
    with pytest.raises(DataError, match=r"made from images.*no pixels.*actcache run"):
        add_hooks(settings)


def test_canary_uses_conversations_without_images(pictured, vision, shown, tmp_path):
    store = run(pictured(layout=dataclasses.replace(SMALL, unit_bytes=1 << 20))).store
    results = check(store.path, HostSettings(model=str(vision)))
    assert {r.hook for r in results} == set(HOOKS)
    assert all(r.ok and r.contexts == 1 for r in results)
    only = write_chats(tmp_path / "only", SHOWN[2:], PICTURES[2:], id=["c"])
    shows = run(pictured(data_files=str(only), store=str(tmp_path / "pictured"))).store
    with pytest.raises(StoreMissingError, match="has images, whose pixels a store does not keep"):
        check(shows.path, HostSettings(model=str(vision)))


def test_contexts_with_images_are_never_run_without_pixels():
    context = Context(
        *(np.zeros(2, t) for t in (np.uint32, np.uint64)), np.array([0, FLAG_IMAGE], np.uint8)
    )
    with pytest.raises(DataError, match="no pixels"):
        joined([context], torch.nn.Linear(1, 1), torch.device("cpu"), 2)


def test_contexts_share_a_pass_only_if_their_tensors_can_be_joined():
    def context(*shape):
        inputs = {"pixel_values": torch.zeros(shape), "mm_token_type_ids": torch.zeros(3)}
        return Context(
            *(np.zeros(3, t) for t in (np.uint32, np.uint64, np.uint8)), inputs if shape else None
        )

    batch = [context(4, 96), context(8, 96), context(), context(), context(1, 2, 3), context(4, 96)]
    assert [len(group) for group in alike(batch)] == [2, 2, 1, 1]
    assert [c for group in alike(batch) for c in group] == batch


@pytest.mark.parametrize("hook", ["visual.blocks.0", "visual.merger", "visual.blocks.1.mlp:in"])
def test_hooks_of_the_vision_tower_are_refused_with_the_reason(pictured, hook):
    with pytest.raises(HookError, match=r"vision tower, whose rows are patches.*resid_pre\.0"):
        run(pictured(hooks=(hook,)))


def test_images_are_turned_as_their_exif_says():
    import io

    out = io.BytesIO()
    image = Image.new("RGB", (4, 2), (255, 0, 0))
    exif = image.getexif()
    exif[0x0112] = 6  # turned by a quarter
    image.save(out, "JPEG", exif=exif)
    assert decode_image(out.getvalue(), "it").size == (2, 4)
    palette = io.BytesIO()
    Image.new("P", (3, 3)).save(palette, "PNG")
    assert decode_image(palette.getvalue(), "it").mode == "RGB"


def test_pixels_are_kept_in_the_type_of_the_host(vision, shown):
    assert isinstance(packing_of(vision, shown), ChatPacking)
    packing = dataclasses.replace(packing_of(vision, shown), dtype=torch.bfloat16)
    source = open_source(
        DataSettings(files=str(shown), messages_column="messages", images_column="images")
    )
    documents = [d for unit in source.units(1) for d in source.read(unit)]
    (context,) = packing.contexts(documents[:1], Host(HostSettings(model=str(vision))).tokenizer)
    assert context.inputs["pixel_values"].dtype == torch.bfloat16
    assert context.inputs["image_grid_thw"].dtype == torch.int64
    assert context.inputs["mm_token_type_ids"].shape == (len(context),)
