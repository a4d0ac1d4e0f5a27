"""Errors of the store. Every message names the object, what was expected and what to do."""


class ActcacheError(Exception):
    """Base of every error that the commands print without a traceback."""


class SettingsError(ActcacheError):
    """A setting or a record has an unknown key, a missing key or a value of the wrong type."""


class StoreError(ActcacheError):
    """Base of all store errors."""


class StoreMissingError(StoreError):
    """There is no store at this path, or it has nothing committed yet."""


class StoreVersionError(StoreError):
    """The store was written in a format this version does not know."""


class IdentityError(StoreError):
    """The store holds other work than the one asked for; the message is a field-by-field diff."""


class HookMissingError(StoreError):
    """The store has no activations of this hook; the message lists those it has."""


class DamagedError(StoreError):
    """Bytes are missing or do not match their digest; the message names segment, array, chunk."""


class OutOfSpaceError(StoreError):
    """The disk is full. Everything committed before is intact."""


class ObjectMissingError(DamagedError):
    """An object that should be there is not; the message names it."""


class RemoteError(StoreError):
    """An object store or web server did not answer, or refused; the message says which and why."""
