"""Which columns of the data hold text, messages and images, and what a row of them is.

Parquet gives all members of a struct the keys of all of them, null where a row has none: a part
{"type": "image"} comes back as {"type": "image", "text": None}, which chat templates read as
something else. So keys that are null are removed before anything looks at a message.

A conversation is checked here, once, before it costs anything: roles, parts, as many images as
parts that show one. Images are bytes in the data itself; what only names a file or an address is
refused, because the identity of a store covers the data's bytes and nothing else.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from actcache.errors import DataError
from actcache.store.ids import canonical_json
from actcache.store.records import did_you_mean

_MESSAGE_NAMES = ("messages", "conversation", "text")  # columns that may hold messages, if they fit
_INLINE = ("image", "url", "path", "base64", "image_url")  # a part that brings its own image
Message = Mapping[str, Any]


@dataclass(frozen=True)
class Document:
    """One text or conversation, and the id that its held-out side and its key follow from."""

    id: str
    text: str
    messages: tuple[Message, ...] = ()  # of a chat, without keys that are null
    images: tuple[bytes, ...] = ()  # encoded, in the order in which the messages show them


@dataclass(frozen=True, kw_only=True)
class Columns:
    """The columns that make up a document."""

    text: tuple[str, ...] = ()
    messages: str | None = None
    images: str | None = None
    id: str | None = None
    note: str = ""  # which they are and why, said aloud

    @property
    def names(self) -> list[str]:
        """What has to be read."""
        chosen = (self.messages, self.images, self.id)
        return [*self.text, *(c for c in chosen if c is not None)]

    @property
    def identity(self) -> dict[str, Any]:
        """Part of the data's identity."""
        found: dict[str, Any] = {"text_columns": list(self.text), "id_column": self.id}
        if self.messages is not None:
            found |= {"messages_column": self.messages, "images_column": self.images}
        return found

    def document(self, row: Mapping[str, Any]) -> Document | None:
        """The document of a row; None if it is empty. DataError for a broken conversation."""
        if self.messages is not None:
            return self._conversation(row, row[self.messages])
        if not any(row[c] for c in self.text):
            return None
        text = "\n".join(str(row[c]) for c in self.text if row[c])
        return Document(text if self.id is None else str(row[self.id]), text)

    def _conversation(self, row: Mapping[str, Any], messages: Any) -> Document | None:
        if not messages:
            return None
        clean = tuple(without_nulls(m) for m in messages)
        where = named(None if self.id is None else str(row[self.id]), clean)
        shown = sum(_images_shown(m, where, self.messages) for m in clean)
        images = () if self.images is None else image_bytes(row[self.images], where, self.images)
        if shown != len(images):
            raise DataError(
                f"{where} shows {shown} images in data.messages_column={self.messages} and brings "
                f"{len(images)} in data.images_column={self.images}: each image needs one part "
                '{"type": "image"}, in order'
            )
        key = str(row[self.id]) if self.id else _key(clean, images, where)
        return Document(key, "", clean, images)


def find_columns(
    schema: pa.Schema,
    *,
    text: str | None,
    messages: str | None,
    images: str | None,
    id: str | None,
) -> Columns:
    """Settle which columns make up a document; arguments are those asked for.

    Without any: a column of text that is called so, then one of messages, then any text. Raises
    DataError, listing the columns, if nothing fits.
    """
    _check_id_column(schema, id)
    if messages is not None and text is not None:
        raise DataError(
            f"data.text_column={text} and data.messages_column={messages}: choose one of them"
        )
    if messages is None and text is None and images is None:
        messages = _guess_messages(schema)
        if messages is not None:
            note = f"messages column: {messages} (found by its form; or choose data.text_column)"
            return Columns(messages=messages, id=id, note=note)
    if messages is None:
        if images is not None:
            raise DataError(
                f"data.images_column={images} needs data.messages_column too: the messages say "
                'where each image is shown, by a part {"type": "image"}'
            )
        columns, note = find_text_columns(schema, text)
        return Columns(text=columns, id=id, note=note)
    _check(schema, "messages_column", messages, is_messages, "a list of {role, content}")
    if images is not None:
        _check(schema, "images_column", images, is_images, "images as bytes, or a list of them")
    note = f"messages column: {messages}; images: {images or 'none'}"
    return Columns(messages=messages, images=images, id=id, note=note)


# -- types of columns ------------------------------------------------------------------------------


def find_text_columns(schema: pa.Schema, asked: str | None) -> tuple[tuple[str, ...], str]:
    """Columns that make up the text, and a sentence saying why these.

    Order: the one asked for; text; content; instruction + output; the first string column.
    Raises DataError listing the columns if none fits.
    """
    strings = [f.name for f in schema if _is_string(f.type)]
    if asked is not None:
        columns = tuple(asked.split("+"))
        for column in columns:
            if column not in strings:
                raise DataError(
                    f"data.text_column={asked}: no text column {column!r}."
                    f"{did_you_mean(column, strings)} The file has: {_listing(schema)}"
                )
        return columns, f"text column: {asked}"
    if columns := _text_by_name(strings):
        return columns, f"text column: {'+'.join(columns)} (found by name)"
    if strings:
        return (strings[0],), (
            f"text column: {strings[0]} (the first column of strings; choose with data.text_column)"
        )
    raise DataError(f"the data has no column of text; it has: {_listing(schema)}")


def _text_by_name(strings: Sequence[str]) -> tuple[str, ...]:
    known = (("text",), ("content",), ("instruction", "output"))
    return next((c for c in known if set(c) <= set(strings)), ())


def _guess_messages(schema: pa.Schema) -> str | None:
    """A column of messages, unless one of text goes by its name."""
    if _text_by_name([f.name for f in schema if _is_string(f.type)]):
        return None
    fits = [f.name for f in schema if is_messages(f.type)]
    return next((name for name in _MESSAGE_NAMES if name in fits), None)


def is_messages(t: pa.DataType) -> bool:
    """Whether a column of type `t` is a list of {role, content}."""
    return _is_list(t) and _has(t.value_type, "role", "content")


def is_images(t: pa.DataType) -> bool:
    """Whether a column of type `t` is binary or {bytes, path}, or a list of either."""
    one = t.value_type if _is_list(t) else t
    return bool(pa.types.is_binary(one) or pa.types.is_large_binary(one) or _has(one, "bytes"))


def _is_list(t: pa.DataType) -> bool:
    return bool(pa.types.is_list(t) or pa.types.is_large_list(t) or pa.types.is_fixed_size_list(t))


def _has(t: pa.DataType, *names: str) -> bool:
    return bool(pa.types.is_struct(t)) and set(names) <= {field.name for field in t}


def _is_string(t: pa.DataType) -> bool:
    return bool(pa.types.is_string(t) or pa.types.is_large_string(t))


def _check(schema: pa.Schema, key: str, name: str, fits: Any, wanted: str) -> None:
    if name not in schema.names:
        raise DataError(
            f"data.{key}={name}: no such column.{did_you_mean(name, schema.names)} "
            f"The file has: {_listing(schema)}"
        )
    found = schema.field(name).type
    if not fits(found):
        hint = ""
        if _is_list(found) and _has(found.value_type, "from", "value"):
            hint = ". {from, value} are not messages yet: see pipelines/prepare_llava_clevr.py"
        raise DataError(f"data.{key}={name}: expected {wanted}, the column is {found}{hint}")


def _check_id_column(schema: pa.Schema, name: str | None) -> None:
    if name is not None and name not in schema.names:
        raise DataError(
            f"data.id_column={name}: no such column.{did_you_mean(name, schema.names)} "
            f"The file has: {', '.join(schema.names)}"
        )


def _listing(schema: pa.Schema) -> str:
    return ", ".join(f"{f.name} ({f.type})" for f in schema) or "no columns"


# -- rows ------------------------------------------------------------------------------------------


def without_nulls(value: Any) -> Any:
    """The same without keys whose value is None, at any depth."""
    if isinstance(value, Mapping):
        return {k: without_nulls(v) for k, v in value.items() if v is not None}
    if isinstance(value, list | tuple):
        return [without_nulls(v) for v in value]
    return value


def named(id: str | None, messages: Sequence[Any]) -> str:
    """How error messages call a conversation: by its id, or how it begins."""
    if id is not None and len(id) <= 80:
        return f"conversation {id!r}"
    for message in messages:
        content = message.get("content") if isinstance(message, Mapping) else None
        parts = content if isinstance(content, list) else [{"text": content}]
        texts = [p.get("text") for p in parts if isinstance(p, Mapping)]
        if text := next((t for t in texts if isinstance(t, str) and t.strip()), None):
            return f"the conversation that begins {text.strip()[:60]!r}"
    return "a conversation without text"


def _images_shown(message: Any, where: str, column: str | None) -> int:
    """Parts of a message that show an image. DataError if it is not a message."""
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise DataError(
            f"{where}: data.messages_column={column} holds {message!r:.80}, which is no message: "
            "expected a role (system, user, assistant, tool) and a content"
        )
    content = message.get("content", "")
    if isinstance(content, str):
        return 0
    if not isinstance(content, list):
        raise DataError(
            f"{where}: expected text or a list of parts as content, got {content!r:.80}"
        )
    return sum(_shows_image(part, where) for part in content)


def _shows_image(part: Any, where: str) -> bool:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "text" and isinstance(part.get("text", ""), str):
        return False
    if kind in ("image", "image_url"):
        if own := [k for k in _INLINE if k in part]:
            raise DataError(
                f"{where}: a part of type image brings {own[0]!r} itself. Put the images' bytes "
                'into a column, name it with data.images_column, and leave {"type": "image"} here'
            )
        return True
    raise DataError(
        f"{where}: expected parts of type text or image, got {part!r:.80}"
        + ("; video and audio are not supported" if kind in ("video", "audio") else "")
    )


def image_bytes(value: Any, where: str, column: str) -> tuple[bytes, ...]:
    """The encoded images of a cell: one or a list, bytes or {bytes, path}; None is no image."""
    found = []
    for item in value if isinstance(value, list) else [value]:
        data = item.get("bytes") if isinstance(item, Mapping) else item
        if isinstance(item, Mapping) and data is None and item.get("path") is not None:
            raise DataError(
                f"{where}: data.images_column={column} holds a path and no bytes "
                f"({item['path']!r:.80}): the data must contain its images"
            )
        if data is not None:
            found.append(bytes(data))
    return tuple(found)


def _key(messages: Sequence[Message], images: Sequence[bytes], where: str) -> str:
    """What names a conversation without an id column: its content."""
    digests = [hashlib.sha256(i).hexdigest() for i in images]
    try:
        return canonical_json({"messages": messages, "images": digests}).decode()
    except (TypeError, ValueError) as e:
        raise DataError(f"{where} holds what is neither text nor number: {e}") from e
