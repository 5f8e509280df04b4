"""A place in an object store, named by a URL: reading, writing and listing with bounded retries, by pyarrow.fs.

``s3://BUCKET/KEY`` and ``gs://BUCKET/KEY``, and ``file:///FOLDER`` for a disk. An S3 endpoint other than Amazon's
comes from ``?endpoint_override=http://HOST:PORT`` or from the variables AWS_ENDPOINT_URL_S3 and AWS_ENDPOINT_URL.
Keys and tokens come from where each store's clients look for them, never from a URL.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import SplitResult, parse_qs, unquote, urlsplit

from embsearch_dist.errors import UserError

T = TypeVar("T")
SCHEMES = ("s3", "gs", "gcs", "file")
PAUSES = [1.0, 4.0]
"""Seconds before the second and the third try of a request; the client of S3 repeats some by itself, too."""
CHUNK = 8 << 20
CONNECT_S, ANSWER_S = 10, 20
HOPELESS = re.compile(r"ACCESS_DENIED|NO_SUCH_BUCKET|INVALID_ACCESS_KEY|SIGNATURE|EXPIRED_TOKEN|UNAUTHORIZED|HTTP 403")
_URL = re.compile(r"([a-z][a-z0-9+.-]*)://", re.IGNORECASE)


class StoreError(UserError):
    """A store did not do what was asked of it, after all tries."""


class Missing(StoreError):
    """There is no such object."""


class OtherSize(StoreError):
    """An object has not the size that a list tells of it: a cut upload, a replaced object, or an old list."""


class _Differs(OSError):
    """As :class:`OtherSize`, before all tries are over: what a store shows may be old."""


@dataclass(frozen=True)
class Entry:
    """An object: its name below the place it was looked for in, its bytes, and nanoseconds of its last change."""

    name: str
    size: int
    changed: int


def is_url(text: object) -> bool:
    """Whether a path is a URL: something, then ``://``."""
    return bool(_URL.match(str(text)))


def join(url: str, *parts: str) -> str:
    """The URL of something below another one, whose query stays behind it."""
    base, mark, query = url.partition("?")
    return "/".join([base.rstrip("/"), *parts]) + mark + query


def _split(url: str) -> SplitResult:
    """Raises:
    UserError: what is behind a ``#`` is no part of a URL's path, so another object would be read.
    """
    if "#" in url:
        raise UserError(f"{url}: a # ends the path of a URL. Write %23 for it")
    return urlsplit(url)


def local_folder(url: str) -> Path | None:
    """The folder or file behind a ``file://`` URL; None for any other.

    Raises:
        UserError: it names another host, or has a ``#``.
    """
    parts = _split(url)
    if parts.scheme.lower() != "file":
        return None
    if parts.netloc not in ("", "localhost"):
        raise UserError(f"{url}: names the host {parts.netloc!r}. Write file:/// and an absolute path")
    return Path(unquote(parts.path))


class Store:
    """What lies below one URL.

    Every method raises :class:`StoreError` when the store does not answer, refuses or fails, :class:`Missing` when
    there is no such object; each names the URL.
    """

    def __init__(self, url: str, system: Any = None) -> None:
        """``system``: a ``pyarrow.fs.FileSystem`` to use in place of the URL's own.

        Raises:
            UserError: the URL is of no known kind, has no bucket, or holds a password or a ``#``.
        """
        self.url = url
        parts = _split(url)
        scheme = parts.scheme.lower()
        if scheme not in SCHEMES:
            raise UserError(f"{url}: {scheme}:// is none of {', '.join(f'{s}://' for s in SCHEMES)}. Use one of them")
        if "@" in parts.netloc:
            raise UserError(
                f"{scheme}://...@{parts.netloc.split('@')[1]}: a key in a URL would be kept in config.yaml. "
                "Leave it out; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a profile in ~/.aws"
            )
        folder = local_folder(url)
        self.local = folder is not None
        if folder is None and not parts.netloc:
            raise UserError(f"{url}: names no bucket. Write {scheme}://BUCKET/KEY")
        path = str(folder) if folder is not None else f"{parts.netloc}/{unquote(parts.path).strip('/')}"
        self.path = path.rstrip("/")
        self.last_sign = time.monotonic()
        """When the store last did something for us: bytes came or went."""
        self._system = system if system is not None else _system(scheme, parts.netloc, parts.query)

    def at(self, name: str) -> str:
        """The URL of an object, for people."""
        return join(self.url.partition("?")[0], name) if name else self.url.partition("?")[0]

    def find(self, name: str = "") -> Entry | None:
        """The object of that name; None where there is none, or only a folder."""
        info = self._try(name, lambda: self._system.get_file_info(self._key(name)))
        return Entry(name, info.size, info.mtime_ns or 0) if info.is_file else None

    def list(self, name: str = "", recursive: bool = True) -> list[Entry]:
        """The objects below a folder, by name; none where there is no such folder."""
        from pyarrow.fs import FileSelector

        base = self._key(name)
        chosen = FileSelector(base, recursive=recursive, allow_not_found=True)
        infos = self._try(name, lambda: self._system.get_file_info(chosen))
        found = [Entry(i.path[len(base) + 1 :], i.size, i.mtime_ns or 0) for i in infos if i.is_file]
        return sorted(found, key=lambda e: e.name)

    def read(self, name: str, most: int = 64 << 20) -> bytes:
        """A small object as a whole, at most so many bytes. One that is not there is not waited for."""

        def work() -> bytes:
            with self._system.open_input_file(self._key(name)) as file:
                if file.size() > most:
                    raise UserError(f"{self.at(name)}: {file.size():,} bytes, expected a small file. Check the URL")
                return file.read()

        return self._try(name, work, sure=False)

    def fetch(self, name: str, target: Path, size: int) -> None:
        """Bring an object into a local file, from where an earlier try was cut.

        Raises:
            OtherSize: it has not the size that was told.
        """

        def work() -> None:
            have = target.stat().st_size if target.exists() else 0
            with self._system.open_input_file(self._key(name)) as source, target.open("ab") as sink:
                if source.size() != size:
                    raise _Differs(f"{source.size():,} bytes there, not {size:,}")
                if have > size:
                    sink.truncate(0)
                    have = 0
                source.seek(have)
                while have < size:
                    data = source.read(min(CHUNK, size - have))
                    if not data:
                        raise OSError(f"cut off after {have:,} of {size:,} bytes")
                    sink.write(data)
                    have += len(data)
                    self.last_sign = time.monotonic()

        self._try(name, work, lambda: target.stat().st_size if target.exists() else 0)

    def write(self, name: str, data: bytes) -> None:
        """Put a small object there: whole, or as it was before."""
        key, own = self._key(name), f".{os.getpid()}.tmp" if self.local else ""

        def work() -> None:
            self._make_folder(key)
            with self._system.open_output_stream(key + own) as sink:
                sink.write(data)
            if own:
                self._system.move(key + own, key)

        self._try(name, work)

    def send(self, name: str, source: Path, size: int) -> None:
        """Put the first ``size`` bytes of a local file there, and look whether they have come.

        A cut upload may leave a shorter object behind: nothing may refer to it before this has returned.
        """
        key = self._key(name)

        def work() -> None:
            self._make_folder(key)
            with source.open("rb") as file, self._system.open_output_stream(key) as sink:
                left = size
                while left:
                    data = file.read(min(CHUNK, left))
                    if not data:
                        raise UserError(f"{source}: became shorter while it was sent")
                    sink.write(data)
                    left -= len(data)
                    self.last_sign = time.monotonic()
            info = self._system.get_file_info(key)
            if not info.is_file or info.size != size:
                raise OSError(f"{info.size if info.is_file else 0} bytes have come there, {size:,} were sent")

        self._try(name, work)

    def delete(self, name: str) -> None:
        """Remove an object; that it is gone already is no error."""

        def work() -> None:
            with contextlib.suppress(FileNotFoundError):
                self._system.delete_file(self._key(name))

        self._try(name, work)

    def _key(self, name: str) -> str:
        return f"{self.path}/{name}" if name else self.path

    def _make_folder(self, key: str) -> None:
        if self.local:  # object stores have none
            self._system.create_dir(key.rsplit("/", 1)[0], recursive=True)

    def _try(self, name: str, work: Callable[[], T], progress: Callable[[], int] = lambda: 0, sure: bool = True) -> T:
        """Do something up to three times in a row; what comes further than the try before does not count as one.

        ``sure``: the object has to be there, and a store that does not show it yet may do so a moment later.
        """
        failed, reached = 0, -1
        while True:
            before = progress()
            failed, reached = (failed, reached) if before <= reached else (0, before)
            try:
                found = work()
                self.last_sign = time.monotonic()
                return found
            except FileNotFoundError as e:
                error: OSError = e
            except OSError as e:
                error = e
                if HOPELESS.search(str(e)):
                    raise StoreError(f"{self.at(name)}: {reason(e)}. Check bucket, keys and rights") from e
            failed += 1
            if failed > len(PAUSES) or (isinstance(error, FileNotFoundError) and not sure):
                break
            time.sleep(PAUSES[failed - 1])
        if isinstance(error, FileNotFoundError):
            raise Missing(f"{self.at(name)}: there is no such object. Check the URL") from error
        told = f"{self.at(name)}: {reason(error)}; tried {failed} times"
        if isinstance(error, _Differs):
            raise OtherSize(told) from error
        raise StoreError(f"{told}. Check URL, endpoint and network") from error


def reason(error: BaseException) -> str:
    """What a store said, in one line: of pyarrow's errors on S3 what AWS's client says, for the object is named."""
    text = " ".join(str(error).split())
    _, mark, said = text.rpartition("AWS Error ")
    return f"{mark}{said}"[:200].rstrip(". ")


@functools.cache
def _system(scheme: str, bucket: str, query: str) -> Any:
    """The client of a URL. pyarrow loads a store's own library only when it is asked for."""
    options = {key: values[-1] for key, values in parse_qs(query).items()}
    if scheme == "file":
        from pyarrow.fs import LocalFileSystem

        return LocalFileSystem()
    known = {"s3": ("endpoint_override", "region", "scheme"), "gs": ("endpoint_override", "scheme", "anonymous")}
    scheme = "gs" if scheme == "gcs" else scheme
    for key in options:
        if key not in known[scheme]:
            raise UserError(
                f"{scheme}://{bucket}: unknown option {key!r} behind '?'. Known: {', '.join(known[scheme])}"
            )
    try:
        return _s3(bucket, options) if scheme == "s3" else _gcs(options)
    except (ImportError, OSError, ValueError) as e:
        raise UserError(f"{scheme}://{bucket}: pyarrow cannot open this store ({reason(e)}). Check URL and keys") from e


def _s3(bucket: str, options: dict[str, str]) -> Any:
    from pyarrow.fs import AwsStandardS3RetryStrategy, S3FileSystem, resolve_s3_region

    endpoint = options.get("endpoint_override", "")
    endpoint = endpoint or os.environ.get("AWS_ENDPOINT_URL_S3", "") or os.environ.get("AWS_ENDPOINT_URL", "")
    region = options.get("region", "") or os.environ.get("AWS_REGION", "") or os.environ.get("AWS_DEFAULT_REGION", "")
    if not region:
        region = "us-east-1" if endpoint else resolve_s3_region(bucket)
    more = {"scheme": options["scheme"]} if "scheme" in options else {}
    return S3FileSystem(
        endpoint_override=endpoint or None,
        region=region,
        connect_timeout=CONNECT_S,
        request_timeout=ANSWER_S,
        retry_strategy=AwsStandardS3RetryStrategy(max_attempts=2),
        background_writes=False,  # else a failed part shows only at the end of the file
        **more,
    )


def _gcs(options: dict[str, str]) -> Any:
    import datetime

    from pyarrow.fs import GcsFileSystem

    more = {key: options[key] for key in ("endpoint_override", "scheme") if key in options}
    anonymous = options.get("anonymous", "false") == "true"
    return GcsFileSystem(anonymous=anonymous, retry_time_limit=datetime.timedelta(seconds=ANSWER_S), **more)
