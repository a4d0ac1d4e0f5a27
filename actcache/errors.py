"""Errors a user of actcache can act on: what was expected, what came, what to do."""

from actcache.store.errors import ActcacheError


class HostError(ActcacheError):
    """The host model or its tokenizer cannot be used as asked."""


class HookError(ActcacheError):
    """A hook point does not exist, or exists and never fired."""


class DataError(ActcacheError):
    """The input text is missing, empty or of the wrong form."""


class NonFiniteError(ActcacheError):
    """The host produced NaN or infinity; the message names the context that caused it."""


class RankError(ActcacheError):
    """A rank did not come, went away, or does something else than the others."""


class OtherRankFailedError(RankError):
    """Another rank failed and has said why; this one ends without a word."""


__all__ = [
    "ActcacheError",
    "DataError",
    "HookError",
    "HostError",
    "NonFiniteError",
    "OtherRankFailedError",
    "RankError",
]
