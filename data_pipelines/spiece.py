"""T5's tokenizer from `spiece.model`, the file that SentencePiece wrote (arXiv 1808.06226).

Older folders, such as PixArt's, have no other. The file is a protocol buffer with the pieces of a
unigram model (arXiv 1804.10959) and a map of characters to normalize.
"""

from pathlib import Path
from typing import Any

import tokenizers
from google.protobuf import descriptor_pb2, descriptor_pool, message, message_factory
from tokenizers import normalizers, pre_tokenizers, processors

from univg_jax.errors import UserError

MAX_BYTES = 2**25  # T5's has 0.8 million
UNIGRAM, UNKNOWN = 1, 2  # a kind of model, and of a piece
END = "</s>"
NUM_EXTRA = 100  # T5's sentinels, which are in its vocabulary but not in the file

# The fields of sentencepiece_model.proto that are read: message -> name, number, type, repeated.
TEXT, FLOAT, BYTES, INT, MESSAGE = (
    getattr(descriptor_pb2.FieldDescriptorProto, f"TYPE_{name}")
    for name in ("STRING", "FLOAT", "BYTES", "INT32", "MESSAGE")
)
FIELDS: dict[str, list[tuple[str, int, int, str]]] = {
    "Piece": [("piece", 1, TEXT, ""), ("score", 2, FLOAT, ""), ("type", 3, INT, "")],
    "Trainer": [("model_type", 3, INT, "")],
    "Normalizer": [("precompiled_charsmap", 2, BYTES, "")],
    "Model": [
        ("pieces", 1, MESSAGE, "Piece"),
        ("trainer", 2, MESSAGE, "Trainer"),
        ("normalizer", 3, MESSAGE, "Normalizer"),
    ],
}


def read_spiece(file: Path) -> tokenizers.Tokenizer:
    """The tokenizer of a T5's `spiece.model`: pieces of words, then the end token.

    Raises UserError for anything else than a unigram model with an unknown and an end piece.
    """
    with file.open("rb") as opened:
        content = opened.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise UserError(f"it has more than {MAX_BYTES} bytes")
    model = _message("Model")()
    try:
        model.ParseFromString(content)
    except message.DecodeError:
        raise UserError("it is not what SentencePiece writes") from None
    if model.trainer.model_type not in (0, UNIGRAM):  # 0: left out, which is the default
        raise UserError("its model is none of unigrams, as T5's is")
    extra = [f"<extra_id_{i}>" for i in reversed(range(NUM_EXTRA))]
    pieces = [(piece.piece, piece.score) for piece in model.pieces]
    ids = {name: i for i, (name, _) in enumerate(pieces)}
    unknown = next((i for i, piece in enumerate(model.pieces) if piece.type == UNKNOWN), None)
    if unknown is None or END not in ids:
        raise UserError(f"it has no piece for what is unknown, or no {END}")
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.Unigram([*pieces, *((name, 0.0) for name in extra)], unk_id=unknown)
    )
    if charsmap := model.normalizer.precompiled_charsmap:
        tokenizer.normalizer = normalizers.Precompiled(charsmap)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        f"$A {END}", special_tokens=[(END, ids[END])]
    )
    tokenizer.add_special_tokens([name for name in ("<pad>", END, "<unk>") if name in ids] + extra)
    return tokenizer


def _message(name: str) -> Any:
    """The class of a message, with the fields in `FIELDS`; the others are skipped."""
    package = "univg_jax.spiece"
    file = descriptor_pb2.FileDescriptorProto(name=f"{package}.proto", package=package)
    for message_name, fields in FIELDS.items():
        described = file.message_type.add(name=message_name)
        for field, number, kind, inner in fields:
            added = described.field.add(name=field, number=number, type=kind)
            added.label = added.LABEL_REPEATED if field == "pieces" else added.LABEL_OPTIONAL
            if inner:
                added.type_name = f".{package}.{inner}"
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{package}.{name}"))
