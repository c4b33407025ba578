"""Files behind a URL, which fsspec opens: http(s); s3, gs and others with their packages.

Shards are kept file by file in a folder of bounded size that all processes of a node share. A file is downloaded under
a hidden name, checked against the manifest's size and SHA-256, and appears by a rename. One download serves every
process that asks. Other files, such as images to encode, are listed and read where they are.
"""

import errno
import fcntl
import hashlib
import io
import os
import random
import re
import tempfile
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, TypeVar
from urllib.parse import quote, unquote

from moe_dit.runtime.errors import InputError
from moe_dit.runtime.files import explained, temporary_name
from moe_dit.runtime.progress import say

PATIENCE = 120.0  # seconds that a server may stay away; $MOE_DIT_PATIENCE replaces it
SILENCE = 30.0  # seconds without a byte, after which a request has failed
TRIES = 3  # downloads whose content may be wrong
_PIECE = 1 << 20  # bytes
_BUFFER = 1 << 16  # bytes read at once of a file that is read in parts
_PACKAGES = {"s3": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs", "http": "aiohttp"}

Result = TypeVar("Result")


def is_remote(path: str | Path) -> bool:
    """Whether a path is a URL."""
    return "://" in str(path)


def cache() -> Path:
    """Where this machine keeps what it makes or fetches once: $MOE_DIT_CACHE, or ~/.cache/moe-dit.

    A user without a home, as containers have them, has a folder of temporary files.

    Raises:
        InputError: that one is another user's.
    """
    if given := os.environ.get("MOE_DIT_CACHE"):
        return Path(given)
    home = os.path.expanduser("~")
    if os.path.isabs(home):
        return Path(home) / ".cache" / "moe-dit"
    folder = Path(tempfile.gettempdir()) / f"moe-dit-{os.getuid()}"
    with explained(f"into {folder}"):
        folder.mkdir(mode=0o700, exist_ok=True)
    if os.lstat(folder).st_uid != os.getuid():
        raise InputError(f"{folder} is another user's; set MOE_DIT_CACHE to a folder of your own")
    return folder


def cache_folder(url: str) -> Path:
    """Where a remote folder is kept on this node."""
    name = re.sub(r"[^A-Za-z0-9.-]+", "_", url.rstrip("/"))[-60:]
    return cache() / "shards" / f"{name}-{hashlib.sha256(url.rstrip('/').encode()).hexdigest()[:8]}"


class RemoteFolder:
    """A folder behind a URL.

    Args:
        url: of the folder.
        folder: where fetched files are kept; None: nothing is fetched.
        limit: bytes that they may take; None: any. The least recently used go first.
        patience: seconds that the server may stay away.
    """

    def __init__(self, url: str, folder: Path | None = None, limit: float | None = None, patience: float | None = None):
        self.url = url.rstrip("/")
        self.folder = folder or cache_folder(url)
        self.limit = limit
        self.patience = float(os.environ.get("MOE_DIT_PATIENCE", PATIENCE)) if patience is None else patience
        self._process = 0
        self._filesystem: Any = None
        self._used: dict[str, float] = {}

    def __getstate__(self) -> dict[str, Any]:  # connections stay with their process
        return {"url": self.url, "folder": self.folder, "limit": self.limit, "patience": self.patience}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def read(self, name: str) -> bytes:
        """A small file as it is now; FileNotFoundError where the server says that there is none."""
        return b"".join(self._pieces(name, 0))

    def begins(self, name: str) -> bytes:
        """The first bytes of a file on the server, as fetching it would read them.

        Raises:
            InputError: the server stays away, or has no such file.
        """
        pieces = self._pieces(name, 0)
        try:
            return next(pieces, b"")
        except FileNotFoundError:
            raise InputError(f"{self.url}/{name} is missing on the server") from None
        finally:
            pieces.close()

    def fetch(self, name: str, size: int, sha256: str) -> Path:
        """A whole file's place in the cache, downloaded if it is not there.

        Args:
            name: of the file.
            size: in bytes.
            sha256: of its content; "": unknown.

        Raises:
            InputError: the server stays away, gives something else, or there is no room.
        """
        path = self.folder / name
        if not self._there(path, size):
            self._check_room(name, size)
            with self._locked(name):
                if not self._there(path, size):  # another process may have fetched it meanwhile
                    self._download(name, size, sha256)
            self._evict(name)
        now = time.monotonic()
        if now - self._used.get(name, -1e9) > 60:  # seconds; a note for who looks for room
            self._used[name] = now
            with suppress(OSError):
                os.utime(path)
        return path

    @staticmethod
    def _there(path: Path, size: int) -> bool:
        try:
            return path.stat().st_size == size
        except OSError:
            return False

    def names(self) -> list[str]:
        """All files and folders below this one, sorted, folders with a slash behind.

        Over HTTP they are what the server's pages of folders link to. Names that start with a dot are passed over.

        Raises:
            InputError: the server stays away, or there is no such folder.
        """
        found: list[str] = []
        folders = [""]
        while folders:
            folder = folders.pop()
            try:
                inside = self._patiently(folder, partial(self._inside, folder))
            except FileNotFoundError:
                raise InputError(f"{self.url}/{folder} is missing on the server") from None
            inside = [name for name in inside if not name.rstrip("/").rpartition("/")[2].startswith(".")]
            folders += [name for name in inside if name.endswith("/")]
            found += inside
        return sorted(found)

    def _inside(self, folder: str, filesystem: Any) -> list[str]:
        """The files and folders of one folder, by their names from here; fsspec's own walk passes over failures."""
        http = self.url.startswith("http")
        start = len(filesystem._strip_protocol(self.url).rstrip("/")) + 1
        found = []
        for entry in filesystem.ls(self._address(folder) if http else self._address(folder).rstrip("/"), detail=True):
            name = entry["name"].rstrip("/")[start:]
            if http:
                name = unquote(name.partition("?")[0])  # pages link to themselves, sorted otherwise
            if name.startswith(folder) and name != folder.rstrip("/"):
                found.append(f"{name}/" if entry["type"] == "directory" else name)
        return found

    # --- the server ---------------------------------------------------------------------------------------------------

    def _open(self) -> Any:
        """fsspec's filesystem, made anew in every process: its connections do not outlive a fork."""
        if self._process != os.getpid():
            import fsspec

            scheme = self.url.partition("://")[0]
            try:
                options: dict[str, Any] = {"skip_instance_cache": True, "use_listings_cache": False}
                if scheme in ("http", "https"):
                    import aiohttp

                    silent = aiohttp.ClientTimeout(total=None, sock_connect=SILENCE, sock_read=SILENCE)
                    options["client_kwargs"] = {"timeout": silent, "raise_for_status": _let_go}
                self._filesystem = fsspec.filesystem(scheme, **options)
            except (ImportError, ValueError) as error:
                package = _PACKAGES.get(scheme.removesuffix("s") if scheme == "https" else scheme)
                hint = f"pip install {package}" if package and isinstance(error, ImportError) else str(error)
                raise InputError(f"{self.url} cannot be read here: {hint}") from None
            self._process = os.getpid()
        return self._filesystem

    def _pieces(self, name: str, start: int) -> Generator[bytes, None, None]:
        """A file's bytes from an offset on; a server that fails is asked again, from where it broke off."""
        place = start
        server = _Patience(self, name)
        while True:
            filesystem = self._open()
            try:
                for piece in _stream(filesystem, self._address(name), place):
                    yield piece
                    place += len(piece)
                    server.works()
                return
            except ValueError as error:
                if place == start:
                    raise InputError(f"{self.url}/{name} cannot be read: {_said(error)}") from None
                raise _NotFromHere(str(error)) from None
            except Exception as error:  # every library behind fsspec has errors of its own
                server.failed(error)

    def _patiently(self, name: str, work: Callable[[Any], Result]) -> Result:
        """What ``work`` gives of fsspec's filesystem; a server that fails is asked again."""
        server = _Patience(self, name)
        while True:
            filesystem = self._open()
            try:
                found = work(filesystem)
                server.works()
                return found
            except Exception as error:  # every library behind fsspec has errors of its own
                server.failed(error)

    def _address(self, name: str) -> str:
        """A file's URL; over HTTP a name's odd characters are quoted."""
        return f"{self.url}/{quote(name) if self.url.startswith('http') else name}"

    def _download(self, name: str, size: int, sha256: str) -> None:
        path = self.folder / name
        temporary = temporary_name(path)
        try:
            for _ in range(TRIES):
                digest = hashlib.sha256()
                with open(temporary, "wb") as file, suppress(_NotFromHere):
                    for piece in self._pieces(name, 0):
                        file.write(piece)
                        digest.update(piece)
                length = temporary.stat().st_size
                if length == size and sha256 in ("", digest.hexdigest()):
                    os.replace(temporary, path)
                    return
            raise InputError(
                f"{self.url}/{name} is not what the manifest says: "
                + (f"{length} bytes instead of {size}" if length != size else "its SHA-256 differs")
            )
        except FileNotFoundError:
            raise InputError(f"{self.url}/{name} is missing on the server") from None
        except OSError as error:
            raise InputError(f"cannot write into the cache {self.folder}: {error.strerror or error}") from None
        finally:
            temporary.unlink(missing_ok=True)

    # --- the cache ----------------------------------------------------------------------------------------------------

    @contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        """One process at a time; a file system without locks lets all in, which costs downloads and harms nothing."""
        with self._lock_file(name) as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX)  # let go by the kernel when the process ends, however it does
            except OSError as error:
                if error.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL):
                    raise InputError(f"cannot lock {self.folder}: {error.strerror}") from None
            for leftover in self.folder.glob(f".{name}.*.tmp"):  # of a process that was killed
                leftover.unlink(missing_ok=True)
            yield

    def _lock_file(self, name: str) -> BinaryIO:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            return open(self.folder / f".{name}.lock", "ab")
        except OSError as error:
            raise InputError(f"cannot write into the cache {self.folder}: {error.strerror}") from None

    def _check_room(self, name: str, size: int) -> None:
        if self.limit is not None and 2 * size > self.limit:
            raise InputError(
                f"the cache of {self.url} may take {self.limit / 1e9:.3g} GB, and {name} alone has {size / 1e9:.3g}; "
                f"it should hold a few: --set data.cache_gb={8 * size / 1e9:.3g}"
            )

    def _evict(self, kept: str) -> None:
        """Remove what was used longest ago; processes that have it open read on."""
        if self.limit is None:
            return
        with self._locked("evict"):
            found = []
            for path in self.folder.glob("*.tar"):
                with suppress(OSError):
                    status = path.stat()
                    # Who uses a file says so every minute. What is ahead of now was used before the clock was set back.
                    since = status.st_mtime < time.time() + 60
                    found.append((since, status.st_mtime, status.st_size, path))
            total = sum(size for *_, size, _ in found)
            for *_, size, path in sorted(found):
                if total <= self.limit:
                    return
                if path.name != kept:
                    path.unlink(missing_ok=True)
                    total -= size


class _Patience:
    """How long a server that fails is asked again."""

    def __init__(self, remote: RemoteFolder, name: str):
        self.remote = remote
        self.name = name
        self.told = False
        self.works()

    def works(self) -> None:
        if self.told:
            say(f"{self.remote.url} is back")
        self.since: float | None = None  # when it began to fail
        self.wait, self.told = 0.2, False

    def failed(self, error: Exception) -> None:
        """Wait before it is asked again, or raise; called where ``error`` is handled."""
        url, patience = self.remote.url, self.remote.patience
        if _is_missing(error) or isinstance(error, InputError):
            raise error
        if _status(error) in (401, 403) or isinstance(error, PermissionError):
            raise InputError(f"{url}/{self.name} may not be read: {_said(error)}") from None
        now = time.monotonic()
        self.since = now if self.since is None else self.since
        failing = now - self.since
        asked = _pause(error)
        wait = max(self.wait, asked or 0.0)
        kept = f"; what was fetched is kept in {self.remote.folder}" if self.remote.folder.exists() else ""
        if asked is not None and failing + asked > patience:
            raise InputError(
                f"{url}/{self.name} cannot be read, tried for {failing:.0f} s: the server refuses for now "
                f"({_said(error)}) and asks for {asked:.0f} s without requests, more than is left of the "
                f"{patience:.0f} s that it may stay away (MOE_DIT_PATIENCE); begin again after them{kept}"
            ) from None
        if failing + wait > patience:
            raise InputError(
                f"{url}/{self.name} cannot be read, tried for {failing:.0f} s: {_said(error)}{kept}"
            ) from None
        if not self.told and max(failing, asked or 0.0) > 1:
            next_time = "" if asked is None else f" in {asked:.0f} s, as it asks,"
            say(f"{url} {_does(error)} ({_said(error)}); trying again{next_time} for up to {patience:.0f} s")
            self.told = True
        # Not before the time that it asks for, and not all at the same.
        time.sleep(wait * random.uniform(0.75 if asked is None else 1.0, 1.25))
        self.wait = min(10.0, 2 * self.wait)


@dataclass(frozen=True)
class RemotePath:
    """A file in a remote folder, with what is used here of pathlib's paths."""

    folder: RemoteFolder
    path: str

    def __str__(self) -> str:
        return f"{self.folder.url}/{self.path}"

    @property
    def name(self) -> str:
        return PurePosixPath(self.path).name

    @property
    def stem(self) -> str:
        return PurePosixPath(self.path).stem

    @property
    def suffix(self) -> str:
        return PurePosixPath(self.path).suffix

    def open(self, mode: str = "rb") -> BinaryIO:
        """The file, to be read in parts by requests for them."""
        return io.BufferedReader(_Parts(self), _BUFFER)


class _Parts(io.RawIOBase):
    """A file of a server, each read a request for a part of it."""

    def __init__(self, path: RemotePath):
        super().__init__()
        self.path = path
        self.place = 0
        try:
            self.size = path.folder._patiently(path.path, lambda filesystem: filesystem.size(self._address))
        except FileNotFoundError:
            raise InputError(f"{path} is missing on the server") from None
        if self.size is None:
            raise InputError(f"{path} cannot be read in parts: the server does not say how long it is; copy it first")

    @property
    def _address(self) -> str:
        return self.path.folder._address(self.path.path)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.place = {io.SEEK_SET: 0, io.SEEK_CUR: self.place, io.SEEK_END: self.size}[whence] + offset
        return self.place

    def tell(self) -> int:
        return self.place

    def readinto(self, buffer: Any) -> int:
        length = max(0, min(len(buffer), self.size - self.place))
        if length:
            try:
                buffer[:length] = self.path.folder._patiently(self.path.path, lambda of: self._part(of, length))
            except FileNotFoundError:
                raise InputError(f"{self.path} is missing on the server") from None
            self.place += length
        return length

    def _part(self, filesystem: Any, length: int) -> bytes:
        part = filesystem.cat_file(self._address, start=self.place, end=self.place + length)
        if len(part) > length:
            raise InputError(f"{self.path} cannot be read in parts, which this server does not give; copy it first")
        if len(part) < length:
            raise OSError(f"{len(part)} bytes of {length}")
        return part


def _answer(error: Exception) -> Exception:
    """What a server said. fsspec (2026.9) makes a FileNotFoundError of every failed HTTP request."""
    cause = error.__cause__
    return cause if isinstance(error, FileNotFoundError) and isinstance(cause, Exception) else error


def _status(error: Exception) -> int:
    """The status of a server's answer over HTTP, 0 where there was none."""
    return getattr(_answer(error), "status", 0)


def _is_missing(error: Exception) -> bool:
    """Whether a server says that there is no such file."""
    answer = _answer(error)
    return isinstance(error, FileNotFoundError) and (
        isinstance(answer, FileNotFoundError) or _status(error) in (404, 410)
    )


def _pause(error: Exception) -> float | None:
    """Seconds for which a server wants no requests (Retry-After, as a number or a date); None: it does not say."""
    headers = getattr(_answer(error), "headers", None) or {}
    text = headers.get("Retry-After", "").strip()
    if re.fullmatch(r"\d+", text):
        return float(text)
    try:
        until = parsedate_to_datetime(text)
    except ValueError:
        return None
    try:
        begin = parsedate_to_datetime(headers.get("Date", ""))  # by the server's clock, which may not be ours
    except ValueError:
        begin = datetime.now(UTC)
    return max(0.0, until.timestamp() - begin.timestamp())


def _does(error: Exception) -> str:
    """What a server does that fails: one that is away, and one that refuses, need different cures."""
    if not _status(error):
        return "does not answer"
    return "refuses for now" if _status(error) == 429 or _pause(error) is not None else "fails"


async def _let_go(response: Any) -> None:
    """What is done with each answer over HTTP: an error is read to its end, with which its connection is free.

    fsspec (2026.9) keeps the connection of one that it meets as it opens a file, of which aiohttp complains later, on
    stderr: "Unclosed connection".
    """
    if response.status >= 400:
        try:
            await response.read()
        except Exception:  # aiohttp's: it breaks off; the status is there
            response.release()


class _NotFromHere(Exception):
    """A server that cannot go on in the middle of a file."""


def _stream(filesystem: Any, url: str, start: int) -> Iterator[bytes]:
    """A file's bytes from an offset on."""
    whole = start == 0 and url.startswith("http")
    # Over HTTP, block_size 0 is one request that is read to its end; others are read in requests of 8 MiB.
    how: dict[str, Any] = {"block_size": 0} if whole else {"block_size": 8 << 20, "cache_type": "readahead"}
    with filesystem.open(url, "rb", **({} if url.startswith("file") else how)) as file:
        if start:
            file.seek(start)
        while piece := file.read(_PIECE):
            yield piece


def _said(error: Exception) -> str:
    error = _answer(error)
    if _status(error) and (message := getattr(error, "message", "")):
        return f"{_status(error)} {message}"[:200]  # aiohttp's own words hold the URL, which is told anyway
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:200]
