"""The frozen encoders of a run: which kinds there are (`kinds`), and those of one run (`run`)."""

from univg_jax.encoders.record import (
    copy_records,
    describe,
    digests,
    find_additional,
    find_problems,
)
from univg_jax.encoders.run import (
    Encoders,
    abstract,
    check,
    codec_identity,
    load,
    load_text,
    prepare,
    prepare_codec,
    pretrained_files,
    tensors,
    text_identity,
    tokenizer_folder,
)

__all__ = [
    "Encoders",
    "abstract",
    "check",
    "codec_identity",
    "copy_records",
    "describe",
    "digests",
    "find_additional",
    "find_problems",
    "load",
    "load_text",
    "prepare",
    "prepare_codec",
    "pretrained_files",
    "tensors",
    "text_identity",
    "tokenizer_folder",
]
