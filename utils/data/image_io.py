"""Image files into pixels, whatever is in them: the only place that decodes images.

Pillow tells what a file is and decodes it. Ordinary JPEG and PNG files that are whole go through OpenCV, which gives
the same pixels in less time, but also gives gray ones for a file that was cut off, without an error.
"""

import warnings
from io import BytesIO
from pathlib import Path
from zlib import crc32

import cv2
import numpy as np
from PIL import Image

from utils.detection.letterbox import Fit, fit_to_input
from utils.system.diagnostics import Diagnostics, FileError, SkippableError
from utils.system.files import read_file

MAX_PIXELS = 120_000_000  # of an image; a phone's 108 megapixels fit, and decoding one stays under 1 GB
MAX_BYTES = 500_000_000  # of an image file
FORMATS = ("JPEG", "PNG", "BMP", "GIF", "WEBP", "TIFF")  # JPEG with MPO in it; others, such as EPS, are never opened
ORIENTATION = 0x0112  # the EXIF tag
END_OF_JPEG = b"\xff\xd9"
TAILS = (bytes(64), b"\xaa" * 64)  # what a decoder could take for image data where some is missing
PLAIN = {"1", "L", "P", "RGB", "RGBX", "YCbCr"}  # Pillow's modes that are RGB, or exactly become it
CONVERTED = {
    "CMYK": "has CMYK colours; they are converted to RGB",
    **dict.fromkeys(("LA", "La", "PA", "RGBA", "RGBa"), "has transparency; its colours alone count"),
    **dict.fromkeys(("I;16", "I;16L", "I;16B", "I;16N"), "has 16 bits of gray; they are scaled to 8"),
}
NO_END = "has no end marker, but all its pixels"
UNREADABLE = "is not an image that can be read; it may be empty, cut off or of another type"

warnings.filterwarnings("ignore", module="PIL")  # what is wrong is said here


def read_encoded(path: str | Path) -> bytes:
    """The bytes of an image file."""
    return read_file(path, MAX_BYTES)


def decode_image(encoded: bytes, path: str | Path) -> np.ndarray:
    """The bytes of the image file `path` -> uint8 RGB (H, W, 3), turned upright by its EXIF orientation."""
    return turn_upright(*decode_stored(encoded, path, Diagnostics()))


def decode_stored(encoded: bytes, path: str | Path, diagnostics: Diagnostics) -> tuple[np.ndarray, int]:
    """The bytes of the image file `path` -> uint8 RGB (H, W, 3) as it is stored, and its EXIF orientation, 1 to 8.

    Raises SkippableError where the pixels are not all there, and FileError for a kind of pixels that has no place in 8 bits.
    """
    if not encoded:
        raise SkippableError(path, "is empty")
    try:
        with Image.open(BytesIO(encoded), formats=FORMATS) as picture:
            if picture.width * picture.height > MAX_PIXELS:
                raise Image.DecompressionBombError
            chunks = png_chunks(encoded, path) if picture.format == "PNG" else set()
            image = decode_ordinary(encoded, picture, chunks)
            if image is None:
                image = decode_other(encoded, picture, path, diagnostics)
            if picture.format == "PNG" and b"IEND" not in chunks:
                diagnostics.record_repair(path, NO_END)
            return image, read_orientation(picture, chunks)
    except FileError:
        raise
    except Image.DecompressionBombError:
        raise SkippableError(path, f"has more than {MAX_PIXELS // 1_000_000} million pixels; make it smaller") from None
    except Exception:  # damaged files lead Pillow into errors of any type
        raise SkippableError(path, UNREADABLE) from None


def decode_ordinary(encoded: bytes, picture: Image.Image, chunks: set[bytes]) -> np.ndarray | None:
    """By OpenCV, a whole JPEG or PNG file of 8 bits without anything special; None for another."""
    whole = {"JPEG": encoded.endswith(END_OF_JPEG), "MPO": encoded.endswith(END_OF_JPEG), "PNG": b"IEND" in chunks}
    special = not whole.get(picture.format) or picture.mode not in ("L", "RGB") or "transparency" in picture.info
    if special or not chunks.isdisjoint((b"acTL", b"eXIf")):
        return None
    image = cv2.imdecode(np.frombuffer(encoded, np.uint8), cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION)
    return image if image is not None and image.shape == (picture.height, picture.width, 3) else None


def decode_other(encoded: bytes, picture: Image.Image, path: str | Path, diagnostics: Diagnostics) -> np.ndarray:
    """By Pillow."""
    if picture.mode not in PLAIN | CONVERTED.keys():
        raise FileError(path, f"has pixels of the kind {picture.mode}; save it as an image of 8 bits")
    if picture.format != "MPO" and getattr(picture, "is_animated", False):
        diagnostics.record_repair(path, "has several frames; the first counts")
        picture.seek(0)
    try:
        picture.load()
    except OSError:
        if picture.format not in ("JPEG", "MPO"):
            raise
        picture = load_unended(encoded, path)
        diagnostics.record_repair(path, NO_END)
    mode = "RGBA" if picture.mode == "P" and "transparency" in picture.info else picture.mode
    if mode in CONVERTED:
        diagnostics.record_repair(path, CONVERTED[mode])
    if mode.startswith("I;16"):
        gray = (np.asarray(picture) >> 8).astype(np.uint8)
        return np.repeat(gray[:, :, None], 3, axis=2)
    return np.array(picture.convert("RGB"))


def load_unended(encoded: bytes, path: str | Path) -> Image.Image:
    """A JPEG file without its end marker; raises SkippableError where pixels are missing too.

    They are all there if what follows makes no difference to them.
    """
    seen = set()
    for tail in TAILS:
        picture = Image.open(BytesIO(encoded + tail + END_OF_JPEG), formats=FORMATS)
        picture.load()
        seen.add(crc32(picture.tobytes()))
    if len(seen) > 1:
        raise SkippableError(path, "is cut off, so that some of its pixels are missing")
    return picture


def png_chunks(encoded: bytes, path: str | Path) -> set[bytes]:
    """The kinds of chunks of a PNG file, as far as they are whole; raises SkippableError where a checksum is wrong.

    Decoders do not look at those of the pixels.
    """
    view, kinds, start = memoryview(encoded), set(), 8
    while start + 12 <= len(view) and b"IEND" not in kinds:
        end = start + 12 + int.from_bytes(view[start : start + 4])
        if end > len(view):
            break
        if crc32(view[start + 4 : end - 4]) != int.from_bytes(view[end - 4 : end]):
            raise SkippableError(path, "is damaged: a checksum in it (CRC) is wrong")
        kinds.add(bytes(view[start + 4 : start + 8]))
        start = end
    return kinds


def read_orientation(picture: Image.Image, chunks: set[bytes]) -> int:
    """The EXIF orientation, 1 (upright) where there is none, or none that can be."""
    if picture.format == "PNG" and b"eXIf" not in chunks:  # looking for more would decode it
        return 1
    try:
        value = picture.getexif().get(ORIENTATION, 1)
    except Exception:  # so does damaged EXIF, which is no reason to miss the picture
        return 1
    return int(value) if value in range(1, 9) else 1


def turn_upright(image: np.ndarray, orientation: int) -> np.ndarray:
    """An image (H, W, 3) as its EXIF orientation, 1 to 8, wants it seen."""
    if orientation in (5, 6, 7, 8):
        image = image.transpose(1, 0, 2)
    if orientation in (2, 3, 6, 7):
        image = image[:, ::-1]
    if orientation in (3, 4, 7, 8):
        image = image[::-1]
    return np.ascontiguousarray(image)


def file_size(path: Path, upright: bool = False) -> tuple[int, int]:
    """Height and width of an image file as it is stored, or as EXIF turns it."""
    (height, width), orientation = file_header(path, upright)
    return (width, height) if orientation > 4 else (height, width)


def is_turned_unseen(path: Path) -> bool:
    """Whether EXIF mirrors or turns an image file in a way that its size does not tell."""
    (height, width), orientation = file_header(path)
    return orientation > 1 and (orientation <= 4 or height == width)


def file_header(path: Path, orientation: bool = True) -> tuple[tuple[int, int], int]:
    """Height and width of an image file as it is stored, and its EXIF orientation, 1 if that is not asked for."""
    try:
        with Image.open(path, formats=FORMATS) as picture:
            return (picture.height, picture.width), read_orientation(picture, {b"eXIf"}) if orientation else 1
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        raise FileError(path, "is not an image that can be read") from None


PADDING = 114  # the gray around a letterboxed image


def read_image(path: str | Path) -> np.ndarray:
    """An image file -> uint8 RGB (H, W, 3), turned upright by its EXIF orientation."""
    return decode_image(read_encoded(path), path)


def write_image(path: str | Path, image: np.ndarray) -> None:
    """uint8 RGB (H, W, 3) -> a file, in the format of its suffix, which must be one of IMAGE_SUFFIXES."""
    path = Path(path)
    path.write_bytes(encode_image(image, path.suffix.lower()))


def encode_image(image: np.ndarray, suffix: str) -> bytes:
    """uint8 RGB (H, W, 3) -> what a file of this suffix holds."""
    _, encoded = cv2.imencode(suffix, cv2.cvtColor(image, cv2.COLOR_RGB2BGR))
    return encoded.tobytes()


def fit_image(image: np.ndarray, input_size: tuple[int, int], letterbox: bool) -> tuple[np.ndarray, Fit]:
    """uint8 (H, W, 3) -> uint8 (*input_size, 3), and how it lies there."""
    fit, inner_size = fit_to_input(image.shape[:2], input_size, letterbox)
    shrinks = inner_size[0] < image.shape[0] or inner_size[1] < image.shape[1]
    inner = cv2.resize(image, inner_size[::-1], interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)
    if inner_size == tuple(input_size):
        return inner, fit
    canvas = np.full((*input_size, 3), PADDING, dtype=np.uint8)
    top, left = int(fit.offset_y), int(fit.offset_x)
    canvas[top : top + inner_size[0], left : left + inner_size[1]] = inner
    return canvas, fit
