"""Decoding and encoding of image files, and fitting of images to the network input.

Pillow identifies files and can decode them all. Ordinary, complete JPEG and PNG files go through OpenCV instead, which
returns the same pixels faster, but silently returns gray pixels for truncated files.
"""

import warnings
from io import BytesIO
from pathlib import Path
from zlib import crc32

import cv2
import numpy as np
from PIL import Image

from utils.detection.letterbox import Fit, fit_to_input
from utils.system.diagnostics import Diagnostics
from utils.system.errors import FileError, SkippableError
from utils.system.files import check_regular_file, read_file

MAX_PIXELS = 120_000_000  # enough for 108-megapixel phone cameras; decoding takes less than 1 GB
MAX_BYTES = 500_000_000  # size limit of an image file
FORMATS = ("JPEG", "PNG", "BMP", "GIF", "WEBP", "TIFF")  # JPEG includes MPO; others, such as EPS, are never opened
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"}
PADDING = 114  # gray level around a letterboxed image
ORIENTATION = 0x0112  # EXIF tag
END_OF_JPEG = b"\xff\xd9"
TAILS = (bytes(64), b"\xaa" * 64)  # two continuations that decode differently if image data are missing
LOSSLESS_MODES = {"1", "L", "P", "RGB", "RGBX", "YCbCr"}  # Pillow's modes that are RGB, or convert to it without loss
LOSSY_MODES = {
    "CMYK": "has CMYK colors, which are converted to RGB",
    **dict.fromkeys(("LA", "La", "PA", "RGBA", "RGBa"), "has transparency, which is ignored"),
    **dict.fromkeys(("I;16", "I;16L", "I;16B", "I;16N"), "has 16 bits per pixel, which are scaled to 8"),
}
NO_END_MARKER = "has no end marker, although no pixels are missing"
UNREADABLE = "is not a readable image; it may be truncated, damaged or of another type"

warnings.filterwarnings("ignore", module="PIL")  # this module reports problems itself


def read_image(path: str | Path) -> np.ndarray:
    """Read an image file as uint8 RGB (H, W, 3), turned upright by its EXIF orientation."""
    return decode_image(read_encoded(path), path)


def read_encoded(path: str | Path) -> bytes:
    return read_file(path, MAX_BYTES)


def write_image(path: str | Path, image: np.ndarray) -> None:
    """Write a uint8 RGB image (H, W, 3) in the format of the path's suffix, which must be in IMAGE_SUFFIXES."""
    path = Path(path)
    path.write_bytes(encode_image(image, path.suffix.lower()))


def encode_image(image: np.ndarray, suffix: str) -> bytes:
    """Encode a uint8 RGB image (H, W, 3) in the format of a suffix such as .jpg."""
    _, encoded = cv2.imencode(suffix, cv2.cvtColor(image, cv2.COLOR_RGB2BGR))
    return encoded.tobytes()


def decode_image(encoded: bytes, path: str | Path) -> np.ndarray:
    """Decode the contents of the image file `path` to uint8 RGB (H, W, 3), turned upright by its EXIF orientation."""
    return turn_upright(*decode_stored(encoded, path, Diagnostics()))


def decode_stored(encoded: bytes, path: str | Path, diagnostics: Diagnostics) -> tuple[np.ndarray, int]:
    """Decode an image file: uint8 RGB (H, W, 3) as stored, and the EXIF orientation, 1 to 8; raises FileError."""
    if not encoded:
        raise SkippableError(path, "is empty")
    try:
        with Image.open(BytesIO(encoded), formats=FORMATS) as picture:
            if picture.width * picture.height > MAX_PIXELS:
                raise Image.DecompressionBombError
            chunks = png_chunks(encoded, path) if picture.format == "PNG" else set()
            image = decode_with_opencv(encoded, picture, chunks)
            if image is None:
                image = decode_with_pillow(encoded, picture, path, diagnostics)
            if picture.format == "PNG" and b"IEND" not in chunks:
                diagnostics.record_repair(path, NO_END_MARKER)
            return image, read_orientation(picture, chunks)
    except FileError:
        raise
    except Image.DecompressionBombError:
        raise SkippableError(path, f"has more than {MAX_PIXELS // 1_000_000} million pixels; make it smaller") from None
    except Exception:  # damaged files cause exceptions of any type in Pillow
        raise SkippableError(path, UNREADABLE) from None


def decode_with_opencv(encoded: bytes, picture: Image.Image, chunks: set[bytes]) -> np.ndarray | None:
    """Decode a complete 8-bit JPEG, or PNG without transparency, animation and EXIF; None for any other file."""
    complete = {"JPEG": encoded.endswith(END_OF_JPEG), "MPO": encoded.endswith(END_OF_JPEG), "PNG": b"IEND" in chunks}
    special = not complete.get(picture.format) or picture.mode not in ("L", "RGB") or "transparency" in picture.info
    if special or not chunks.isdisjoint((b"acTL", b"eXIf")):
        return None
    image = cv2.imdecode(np.frombuffer(encoded, np.uint8), cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION)
    return image if image is not None and image.shape == (picture.height, picture.width, 3) else None


def decode_with_pillow(encoded: bytes, picture: Image.Image, path: str | Path, diagnostics: Diagnostics) -> np.ndarray:
    if picture.mode not in LOSSLESS_MODES | LOSSY_MODES.keys():
        raise FileError(path, f"has pixels of type {picture.mode}; save it as an 8-bit image")
    if picture.format != "MPO" and getattr(picture, "is_animated", False):
        diagnostics.record_repair(path, "has several frames; the first is used")
        picture.seek(0)
    try:
        picture.load()
    except OSError:
        if picture.format not in ("JPEG", "MPO"):
            raise
        picture = load_unterminated_jpeg(encoded, path)
        diagnostics.record_repair(path, NO_END_MARKER)
    mode = "RGBA" if picture.mode == "P" and "transparency" in picture.info else picture.mode
    if mode in LOSSY_MODES:
        diagnostics.record_repair(path, LOSSY_MODES[mode])
    if mode.startswith("I;16"):
        gray = (np.asarray(picture) >> 8).astype(np.uint8)
        return np.repeat(gray[:, :, None], 3, axis=2)
    return np.array(picture.convert("RGB"))


def load_unterminated_jpeg(encoded: bytes, path: str | Path) -> Image.Image:
    """Load a JPEG file without an end marker; raises SkippableError if pixels are missing too."""
    checksums = set()  # all pixels are there if they do not depend on what follows the end of the file
    for tail in TAILS:
        picture = Image.open(BytesIO(encoded + tail + END_OF_JPEG), formats=FORMATS)
        picture.load()
        checksums.add(crc32(picture.tobytes()))
    if len(checksums) > 1:
        raise SkippableError(path, "is truncated and lacks some of its pixels")
    return picture


def png_chunks(encoded: bytes, path: str | Path) -> set[bytes]:
    """The types of the complete chunks in a PNG file; raises SkippableError for a wrong checksum."""
    view, types, start = memoryview(encoded), set(), 8
    while start + 12 <= len(view) and b"IEND" not in types:
        end = start + 12 + int.from_bytes(view[start : start + 4])
        if end > len(view):
            break
        if crc32(view[start + 4 : end - 4]) != int.from_bytes(view[end - 4 : end]):
            raise SkippableError(path, "is damaged: it has a wrong checksum (CRC)")
        types.add(bytes(view[start + 4 : start + 8]))
        start = end
    return types


def upright_size(path: Path) -> tuple[int, int]:
    """Height and width of an image file as turned by EXIF."""
    (height, width), orientation = read_header(path)
    return (width, height) if orientation > 4 else (height, width)


def read_header(path: Path) -> tuple[tuple[int, int], int]:
    """Height and width of an image file as stored, and its EXIF orientation; raises FileError."""
    check_regular_file(path, MAX_BYTES)
    try:
        with Image.open(path, formats=FORMATS) as picture:
            return (picture.height, picture.width), read_orientation(picture, {b"eXIf"})
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        raise FileError(path, "is not a readable image") from None


def read_orientation(picture: Image.Image, chunks: set[bytes]) -> int:
    """The EXIF orientation; 1 (upright) if it is missing or invalid."""
    if picture.format == "PNG" and b"eXIf" not in chunks:  # Pillow would decode the image to search further
        return 1
    try:
        value = picture.getexif().get(ORIENTATION, 1)
    except Exception:  # damaged EXIF causes exceptions of any type, and the pixels are still usable
        return 1
    return int(value) if value in range(1, 9) else 1


def turn_upright(image: np.ndarray, orientation: int) -> np.ndarray:
    """Apply an EXIF orientation, 1 to 8, to an image (H, W, 3)."""
    if orientation in (5, 6, 7, 8):
        image = image.transpose(1, 0, 2)
    if orientation in (2, 3, 6, 7):
        image = image[:, ::-1]
    if orientation in (3, 4, 7, 8):
        image = image[::-1]
    return np.ascontiguousarray(image)


def fit_image(image: np.ndarray, input_size: tuple[int, int], letterbox: bool) -> tuple[np.ndarray, Fit]:
    """Resize a uint8 image (H, W, 3) to (*input_size, 3), stretched or letterboxed; also returns the placement."""
    fit, inner_size = fit_to_input(image.shape[:2], input_size, letterbox)
    shrinks = inner_size[0] < image.shape[0] or inner_size[1] < image.shape[1]
    inner = cv2.resize(image, inner_size[::-1], interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)
    if inner_size == tuple(input_size):
        return inner, fit
    canvas = np.full((*input_size, 3), PADDING, dtype=np.uint8)
    top, left = int(fit.offset_y), int(fit.offset_x)
    canvas[top : top + inner_size[0], left : left + inner_size[1]] = inner
    return canvas, fit
