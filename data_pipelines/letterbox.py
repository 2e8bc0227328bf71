"""A picture of any shape inside a canvas of another, without distortion, and back again.

The picture is as large as it can be, in the middle, and something else fills the rest. `place` puts
it there; `restore` takes what a model made of the canvas back to the picture's own size.
"""

import dataclasses
from typing import Literal

import cv2
import numpy as np
from jaxtyping import UInt8

from data_pipelines import renderings, transforms
from data_pipelines.transforms import Record, Shape

Around = Literal["edge", "gray"]  # the nearest pixel of the picture, or mid-gray: "nothing here"


@dataclasses.dataclass(frozen=True)
class Letterbox:
    """Where a picture of one (height, width) lies in a canvas of another."""

    picture: Shape
    canvas: Shape

    @property
    def window(self) -> tuple[int, int, int, int]:
        """Top, left, height and width of the picture in the canvas."""
        height, width = transforms.largest_window(self.canvas, self.picture)
        return (self.canvas[0] - height) // 2, (self.canvas[1] - width) // 2, height, width

    def place(
        self, image: UInt8[np.ndarray, "h w 3"], *, around: Around
    ) -> UInt8[np.ndarray, "h2 w2 3"]:
        """The canvas with the picture in its window."""
        if self.picture == self.canvas:
            return image
        _, _, height, width = self.window
        image = transforms.resize_image(image, height=height, width=width)
        if around == "gray":
            return self._surrounded(image, cv2.BORDER_CONSTANT, renderings.GRAY)
        return self._surrounded(image, cv2.BORDER_REPLICATE, 0)

    def place_hole(self, hole: UInt8[np.ndarray, "h w"]) -> UInt8[np.ndarray, "h2 w2"]:
        """The canvas with the hole in its window, and the rest a hole too.

        A pixel of which the hole touches a part is of the hole: what remains shows nothing of it.
        """
        if self.picture == self.canvas:
            return hole
        _, _, height, width = self.window
        hole = transforms.resize({"ignore_mask": hole}, height=height, width=width)["ignore_mask"]
        return self._surrounded(hole, cv2.BORDER_CONSTANT, 1)

    def restore(self, record: Record) -> Record:
        """A record whose image is a canvas: the window of it, at the picture's own size."""
        if self.picture == self.canvas:
            return record
        top, left, height, width = self.window
        window = transforms.crop(record, top=top, left=left, height=height, width=width)
        return transforms.resize(window, height=self.picture[0], width=self.picture[1])

    def _surrounded(self, pixels: np.ndarray, kind: int, value: int) -> np.ndarray:
        top, left, height, width = self.window
        bottom, right = self.canvas[0] - height - top, self.canvas[1] - width - left
        return cv2.copyMakeBorder(pixels, top, bottom, left, right, kind, value=[value] * 3)
