"""Image files in and out."""

import contextlib
import io
import os
import warnings
from collections.abc import Iterator
from typing import BinaryIO, Literal, NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile
from PIL.TiffImagePlugin import TiffImageFile

from varedit_jax.colors import to_srgb
from varedit_jax.errors import UserError
from varedit_jax.jpeg import check_scans
from varedit_jax.png import without_large_metadata
from varedit_jax.storage.disk import explained, is_machine_error, read_explained, reason
from varedit_jax.storage.files import write_bytes
from varedit_jax.storage.paths import PathLike, is_remote, resolve
from varedit_jax.storage.pointers import HEAD_BYTES, what_instead

ImageSource = PathLike | BinaryIO | Image.Image | np.ndarray


class Limits(NamedTuple):
    """Sizes of images that are opened, in pixels."""

    max_pixels: int = 64_000_000
    min_side: int = 1
    max_side: int = 2**31 - 1
    max_ratio: float = float("inf")  # long side over short side


_DEFAULT = Limits()


# Reasons why an image cannot be used.
Fault = Literal[
    "empty file",
    "not an image",
    "cut short",
    "damaged image",
    "too many pixels",
    "absurd size",
    "several frames",
    "unknown colors",
]


class ImageError(UserError):
    """An image that cannot be used, in one sentence with its name; and in short, where thousands are listed."""

    def __init__(self, fault: Fault, sentence: str, detail: str = "") -> None:
        super().__init__(sentence)
        self.fault, self.detail = fault, detail


# Kinds that are read. PIL knows more, but runs other programs or fetches other files for some of them.
_READABLE = (
    "PNG", "JPEG", "MPO", "WEBP", "BMP", "GIF", "TIFF", "AVIF", "JPEG2000", "PPM", "TGA", "ICO", "PCX"
)  # fmt: skip

_SLOW = {"JPEG2000": 4}  # kinds that take so much longer than others; as much fewer pixels of them are read
_MAX_PIECES = 100_000  # strips or tiles of an image
_MAX_COUNTED = 100  # frames

# Modes whose pixels a color profile may describe, and what others become.
_COLORS = {"1": "L", "L": "L", "LA": "L", "CMYK": "CMYK"}

# Options of each format that `write_image` can write.
_FORMATS: dict[str, tuple[str, dict[str, int]]] = {
    ".png": ("PNG", {}),
    ".jpg": ("JPEG", {"quality": 95, "subsampling": 0}),
    ".jpeg": ("JPEG", {"quality": 95, "subsampling": 0}),
    ".webp": ("WEBP", {"quality": 95}),
    ".bmp": ("BMP", {}),
    ".tif": ("TIFF", {}),
    ".tiff": ("TIFF", {}),
}

_EXIF_ORIENTATION = 0x0112
_TIFF_BITS = 0x0102  # of each sample
_UPRIGHT = {  # what undoes each value of the tag; 1 is upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def read_image(source: ImageSource, max_pixels: int = _DEFAULT.max_pixels) -> np.ndarray:
    """An image as uint8 [H, W, 3], RGB, from a file name, an open binary file, a PIL image or an array.

    EXIF orientation is applied, transparency is laid on white; palette, gray (1, 8 or 16 bits) and CMYK images become
    RGB; color profiles are converted to sRGB. Arrays are uint8 [H, W], [H, W, 1], [H, W, 3] or [H, W, 4] (with alpha).

    Raises UserError, one sentence with the name of the image, if it cannot be read, is no image, is damaged, has
    several frames, no pixels, or more than `max_pixels`.
    """
    limits = Limits(max_pixels)
    if isinstance(source, np.ndarray):
        return _from_array(source, limits)
    if isinstance(source, Image.Image):
        return _pixels(source, "the image", limits)
    if isinstance(source, (str, os.PathLike)):
        name = os.fspath(source)
        try:
            with read_explained(name):
                file = resolve(source).open("rb")  # closed below, once the reasons for failing here are told
        except FileNotFoundError as error:
            raise UserError(f"there is no image {name}; check the path") from error
        except OSError as error:
            raise UserError(f"cannot read the image {name!r}: {reason(error)}; check the path") from error
        with file:
            return _pixels(file, name, limits)
    if hasattr(source, "read"):
        known_as = getattr(source, "name", None)
        return _pixels(source, known_as if isinstance(known_as, str) else "the image", limits)
    raise UserError(
        f"a value of type {type(source).__name__} is not an image; "
        f"give a file name, an open binary file, a PIL image or an array"
    )


def _pixels(source: BinaryIO | Image.Image, name: str, limits: Limits) -> np.ndarray:
    # PIL warns of odd metadata, and of sizes that are refused.
    with warnings.catch_warnings(action="ignore"), read_explained(name):
        if isinstance(source, Image.Image):
            _check_opened(source, name, limits)
            image = source
        else:
            image = open_image(_seekable(source, name), name, limits)
        load_image(image, name)
        return upright_rgb(image, name)


def _seekable(file: BinaryIO, name: str) -> BinaryIO:
    try:
        if not (hasattr(file, "seekable") and file.seekable()):
            file = io.BytesIO(file.read())
        file.seek(0)
        start: object = file.read(0)
    except (OSError, TypeError, ValueError) as error:  # ValueError: a closed file; TypeError: read() gave text
        if is_machine_error(error):
            raise
        raise UserError(f"cannot read {name}: {error}; give a file opened in binary mode") from error
    if not isinstance(start, bytes):
        raise UserError(f"{name} is opened as text; open it in binary mode, 'rb'")
    return file


def open_image(file: BinaryIO, name: str = "the image", limits: Limits = _DEFAULT) -> Image.Image:
    """An image file, opened but not decoded.

    Nothing that is published is trusted: files are opened as few kinds of images, their size is looked at before they
    are decoded, and whatever a decoder throws becomes a fault.

    Raises ImageError if it is empty, no image, damaged, has several frames, or a size beyond the limits.
    """
    start = file.read(12)
    file.seek(0)
    if not start:
        raise ImageError("empty file", f"{name} is empty (0 bytes); save the image again")
    Image.init()  # at once where it has been done; what imports one kind of image registers that alone
    try:
        with _decoding(name):
            file = without_large_metadata(file)
            image = Image.open(file, formats=[kind for kind in _READABLE if kind in Image.OPEN])
            if isinstance(image, JpegImageFile):
                _check_jpeg(image, file)
    except UnidentifiedImageError as error:
        file.seek(0)
        if instead := what_instead(file.read(HEAD_BYTES)):
            raise ImageError("not an image", f"{name} {instead}", instead) from error
        raise ImageError(
            "not an image",
            f"{name} is not an image of a known kind, or damaged at its start; save it as PNG, JPEG or WebP",
            f"it begins with {start!r}",
        ) from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:  # the latter where it is an error
        raise _too_large(name, "hundreds of millions of", limits) from error
    _check_opened(image, name, limits)
    return image


def _check_jpeg(image: JpegImageFile, file: BinaryIO) -> None:
    """Raises ValueError for damage that the decoder would not notice, and for what would keep it busy for minutes."""
    start = file.tell()  # opening ends behind the header of the first scan
    file.seek(0)
    check_scans(file.read(), start, image.layers)
    file.seek(start)
    if any(0 in table for table in image.quantization.values()):
        raise ValueError("a quantization table with zeros")


def load_image(image: Image.Image, name: str = "the image") -> None:
    """Decodes an opened image. Raises ImageError if it is damaged."""
    with _decoding(name):
        image.load()


@contextlib.contextmanager
def _decoding(name: str) -> Iterator[None]:
    """Turns what a decoder throws into ImageError: damaged data give every kind of exception."""
    try:
        yield
    except (UnidentifiedImageError, Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise
    except Exception as error:
        if is_machine_error(error):
            raise
        text = str(error) or type(error).__name__
        fault: Fault = "cut short" if "truncated" in text.lower() else "damaged image"
        sentence = f"{name} is damaged or cut short ({text}); copy or save it again"
        raise ImageError(fault, sentence, text) from error


def _check_opened(image: Image.Image, name: str, limits: Limits) -> None:
    width, height = image.size
    slowness = _SLOW.get(image.format or "", 1)
    _check_size(name, height, width, limits._replace(max_pixels=limits.max_pixels // slowness))
    with _decoding(name):
        frames = _frames(image)
    if frames != "1":
        raise ImageError(
            "several frames",
            f"{name} has {frames} frames, but only single images can be edited; "
            f"save its first frame as an image of its own",
            f"{frames} frames",
        )
    pieces = len(getattr(image, "tile", ()))
    if pieces > _MAX_PIECES:
        sentence = f"{name} is stored in {pieces} pieces, but at most {_MAX_PIECES} are read; save it as PNG"
        raise ImageError("damaged image", sentence, f"{pieces} pieces")


def _frames(image: Image.Image) -> str:
    """Returns how many frames an opened image has, in words."""
    # A camera's MPO is a JPEG with previews or depth behind the photo, which comes first.
    if image.format == "MPO" or not getattr(image, "is_animated", False):
        return "1"
    if image.format != "TIFF":
        return str(getattr(image, "n_frames", 1))
    for count in range(1, _MAX_COUNTED + 1):  # PIL would read all of them to count them, slower with each
        try:
            image.seek(count)
        except EOFError:
            return str(count)
    return f"more than {_MAX_COUNTED}"


def _too_large(name: str, size: str, limits: Limits) -> ImageError:
    limit = f"{limits.max_pixels / 1e6:g} million"
    sentence = f"{name} has {size} pixels, but at most {limit} can be edited; make it smaller"
    return ImageError("too many pixels", sentence, f"{size} pixels")


def upright(image: Image.Image) -> Image.Image:
    """A loaded image of any mode as `upright_rgb` gives it, not copied where it is so already. Raises ImageError."""
    if image.mode == "RGB" and orientation(image) == 1 and not image.has_transparency_data:
        return to_srgb(image)
    return Image.fromarray(upright_rgb(image))


def upright_rgb(image: Image.Image, name: str = "the image") -> np.ndarray:
    """Pixels of a loaded image of any mode in sRGB, EXIF orientation applied: uint8 [H, W, 3]. Raises ImageError."""
    image_HW3 = _rgb(image, name)
    turn = _UPRIGHT.get(orientation(image))
    return image_HW3 if turn is None else np.array(Image.fromarray(image_HW3).transpose(turn))


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Width and height of an opened image, turned as its metadata says."""
    width, height = image.size
    if isinstance(image, TiffImageFile):  # Pillow 12.3 turns TIFFs when it loads them, and has that size before
        return width, height
    return (height, width) if orientation(image) >= 5 else (width, height)


def _check_size(name: str, height: int, width: int, limits: Limits) -> None:
    short, long = sorted((height, width))
    if short < 1:
        sentence = f"{name} has no pixels (it is {width} x {height}); give an image of at least 1 x 1"
        raise ImageError("absurd size", sentence, "no pixels")
    if height * width > limits.max_pixels:
        raise _too_large(name, f"{width} x {height}", limits)
    if short < limits.min_side or long > limits.max_side or long > limits.max_ratio * short:
        sentence = (
            f"{name} has {width} x {height} pixels; give sides from {limits.min_side} to {limits.max_side}, "
            f"the longer at most {limits.max_ratio:g} times the shorter"
        )
        raise ImageError("absurd size", sentence, f"{width} x {height} pixels")


def orientation(image: Image.Image) -> int:
    """The EXIF tag that says how an image is turned, 1 if it is upright or does not say."""
    try:
        value = int(image.getexif().get(_EXIF_ORIENTATION, 1))
        return value if value in _UPRIGHT else 1
    except Exception:  # unreadable metadata is no reason to refuse the pixels
        return 1


def _rgb(image: Image.Image, name: str) -> np.ndarray:
    """Pixels of a loaded image of any mode in sRGB, on white, uint8 [H, W, 3]."""
    if image.mode == "F" or image.mode.startswith("I"):
        image = _byte_gray(image, name)
    try:
        colors = to_srgb(image.convert(_COLORS.get(image.mode, "RGB"))).convert("RGB")
        if not image.has_transparency_data:
            return np.array(colors)
        alpha = image.convert("RGBA").getchannel("A")
    except (ValueError, OSError) as error:  # a mode that PIL reads but does not convert
        sentence = f"{name} has unknown colors ({image.mode}): {error}; save it as RGB"
        raise ImageError("unknown colors", sentence, f"mode {image.mode}: {error}") from error
    colors.putalpha(alpha)
    white = Image.new("RGBA", colors.size, "white")
    return np.array(Image.alpha_composite(white, colors).convert("RGB"))


def _byte_gray(image: Image.Image, name: str) -> Image.Image:
    """16-bit gray to 8 bits. PIL keeps it in the modes I;16 (also I;16B) and I, and clips it if asked to convert."""
    gray_HW = np.array(image)
    low, high = gray_HW.min(), gray_HW.max()
    # Values of 32 bits do not say which of them is white: 1, 255, 65535 and 2**32 - 1 are all in use.
    deep = image.mode == "F" or (isinstance(image, TiffImageFile) and 32 in image.tag_v2.get(_TIFF_BITS, ()))
    if deep or low < 0 or high > 65535:
        values = f"gray values of {8 * gray_HW.dtype.itemsize} bits, from {low} to {high}"
        sentence = (
            f"{name} has {values}, which do not say what is white; save it with 8 bits (white is 255) or 16 (65535)"
        )
        raise ImageError("unknown colors", sentence, values)
    byte_HW = ((gray_HW.astype(np.uint32) + 128) // 257).astype(np.uint8)  # 65535 = 257 * 255
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        byte_HW[gray_HW == transparent] = 255
    gray = Image.fromarray(byte_HW)
    gray.info = {name: value for name, value in image.info.items() if name == "icc_profile"}
    return gray


def _from_array(array: np.ndarray, limits: Limits) -> np.ndarray:
    name = "the image"
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (1, 3, 4)):
        raise UserError(f"{name} has the shape {array.shape}; it must be [height, width] or [height, width, 1, 3 or 4]")
    if array.dtype != np.uint8:
        raise UserError(f"{name} has values of type {array.dtype}; give uint8, from 0 to 255")
    _check_size(name, array.shape[0], array.shape[1], limits)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    return _rgb(Image.fromarray(np.ascontiguousarray(array)), name)


def shape_of(image: np.ndarray) -> tuple[int, int]:
    """Height and width of uint8 [height, width, 3]. Raises ValueError for any other array."""
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or 0 in image.shape:
        raise ValueError(f"expected uint8 [height, width, 3], got {image.dtype} {image.shape}")
    return image.shape[0], image.shape[1]


def check_output(path: PathLike) -> None:
    """Raises UserError if `write_image` could not write to `path`; meant to be asked before a long edit."""
    target = resolve(path)
    if target.suffix.lower() not in _FORMATS:
        raise UserError(f"cannot tell the kind of image from the name {target}; end it in {', '.join(_FORMATS)}")
    if is_remote(target):
        return
    if target.is_dir():
        raise UserError(f"{target} is a directory; give the name of an image file")
    if not target.parent.is_dir():
        raise UserError(f"the directory {target.parent} of {target} does not exist; create it first")
    if not os.access(target.parent, os.W_OK):
        raise UserError(f"the directory {target.parent} may not be written to; choose another one for {target.name}")


def write_image(path: PathLike, image_HW3: np.ndarray) -> None:
    """Writes uint8 [H, W, 3] as the kind of image that the suffix of `path` names.

    The file appears whole or not at all. Raises UserError for an unknown suffix, a missing directory, a full disk, or
    an image too large for its kind.
    """
    shape_of(image_HW3)
    check_output(path)
    target = resolve(path)
    kind, options = _FORMATS[target.suffix.lower()]
    encoded = io.BytesIO()
    try:
        Image.fromarray(np.ascontiguousarray(image_HW3)).save(encoded, kind, **options)
    except (OSError, ValueError) as error:  # a side over 65535 in JPEG, over 16383 in WebP
        raise UserError(
            f"{target}: {kind} cannot hold an image of {image_HW3.shape[1]} x {image_HW3.shape[0]} pixels ({error}); "
            f"write a .png"
        ) from error
    with explained(f"image {target.name}", target.parent):
        write_bytes(target, encoded.getbuffer())
