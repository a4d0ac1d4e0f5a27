"""Stores in S3-compatible object stores. Exclusive creation is a conditional put (If-None-Match).

An object goes up in one request, which is what makes it exclusive and whole or absent; S3 takes up
to 5 GiB that way. A put whose answer was lost is tried again: if the name is taken then and holds
just our bytes, the first try had come through. Claims are taken over by If-Match on the entity tag.

Credentials come from the environment and the profile that the AWS tools use, and go nowhere else:
AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN, or the keys of AWS_PROFILE (default) in
~/.aws/credentials; else the roles that obstore finds (web identity, container, instance). Further
AWS_REGION, AWS_ENDPOINT_URL(_S3) and, for public buckets, AWS_SKIP_SIGNATURE=true.
"""

from __future__ import annotations

import configparser
import contextlib
import os
import re
import uuid
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from actcache.store.errors import ObjectMissingError, RemoteError, StoreError
from actcache.store.objects import Buffer, Objects, _obstore, _status

LARGEST = 5 << 30  # bytes of one put
SLOWEST = 1 << 20  # bytes a second that an upload may be slow
_KEYS = ("aws_access_key_id", "aws_secret_access_key", "aws_session_token")


def open_bucket(url: str) -> tuple[S3, str]:
    """Client and key of s3://bucket/prefix. StoreError if it is not of that form."""
    parts = urlsplit(url)
    if not parts.hostname or parts.query or parts.fragment or "@" in parts.netloc or parts.port:
        raise StoreError(f"{url.split('@')[-1]}: expected s3://bucket/prefix")
    return S3(f"s3://{parts.netloc}"), parts.path.strip("/")


class S3(Objects):
    """One bucket."""

    listable = True

    def __init__(self, base: str) -> None:
        super().__init__(base)
        self._profile = profile()
        self._sending = lru_cache(8)(self._for_seconds)

    # -- reading -----------------------------------------------------------------------------------

    def names(self, folder: str) -> list[str]:
        found = self.ask(folder, lambda store: _obstore().list_with_delimiter(store, folder))
        keys = [*found["common_prefixes"], *(o["path"] for o in found["objects"])]
        return sorted(str(key).rpartition("/")[2] for key in keys)

    def described(self, key: str) -> list[tuple[int, float]]:
        return [(int(o["size"]), o["last_modified"].timestamp()) for o in self._tree(key)]

    def _tree(self, key: str) -> list[Any]:
        """The object `key` and all objects below it, as the server describes them."""
        found = self.ask(key, lambda store: _obstore().list(store, key).collect())
        with contextlib.suppress(ObjectMissingError):
            found.append(self.ask(key, lambda store: _obstore().head(store, key)))
        return list(found)

    # -- writing -----------------------------------------------------------------------------------

    def create(self, key: str, data: Buffer) -> None:
        """Put an object under a name that is free.

        Raises FileExistsError if it is taken, StoreError if it is too large, RemoteError.
        """
        if len(data) > LARGEST:
            raise StoreError(
                f"{self.name(key)} has {len(data):,} bytes; an object store takes {LARGEST:,} in "
                "one piece. Make segments smaller: layout.segment_rows=…"
            )
        tries = 0

        def act(store: Any) -> None:
            nonlocal tries
            tries += 1
            try:
                _obstore().put(store, key, data, mode="create", use_multipart=False)
            except _obstore().exceptions.AlreadyExistsError as e:
                if _status(e) == 409:
                    raise ConnectionError("another put of this name is under way") from None
                if tries == 1 or self.read(key, len(data)) != bytes(data):
                    raise FileExistsError(self.name(key)) from None

        self._write(key, act, len(data))

    def refuse_unwritable(self, key: str) -> None:
        probe = f"{key}/claims/.probe.{uuid.uuid4().hex[:8]}.partial".lstrip("/")
        self.create(probe, b"1")
        try:
            self.create(probe, b"2")
        except FileExistsError:
            return
        finally:
            self.remove(probe)
        raise StoreError(
            f"{self.base} at {_endpoint(self._profile) or 'AWS'} ignores If-None-Match: it would "
            "let one writer replace what another has committed. Use a server that honours it, or "
            "write to a folder and copy that to one"
        )

    def replace(self, key: str, data: Buffer) -> None:
        """Put an object over one that may be there. RemoteError."""
        self._write(key, lambda store: _obstore().put(store, key, data, use_multipart=False))

    def swap(self, key: str, old: bytes, new: bytes) -> bool:
        """Replace an object that holds `old` by `new`; False if another was faster."""

        def act(store: Any) -> bool:
            found = _obstore().get(store, key)
            held = bytes(found.bytes())
            if held != old:
                return held == new  # an earlier try whose answer was lost
            try:
                _obstore().put(store, key, new, mode={"e_tag": found.meta["e_tag"]})
            except _obstore().exceptions.PreconditionError:
                return False
            return True

        try:
            return self.ask(key, act)
        except ObjectMissingError:
            return False

    def remove(self, key: str) -> None:
        """Remove an object, and whatever lies below `key` as a folder."""
        keys = [str(o["path"]) for o in self._tree(key)]
        if keys:
            self._write(key, lambda store: _obstore().delete(store, keys))

    def _write(self, key: str, act: Any, size: int = 0) -> None:
        try:
            self.ask(key, act, size)
        except ObjectMissingError as e:  # a bucket that is not there is said by `_refuse`
            raise RemoteError(f"cannot write {self.name(key)}: {e}") from None
        except RemoteError as e:
            raise RemoteError(f"cannot write: {e}") from None

    # -- the client --------------------------------------------------------------------------------

    def _refuse(self, key: str, e: Exception) -> None:
        if "<Code>NoSuchBucket</Code>" in str(e):
            raise RemoteError(
                f"{self.base}: there is no such bucket at {_endpoint(self._profile) or 'AWS'}. "
                "Create it, or correct the name or AWS_ENDPOINT_URL"
            ) from None
        if re.search(r"/latest/(api/token|meta-data)", str(e)):
            raise RemoteError(
                f"no credentials for {self.base}: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, "
                "or AWS_PROFILE, or AWS_SKIP_SIGNATURE=true for a public bucket"
            ) from None
        super()._refuse(key, e)

    def hint(self, e: Exception) -> str:
        where = _endpoint(self._profile)
        who = os.environ.get("AWS_PROFILE") or "AWS_ACCESS_KEY_ID"
        if _status(e) in (401, 403):
            return f" ({who}, endpoint {where or 'AWS'}). Check the keys and what they may do"
        return (
            f" (endpoint {where or 'AWS'}). Check AWS_ENDPOINT_URL and AWS_REGION; everything "
            "committed before is intact, the same command continues"
        )

    def _store(self, size: int = 0) -> Any:
        reading = super()._store()
        # In powers of two, so that a few clients serve all sizes.
        return self._sending(1 << (size // SLOWEST).bit_length()) if size > SLOWEST else reading

    def _for_seconds(self, seconds: int) -> Any:
        return self.connect({"timeout": f"{30 + seconds}s"})

    def connect(self, times: dict[str, str]) -> Any:
        config: dict[str, str] = {"checksum_algorithm": "SHA256"}
        if not os.environ.get("AWS_ACCESS_KEY_ID"):
            names = ("access_key_id", "secret_access_key", "session_token")
            keys = zip(names, _KEYS, strict=True)
            config |= {name: self._profile[key] for name, key in keys if key in self._profile}
        if not (os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")):
            config["region"] = self._profile.get("region", "us-east-1")
        endpoint = _endpoint(self._profile)
        if endpoint:
            config["endpoint"] = endpoint
        options = {
            "allow_http": (endpoint or "").startswith("http:"),
            "connect_timeout": "10s",
            **times,
        }
        return _obstore().store.S3Store(
            self.base.removeprefix("s3://"),
            config=config,
            client_options=options,
            retry_config={"max_retries": 0},
        )


def _endpoint(settings: dict[str, str]) -> str | None:
    found = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    return found or settings.get("endpoint_url")


def profile() -> dict[str, str]:
    """Settings of the profile in use: AWS_PROFILE, or "default" if it is there.

    StoreError for a profile that is asked for and is not there or holds no keys.
    """
    asked = os.environ.get("AWS_PROFILE")
    name = asked or "default"
    home = Path("~/.aws").expanduser()
    files = {
        os.environ.get("AWS_CONFIG_FILE") or home / "config": f"profile {name}",
        os.environ.get("AWS_SHARED_CREDENTIALS_FILE") or home / "credentials": name,
    }
    found: dict[str, str] = {}
    for file, section in files.items():
        for title in (name, section):
            found |= _section(Path(file), title)
    if asked and not os.environ.get("AWS_ACCESS_KEY_ID") and not set(_KEYS[:2]) <= found.keys():
        raise StoreError(
            f"AWS_PROFILE={asked}: no keys under that name in {' or '.join(map(str, files))}. For "
            "a profile with a role or single sign-on: "
            f"eval $(aws configure export-credentials --profile {asked} --format env)"
        )
    return found


def _section(file: Path, title: str) -> dict[str, str]:
    parser = configparser.RawConfigParser()
    try:
        parser.read(file)
    except configparser.Error:  # its message would quote the line
        raise StoreError(f"{file} is not a file of AWS profiles") from None
    return dict(parser[title]) if parser.has_section(title) else {}
