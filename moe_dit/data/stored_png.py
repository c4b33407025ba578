"""PNG files that decode at memory speed: rows without filters, stored rather than compressed. Every program opens them.

Undoing PNG's row filters is most of a decode, and Pillow always writes them. On crops of photographs of 256 x 256,
Pillow decodes its own files in 1.6 ms, and 0.9 ms uncompressed, these in 0.17 ms; :func:`decode` takes 0.07 ms. They
hold 3 bytes a pixel. Format: the PNG specification, https://www.w3.org/TR/png-3/.
"""

import struct
import zlib

import numpy as np

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_BEFORE, _AFTER = 41, 16  # bytes before and after the compressed rows


def encode(image_HW3: np.ndarray) -> bytes:
    """A PNG file of uint8 [H, W, 3]."""
    height, width, _ = image_HW3.shape
    rows = np.zeros((height, 1 + 3 * width), np.uint8)  # each begins with its filter: 0, none
    rows[:, 1:] = image_HW3.reshape(height, -1)
    return _head(height, width) + _chunk(b"IDAT", zlib.compress(rows.tobytes(), 0)) + _chunk(b"IEND", b"")


def decode(data: bytes) -> np.ndarray | None:
    """What :func:`encode` was given; None for a file that is not its."""
    if len(data) < _BEFORE + _AFTER or data[:8] != _SIGNATURE:
        return None
    width, height = struct.unpack(">II", data[16:24])
    # Nothing but one chunk of rows: what stands behind it may say that they are to be turned.
    begin = _head(height, width) + struct.pack(">I", len(data) - _BEFORE - _AFTER) + b"IDAT"
    if not data.startswith(begin):
        return None
    size = height * (1 + 3 * width)
    if not size <= len(data) < size + size // 100 + 1000:
        return None
    try:
        rows = np.frombuffer(zlib.decompress(data[_BEFORE:-_AFTER], bufsize=size), np.uint8)
    except zlib.error:
        return None
    if len(rows) != size:
        return None
    rows = rows.reshape(height, 1 + 3 * width)
    return None if rows[:, 0].any() else rows[:, 1:].reshape(height, width, 3)


def _head(height: int, width: int) -> bytes:
    return _SIGNATURE + _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))  # 8 bits, RGB


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(data, zlib.crc32(kind)))
