"""Small copies of pictures that stand in a page itself, as many as it may hold."""

import dataclasses

from etils import epath
from PIL import Image

from univg_jax.errors import UserError
from univg_jax.images import data_uri, jpeg_bytes, open_picture, png_bytes, to_rgb

SIDE = 288  # of a picture, in pixels
SMALL = 96  # up to here a picture is kept as it is, and its pixels are shown
QUALITY = 80


@dataclasses.dataclass(frozen=True)
class Thumbnail:
    """A picture, or the reason why it is not there."""

    uri: str = ""
    reason: str = ""
    is_small: bool = False


class Album:
    """Pictures of at most `most` bytes together; `left_out` counts those beyond."""

    def __init__(self, most: int) -> None:
        self._rest, self.left_out = most, 0

    def add(self, path: epath.PathLike) -> Thumbnail:
        """A small copy of a picture. One that is not there or torn is no error."""
        if self._rest <= 0:
            self.left_out += 1
            return Thumbnail(reason="left out")
        try:
            pixels = to_rgb(open_picture(epath.Path(path).read_bytes()))
        except (FileNotFoundError, NotADirectoryError):
            return Thumbnail(reason="missing")
        except UserError:
            return Thumbnail(reason="not readable")
        is_small = max(pixels.shape[:2]) <= SMALL
        if is_small:
            uri = data_uri(png_bytes(pixels))
        else:
            picture = Image.fromarray(pixels)
            picture.thumbnail((SIDE, SIDE))
            uri = data_uri(jpeg_bytes(to_rgb(picture), quality=QUALITY))
        self._rest -= len(uri)
        return Thumbnail(uri=uri, is_small=is_small)
