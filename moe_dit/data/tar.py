"""The one way to look into tar files: the members of samples, as webdataset names them.

A sample is what comes before the first dot of a file's name, its folder included, and what follows is the extension.
Whatever tar puts beside that is passed over, as webdataset passes it over: a leading ./, entries of folders, and hidden
files, as macOS's ._ companions are.
"""

import tarfile
from collections import Counter
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

from moe_dit.runtime.errors import InputError

_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZ": "bzip2", b"\xfd7": "xz", b"(\xb5": "zstd"}  # by their first two bytes


class Member(NamedTuple):
    """A file inside a tar file."""

    name: str
    key: str  # of its sample: the name up to the first dot behind the last slash
    extension: str  # what follows, in lower case; "" without a dot
    offset: int  # of its bytes in the tar file
    size: int  # in bytes


def members(file: BinaryIO, left_out: Counter[str] | None = None) -> Iterator[Member]:
    """The files in a tar file, in order; the caller may read the file in between.

    Args:
        file: open where the tar file begins, uncompressed.
        left_out: counts what is no file of bytes and might have been meant as one.

    Raises:
        ValueError: it is no tar file, is damaged, or keeps a file in parts.
        InputError: reading said so itself.
    """
    try:
        start = file.tell()
        with tarfile.open(fileobj=file, mode="r:") as tar:
            while (entry := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # tarfile keeps all, a kilobyte each
                name = "/".join(part for part in entry.name.split("/") if part not in ("", "."))
                folder, slash, last = name.rpartition("/")
                if entry.isdir() or last.startswith(".") or not last:
                    continue
                if not entry.isreg():
                    if left_out is not None:
                        left_out["links and devices in tar files"] += 1
                    continue
                if entry.issparse():
                    raise ValueError(f"{name} is kept in parts (a sparse file); make it without --sparse")
                stem, _, extension = last.partition(".")
                yield Member(name, f"{folder}{slash}{stem}", extension.lower(), entry.offset_data, entry.size)
    except (InputError, ValueError):
        raise
    except Exception as error:  # tarfile raises whatever a damaged header leads it to
        file.seek(start)
        kind = _COMPRESSED.get(file.read(2))
        if kind:
            raise ValueError(f"it is compressed ({kind}), and cannot be read in parts; decompress it") from None
        raise ValueError(str(error) or type(error).__name__) from None
