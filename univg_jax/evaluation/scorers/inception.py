"""FID's Inception as a scorer: 2048 features of a picture, by one of FID's conventions."""

from univg_jax.evaluation import fid
from univg_jax.evaluation.scorers.network import PictureNetwork, digest_of, weights_of
from univg_jax.interop.inception import load_inception
from univg_jax.pretrained import local_path


def open_inception(path: str, *, convention: str = "pytorch-fid") -> PictureNetwork:
    """The network of a safetensors file, or of the only one in a folder, in float32.

    `convention` is one of `fid.CONVENTIONS`; distances of different ones do not compare. Raises
    UserError for another name, and what `load_inception` raises.
    """
    fid.check_convention(convention)
    module, params = load_inception(path)
    return PictureNetwork(
        lambda p, x: module.apply({"params": p}, x),
        params,
        lambda image: fid.preprocess(image, convention=convention),
        digest=digest_of(weights_of(local_path(path)), convention),
        opened_with={"convention": convention},
    )
