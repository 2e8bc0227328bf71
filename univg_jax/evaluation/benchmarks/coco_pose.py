"""COCO keypoints: object keypoint similarity, its average precision, and PCK.

    OKS = mean over labeled joints of exp(-d^2 / (2 s^2 area))        s = 2 sigma of the joint

AP and AR are pycocotools': over OKS from .5 to .95, of people in all pictures. They are no mean
over pictures, so results of all shards are joined (as lists, in any order) and evaluated at once.
PCK is the share of joints within a part of the box's longer side, averaged over joints.

A generated skeleton is of one person: of the people in a picture it is compared, by OKS and PCK,
with the largest one, which renderings draw last. AP asks for all people.
"""

import contextlib
import copy
import io
import math
import os
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Num

from univg_jax.errors import UserError, needs_extra
from univg_jax.evaluation import metrics
from univg_jax.evaluation.metrics import Ratio

Annotations = dict[str, list[dict[str, Any]]]  # images, annotations, categories
Result = dict[str, Any]  # one person in COCO's format of results
Joints = Num[np.ndarray, "17 3"]  # x, y, and a confidence or visibility; 0 is none

# Of the distances of people's annotations, by COCO: nose, eyes, ears, shoulders, elbows, wrists,
# hips, knees, ankles.
SIGMAS = np.array([0.026, *np.repeat([25, 35, 79, 72, 62, 107, 87, 89], 2) / 1000])
PCK_AT = (0.1, 0.2)
STATISTICS = ("AP", "AP50", "AP75", "APM", "APL", "AR", "AR50", "AR75", "ARM", "ARL")
PERSON = 1  # the id of its category


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


def score(prediction: Joints, person: Mapping[str, Any]) -> dict[str, Ratio]:
    """OKS and PCK of joints in pixels against a person's annotation with labeled joints."""
    target = np.array(person["keypoints"], float).reshape(17, 3)
    xy = np.where(prediction[:, 2:] > 0, prediction[:, :2].astype(float), np.nan)
    side = float(max(person["bbox"][2:]))
    pck = {
        f"pck@{at}": metrics.pck(xy, target[:, :2], visible=target[:, 2] > 0, box_size=side, at=at)
        for at in PCK_AT
    }
    return {"oks": Ratio.of(oks(prediction, target, area=float(person["area"])))} | pck
