"""What a trained model answers: pictures, and all that is needed to make them again."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image

from univg_jax.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """The answer to one call of a `Pipeline`: lists with an entry for each picture.

    `answers` are what the pictures of dense tasks say, at the picture's size; None for other tasks:

    | task | answer |
    |---|---|
    | depth | float32 [h, w], meters as far as the model knows the scale |
    | pose | float32 [17, 3], x and y as fractions of the picture, confidence; COCO's joints |
    | seg | uint8 [h, w], 1 where the mask is |

    `settings` has the options that the pictures were made with, by their names in a call
    (`guidance`, `image_guidance`, `steps`, `solver`, `negative_prompt`), the other settings of the
    solver, and the checkpoint. It can be written as JSON.

    Example:

        >>> result = pipe("a pig on grass", seed=7, steps=1)
        >>> result.settings["steps"], result.settings["checkpoint_step"]
        (1, 2)
        >>> options = {k: result.settings[k] for k in ("guidance", "steps", "solver")}
        >>> again = pipe.run(result.task, prompt=result.prompts, seed=result.seeds, **options)
        >>> bool((np.asarray(again.image) == np.asarray(result.image)).all())
        True
    """

    task: str
    images: list[Image.Image]
    seeds: list[int]
    prompts: list[str]
    settings: Mapping[str, Any]
    answers: list[np.ndarray | None]

    @property
    def image(self) -> Image.Image:
        """The only picture, or the first one. Raises UserError if an empty list made none."""
        self._check_not_empty()
        return self.images[0]

    @property
    def answer(self) -> np.ndarray | None:
        """The only picture's answer, or the first one's. Raises UserError as `image` does."""
        self._check_not_empty()
        return self.answers[0]

    def _check_not_empty(self) -> None:
        if not self.images:
            raise UserError("nothing was made: a list that was given is empty")
