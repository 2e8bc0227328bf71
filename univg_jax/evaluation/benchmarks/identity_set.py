"""Pictures of given people: how alike the faces are, how often there is one, what the text gets.

Any folder of portraits with any prompts, and Unsplash-50's protocol (the 50 portraits of
LCM-Lookahead, as PuLID's tables 6 and 7 use them): four pictures for each person and prompt, the
cosine of face embeddings on ONE prompt, and CLIP-T over other prompts. Numbers of different
encoders or prompts do not compare, and some papers do not name their encoder. So both are stored
(`Settings`).

Where no face is found in a picture there is no cosine. `skip/` leaves such pictures out and
`zero/` counts them as 0: a model may hide bad faces behind the first, so the detection rate stands
beside both. A picture that is missing is left out of these, and has 0 in `strict/`. Prompts may
have `<p>` where the person is; in others it is put first, and CLIP is given "person" for it.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from data_pipelines.examples import PLACEHOLDER
from univg_jax.errors import NotFoundError, UserError, quote
from univg_jax.evaluation import metrics, similarity
from univg_jax.evaluation.inputs import InputFile, check_count
from univg_jax.evaluation.judging import is_inside
from univg_jax.evaluation.metrics import Image, Ratio, merge
from univg_jax.evaluation.official import MAX_IMAGES, Official, Published, Request, requests_of
from univg_jax.evaluation.summaries import Scores, Summary, column, failure_counts
from univg_jax.fields import setting

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
UNSPLASH = 50  # people
# Of PuLID's table 6, which is of one prompt.
UNSPLASH_PROMPT = "portrait, color, cinematic, in garden, soft light, detailed face"
UNSPLASH_ENCODER = "CurricularFace"
PEOPLE_FILE = InputFile("people.jsonl", 'lines of {"face": a picture beside it, "prompts": [...]}')


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is asked of each portrait, and by what its face is compared; a result stores it.

    Faces are compared in pictures of `prompts`, texts in those of `clip_prompts`, or of `prompts`
    if there are none, as PuLID does.
    """

    encoder: str = setting(UNSPLASH_ENCODER, "the encoder of faces that is given")
    clip: str = setting("ViT-B/32", "the CLIP that is given")
    prompts: tuple[str, ...] = setting((UNSPLASH_PROMPT,), "of all people, such as ['<p> at sea']")
    clip_prompts: tuple[str, ...] = setting((), "further ones, where only texts are compared")
    images: int = setting(4, "of each person and prompt", least=1, most=MAX_IMAGES)
    people: int | None = setting(UNSPLASH, "how many portraits there have to be", none="any number")


@dataclasses.dataclass(frozen=True)
class Row:
    """A portrait and one of its prompts.

    Faces are compared where `compares`, and texts where `reads`.
    """

    person: str
    face: str
    number: int
    prompt: str
    images: int
    compares: bool = True
    reads: bool = True

    @property
    def text(self) -> str:
        """What CLIP is given."""
        return self.prompt.replace(PLACEHOLDER, "person")


def read(
    path: epath.PathLike, settings: Settings = Settings(), *, excerpt: bool = False
) -> tuple[Row, ...]:
    """The portraits of a folder, each with all prompts; or of a file people.jsonl with their own.

    The name of a person is that of the file. Raises UserError for a folder without pictures, two
    of one name, another number of people than `settings.people`, and a torn file.
    """
    place = epath.Path(path)
    if place.name.endswith(".jsonl"):
        asked = _people(place)
    else:
        if not place.is_dir():
            raise NotFoundError(f"{place} does not exist: expected a folder of portraits")
        faces = sorted(f for f in place.iterdir() if f.suffix.lower() in SUFFIXES)
        asked = [(face, settings.prompts) for face in faces]
    names = [face.stem for face, _ in asked]
    if not names:
        raise UserError(f"{place} has no portraits: expected {', '.join(SUFFIXES)}")
    for name in names:
        if names.count(name) > 1 or not re.fullmatch(r"[\w .-]+", name):
            reason = "are two portraits" if names.count(name) > 1 else "is no name of a person"
            raise UserError(f"{place}: {quote(name)} {reason}: expected files of plain names")
    check_count(
        str(place),
        found=len(names),
        official=settings.people or len(names),
        what="portraits",
        excerpt=excerpt,
        expected="one of each person",
    )
    return tuple(
        Row(
            person=face.stem,
            face=str(face),
            number=number,
            prompt=prompt,
            images=settings.images,
            compares=number < len(prompts),
            reads=number >= len(prompts) or not settings.clip_prompts,
        )
        for face, prompts in asked
        for number, prompt in enumerate((*prompts, *settings.clip_prompts))
    )


def _people(path: epath.Path) -> list[tuple[epath.Path, tuple[str, ...]]]:
    found = []
    for number, line in enumerate(PEOPLE_FILE.objects(path, ("face", "prompts")), 1):
        face, prompts = line["face"], line["prompts"]
        is_right = isinstance(face, str) and is_inside(face) and isinstance(prompts, list)
        if not is_right or not prompts or not all(isinstance(p, str) and p for p in prompts):
            raise PEOPLE_FILE.error(path, f"has no portrait with prompts in line {number}")
        found.append((path.parent / face, tuple(prompts)))
    return found


def image_files(row: Row) -> tuple[str, ...]:
    """Where the pictures of a person and prompt lie; there is no official layout."""
    return tuple(f"{row.person}/{row.number:03}_{k}.png" for k in range(row.images))


def requests(rows: Sequence[Row]) -> list[Request]:
    """The pictures of each person and prompt."""
    return requests_of(
        rows,
        image_files,
        task="id",
        inputs=lambda row: {"prompt": _asked(row.prompt), "face": row.face},
    )


def _asked(prompt: str) -> str:
    return prompt if PLACEHOLDER in prompt else f"{PLACEHOLDER}, {prompt}"


def check_scoring(rows: Sequence[Row], scorers: Mapping[str, Any]) -> None:
    """Raises UserError for a portrait that cannot be read, or in which no face is found: nothing
    can be compared with it.
    """
    if identify := scorers.get("identify"):
        for face in dict.fromkeys(row.face for row in rows if row.compares):
            _reference(face, identify)


def score(row: Row, images: Sequence[Image | None], scorers: Mapping[str, Any]) -> dict[str, Ratio]:
    """Sums and counts over the pictures of a person and prompt.

    Raises UserError for a portrait that `check_scoring` refuses.
    """
    there = [image for image in images if image is not None]
    faces: list[float | None] = []
    if row.compares and there and (identify := scorers.get("identify")):
        faces = _cosines(row, there, identify)
    found = [cosine for cosine in faces if cosine is not None]
    texts: list[float] = []
    if row.reads and there and (clip := scorers.get("clip")):
        (text,) = clip.text_embed([row.text])
        texts = [metrics.cosine(v, text).value for v in clip.image_embed(there)]
    total, asked = math.fsum(found), len(images) if row.compares else 0
    return {
        "skip/similarity": Ratio.of(total, len(found)),
        "zero/similarity": Ratio.of(total, len(faces)),
        "strict/similarity": Ratio.of(total, asked),
        "detection_rate": Ratio.of(len(found), len(faces)),
        "clip_t": Ratio.of(math.fsum(texts), len(texts)),
        "strict/clip_t": Ratio.of(math.fsum(texts), len(images) if row.reads else 0),
        "failures/missing": Ratio.of(len(images) - len(there)),
        "failures/no_face": Ratio.of(len(faces) - len(found)),
    }


def _cosines(row: Row, images: Sequence[Image], identify: Any) -> list[float | None]:
    reference = _reference(row.face, identify)
    vectors = [identify(image) for image in images]
    return [None if v is None else metrics.cosine(v, reference).value for v in vectors]


def _reference(face: str, identify: Any) -> Any:
    vector = identify(similarity.read_rgb(face, what="a portrait"))
    if vector is None:
        raise UserError(f"{face}: no face was found in the portrait")
    return vector


def summary(rows: Sequence[Row], scores: Sequence[Scores]) -> Summary:
    """Means over pictures, by policy; `failures/` count pictures."""
    found = {name: merge(column(scores, name)).value for name in scores[0]}
    return found | failure_counts(scores)


def benchmark(settings: Settings = Settings()) -> Official:
    """The benchmark with these settings."""
    is_unsplash = settings.people == UNSPLASH and settings.prompts == (UNSPLASH_PROMPT,)
    return Official(
        name="identity_set",
        version=2,
        read=functools.partial(read, settings=settings),
        requests=requests,
        check_scoring=check_scoring,
        needs={"identify": ("similarity", "detection_rate", "no_face"), "clip": ("clip_t",)},
        weights=similarity.clip_weights(settings.clip),
        score=score,
        summary=summary,
        quality=lambda scores: scores["zero/similarity"].value,
        primary="zero/similarity",
        settings=dataclasses.asdict(settings) | similarity.COSINE,
        scoring=("encoder", "clip", "clip_score"),
        published=PUBLISHED if is_unsplash else (),
    )


# PuLID does not say what it does where no face is found. UniVG and OneDiffusion name no encoder.
PUBLISHED = (
    Published("UniVG", "skip/similarity", 0.329, "UniVG (arXiv 2503.12652), of an unnamed encoder"),
    Published("OneDiffusion", "skip/similarity", 0.283, "its paper, of an unnamed encoder"),
    *(
        Published(system, "skip/similarity", value, "PuLID (arXiv 2404.16022), table 6")
        for system, value in {"PhotoMaker": 0.193, "InstantID": 0.648, "PuLID": 0.654}.items()
    ),
)
BENCHMARK = benchmark()
