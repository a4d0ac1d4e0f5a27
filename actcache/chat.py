"""Conversations to contexts: through the chat template and, with images, the host's processor.

One conversation is one context, as `apply_chat_template(…, tokenize=True)` would give it: the same
token ids, one BOS. Images go through the host's image processor; what it gives the model (pixels,
grids, token types) travels with the context, in the host's number type.

Cost: two renderings and one tokenization per conversation. A segment's pixels are in memory with
it, for Qwen2.5-VL about 9 KiB per image token in bfloat16.
"""

from __future__ import annotations

import io
import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from actcache.columns import Columns, Document
from actcache.data import Context, LongChat, Packing, PackSettings, load_processor
from actcache.errors import DataError, HostError
from actcache.host import DTYPES, Host
from actcache.roles import by_token, expanded, images_of, render, role_code, where
from actcache.sources import DataSettings
from actcache.store import FLAG_BOS, FLAG_DOC_START, FLAG_IMAGE, FLAG_SPECIAL
from actcache.store.ids import digest
from actcache.store.layout import ROLE_SHIFT
from actcache.store.split import doc_key

_NOT_INPUTS = {"input_ids", "attention_mask", "offset_mapping", "text_replacement_offsets"}
_NOISE = {"video_processor", "transformers_version", "_name_or_path"}


@dataclass(frozen=True)
class ChatPacking(Packing):
    """How conversations become contexts for one host."""

    long_chat: LongChat
    template: str
    processor: Any = None  # None: text only
    dtype: torch.dtype = torch.float32  # of pixels
    tally: dict[str, set[int]] = field(default_factory=lambda: defaultdict(set))  # document keys

    def identity(self) -> dict[str, Any]:
        return super().identity() | {
            "chat_template": digest(self.template),
            "long_chat": self.long_chat,
            "images": None if self.processor is None else processor_digest(self.processor),
        }

    def contexts(self, documents: Iterable[Document], tokenizer: Any) -> Iterator[Context]:
        """One context per conversation. DataError for one that cannot be given to the host."""
        for document in documents:
            context = self._context(document, tokenizer)
            if len(context) <= self.context:
                yield context
            elif (shorter := self._shortened(context, document)) is not None:
                yield shorter

    def segments(self, stream: Iterator[Context], rows: int) -> Iterator[list[Context]]:
        """As many whole conversations as fit."""
        waiting: list[Context] = []
        size = 0
        for context in stream:
            if size + len(context) > rows:
                yield waiting
                waiting, size = [], 0
            waiting.append(context)
            size += len(context)
        if waiting:
            yield waiting

    def report(self) -> list[str]:
        return [f"{len(k):,} conversations {what}" for what, k in sorted(self.tally.items())]

    def _count(self, what: str, document: Document) -> None:
        self.tally[what].add(doc_key(document.id))  # a unit may be read more than once

    def spare(self, tokenizer: Any) -> Context | None:
        """A short context with an image, if the data has images."""
        if self.processor is None:
            return None
        from PIL import Image

        out = io.BytesIO()
        Image.new("RGB", (64, 64)).save(out, "PNG")
        message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "."}]}
        return self._context(Document("spare", "", (message,), (out.getvalue(),)), tokenizer)

    # -- one conversation --------------------------------------------------------------------------

    def _context(self, document: Document, tokenizer: Any) -> Context:
        renderer = self.processor or tokenizer
        prompt, roles = render(renderer, self.template, document)
        if roles is None:
            self._count("have no roles: the chat template rewrites their text", document)
            roles = np.zeros(len(prompt), np.uint8)
        if self.processor is None:
            out = tokenizer(
                prompt,
                add_special_tokens=False,
                return_offsets_mapping=tokenizer.is_fast,
                verbose=False,
            )
            ids, types = out["input_ids"], np.zeros(len(out["input_ids"]), np.int64)
            offsets, inputs = out.get("offset_mapping"), None
        else:
            out = self._processed(prompt, document, tokenizer)
            ids, types = out["input_ids"][0], np.asarray(out["mm_token_type_ids"][0])
            offsets, inputs = out["offset_mapping"][0], self._inputs(out)
            shown = [i for i, m in enumerate(document.messages) for _ in range(images_of(m))]
            image_roles = [role_code(document.messages[i]["role"]) for i in shown]
            roles = expanded(roles, out["text_replacement_offsets"][0], image_roles)
        tokens = np.array(ids, dtype=np.uint32)
        flags = self._flags(tokens, types, tokenizer) | by_token(roles, offsets) << ROLE_SHIFT
        doc = np.full(len(tokens), doc_key(document.id), np.uint64)
        return Context(tokens, doc, flags.astype(np.uint8), inputs)

    def _flags(self, tokens: NDArray[Any], types: NDArray[Any], tokenizer: Any) -> NDArray[Any]:
        if not len(tokens):
            raise DataError("the chat template gives an empty text for a conversation")
        image = types != 0
        special = np.isin(tokens, sorted(self.special)) & ~image
        flags = np.where(special, FLAG_SPECIAL, 0) | np.where(image, FLAG_IMAGE, 0)
        flags[0] |= FLAG_DOC_START
        if int(tokens[0]) == tokenizer.bos_token_id:
            flags[0] |= FLAG_BOS
        return flags.astype(np.uint8)

    def _processed(self, prompt: str, document: Document, tokenizer: Any) -> Any:
        """The processor's output for one text and its images."""
        here = where(document)
        images = [
            decode_image(data, f"image {i} of {here}") for i, data in enumerate(document.images)
        ]
        placeholder = getattr(self.processor, "image_token", None)
        if placeholder is not None and prompt.count(placeholder) != len(images):
            raise DataError(
                f"{here}: its text has {prompt.count(placeholder)} times {placeholder}, for "
                f"{len(images)} images. Either the chat template does not show an image where a "
                "part says so, or the messages spell the placeholder themselves"
            )
        bos = tokenizer.bos_token
        try:
            return self.processor(
                text=[prompt],
                images=[images] if images else None,
                add_special_tokens=not (bos and prompt.startswith(bos)),
                return_mm_token_type_ids=True,
                return_offsets_mapping=True,
                return_text_replacement_offsets=True,
            )
        except (ValueError, TypeError, IndexError) as e:
            raise DataError(f"{here}: the processor refuses it: {e}") from e

    def _inputs(self, out: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """What the model takes beside the token ids; token types lose their axis of one text."""
        found = {}
        for name in sorted(set(out) - _NOT_INPUTS):
            value = torch.as_tensor(np.asarray(out[name]))
            value = value.to(self.dtype) if value.is_floating_point() else value
            found[name] = value[0] if name.endswith("token_type_ids") else value
        return found

    def _shortened(self, context: Context, document: Document) -> Context | None:
        """What the settings make of a conversation that is too long; None: nothing."""
        long = f"{where(document)} has {len(context)} tokens, context={self.context}"
        if self.long_chat == "drop":
            self._count(f"left out: longer than context={self.context}", document)
            return None
        if self.long_chat == "error":
            raise DataError(f"{long}; raise context, or cut or leave it out with pack.long_chat")
        n = self.context
        if (context.flags[n:] & FLAG_IMAGE).any():
            raise DataError(
                f"{long}: to cut it would cut an image. Raise context, or leave such conversations "
                "out with pack.long_chat=drop"
            )
        self._count(f"cut at context={self.context}", document)
        inputs = {
            k: v[:n] if k.endswith("token_type_ids") else v
            for k, v in (context.inputs or {}).items()
        }
        return Context(context.token_id[:n], context.doc[:n], context.flags[:n], inputs or None)


# -- settling the settings -------------------------------------------------------------------------


def resolve_chat(
    settings: PackSettings, columns: Columns, data: DataSettings, host: Host, context: int
) -> tuple[ChatPacking, list[str]]:
    """Fit conversations to a host; and what should be said aloud.

    Raises HostError if the host has no chat template, or takes no images and the data has some.
    """
    tokenizer, images = host.tokenizer, columns.images is not None
    processor = None
    if images:
        trust = host.settings.trust_remote_code
        processor = load_processor(host.folder, host.config, tokenizer, trust)
        if processor is None or getattr(processor, "image_processor", None) is None:
            raise HostError(
                f"data.images_column={columns.images}: host.model={host.settings.model} takes "
                "no images (there is no image processor in its folder)"
            )
    if context < 2:
        raise DataError(f"context: expected at least 2 tokens, got {context}")
    unused = PackSettings(long_chat=settings.long_chat)
    ignored = [k for k, v in vars(settings).items() if v != getattr(unused, k)]
    notes = [f"pack.{k} has no effect on chats: one conversation is one context" for k in ignored]
    return ChatPacking(
        context=context,
        eos=None,
        bos=None,
        attend_across_documents=True,
        drop_tail=False,
        special=frozenset(tokenizer.all_special_ids),
        long_chat=settings.long_chat,
        template=_template(data, processor or tokenizer, host),
        processor=processor,
        dtype=DTYPES[host.settings.dtype],
    ), notes


def _template(data: DataSettings, renderer: Any, host: Host) -> str:
    if data.chat_template is not None:
        try:
            return Path(data.chat_template).expanduser().read_text("utf-8")
        except (OSError, UnicodeDecodeError) as e:
            raise DataError(f"data.chat_template={data.chat_template} cannot be read: {e}") from e
    template = getattr(renderer, "chat_template", None)
    if isinstance(template, Mapping):
        template = template.get("default")
    if not template:
        raise HostError(
            f"host.model={host.settings.model}: neither its processor nor its tokenizer has a chat "
            "template, so messages cannot become text. Give one with data.chat_template=FILE "
            "(Jinja), or use the instruction-tuned model"
        )
    return str(template)


def processor_digest(processor: Any) -> str:
    """Identity of what turns images into pixels and placeholders."""
    settings = {k: v for k, v in processor.to_dict().items() if k not in _NOISE}
    settings["image_class"] = type(processor.image_processor).__name__
    return digest(json.loads(json.dumps(_plain(settings), default=str)))


def _plain(value: Any) -> Any:
    """Nested mappings without nulls and noise, which differ between versions and say nothing."""
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items() if v is not None and k not in _NOISE}
    return value


# -- images ----------------------------------------------------------------------------------------


def decode_image(data: bytes, what: str) -> Any:
    """The image in RGB, turned as its EXIF says. DataError naming `what` if it does not decode."""
    from PIL import Image, ImageOps

    try:
        with Image.open(io.BytesIO(data)) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as e:
        raise DataError(
            f"{what} does not decode ({len(data):,} bytes): {str(e).split(' <')[0]}. "
            "Repair it or leave the row out"
        ) from e
