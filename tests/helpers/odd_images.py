"""Odd images and what they show: the pixels that each file's format defines, worked out by hand, or why there are none.

All are 8 x 8, so that a centre crop of 8 leaves them as they are. Files that Pillow cannot write are written byte by
byte. Nothing here calls the project.
"""

import io
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

SIDE = 8
WHITE = 255


@dataclass(frozen=True)
class Odd:
    """An image file.

    Attributes:
        name: of the file.
        content: its bytes.
        pixels: uint8 [8, 8, 3], as people see it; None: it cannot be read.
        within: levels by which a lossy format or a rounding may differ.
        reason: a part of the line that says why it cannot be read.
    """

    name: str
    content: bytes
    pixels: np.ndarray | None
    within: int = 0
    reason: str = ""


# --- the pictures -----------------------------------------------------------------------------------------------------

PLACE = np.arange(64).reshape(SIDE, SIDE)  # of each pixel, row by row
BYTES = (PLACE * 4 + 1).astype(np.uint8)  # grey: 1, 5, ..., 253
RGB = np.stack([BYTES, BYTES.T, 255 - BYTES], -1)
ALPHA = np.where(PLACE % 2, 255, 0).astype(np.uint8)  # every second pixel is there
DEEP_ALPHA = ALPHA.astype(np.uint16) * 257
DEEP = (PLACE * 1040 + 15).astype(np.uint16)  # grey of 16 bits: 15, 1055, ..., 65535
PALETTE = np.array([[255, 0, 0], [0, 200, 0], [10, 20, 30], [250, 250, 0]], np.uint8)
INDICES = (PLACE % 4).astype(np.uint8)


def grey(values) -> np.ndarray:
    """Levels [8, 8] as [8, 8, 3]."""
    return np.repeat(np.asarray(values)[..., None], 3, -1).astype(np.uint8)


def of_depth(values, highest: int) -> np.ndarray:
    """Levels of numbers that go to ``highest``."""
    return grey(np.floor(np.asarray(values, np.float64) * 255 / highest + 0.5))


def white_where(hidden, pixels) -> np.ndarray:
    return np.where(np.asarray(hidden)[..., None], WHITE, pixels).astype(np.uint8)


def on_white(pixels, alpha) -> np.ndarray:
    part = np.asarray(alpha, np.float64)[..., None] / 255
    return np.floor(pixels * part + 255 * (1 - part) + 0.5).astype(np.uint8)


def rows(values, kind: str = "u1") -> list[bytes]:
    return [row.astype(kind).tobytes() for row in np.asarray(values)]


def packed(values, bits: int) -> list[bytes]:
    """Rows of numbers of 1, 2, 4 or 12 bits, the first in the highest bits."""
    lines = ("".join(f"{value:0{bits}b}" for value in row) for row in np.asarray(values))
    return [int(line, 2).to_bytes(len(line) // 8, "big") for line in lines]


# --- formats ----------------------------------------------------------------------------------------------------------


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(
    depth: int,
    colour: int,
    lines: list[bytes],
    *before: tuple[bytes, bytes],
    after: tuple[tuple[bytes, bytes], ...] = (),
    size=(SIDE, SIDE),
    interlaced=0,
) -> bytes:
    """A PNG file of rows as they are stored (colour 0: grey, 2: RGB, 3: palette, 4: grey and alpha, 6: RGBA)."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", *size, depth, colour, 0, 0, interlaced))
    pixels = chunk(b"IDAT", zlib.compress(b"".join(b"\0" + line for line in lines)))
    others = [b"".join(chunk(*one) for one in some) for some in (before, after)]
    return b"\x89PNG\r\n\x1a\n" + head + others[0] + pixels + others[1] + chunk(b"IEND", b"")


def numbers(*values: int) -> bytes:
    """As PNG keeps numbers of 16 bits."""
    return struct.pack(f">{len(values)}H", *values)


def adam7(pixels: np.ndarray) -> list[bytes]:
    """The rows of PNG's seven passes."""
    passes = [(0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1)]
    return [line for top, left, down, right in passes for line in rows(pixels[top::down, left::right])]


def exif(orientation: int) -> bytes:
    return b"MM\0*" + struct.pack(">IHHHIHHI", 8, 1, 0x0112, 3, 1, orientation, 0, 0)


def tiff(lines: list[bytes], bits: tuple[int, ...], photometric: int, big=False, strips=1, more=None, after=0) -> bytes:
    """A TIFF file of uncompressed rows.

    Args:
        bits: of each number of a pixel.
        photometric: 0: grey, 0 is white; 1: grey; 2: RGB; 3: palette; 5: CMYK; 6: YCbCr; 8: LAB.
        big: big-endian.
        strips: in which the rows lie.
        more: other tags, which hold numbers of 16 bits.
        after: how many more pages follow, black ones.
    """
    order = ">" if big else "<"
    data = b"".join(lines)
    page = b""
    start = 8
    for number in range(after + 1):
        part = len(data) // strips
        tags = {256: [SIDE], 257: [SIDE], 258: list(bits), 259: [1], 262: [photometric], 277: [len(bits)]}
        tags |= {273: [start + i * part for i in range(strips)], 278: [SIDE], 279: [part] * strips} | (more or {})
        directory = start + len(data)
        place = directory + 2 + 12 * len(tags) + 4
        entries, long = b"", b""
        for tag in sorted(tags):
            value = struct.pack(f"{order}{len(tags[tag])}H", *tags[tag])
            if len(value) > 4:
                value, long = struct.pack(f"{order}I", place + len(long)), long + value
            entries += struct.pack(f"{order}HHI", tag, 3, len(tags[tag])) + value.ljust(4, b"\0")
        end = place + len(long)
        following = end + len(data) if number < after else 0
        page += data + struct.pack(f"{order}H", len(tags)) + entries + struct.pack(f"{order}I", following) + long
        start, data = end, bytes(len(data))
    head = (b"MM\0*" if big else b"II*\0") + struct.pack(f"{order}I", 8 + len(b"".join(lines)))
    return head + page


def bmp(bits: int, lines: list[bytes], palette: bytes = b"") -> bytes:
    """A BMP file of rows from the top, each a multiple of 4 bytes."""
    data = b"".join(reversed(lines))
    start = 14 + 40 + len(palette)
    info = struct.pack("<IiiHHIIiiII", 40, SIDE, SIDE, 1, bits, 0, len(data), 0, 0, len(palette) // 4, 0)
    return b"BM" + struct.pack("<IHHI", start + len(data), 0, 0, start) + info + palette + data


def gif(frames: list[tuple[tuple[int, int, int, int], bytes]], transparent: int | None = None) -> bytes:
    """A GIF file of 8 x 8 with PALETTE, and background 0, of frames: (left, top, width, height) and indices."""
    out = b"GIF89a" + struct.pack("<HHBBB", SIDE, SIDE, 0x81, 0, 0) + PALETTE.tobytes()
    for box, pixels in frames:
        out += b"\x21\xf9\x04" + struct.pack("<BHBB", 4 | (transparent is not None), 10, transparent or 0, 0)
        out += b"," + struct.pack("<HHHHB", *box, 0) + b"\x07"
        # Without compression: codes of 8 bits, of which 128 clears the table before they would need 9, and 129 ends.
        codes = b"".join(b"\x80" + pixels[i : i + 100] for i in range(0, len(pixels), 100)) + b"\x81"
        out += bytes([len(codes)]) + codes + b"\0"
    return out + b";"


def saved(pixels: np.ndarray, kind: str, mode: str | None = None, **how) -> bytes:
    """What Pillow writes of pixels."""
    file = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(file, kind, **how)
    return file.getvalue()


def in_two(pixels: np.ndarray, kind: str, **how) -> bytes:
    """An animation of pixels, and then their negative."""
    return saved(pixels, kind, save_all=True, append_images=[Image.fromarray(255 - pixels)], **how)


# --- all of them ------------------------------------------------------------------------------------------------------

FLAT = np.full((SIDE, SIDE, 3), (200, 100, 50), np.uint8)
PLTE = (b"PLTE", PALETTE.tobytes())
KEPT = [[255, 0, 255, 0], [255, 128, 0, 64]]  # alphas of the palette's colours
INNER = ((2, 1, 4, 5), bytes(INDICES[1:6, 2:6].tobytes()))  # a frame that is smaller than its GIF
inner = np.zeros((SIDE, SIDE), bool)
inner[1:6, 2:6] = True
NO_RANGE = "numbers, which have no range of their own"
NO_SIGN = "integers of 32 bits or with a sign, which have no range of their own"
COLORMAP = {320: [level * 257 for band in range(3) for level in [*PALETTE[:, band].tolist(), *[0] * 252]]}
YELLOW = np.full((SIDE, SIDE, 3), (255, 255, 0), np.uint8)
RGB16 = np.stack([DEEP, DEEP.T, 65535 - DEEP], -1)


def _grey_pngs() -> list[Odd]:
    dark = (PLACE * 3 + 11).astype(np.uint16)  # 11 to 200 of 65,535
    return [
        Odd("grey 1.png", png(1, 0, packed(PLACE % 2, 1)), of_depth(PLACE % 2, 1)),
        Odd("grey 2.png", png(2, 0, packed(PLACE % 4, 2)), of_depth(PLACE % 4, 3)),
        Odd("grey 4.png", png(4, 0, packed(PLACE % 16, 4)), of_depth(PLACE % 16, 15)),
        Odd("grey 8.png", png(8, 0, rows(BYTES)), grey(BYTES)),
        Odd("grey 16.png", png(16, 0, rows(DEEP, ">u2")), of_depth(DEEP, 65535)),
        Odd("grey 16, dark.png", png(16, 0, rows(dark, ">u2")), grey(dark >= 129)),  # 129 is half of a level, 128.5
        Odd("grey 16 in two.png", png(16, 4, rows(np.stack([DEEP, DEEP_ALPHA], -1), ">u2")),
            white_where(ALPHA == 0, grey(DEEP >> 8))),
        *(
            Odd(
                f"grey {bits}, one white.png",
                png(bits, 0, packed(PLACE % 2**bits, bits), (b"tRNS", numbers(hidden))),
                white_where(PLACE % 2**bits == hidden, of_depth(PLACE % 2**bits, 2**bits - 1)),
            )
            for bits, hidden in ((1, 0), (2, 2), (4, 12), (8, 12))
        ),
        Odd("grey 16, one white.png", png(16, 0, rows(DEEP, ">u2"), (b"tRNS", numbers(1055))),
            white_where(DEEP == 1055, of_depth(DEEP, 65535))),
    ]  # fmt: skip


def _colour_pngs() -> list[Odd]:
    colour = RGB[3, 4]
    deep = RGB16[3, 4]
    half = np.where(PLACE % 3, 128, 255)
    indexed = [
        Odd(f"palette, {name}.png", png(8, 3, rows(INDICES), PLTE, (b"tRNS", bytes(alphas))),
            on_white(PALETTE[INDICES], np.array(alphas)[INDICES]), 1)
        for name, alphas in (("one white", [255, 0, 255, 255]), ("two white", KEPT[0]), ("alphas", KEPT[1]))
    ]  # fmt: skip
    turned = (np.rot90(RGB, -1), np.rot90(RGB), RGB[::-1, ::-1], RGB[:, ::-1], RGB.transpose(1, 0, 2))
    exifs = [
        Odd(f"turned {orientation}.png", png(8, 2, rows(RGB), (b"eXIf", exif(orientation))), want)
        for orientation, want in zip((6, 8, 3, 2, 5), turned, strict=True)
    ]
    behind = png(8, 2, rows(RGB), after=((b"eXIf", exif(6)),))
    mixed = np.concatenate([RGB, half[..., None].astype(np.uint8)], -1)
    return [
        *indexed,
        *exifs,
        Odd("turned behind.png", behind, turned[0]),
        Odd("turned to nowhere.png", png(8, 2, rows(RGB), (b"eXIf", b"not EXIF at all")), RGB),
        Odd("palette 2.png", png(2, 3, packed(INDICES, 2), PLTE), PALETTE[INDICES]),
        Odd("rgb.png", png(8, 2, rows(RGB)), RGB),
        Odd("rgb, woven.png", png(8, 2, adam7(RGB), interlaced=1), RGB),
        Odd("rgb, of a profile.png", png(8, 2, rows(RGB), (b"iCCP", b"x\0\0" + zlib.compress(b"none"))), RGB),
        Odd("rgb, one white.png", png(8, 2, rows(RGB), (b"tRNS", numbers(*colour.tolist()))),
            white_where((colour == RGB).all(-1), RGB)),
        Odd("rgb 16.png", png(16, 2, rows(RGB16, ">u2")), RGB16 >> 8),  # as everywhere, the higher byte
        Odd("rgb 16, one white.png", png(16, 2, rows(RGB16, ">u2"), (b"tRNS", numbers(*deep.tolist()))),
            white_where((deep == RGB16).all(-1), RGB16 >> 8)),
        Odd("grey and alpha.png", png(8, 4, rows(np.stack([BYTES, half], -1))), on_white(grey(BYTES), half), 1),
        Odd("rgba.png", png(8, 6, rows(mixed)), on_white(RGB, half), 1),
        Odd("rgba 16.png", png(16, 6, rows(np.concatenate([RGB16, DEEP_ALPHA[..., None]], -1), ">u2")),
            white_where(ALPHA == 0, RGB16 >> 8)),
        Odd("moving.png", in_two(RGB, "PNG"), RGB),
    ]  # fmt: skip


def _tiffs() -> list[Odd]:
    twelve = PLACE * 65
    half = np.where(PLACE % 2, 128, 0)  # what is multiplied by it is at most so large
    times_half = np.stack([BYTES // 2 * (half > 0), half], -1)
    cyan = np.full((SIDE, SIDE, 4), (255, 0, 0, 0))
    planes = [line for band in range(3) for line in rows(RGB[..., band])]
    numbers32 = rows(np.linspace(0, 1, 64).reshape(SIDE, SIDE), "<f4")
    red = np.full((SIDE, SIDE, 3), (100, 128, 178))  # Y, Cb, Cr
    return [
        Odd("grey 16.tif", tiff(rows(DEEP, "<u2"), (16,), 1), of_depth(DEEP, 65535)),
        Odd("grey 16, big-endian.tif", tiff(rows(DEEP, ">u2"), (16,), 1, big=True), of_depth(DEEP, 65535)),
        Odd("grey 16, negative.tif", tiff(rows(DEEP, "<u2"), (16,), 0), of_depth(65535 - DEEP, 65535)),
        Odd("grey 8, negative.tif", tiff(rows(BYTES), (8,), 0), grey(255 - BYTES)),
        Odd("grey 12.tif", tiff(packed(twelve, 12), (12,), 1), of_depth(twelve, 4095)),
        Odd("grey 16, turned.tiff", tiff(rows(DEEP, "<u2"), (16,), 1, more={274: [6]}),
            of_depth(np.rot90(DEEP, -1), 65535)),
        Odd("grey times alpha.tif", tiff(rows(times_half), (8, 8), 1, more={338: [1]}),
            grey(times_half[..., 0] + 255 - half), 1),
        Odd("grey and alpha.tif", tiff(rows(np.stack([BYTES, half], -1)), (8, 8), 1, more={338: [2]}),
            on_white(grey(BYTES), half), 1),
        Odd("palette and alpha.tif", tiff(rows(np.stack([INDICES, ALPHA], -1)), (8, 8), 3, more={338: [2]} | COLORMAP),
            white_where(ALPHA == 0, PALETTE[INDICES])),
        Odd("rgb and more.tif", tiff(rows(np.dstack([RGB, ALPHA])), (8,) * 4, 2, more={338: [0]}), RGB),
        Odd("rgb in planes.tif", tiff(planes, (8,) * 3, 2, strips=3, more={284: [2]}), RGB),
        Odd("rgb 16.tif", tiff(rows(RGB16, "<u2"), (16,) * 3, 2), RGB16 >> 8),
        Odd("pages.tif", tiff(rows(RGB), (8,) * 3, 2, after=1), RGB),
        Odd("cmyk.tif", tiff(rows(cyan), (8,) * 4, 5), np.full((SIDE, SIDE, 3), (0, 255, 255), np.uint8)),
        # R = Y + 1.402 (Cr - 128), G = Y - 0.714 (Cr - 128), B = Y
        Odd("ycbcr.tif", tiff(rows(red), (8,) * 3, 6), np.full((SIDE, SIDE, 3), (170, 64, 100), np.uint8), 1),
        # L* = 100 * 128 / 255 is Y = 0.186, which sRGB's curve makes 0.468 of 255
        Odd("lab.tif", tiff(rows(np.full((SIDE, SIDE, 3), (128, 0, 0))), (8,) * 3, 8), grey(np.full((8, 8), 119)), 1),
        Odd("floats.tif", tiff(numbers32, (32,), 1, more={339: [3]}), None, reason=f"floating-point {NO_RANGE}"),
        Odd("signed 16.tif", tiff(rows(DEEP, "<i2"), (16,), 1, more={339: [2]}), None, reason=NO_SIGN),
        Odd("integers 32.tif", tiff(rows(PLACE, "<i4"), (32,), 1, more={339: [2]}), None, reason=NO_SIGN),
    ]  # fmt: skip


def _others() -> list[Odd]:
    ten = PLACE * 16 + 3  # to 1011 of 1023
    ink = 1 - PLACE % 2  # PBM's 1 is black
    text = " ".join(map(str, ten.flatten()))
    behind = np.full((SIDE, SIDE, 3), PALETTE[0])
    colours = np.pad(PALETTE[:, ::-1], ((0, 0), (0, 1))).tobytes()  # BMP's: blue, green, red, nothing
    fives = np.dstack([PLACE // 2, PLACE.T // 2, 31 - PLACE // 2])
    short = (fives[..., 0] << 10) | (fives[..., 1] << 5) | fives[..., 2]
    float_map = b"Pf 8 8 -1.0\n" + b"".join(rows(np.full((SIDE, SIDE), 0.5), "<f4"))
    rgba = np.dstack([RGB, ALPHA])
    return [
        Odd("bits.ppm", b"P4 8 8\n" + b"".join(packed(ink, 1)), of_depth(PLACE % 2, 1)),
        Odd("grey of 1023.pgm", b"P5 8 8 1023\n" + b"".join(rows(ten, ">u2")), of_depth(ten, 1023)),
        Odd("grey of 1023, in letters.pgm", f"P2 8 8 1023\n{text}\n".encode(), of_depth(ten, 1023)),
        Odd("grey of 65535.pgm", b"P5 8 8 65535\n" + b"".join(rows(DEEP, ">u2")), of_depth(DEEP, 65535)),
        Odd("grey of 63.pgm", b"P5 8 8 63\n" + b"".join(rows(PLACE)), of_depth(PLACE, 63)),
        Odd("rgb of 1023.ppm", b"P6 8 8 1023\n" + b"".join(rows(np.dstack([ten] * 3), ">u2")), of_depth(ten, 1023)),
        Odd("floats.pgm", float_map, None, reason=f"floating-point {NO_RANGE}"),
        Odd("whole.gif", gif([((0, 0, 8, 8), INDICES.tobytes()), INNER]), PALETTE[INDICES]),
        Odd("inner.gif", gif([INNER]), np.where(inner[..., None], PALETTE[INDICES], behind).astype(np.uint8)),
        Odd("inner, one white.gif", gif([INNER], 2), white_where(~inner | (INDICES == 2), PALETTE[INDICES])),
        Odd("one white.gif", gif([((0, 0, 8, 8), INDICES.tobytes())], 0), white_where(INDICES == 0, PALETTE[INDICES])),
        Odd("1.bmp", bmp(1, [row + bytes(3) for row in packed(PLACE % 2, 1)], colours[:8]), PALETTE[PLACE % 2]),
        Odd("4.bmp", bmp(4, packed(INDICES, 4), colours), PALETTE[INDICES]),
        Odd("8.bmp", bmp(8, rows(INDICES), colours), PALETTE[INDICES]),
        Odd("16.bmp", bmp(16, rows(short, "<u2")), np.floor(fives * 255 / 31 + 0.5).astype(np.uint8), 1),
        Odd("24.bmp", bmp(24, rows(RGB[..., ::-1])), RGB),
        Odd("32.bmp", bmp(32, rows(np.dstack([RGB[..., ::-1], ALPHA]))), RGB),
        Odd("clear.webp", saved(rgba, "WEBP", "RGBA", lossless=True, exact=True), white_where(ALPHA == 0, RGB)),
        Odd("moving.webp", in_two(RGB, "WEBP", lossless=True), RGB),
        Odd("flat.avif", saved(FLAT, "AVIF", "RGB", quality=100), FLAT, 3),
        Odd("cmyk.jpg", saved(255 - YELLOW, "JPEG", "CMYK", quality=100), 255 - YELLOW, 3),  # written as its negative
        Odd("grey.jpg", saved(FLAT[..., 1], "JPEG", "L", quality=100), grey(FLAT[..., 1]), 1),
        Odd("turned.jpg", saved(FLAT, "JPEG", "RGB", quality=100, exif=b"Exif\0\0" + exif(6)), FLAT, 3),
    ]  # fmt: skip


def _unreadable() -> list[Odd]:
    whole = png(8, 2, rows(np.random.default_rng(0).integers(0, 256, (64, 64, 3)), "u1"), size=(64, 64))
    photograph = saved(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8), "JPEG", "RGB")
    broken = bytearray(png(8, 0, rows(BYTES)))
    broken[-30] ^= 255
    large = "pixels, more than the 67108864 that are read"
    return [
        Odd("nothing.png", b"", None, reason="not an image of a known format"),
        Odd("text.jpg", b"no image\n", None, reason="not an image of a known format"),
        Odd("cut.png", whole[: len(whole) // 2], None, reason="truncated"),
        Odd("cut.jpg", photograph[: len(photograph) // 2], None, reason="truncated"),
        Odd("damaged.png", bytes(broken), None, reason=""),
        Odd("large.png", png(8, 0, [bytes(9)], size=(8193, 8192)), None, reason=f"it has 8193 x 8192 {large}"),
        Odd("larger.png", png(1, 0, [bytes(9)], size=(12000, 12000)), None, reason=f"it has 12000 x 12000 {large}"),
        Odd("bomb.png", png(1, 0, [bytes(9)], size=(60000, 50000)), None, reason=f"it has 60000 x 50000 {large}"),
        Odd("bomb.gif", b"GIF89a\xff\xff\xff\xff" + gif([INNER])[10:], None, reason=f"it has 65535 x 65535 {large}"),
    ]  # fmt: skip


def odd_images() -> list[Odd]:
    """All of them."""
    found = [*_grey_pngs(), *_colour_pngs(), *_tiffs(), *_others(), *_unreadable()]
    assert len({odd.name for odd in found}) == len(found)
    return found


def write_odd_images(folder: Path) -> Path:
    """Write all of them as the class ``odd`` of a folder of class folders; gives the folder."""
    (folder / "odd").mkdir(parents=True)
    for odd in odd_images():
        (folder / "odd" / odd.name).write_bytes(odd.content)
    return folder


def check_pixels(found: dict[str, np.ndarray | str]) -> None:
    """Hold what some way of reading gave against all of them.

    Args:
        found: by file name, uint8 [8, 8, 3], or the line that says why there are none.
    """
    wrong = []
    for odd in odd_images():
        got = found.get(odd.name)
        if got is None:
            wrong.append(f"{odd.name}: neither pixels nor a reason")
        elif odd.pixels is None and not (isinstance(got, str) and odd.reason in got and "\n" not in got):
            wrong.append(f"{odd.name}: {got!r} instead of {odd.reason!r}")
        elif odd.pixels is not None and (isinstance(got, str) or got.shape != odd.pixels.shape):
            wrong.append(f"{odd.name}: {got if isinstance(got, str) else got.shape} instead of pixels")
        elif odd.pixels is not None and not isinstance(got, str):
            off = np.abs(got.astype(int) - odd.pixels).max()
            if off > odd.within:
                wrong.append(f"{odd.name}: {off} levels off")
    extra = set(found) - {odd.name for odd in odd_images()}
    assert not wrong and not extra, "\n".join([*wrong, *sorted(extra)])
