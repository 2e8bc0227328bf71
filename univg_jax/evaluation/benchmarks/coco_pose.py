"""COCO keypoints: object keypoint similarity, its average precision, and PCK.

    OKS = mean over labeled joints of exp(-d^2 / (2 s^2 area))        s = 2 sigma of the joint

AP and AR are pycocotools': over OKS from .5 to .95, of people in all pictures. They are no mean
over pictures, so results of all shards are joined (as lists, in any order) and evaluated at once.
PCK is the share of joints within a part of the box's longer side, averaged over joints.

A generated skeleton is of one person: of the people in a picture it is compared, by OKS and PCK,
with the largest one, which renderings draw last. AP asks for all people, so a picture of several
has at most one of them found. A generated picture is read by `renderings.decode_pose`, and is of
the whole photograph, whatever its size. One that is missing finds nobody: AP has it so, OKS and PCK
leave it out, and `strict/` counts it as 0. A picture without labeled people counts in AP alone.
"""

import contextlib
import copy
import dataclasses
import io
import math
import os
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Num

from data_pipelines import renderings
from data_pipelines.native.tables import get
from univg_jax.errors import UserError, needs_extra, quote
from univg_jax.evaluation import metrics
from univg_jax.evaluation.inputs import check_count
from univg_jax.evaluation.metrics import Image, Ratio, merge
from univg_jax.evaluation.official import Official, Request, requests_of
from univg_jax.evaluation.summaries import Scores, Summary, column, failure_counts
from univg_jax.fields import setting

Annotations = dict[str, list[dict[str, Any]]]  # images, annotations, categories
Result = dict[str, Any]  # one person in COCO's format of results
Joints = Num[np.ndarray, "17 3"]  # x, y, and a confidence or visibility; 0 is none

# Of the distances of people's annotations, by COCO: nose, eyes, ears, shoulders, elbows, wrists,
# hips, knees, ankles.
SIGMAS = np.array([0.026, *np.repeat([25, 35, 79, 72, 62, 107, 87, 89], 2) / 1000])
PCK_AT = (0.1, 0.2)
STATISTICS = ("AP", "AP50", "AP75", "APM", "APL", "AR", "AR50", "AR75", "ARM", "ARL")
PERSON = 1  # the id of its category
IMAGES = {"val2017": 5000}  # of a split, in the official file
CHOICES = ("all", "labeled")
_NOTHING = {"oks": Ratio.of(0.0, 0.0)} | {
    f"pck@{at}": Ratio.of(np.zeros(17), np.zeros(17)) for at in PCK_AT
}


@dataclasses.dataclass(frozen=True)
class Settings:
    """Which pictures are asked for; a result stores `split` and `choice`.

    AP is over all pictures of the split, as COCO has it, or only over those with a labeled person.
    """

    split: str = setting("val2017", "of person_keypoints_SPLIT.json", least=1)
    choice: str = setting("all", "all pictures, or those with a labeled person", names=CHOICES)
    pictures: str = setting("", "their folder; by default SPLIT beside annotations", is_path=True)


@dataclasses.dataclass(frozen=True)
class Row:
    """A photograph and the annotations of its people, as COCO has them."""

    image_id: int
    picture: str
    height: int
    width: int
    people: tuple[Mapping[str, Any], ...] = dataclasses.field(repr=False, hash=False)


def read(
    path: str | os.PathLike, settings: Settings = Settings(), *, excerpt: bool = False
) -> tuple[Row, ...]:
    """The photographs of annotations/person_keypoints_SPLIT.json in COCO's folder, by their ids.

    Raises UserError for a file that is missing or another one, or, unless it is an `excerpt`, has
    not as many pictures as the official one.
    """
    from data_pipelines.native import coco

    root = os.fspath(path)
    file = os.path.join(root, "annotations", f"person_keypoints_{settings.split}.json")
    pictures = settings.pictures or os.path.join(root, settings.split)
    content = read_annotations(file)
    people: dict[int, list[Mapping[str, Any]]] = {}
    try:
        for image in content["images"]:
            people[get(image, "id", int)] = []
        for annotation in content["annotations"]:
            person = _person(annotation)
            if person["image_id"] not in people:
                raise UserError(f"annotation {person['id']} is of no picture of the list")
            people[person["image_id"]].append(person)
        rows = []
        for image in sorted(content["images"], key=lambda image: image["id"]):
            name = get(image, "file_name", str)
            if not re.fullmatch(r"[\w.-]+", name, re.ASCII):
                raise UserError(f"{quote(name)} is the name of no picture")
            found = tuple(people[image["id"]])
            if settings.choice == "all" or largest_person(found) is not None:
                place = os.path.join(pictures, name)
                rows.append(Row(image["id"], place, *coco.image_size(image), found))
    except UserError as error:
        raise UserError(f"{file}: {error}") from None
    official = IMAGES.get(settings.split, len(people))
    check_count(
        str(file),
        found=len(people),
        official=official,
        what="pictures",
        excerpt=excerpt,
        expected="COCO's keypoints",
    )
    return tuple(rows)


def _person(annotation: Mapping[str, Any]) -> dict[str, Any]:
    """What is scored of an annotation. Raises UserError for one that is not as COCO has it."""
    person: dict[str, Any] = {name: get(annotation, name, int) for name in ("id", "image_id")}
    person |= {name: get(annotation, name, int, 0) for name in ("iscrowd", "num_keypoints")}
    person |= {"category_id": PERSON, "area": get(annotation, "area", float)}
    for name, length in {"bbox": 4, "keypoints": 51}.items():
        numbers = get(annotation, name, list)
        if len(numbers) != length or not all(type(n) in (int, float) for n in numbers):
            raise UserError(f"{name} of annotation {person['id']} is not {length} numbers")
        person[name] = numbers
    return person


def image_files(row: Row) -> tuple[str, ...]:
    """Where the generated skeleton lies; there is no official layout."""
    return (f"{row.image_id:012}.png",)


def requests(rows: Sequence[Row]) -> list[Request]:
    """The skeleton in each photograph, all of it."""
    return requests_of(
        rows,
        image_files,
        task="pose",
        inputs=lambda row: {"image": row.picture},
        whole=True,
    )


def read_annotations(path: str | os.PathLike) -> Annotations:
    """COCO's `person_keypoints_*.json`. Raises UserError, or NotFoundError if it is not there."""
    from data_pipelines.native import coco

    keys = ("images", "annotations", "categories")
    return {key: list(coco.read_list(path, key, what="COCO's keypoints")) for key in keys}


def in_pixels(joints: Float[np.ndarray, "17 3"], *, height: int, width: int) -> Joints:
    """Joints as fractions of a picture (`renderings.decode_pose`) as COCO's indices of pixels.

    0.5 / width is the middle of pixel 0. A joint that was not found is 0, 0, 0.
    """
    xy = joints[:, :2].astype(float) * (width, height) - 0.5
    found = joints[:, 2:] > 0
    return np.where(found, np.concatenate([xy, joints[:, 2:]], axis=1), 0.0)


def keypoint_results(image_id: int, people: Float[np.ndarray, "p 17 3"]) -> list[Result]:
    """People of a picture, in pixels, as COCO's results; one without any joint is left out.

    A person's score is the mean confidence of all joints, 0 of those that were not found.
    """
    return [
        {
            "image_id": image_id,
            "category_id": PERSON,
            "keypoints": [float(v) for v in joints.ravel()],
            "score": float(joints[:, 2].mean()),
        }
        for joints in people
        if (joints[:, 2] > 0).any()
    ]


def average_precision(
    annotations: Annotations,
    results: Sequence[Result],
    *,
    image_ids: Collection[int] | None = None,
) -> dict[str, float]:
    """pycocotools' STATISTICS of the results, over `image_ids` or all images; NaN without people.

    Results may come in any order. Raises UserError for a result of an image that is not among them.
    """
    with needs_extra("data", "OKS average precision"):
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval

    ids = sorted({i["id"] for i in annotations["images"]} if image_ids is None else image_ids)
    if strangers := {r["image_id"] for r in results} - set(ids):
        raise UserError(
            f"{len(strangers)} of the images with results, such as {min(strangers)}, are not among "
            f"the {len(ids)} that are evaluated"
        )
    # Equal scores stay in the order of the list, so that must not depend on the shards.
    order = sorted(results, key=lambda r: (r["image_id"], -r["score"], r["keypoints"]))
    with contextlib.redirect_stdout(io.StringIO()):
        truth, found = COCO(), COCO()
        truth.dataset = copy.deepcopy(annotations)
        truth.createIndex()
        if order:
            found = truth.loadRes(copy.deepcopy(order))
        else:
            found.dataset = {**truth.dataset, "annotations": []}
            found.createIndex()
        evaluation = COCOeval(truth, found, "keypoints")
        evaluation.params.imgIds = ids
        evaluation.params.catIds = [PERSON]
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return {n: v if v >= 0 else math.nan for n, v in zip(STATISTICS, map(float, evaluation.stats))}


def largest_person(people: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """The annotation with the largest area of those with labeled joints; None if there is none."""
    labeled = [p for p in people if not p.get("iscrowd") and any(p["keypoints"][2::3])]
    return max(labeled, key=lambda p: (p["area"], -p["id"]), default=None)


def oks(prediction: Joints, target: Joints, *, area: float) -> float:
    """Object keypoint similarity in [0, 1] of joints in pixels; a joint not found has none of it.

    NaN if no joint of the target is labeled. `area` is that of the person's segment, in pixels.
    """
    labeled = target[:, 2] > 0
    square = np.square(prediction[:, :2].astype(float) - target[:, :2]).sum(axis=1)
    similarity = np.exp(-square / (2 * (2 * SIGMAS) ** 2 * (area + np.spacing(1))))
    similarity = np.where(prediction[:, 2] > 0, similarity, 0)
    return float(similarity[labeled].mean()) if labeled.any() else math.nan


def compare(prediction: Joints, person: Mapping[str, Any]) -> dict[str, Ratio]:
    """OKS and PCK of joints in pixels against a person's annotation with labeled joints."""
    target = np.array(person["keypoints"], float).reshape(17, 3)
    xy = np.where(prediction[:, 2:] > 0, prediction[:, :2].astype(float), np.nan)
    side = float(max(person["bbox"][2:]))
    pck = {
        f"pck@{at}": metrics.pck(xy, target[:, :2], visible=target[:, 2] > 0, box_size=side, at=at)
        for at in PCK_AT
    }
    return {"oks": Ratio.of(oks(prediction, target, area=float(person["area"])))} | pck


def score(row: Row, images: Sequence[Image | None], scorers: Mapping[str, Any]) -> dict[str, Ratio]:
    """OKS and PCK of a picture's largest person, and the joints themselves; no scorer is needed.

    `joints` are sums that are added to nothing: AP needs them one by one.
    """
    (image,) = images
    joints = np.zeros((17, 3))
    if image is not None:
        joints = in_pixels(renderings.decode_pose(image), height=row.height, width=row.width)
    person = largest_person(row.people)
    strict = _NOTHING if person is None else compare(joints, person)
    is_there = float(image is not None)
    return {
        **{n: Ratio(r.total * is_there, r.count * is_there) for n, r in strict.items()},
        **{f"strict/{n}": r for n, r in strict.items()},
        "joints": Ratio.of(joints.ravel()),
        "failures/missing": Ratio.of(float(image is None)),
    }


def summary(rows: Sequence[Row], scores: Sequence[Scores]) -> Summary:
    """pycocotools' STATISTICS over all rows, means of OKS and PCK, and how many are missing."""
    people = [dict(person) for row in rows for person in row.people]
    sizes = [{"id": row.image_id, "height": row.height, "width": row.width} for row in rows]
    categories = [{"id": PERSON, "name": "person"}]
    results = [
        result
        for row, entry in zip(rows, scores, strict=True)
        for result in keypoint_results(row.image_id, entry["joints"].total.reshape(1, 17, 3))
    ]
    content = {"images": sizes, "annotations": people, "categories": categories}
    found = average_precision(content, results)
    names = [name for name in scores[0] if name != "joints"]
    found |= {name: merge(column(scores, name)).value for name in names}
    return found | failure_counts(scores)


def benchmark(settings: Settings = Settings()) -> Official:
    """The benchmark with these settings."""

    def read_rows(path: str | os.PathLike, *, excerpt: bool = False) -> tuple[Row, ...]:
        return read(path, settings, excerpt=excerpt)

    return Official(
        name="coco_pose",
        version=1,
        read=read_rows,
        requests=requests,
        score=score,
        summary=summary,
        quality=lambda scores: scores["oks"].value,
        primary="AP",
        settings={"split": settings.split, "choice": settings.choice},
    )


BENCHMARK = benchmark()
