"""Hook points: from a name to a module of the host, and from a forward pass to its tensors.

Activations come from plain forward hooks on named modules, never from `output_hidden_states`
(whose last entry is taken after the final norm). A hook that does not fire, or fires more than
once in a pass, is an error; there is no fallback to something similar.

Shapes: B contexts, T tokens, d width of the hooked tensor.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, Self

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from actcache.errors import HookError
from actcache.families import block_list, embedding_path, part_of, runner_path
from actcache.store.hooknames import KINDS, canonical, parse_alias
from actcache.store.records import did_you_mean

_VISION = re.compile(
    r"(^|\.)(visual|vision\w*|image_\w+|multi_modal_projector|mm_projector|connector|audio\w*)(\.|$)"
)
_SPEC = re.compile(r"(?P<path>[^:]+)(:(?P<io>in|out)(\.(?P<item>\w+))?)?")


@dataclass(frozen=True, kw_only=True)
class HookPoint:
    """One tensor of the host: the input or output of a module, or an item of either."""

    name: str  # canonical, see actcache.store.hooknames
    module: str  # path in the base model
    io: Literal["in", "out"]
    index: int | str | None = None  # tuple item, or keyword of an input


def resolve(
    names: Sequence[str] | str, layers: Sequence[int] | None, model: nn.Module
) -> list[HookPoint]:
    """Hook points for `names`; an alias without a layer ("resid") stands for all of `layers`.

    Without `layers` it stands for every block that has such a part: in a hybrid, some have
    attention. Raises HookError for a name that matches nothing, with the nearest names, and for
    a module that cannot give one vector per token of the text.
    """
    asked = [names] if isinstance(names, str) else list(names)
    if not asked:
        raise HookError("hooks is empty: name at least one, such as hooks=resid")
    expanded = [full for name in asked for full in _expand(name, layers, model)]
    if layers is not None and not any(name in KINDS for name in asked):
        raise HookError(
            f"layers={list(layers)} has no effect with hooks={asked}: give hooks without a layer, "
            f"such as hooks=resid, or leave layers out. Kinds: {', '.join(KINDS)}"
        )
    points = {point.name: point for point in (_point(n, model) for n in expanded)}
    return list(points.values())


def _expand(name: str, layers: Sequence[int] | None, model: nn.Module) -> list[str]:
    if name not in KINDS:
        return [name]
    if layers is not None:
        return [f"{name}.{layer}" for layer in layers]
    _, blocks = block_list(model)
    every = range(len(blocks))
    having = [n for n in every if name not in ("attn", "mlp") or part_of(blocks[n], name)]
    return [f"{name}.{layer}" for layer in having or every]


def _point(name: str, model: nn.Module) -> HookPoint:
    short = canonical(name)
    if short == "embed":
        return HookPoint(name=short, module=embedding_path(model), io="out")
    alias = parse_alias(short)
    if alias is not None:
        return _block_point(short, *alias, model)
    return _module_point(name, short, model)


def _block_point(name: str, kind: str, layer: int, model: nn.Module) -> HookPoint:
    path, blocks = block_list(model)
    if layer >= len(blocks):
        raise HookError(f"hook {name!r}: the host has {len(blocks)} blocks, 0 to {len(blocks) - 1}")
    if kind in ("resid", "resid_pre"):
        io: Literal["in", "out"] = "out" if kind == "resid" else "in"
        return HookPoint(name=name, module=f"{path}.{layer}", io=io)
    part = part_of(blocks[layer], kind)
    if part is None:
        words = {"attn": "attention", "mlp": "MLP"}[kind]
        children = list(dict(blocks[layer].named_children()))
        raise HookError(
            f"hook {name!r}: {path}.{layer} has no {words} that an alias could name; it has "
            f"{', '.join(children)}. Name the module itself, such as "
            f"hooks=[{path}.{layer}.{children[-1]}]"
        )
    return HookPoint(name=name, module=f"{path}.{layer}.{part}", io="out")


def _module_point(name: str, short: str, model: nn.Module) -> HookPoint:
    match = _SPEC.fullmatch(short)
    if match is None:
        raise HookError(f"hook {name!r}: expected PATH, PATH:in, PATH:out or PATH:out.1")
    modules = dict(model.named_modules())
    prefix = str(getattr(model, "base_model_prefix", ""))
    path = match["path"]
    if path not in modules:
        path = path.removeprefix(f"{prefix}.")  # paths of the model with its head work too
    if path not in modules or path == "":
        raise HookError(f"hook {name!r} matches nothing in the host.{_nearest(name, modules)}")
    _refuse_partial(name, path, model)
    item: int | str | None = match["item"]
    if item is not None and str(item).isdigit():
        item = int(item)
    io: Literal["in", "out"] = "in" if match["io"] == "in" else "out"
    if item is None:
        known = {(p.module, p.io): p for p in _aliases(model)}
        if (path, io) in known:
            return known[path, io]  # one tensor, one name
    side = "" if io == "out" and item is None else f":{io}" + ("" if item is None else f".{item}")
    return HookPoint(name=f"{path}{side}", module=path, io=io, index=item)


def _refuse_partial(name: str, path: str, model: nn.Module) -> None:
    """HookError for a module that the text does not reach, or not all of it."""
    if not f"{path}.".startswith(inside := runner_path(model)):
        raise HookError(
            f"hook {name!r}: of an encoder-decoder the encoder runs alone ({inside[:-1]}), "
            f"and {path!r} lies outside of it: what a decoder computes needs a target text, "
            "which the data does not have"
        )
    if _VISION.search(path):
        raise HookError(
            f"hook {name!r}: {path!r} belongs to the vision tower, whose rows are patches of "
            "images, several for each token and none for text: they have no place in a table of "
            "tokens. What the language model gets to see of an image is resid_pre.0, and every "
            "later hook of it, at the image's tokens"
        )
    if re.search(r"(^|\.)experts\.", path):
        raise HookError(
            f"hook {name!r}: an expert sees only the tokens that are routed to it, and has no "
            "vector for the others. Use the MLP as a whole (mlp.L), or the router"
        )


def _aliases(model: nn.Module) -> Iterator[HookPoint]:
    """Every point of the host that has a short name."""
    try:
        path, blocks = block_list(model)
    except HookError:
        return
    yield HookPoint(name="embed", module=embedding_path(model), io="out")
    for layer, block in enumerate(blocks):
        yield HookPoint(name=f"resid.{layer}", module=f"{path}.{layer}", io="out")
        yield HookPoint(name=f"resid_pre.{layer}", module=f"{path}.{layer}", io="in")
        for kind in ("attn", "mlp"):
            part = part_of(block, kind)
            if part is not None:
                yield HookPoint(name=f"{kind}.{layer}", module=f"{path}.{layer}.{part}", io="out")


def _nearest(name: str, modules: Iterable[str]) -> str:
    aliases = [f"{kind}.{n}" for kind in KINDS for n in range(4)]
    return did_you_mean(name, [*(m for m in modules if m), *aliases, "embed"], n=5)


class Capture:
    """Collects the hooked tensors of each forward pass. Use as a context manager."""

    def __init__(self, model: nn.Module, points: Sequence[HookPoint]) -> None:
        self._points = {p.name: p for p in points}
        self._found: dict[str, Tensor] = {}
        self._again: set[str] = set()  # fired more than once
        modules = dict(model.named_modules())
        self._handles = [h for p in points for h in self._attach(modules[p.module], p)]

    def _attach(self, module: nn.Module, point: HookPoint) -> Iterator[RemovableHandle]:
        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._keep(point, _from_input(point, args, kwargs))

        def after(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            self._keep(point, _from_output(point, output))

        if point.io == "in":
            yield module.register_forward_pre_hook(before, with_kwargs=True)
        else:
            yield module.register_forward_hook(after)

    def _keep(self, point: HookPoint, x: Tensor) -> None:
        if point.name in self._found:
            self._again.add(point.name)
        self._found[point.name] = x

    def take(self, tokens: Sequence[int] | None = None) -> dict[str, Tensor]:
        """Tensors (B, T, d) of the last forward pass by hook name, and forget them.

        With `tokens` = (B, T), a module that works on rows (B·T, d), as routers do, is unfolded.
        Raises HookError for a hook that did not fire, fired twice, or is not (B, T, d).
        """
        found, self._found = self._found, {}
        again, self._again = self._again, set()
        silent = [name for name in self._points if name not in found]
        if silent:
            raise HookError(
                f"hook {silent[0]!r} did not fire: the forward pass never ran "
                f"{self._points[silent[0]].module!r}"
            )
        if again:
            raise HookError(
                f"hook {min(again)!r} fired more than once in a forward pass: "
                f"{self._points[min(again)].module!r} is used at several depths, so that one "
                "name would stand for several activations"
            )
        return {name: _unfolded(name, x, tokens) for name, x in found.items()}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()


def _unfolded(name: str, x: Tensor, tokens: Sequence[int] | None) -> Tensor:
    """x as (B, T, d), or HookError."""
    if x.ndim == 2 and tokens is not None and len(x) == tokens[0] * tokens[1]:
        return x.reshape(tokens[0], tokens[1], -1)
    if x.ndim != 3:
        raise HookError(
            f"hook {name!r} has shape {tuple(x.shape)}; expected (contexts, tokens, width)"
        )
    return x


def _from_output(point: HookPoint, output: Any) -> Tensor:
    """A tensor, the chosen item of a tuple, or the first item."""
    if isinstance(output, Tensor) and point.index is None:
        return output
    try:
        item = output[point.index if point.index is not None else 0]
    except (IndexError, KeyError, TypeError):
        item = None
    return _tensor(point, item, output)


def _from_input(point: HookPoint, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The chosen argument; else the first positional tensor, `hidden_states`, or first keyword."""
    values: list[Any]
    if isinstance(point.index, str):
        values = [kwargs.get(point.index)]
    elif isinstance(point.index, int):
        values = [args[point.index]] if point.index < len(args) else []
    else:
        values = [*args, kwargs.get("hidden_states"), *kwargs.values()]
    item = next((v for v in values if isinstance(v, Tensor)), None)
    return _tensor(point, item, (args, tuple(kwargs)))


def _tensor(point: HookPoint, item: Any, source: Any) -> Tensor:
    if isinstance(item, Tensor):
        return item
    raise HookError(
        f"hook {point.name!r}: the {point.io}put of {point.module} holds no such tensor "
        f"(it is {type(source).__name__})"
    )
