"""Pictures: their files to arrays and back, between 0..255 and [-1, 1]. Loads without JAX.

`open_picture` is the only place where a picture file is opened, but for the plain JPEG files that
`decode_rgb` gives to OpenCV (`univg_jax.jpeg`): faster, and the same pixels. What the pixels of a
file mean:

* A picture is RGB. 16-bit gray is 0..65535. Floats are black to white from 0 to 1 if they lie in
  [-0.1, 1.1], as resampling may leave them, and from 0 to 255 if the largest is above 10 and none
  above 256; others are refused, and so are NaN and infinity. What is transparent shows white.
* A mask is white where something is. White is the larger of two values (0 and 1, 0 and 255, two
  colors), or of more values what is above half of the brightest that the file can hold: those are
  the edges of a smooth mask. Above a quarter of gray it is no mask. What is transparent is black.
* A file has at most MAX_PIXELS, a JPEG MAX_JPEG_PIXELS. One of more than WHOLE_PIXELS is read at a
  half or a quarter of its width and height: pictures by means, masks by majority. The fraction
  depends on the size alone, so that what lay on one another still does.
"""

import base64
import contextlib
import io
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Bool, Float, Integer, UInt8
from PIL import Image

from univg_jax import jpeg
from univg_jax.errors import NonFiniteError, NotFoundError, UserError
from univg_jax.files import check_address, write_whole

Picture = Image.Image | np.ndarray | str | os.PathLike  # what a user may give
FORMATS = ("PNG", "JPEG", "WEBP", "AVIF", "TIFF", "BMP", "GIF", "PPM", "JPEG2000")
MAX_PIXELS, MAX_JPEG_PIXELS = 2**27, 2**28  # a phone's 108 and 200 megapixels, but no bomb
WHOLE_PIXELS = 2**25
MAX_GRAY = 0.25  # of a mask's pixels
Image.MAX_IMAGE_PIXELS = None  # one limit for a whole process; `open_picture` has its own

_TO_8_BITS = np.rint(np.arange(2**16) / 257).astype(np.uint8)  # 65535 / 257 = 255
_ORIENTATION = 0x0112  # EXIF's tag: how to turn what is stored
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_TURNS_OF_ARRAYS: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda pixels: pixels,
    2: lambda pixels: pixels[:, ::-1],
    3: lambda pixels: pixels[::-1, ::-1],
    4: lambda pixels: pixels[::-1],
    5: lambda pixels: pixels.swapaxes(0, 1),
    6: lambda pixels: pixels[::-1].swapaxes(0, 1),
    7: lambda pixels: pixels[::-1, ::-1].swapaxes(0, 1),
    8: lambda pixels: pixels[:, ::-1].swapaxes(0, 1),
}
_PNG_EXIF = (b"eXIf", b"Raw profile type", b"XML:com.adobe.xmp")
_HEIF = (b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1", b"msf1")


def open_picture(data: bytes) -> Image.Image:
    """The picture in a file's bytes: its first frame, decoded to its end and upright.

    Raises UserError, whose message begins with "is", for what is not a whole picture in one of
    FORMATS, or too large.
    """
    with _refusing(data):
        picture = _open_header(data)
        width, height = picture.size
        fraction = _fraction(width, height)
        picture.draft(None, (width // fraction, height // fraction))  # of JPEG only
        picture.load()
        return _usual(upright(picture))


def decode_rgb(data: bytes, *, least: tuple[int, int] | None = None) -> UInt8[np.ndarray, "h w 3"]:
    """`to_rgb(open_picture(data))`, the same pixels in less time.

    With `least`, a height and width that are enough for the caller, a JPEG may be decoded at a
    half, a quarter or an eighth of its size that has as much. Its sides are then rounded up, so
    masks, boxes and other geometry do not lie on it to the pixel.

    Raises UserError as these do.
    """
    if (plain := _plain_jpeg(data)) is not None:
        height, width, orientation = plain
        enough = least if least is None or orientation < 5 else least[::-1]
        if (pixels := jpeg.decode(data, height, width, least=enough)) is not None:
            return np.ascontiguousarray(_TURNS_OF_ARRAYS[orientation](pixels))
    return to_rgb(open_picture(data))


def verify(data: bytes) -> tuple[int, int]:
    """The upright height and width of a picture that is decoded once to be sure that it can be.

    Raises UserError as `open_picture` does.
    """
    if (plain := _plain_jpeg(data)) is not None:
        height, width, orientation = plain
        if jpeg.is_whole(data):
            return (height, width) if orientation < 5 else (width, height)
    width, height = open_picture(data).size
    if (whole := size_of(data)) != (height, width):  # a large one, read smaller
        return whole
    return height, width


def size_of(data: bytes) -> tuple[int, int]:
    """The upright height and width that a picture's header tells; nothing is decoded.

    Raises UserError as `open_picture` does, but not for damage behind the header.
    """
    if (plain := _plain_jpeg(data)) is not None:
        height, width, orientation = plain
    else:
        with _refusing(data):
            picture = _open_header(data)
            width, height = picture.size
            # Pillow gives the upright size of a TIFF from the start.
            orientation = 1 if picture.format == "TIFF" else _orientation(picture)
    return (height, width) if orientation < 5 else (width, height)


@contextlib.contextmanager
def _refusing(data: bytes) -> Iterator[None]:
    """Makes a UserError, whose message begins with "is", of what Pillow raises for a file."""
    try:
        yield
    except UserError:
        raise
    except Image.UnidentifiedImageError:
        why = f"none of {', '.join(FORMATS)}" if data else "it is empty"
        if data[4:8] == b"ftyp" and data[8:12] in _HEIF:
            why = "HEIC files need to be converted, to JPEG for example"
    except Exception as error:  # Pillow raises many kinds for damaged files, even SyntaxError
        why = str(error) or type(error).__name__
    else:
        return
    raise UserError(f"is not a readable image: {why}")


def _open_header(data: bytes) -> Image.Image:
    """The picture, not decoded yet; raises ValueError for a bomb."""
    picture = Image.open(io.BytesIO(data), formats=FORMATS)
    width, height = picture.size
    most = MAX_JPEG_PIXELS if picture.format in ("JPEG", "MPO") else MAX_PIXELS
    if width * height > most:
        raise ValueError(
            f"{width} x {height} pixels are more than {MAX_PIXELS} ({MAX_JPEG_PIXELS} in a "
            "JPEG), and taken for a decompression bomb"
        )
    return picture


def _plain_jpeg(data: bytes) -> tuple[int, int, int] | None:
    """Stored height and width and the orientation of a JPEG that OpenCV reads as Pillow does."""
    if (header := jpeg.plain_header(data)) is None or header.height * header.width > WHOLE_PIXELS:
        return None
    orientation = 1
    if header.may_turn:
        try:
            orientation = _orientation(_open_header(data))
        except Exception:  # of Pillow's parsers
            return None
    return header.height, header.width, orientation


def open_any(picture: Picture) -> Image.Image:
    """The upright picture of a path, a PIL image, or an array (uint8 RGB, RGBA or gray, or bool).

    Raises UserError, whose message begins with a verb. NotFoundError if no file is there.
    """
    if isinstance(picture, Image.Image):
        _check_not_empty(*picture.size)
        with _refusing(b""):  # a file that was opened and not read yet
            picture.load()
            return _usual(upright(picture))
    if isinstance(picture, np.ndarray):
        is_gray = picture.ndim == 2 and picture.dtype in (np.uint8, bool)
        is_color = picture.ndim == 3 and picture.shape[-1] in (3, 4) and picture.dtype == np.uint8
        if not (is_gray or is_color):
            raise UserError(f"is {picture.dtype} {list(picture.shape)}, expected uint8 [h, w, 3]")
        _check_not_empty(picture.shape[1], picture.shape[0])
        return Image.fromarray(picture)
    if not isinstance(picture, str | os.PathLike):
        kind = type(picture).__name__
        raise UserError(f"is of the type {kind}: expected a path, a PIL image or an array")
    check_address(picture, where="is an address")
    path = epath.Path(picture).expanduser()
    if path.is_dir():
        raise UserError("is a folder; expected a picture")
    if not path.is_file():
        raise NotFoundError("does not exist")
    try:
        return open_picture(path.read_bytes())
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror or error}") from None


def _usual(picture: Image.Image) -> Image.Image:
    """The picture in a mode that Pillow converts to any other."""
    other = {"La": "LA", "LAB": "RGB"}.get(picture.mode)
    return picture if other is None else picture.convert(other)


def _check_not_empty(width: int, height: int) -> None:
    if not (width and height):
        raise UserError(f"has {width} x {height} pixels: expected at least 1 x 1")


def upright(picture: Image.Image) -> Image.Image:
    """The picture turned as its EXIF or XMP says; as it is where they are damaged."""
    turn = _TURNS.get(_orientation(picture))
    return picture if turn is None else picture.transpose(turn)


def _orientation(picture: Image.Image) -> int:
    """1 to 8, by EXIF or XMP; 1 where they are damaged."""
    try:
        if not _may_turn(picture):
            return 1
        orientation = picture.getexif().get(_ORIENTATION)
    except Exception:  # of Pillow's parsers
        return 1
    return orientation if orientation in _TURNS else 1


def _may_turn(picture: Image.Image) -> bool:
    """False for a PNG that has no orientation: Pillow would decode all of it to look for one."""
    if picture.format != "PNG" or picture.fp is None or not isinstance(picture.fp, io.BytesIO):
        return True
    data = picture.fp.getvalue()
    return any(key in data for key in _PNG_EXIF)


def to_rgb(picture: Image.Image, *, drop_alpha: bool = False) -> UInt8[np.ndarray, "h w 3"]:
    """8-bit RGB of an upright picture. Raises UserError for numbers that are no gray.

    What is transparent lies on white or, with `drop_alpha`, has the colors that it hides, as
    Pillow's `convert("RGB")` has them and with it the official code of benchmarks.
    """
    if _is_numbers(picture):
        values = np.asarray(picture)
        gray = _gray(values)
        if "transparency" in picture.info:
            gray[values == picture.info["transparency"]] = 255
        picture = Image.fromarray(gray)
    elif _is_transparent(picture) and not drop_alpha:
        picture = picture.convert("RGBA")
    elif picture.mode != "L":
        picture = picture.convert("L" if picture.mode == "1" else "RGB")
    if (fraction := _fraction(*picture.size)) > 1:
        picture = picture.reduce(fraction)
    if picture.mode == "RGBA":
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return np.asarray(picture.convert("RGB"))


def to_mask(picture: Image.Image) -> UInt8[np.ndarray, "h w"]:
    """1 where an upright mask is white, else 0.

    Raises UserError, whose message begins with "is", for a picture that is no mask.
    """
    if _is_numbers(picture):
        plane = np.asarray(picture)
    else:
        if _is_transparent(picture):
            picture = picture.convert("RGBA")
            picture = Image.alpha_composite(Image.new("RGBA", picture.size, "black"), picture)
        plane = np.asarray(picture.convert("L"))
    mask = _threshold(plane)
    if (fraction := _fraction(*picture.size)) > 1:
        mask = np.asarray(Image.fromarray(mask * np.uint8(255)).reduce(fraction)) > 127
    return mask.astype(np.uint8)


def to_integers(picture: Image.Image) -> Integer[np.ndarray, "h w"] | None:
    """The numbers of an upright picture of 16 or 32 bits; None for any other."""
    if picture.mode == "F" or not _is_numbers(picture):
        return None
    fraction = _fraction(*picture.size)
    return np.asarray(picture)[::fraction, ::fraction]


def _is_numbers(picture: Image.Image) -> bool:
    return picture.mode.startswith("I") or picture.mode == "F"


def _is_transparent(picture: Image.Image) -> bool:
    return bool({"A", "a"} & set(picture.getbands())) or "transparency" in picture.info


def _fraction(width: int, height: int) -> int:
    """1, 2, 4, ...: what to divide the sides by for at most WHOLE_PIXELS."""
    fraction = 1
    while -(-width // fraction) * -(-height // fraction) > WHOLE_PIXELS:
        fraction *= 2
    return fraction


def _gray(values: np.ndarray) -> UInt8[np.ndarray, "h w"]:
    """Gray levels of 16-bit integers, or of floats."""
    low, high = values.min(), values.max()
    if values.dtype.kind != "f":
        if low < 0 or high > 65535:
            raise UserError(f"is not a readable image: values {low} to {high}, expected 16 bits")
        return _TO_8_BITS[values]
    if low >= -0.1 and high <= 1.1:
        scale = 255
    elif low >= -1 and 10 < high <= 256:
        scale = 1
    else:  # also where there is a NaN
        raise UserError(
            f"is not a readable image: floats from {low:g} to {high:g}, expected [0, 1] or [0, 255]"
        )
    levels = values * np.float32(scale)
    return np.clip(np.rint(levels, out=levels), 0, 255, out=levels).astype(np.uint8)


def _threshold(plane: np.ndarray) -> Bool[np.ndarray, "h w"]:
    """Where the one plane of a mask is white."""
    low, high = plane.min(), plane.max()
    if not np.isfinite([low, high]).all():
        raise UserError("is no mask: it has values that are not finite")
    if low < high and ((plane == low) | (plane == high)).all():
        return plane == high
    white = 1 if high <= 1 else 255 if plane.dtype.itemsize == 1 or high <= 255 else 65535
    if 0 < high <= white / 2 or low < 0 or high > white:
        raise UserError(f"is no mask: values {low:g} to {high:g}, expected black and white")
    gray = ((plane > 0.1 * white) & (plane < 0.9 * white)).mean()
    if gray > MAX_GRAY:
        raise UserError(f"is no mask: {gray:.0%} of its pixels are gray, not black or white")
    return plane > white / 2


def to_float(images: Any) -> Any:
    """uint8 in 0..255 -> float32 in [-1, 1], of numpy or JAX; floats stay as they are."""
    return images.astype(np.float32) / 127.5 - 1 if images.dtype == np.uint8 else images


def to_uint8(images: Float[Any, "..."]) -> UInt8[np.ndarray, "..."]:
    """Floats in [-1, 1] -> the nearest of 0..255; `check_finite` first what may be no number."""
    return np.rint((np.asarray(images) + 1) * 127.5).astype(np.uint8)


def check_finite(rows: Float[np.ndarray, "b ..."], names: Sequence[str], *, what: str) -> None:
    """Raises NonFiniteError with the first one's name if a row has a NaN or an infinity.

    Nothing that is no number leaves the program as data: a NaN would be written as black.
    """
    finite = np.isfinite(rows)
    if not finite.all():
        bad = np.flatnonzero(~finite.reshape(len(rows), -1).all(axis=1))
        raise NonFiniteError(
            f"{names[bad[0]]} is not finite, as {len(bad)} of {len(rows)} {what}s: a product is "
            "beyond the range of its dtype (conditioning.*.dtype), or weights are damaged"
        )


def png_bytes(pixels: np.ndarray, *, optimize: bool = False) -> bytes:
    """The PNG of uint8 [h w 3] or [h w], or uint16 [h w]. `optimize`: smaller, in more time."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", optimize=optimize)
    return buffer.getvalue()


def jpeg_bytes(pixels: UInt8[np.ndarray, "h w 3"], *, quality: int) -> bytes:
    """The JPEG of a picture, with colors at half the resolution as is Pillow's default."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def write_png(path: epath.PathLike, pixels: np.ndarray) -> None:
    """Writes `png_bytes` to a local path or a bucket, whole or not at all; makes its folder."""
    write_whole(path, png_bytes(pixels))


def data_uri(picture: bytes, *, kind: str = "") -> str:
    """The file of a PNG or JPEG as an address that a page or a message carries in itself.

    `kind` is what it is said to be, by default what it is.
    """
    kind = kind or ("png" if picture.startswith(b"\x89PNG") else "jpeg")
    return f"data:image/{kind};base64,{base64.b64encode(picture).decode()}"
