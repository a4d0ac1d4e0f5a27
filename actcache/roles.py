"""A conversation as text, and who wrote which token of it.

The conversation is rendered twice, the second time with marks around each message's text, inside of
the white space that templates strip. If the two differ in the marks alone, every character is known
to be a message's or the template's. Otherwise the template does more to a text than to place it,
and nobody wrote anything: the role of all its tokens is 0, which the caller counts.

Cost: one more rendering per conversation.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jinja2.exceptions import TemplateError
from numpy.typing import NDArray

from actcache.columns import Document, Message, named
from actcache.errors import DataError
from actcache.store import ROLES

_OPEN, _MIDDLE, _CLOSE = "\ue000", "\ue001", "\ue002"  # for private use, so no text has them
_MARK = re.compile(f"{_OPEN}([0-9]+){_MIDDLE}|{_CLOSE}")
_NAMES = {"developer": "system", "human": "user", "model": "assistant", "gpt": "assistant"}


def render(
    renderer: Any, template: str, document: Document
) -> tuple[str, NDArray[np.uint8] | None]:
    """The text of a conversation and the role code of each of its characters.

    Roles are None if the template does something to the texts. DataError if it cannot render.
    """
    prompt = _apply(renderer, template, document.messages, document)
    if re.search(r"\{'type': '(text|image)'", prompt):
        raise DataError(
            f"{where(document)}: the chat template prints the parts of a content instead of their "
            "text: it takes plain text only. Use another with data.chat_template=FILE"
        )
    if any(mark in prompt for mark in (_OPEN, _MIDDLE, _CLOSE)):
        return prompt, None
    marked = [_marked(i, m) for i, m in enumerate(document.messages)]
    try:
        found = _apply(renderer, template, marked, document)
    except DataError:  # it rendered without the marks
        return prompt, None
    opens = [mark[1] is not None for mark in _MARK.finditer(found)]
    in_pairs = opens == [True, False] * (len(opens) // 2)
    if not in_pairs or _MARK.sub("", found) != prompt:
        return prompt, None
    return prompt, _roles(found, [role_code(m["role"]) for m in document.messages], len(prompt))


def _apply(renderer: Any, template: str, messages: Sequence[Message], document: Document) -> str:
    try:
        text = renderer.apply_chat_template(
            [dict(m) for m in messages], chat_template=template, tokenize=False
        )
    except (TemplateError, ValueError, TypeError, KeyError) as e:
        raise DataError(f"{where(document)}: the chat template refuses it: {e}") from e
    return str(text)


def role_code(role: str) -> int:
    """Index into ROLES."""
    name = _NAMES.get(role, role)
    return ROLES.index(name) if name in ROLES[1:] else ROLES.index("other")


def _marked(number: int, message: Message) -> dict[str, Any]:
    """The message with marks around its text, inside of white space that a template may strip."""

    def mark(text: str) -> str:
        core = text.strip()
        start = text.index(core)
        end = start + len(core)
        around = f"{_OPEN}{number}{_MIDDLE}{core}{_CLOSE}" if core else ""
        return text[:start] + around + text[end:]

    content = message.get("content")
    if isinstance(content, str):
        return {**message, "content": mark(content)}
    if isinstance(content, list):
        parts = [{**p, "text": mark(p["text"])} if "text" in p else p for p in content]
        return {**message, "content": parts}
    return dict(message)


def _roles(marked: str, codes: Sequence[int], length: int) -> NDArray[np.uint8]:
    """Role of each character of the text without marks."""
    roles = np.zeros(length, np.uint8)
    at = last = code = 0
    for mark in _MARK.finditer(marked):
        stop = at + mark.start() - last
        roles[at:stop] = code
        code = codes[int(mark[1])] if mark[1] is not None else 0
        at, last = stop, mark.end()
    return roles


def expanded(
    roles: NDArray[np.uint8], replaced: Sequence[Mapping[str, Any]], codes: Sequence[int]
) -> NDArray[np.uint8]:
    """Roles by character after the processor put many placeholders in place of each; the k-th of
    `replaced` (spans in the old text and in the new one) has the role codes[k]."""
    parts, last = [], 0
    for item, code in zip(replaced, codes, strict=True):
        start, stop = item["span"]
        new_start, new_stop = item["new_span"]
        parts += [roles[last:start], np.full(new_stop - new_start, code, np.uint8)]
        last = stop
    return np.concatenate([*parts, roles[last:]])


def by_token(roles: NDArray[np.uint8], offsets: Sequence[Sequence[int]] | None) -> Any:
    """Role of each token: that of its first character that has one. 0 without offsets."""
    if offsets is None:
        return np.uint8(0)
    found = [roles[start:stop] for start, stop in offsets]
    return np.array([int(r[np.argmax(r != 0)]) if len(r) else 0 for r in found], np.uint8)


def images_of(message: Message) -> int:
    """Images that a message shows."""
    content = message.get("content")
    return sum(p["type"] != "text" for p in content) if isinstance(content, list) else 0


def where(document: Document) -> str:
    """How error messages call it."""
    return named(document.id if len(document.id) <= 80 else None, document.messages)
