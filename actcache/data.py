"""Documents to contexts: tokenize and pack, so that every fed token becomes a row that knows where
it came from.

Documents are tokenized without special tokens, each is closed by a separator (EOS), and the stream
of one input unit is cut into contexts. The last context of a unit may be short; padding is never a
row. A document's border is kept (flag on its first token, key on every token). Whether attention
crosses borders is a setting and part of the identity.

Cost: tokenizing with a fast tokenizer, about a million tokens a second.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from actcache.errors import DataError, HostError
from actcache.sources import Document
from actcache.store import FLAG_BOS, FLAG_DOC_START, FLAG_SPECIAL
from actcache.store.split import doc_key

PROCESSOR_JSON = "processor_config.json"
_DOCUMENTS_AT_ONCE = 256
LongChat = Literal["cut", "drop", "error"]


@dataclass(frozen=True, kw_only=True)
class PackSettings:
    """How documents become contexts. Part of the token stream's identity."""

    separator: Literal["eos", "none"] = "eos"  # closes every document
    bos: Literal["auto", "context", "none"] = "auto"  # auto: as the tokenizer itself would
    attend_across_documents: bool = True  # False: block-diagonal attention, positions restart
    drop_tail: bool = False  # drop the short last context of each unit
    long_chat: LongChat = "cut"  # a conversation beyond `context` tokens: cut, left out, refused


@dataclass(frozen=True)
class Packing:
    """Resolved packing for one tokenizer. `actcache.chat` has the one for conversations."""

    context: int
    eos: int | None
    bos: int | None
    attend_across_documents: bool
    drop_tail: bool
    special: frozenset[int]

    def identity(self) -> dict[str, Any]:
        return {
            "context": self.context,
            "separator": self.eos,
            "bos": self.bos,
            "attend_across_documents": self.attend_across_documents,
            "drop_tail": self.drop_tail,
        }

    def contexts(self, documents: Iterable[Document], tokenizer: Any) -> Iterator[Context]:
        """The contexts of one unit's documents, in order."""
        return contexts(documents, tokenizer, self)

    def segments(self, stream: Iterator[Context], rows: int) -> Iterator[list[Context]]:
        """The contexts of each segment of at most `rows` rows."""
        while chunk := list(islice(stream, rows // self.context)):
            yield chunk

    def spare(self, tokenizer: Any) -> Context | None:
        """A short context with an image, if contexts may have some."""
        return None

    def report(self) -> list[str]:
        """What was done with documents that did not fit, in sentences."""
        return []


@dataclass(frozen=True)
class Context:
    """Tokens the host sees at once, each with its document and flags. Arrays of shape (t,)."""

    token_id: NDArray[np.uint32]
    doc: NDArray[np.uint64]
    flags: NDArray[np.uint8]
    # What else the host is given, as tensors by the names of its forward pass: pixels and the like,
    # of any shape that can be joined along the first axis, and …token_type_ids of shape (t,).
    inputs: Mapping[str, Any] | None = None

    def __len__(self) -> int:
        return len(self.token_id)


def resolve_packing(settings: PackSettings, tokenizer: Any, context: int) -> Packing:
    """Fit the settings to a tokenizer. Raises HostError if it lacks a token that is asked for."""
    if context < 2:
        raise DataError(f"context: expected at least 2 tokens, got {context}")
    end = _either(tokenizer.eos_token_id, tokenizer.sep_token_id)  # BERT closes with [SEP]
    begin = _either(tokenizer.bos_token_id, tokenizer.cls_token_id)
    if settings.separator == "eos" and end is None:
        raise HostError("pack.separator=eos: the tokenizer has no EOS token; use separator=none")
    own = tokenizer("").input_ids[:1]
    adds_bos = begin is not None and own == [begin]
    wants_bos = settings.bos == "context" or (settings.bos == "auto" and adds_bos)
    if wants_bos and begin is None:
        raise HostError("pack.bos=context: the tokenizer has no BOS token; use bos=none")
    return Packing(
        context=context,
        eos=end if settings.separator == "eos" else None,
        bos=begin if wants_bos else None,
        attend_across_documents=settings.attend_across_documents,
        drop_tail=settings.drop_tail,
        special=frozenset(tokenizer.all_special_ids),
    )


def _either(*ids: int | None) -> int | None:
    return next((i for i in ids if i is not None), None)


def contexts(documents: Iterable[Document], tokenizer: Any, packing: Packing) -> Iterator[Context]:
    """Pack the documents of one unit, in order."""
    room = packing.context - (packing.bos is not None)
    waiting: list[Context] = []
    size = 0
    for piece in _pieces(documents, tokenizer, packing):
        waiting.append(piece)
        size += len(piece)
        if size < room:
            continue
        stream = _join(waiting)
        full = len(stream) // room * room
        for start in range(0, full, room):
            yield _with_bos(_cut(stream, start, start + room), packing)
        waiting, size = [_cut(stream, full, len(stream))], len(stream) - full
    if size and not packing.drop_tail:
        yield _with_bos(_join(waiting), packing)


def chunk_and_tokenize(texts: Iterable[str], tokenizer: Any, max_seq_len: int) -> NDArray[np.int64]:
    """Token ids (n, max_seq_len): texts joined by EOS, cut to equal length, the tail dropped.

    The recipe of EleutherAI's sparsify (`chunk_and_tokenize`), for use outside a store.
    """
    packing = resolve_packing(PackSettings(bos="none", drop_tail=True), tokenizer, max_seq_len)
    chunks = contexts((Document(t, t) for t in texts), tokenizer, packing)
    rows = [c.token_id.astype(np.int64) for c in chunks]
    return np.stack(rows) if rows else np.empty((0, max_seq_len), dtype=np.int64)


def _pieces(documents: Iterable[Document], tokenizer: Any, packing: Packing) -> Iterator[Context]:
    """Each document as tokens with its separator."""
    end = [] if packing.eos is None else [packing.eos]
    special = np.array(sorted(packing.special), dtype=np.uint32)
    iterator = iter(documents)
    while batch := list(islice(iterator, _DOCUMENTS_AT_ONCE)):
        encoded = tokenizer([d.text for d in batch], add_special_tokens=False, verbose=False)
        for document, ids in zip(batch, encoded.input_ids, strict=True):
            tokens = np.array([*ids, *end], dtype=np.uint32)
            if not len(tokens):
                continue
            flags = np.where(np.isin(tokens, special), FLAG_SPECIAL, 0).astype(np.uint8)
            flags[0] |= FLAG_DOC_START
            yield Context(tokens, np.full(len(tokens), doc_key(document.id), np.uint64), flags)


def _with_bos(context: Context, packing: Packing) -> Context:
    if packing.bos is None:
        return context
    bos = Context(
        np.array([packing.bos], np.uint32),
        context.doc[:1],
        np.array([FLAG_SPECIAL | FLAG_BOS], np.uint8),
    )
    return _join([bos, context])


def _join(parts: list[Context]) -> Context:
    if len(parts) == 1:
        return parts[0]
    return Context(
        np.concatenate([p.token_id for p in parts]),
        np.concatenate([p.doc for p in parts]),
        np.concatenate([p.flags for p in parts]),
    )


def _cut(c: Context, start: int, stop: int) -> Context:
    return Context(c.token_id[start:stop], c.doc[start:stop], c.flags[start:stop])


# -- processors ------------------------------------------------------------------------------------


def load_processor(folder: Path, config: Any, tokenizer: Any, trust_remote_code: bool) -> Any:
    """The host's own processor of text and images; None if its folder has no image processor.

    Images go through Pillow wherever the model has code for that, so that the pixels do not depend
    on what else is installed. HostError if Pillow is missing or the processor cannot be made.
    """
    from transformers import AutoImageProcessor

    if not any((folder / f).is_file() for f in ("preprocessor_config.json", PROCESSOR_JSON)):
        return None
    try:
        images = AutoImageProcessor.from_pretrained(  # type: ignore[no-untyped-call]
            folder, backend="pil", trust_remote_code=trust_remote_code
        )
        processor = _processor(folder, config, tokenizer, images, trust_remote_code)
    except ImportError as e:
        raise HostError(
            f"{folder}: images need Pillow: pip install 'actcache-saetrain[images]'. {_first(e)}"
        ) from e
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise HostError(f"{folder}: its image processor cannot be loaded: {_first(e)}") from e
    if not getattr(processor, "chat_template", None):
        processor.chat_template = getattr(tokenizer, "chat_template", None)
    return processor


def _processor(folder: Path, config: Any, tokenizer: Any, images: Any, trust: bool) -> Any:
    """As AutoProcessor makes it, or without its video half, which needs torchvision."""
    from transformers import AutoProcessor
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

    try:
        load: Any = AutoProcessor.from_pretrained
        processor = load(folder, trust_remote_code=trust)
        processor.image_processor = images
        return processor
    except ImportError:
        if type(config) not in PROCESSOR_MAPPING:
            raise
    made: Any = PROCESSOR_MAPPING[type(config)]

    def check(self: Any, name: str, part: Any) -> Any:
        return None if part is None else made.check_argument_for_proper_class(self, name, part)

    members = {"check_argument_for_proper_class": check, "__module__": made.__module__}
    without_video: Any = type(made.__name__, (made,), members)
    settings, rest = made.get_processor_dict(folder)
    parts = {"tokenizer": tokenizer, "image_processor": images}
    return without_video.from_args_and_dict(
        [parts.get(name) for name in made.get_attributes()], settings, **rest
    )


def _first(e: Exception) -> str:
    return str(e).strip().split("\n")[0]
