"""BENCHMARKS: how every task is judged on held-out examples of the embedded data, and against what.

| task | primary | other metrics | trivial answers |
|---|---|---|---|
| t2i | caption ranked first of 16 of the true setting | the same in any setting | chance; the mean training image |
| ie | L1 in the changed region | L1, PSNR | a copy of the source |
| ip | L1 in the hole | L1 raw and composited | the hole filled with the mean visible color |
| lg | IoU of each box's best same-noun detection | success at IoU 0.5 | the layout itself; the mean training image |
| depth | AbsRel after scale and shift | delta1 | the mean training depth |
| pose | PCK at 0.1 of the box | | the mean training pose |
| seg | mean IoU | overall IoU | everything; the mean training mask |
| id | cosine of face embeddings | | the mean training image; another person's picture |

A trivial answer is a picture like any other, scored by the same code; the strongest one is what a
model has to beat. Ground truth is the record's own label, not its rendering, where they differ.

A benchmark may also have references: answers that know more than a trivial one may, and show what
its metric does not measure. Held-out captions differ in ground and sky, so the true background
without any object ranks its caption first about every other time (0.51 of 256 scenes of 16 nouns):
plain retrieval says little about objects. With the true setting in all 16 captions that reference
falls to 0.18, and the real pictures stay at 0.97. It does not fall to chance, 0.06, for reasons not
found (shadows are not it): compare with it, not with chance.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import cv2
import numpy as np
from jaxtyping import UInt8

from data_pipelines import renderings, tasks, transforms
from univg_jax.evaluation import metrics
from univg_jax.evaluation.metrics import Ratio
from univg_jax.evaluation.scorers import Scorers

CANDIDATES = 16  # captions of the retrieval: the true one and 15 others
DEPTH_RANGE = (0.001, 10.0)  # meters that count, as NYUv2 has it; the embedded data's sky is beyond

Image = UInt8[np.ndarray, "h w 3"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """A held-out example in its fixed place: `index` keys its noise and names its files."""

    index: int
    task: str
    record: Mapping[str, Any]  # at the example's size
    example: tasks.Example

    @property
    def prompt(self) -> str:
        return tasks.prompt(self.task, self.example.text)


Judge = Callable[[Case, Image], dict[str, Ratio]]
Answer = Callable[[Case], Image]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Metric:
    label: str
    better: str  # "higher" or "lower"
    percent: bool = False

    def improves(self, value: float, other: float) -> bool:
        """Strictly; a NaN beats nothing and is not beaten."""
        return value > other if self.better == "higher" else value < other


@dataclasses.dataclass(frozen=True, kw_only=True)
class Benchmark:
    """How one task is judged. `metrics[first]` is the primary one.

    `judge(scorers, cases)` returns the function that scores one answer to one of `cases`; it raises
    ValueError if a scorer that it needs is absent. `trivial(train)` makes the trivial answers from
    training examples. `chance(cases)` has the expected values of guessing, where that is a number.
    """

    title: str
    metrics: dict[str, Metric]
    judge: Callable[[Scorers, Sequence[Case]], Judge]
    trivial: Callable[[Sequence[Case]], dict[str, Answer]]
    chance: Callable[[Sequence[Case]], dict[str, float]] = lambda cases: {}
    references: dict[str, Answer] = dataclasses.field(default_factory=dict)
    needs: tuple[str, ...] = ()  # record fields beside those of the task
    needs_scene: bool = False  # of the scorers
    difficulty: str = ""  # for the report, if the task fails
    note: str = ""

    @property
    def primary(self) -> str:
        return next(iter(self.metrics))


def draw_cases(
    task: str, records: Sequence[transforms.Record], *, resolution: int, seed: int = 0
) -> list[Case]:
    """Examples of `task` from suitable records (`mixture.eval_records`), the random choices keyed
    by (seed, place).

    Raises ValueError for an unknown task, or a record that lacks a field which the task or its
    benchmark needs.
    """
    spec, cases = tasks.find(task), []
    for index, record in enumerate(records):
        where = f"case {index} of task {task!r}"
        tasks.check(record, (*spec.needs, *BENCHMARKS[task].needs), where=where)
        record = transforms.resize_and_crop(record, resolution=resolution)
        rng = np.random.default_rng((seed, index))
        example = spec.example(record, rng, resolution, where=where, center=True)
        cases.append(Case(index=index, task=task, record=record, example=example))
    return cases


# --- answers that need no model ---


def _constant(image: Image) -> Answer:
    return lambda case: image


def _mean_target(train: Sequence[Case]) -> Image:
    return np.rint(np.mean([case.example.target for case in train], axis=0, dtype=float)).astype(
        np.uint8
    )


def _mean_image(train: Sequence[Case]) -> dict[str, Answer]:
    return {"the mean training image": _constant(_mean_target(train))}


def _copy(train: Sequence[Case]) -> dict[str, Answer]:
    return {"a copy of the source": lambda case: case.example.source}


def _filled(train: Sequence[Case]) -> dict[str, Answer]:
    def fill(case: Case) -> Image:
        hole = case.example.mask[..., 0] > 0
        visible = case.example.source[~hole]
        color = visible.mean(axis=0) if len(visible) else np.full(3, renderings.GRAY)
        return np.where(hole[..., None], np.rint(color).astype(np.uint8), case.example.source)

    return {"the mean visible color": fill}


def _layout_answers(train: Sequence[Case]) -> dict[str, Answer]:
    return {"the layout itself": lambda case: case.example.source} | _mean_image(train)


def _mean_pose(train: Sequence[Case]) -> dict[str, Answer]:
    joints = np.mean([case.record["joints"] for case in train], axis=0, dtype=np.float32)
    joints[:, 2] = 1
    resolution = train[0].example.target.shape[0]
    return {
        "the mean training pose": _constant(renderings.render_pose(joints, resolution=resolution))
    }


def _mask_answers(train: Sequence[Case]) -> dict[str, Answer]:
    masks = np.stack([renderings.decode_mask(case.example.target) for case in train])
    mean = masks.mean(axis=0)
    likely = mean >= np.quantile(mean, 1 - masks.mean())  # as large as a mask is on average
    everything = np.ones_like(masks[0])
    return {
        "everything": _constant(renderings.render_mask(everything)),
        "the mean training mask": _constant(renderings.render_mask(likely.astype(np.uint8))),
    }


def _person_answers(train: Sequence[Case]) -> dict[str, Answer]:
    def other(case: Case) -> Image:
        return train[np.random.default_rng([1, case.index]).integers(len(train))].example.target

    return {"another person's picture": other} | _mean_image(train)


# --- judges ---


def _scene(scorers: Scorers) -> Any:
    if scorers.scene is None:
        raise ValueError(
            "this benchmark needs the scene scorer (`univg_jax.evaluation.scorers.scene_scorer`)"
        )
    return scorers.scene


def _split_caption(caption: str) -> tuple[str, str]:
    """(objects, setting) of an `emoji_scenes` caption: "a pig", " on grass under a blue sky"."""
    objects, on, setting = caption.rpartition(" on ")
    return (objects, on + setting) if on else (caption, "")


def _candidates(cases: Sequence[Case]) -> dict[str, list[list[str]]]:
    """By metric, for each case its caption and up to 15 others of the set, fixed by the case's
    index.
    """

    def draw(true: str, pool: list[str], index: int) -> list[str]:
        others = [text for text in pool if text != true]
        chosen = np.random.default_rng([CANDIDATES, index]).permutation(len(others))[
            : CANDIDATES - 1
        ]
        return [true, *(others[i] for i in chosen)]

    captions = sorted({case.example.text for case in cases})
    objects = sorted({_split_caption(caption)[0] for caption in captions})
    rows: dict[str, list[list[str]]] = {"retrieval_r1": [], "retrieval_objects_r1": []}
    for case in cases:
        thing, setting = _split_caption(case.example.text)
        rows["retrieval_r1"].append(draw(case.example.text, captions, case.index))
        rows["retrieval_objects_r1"].append([t + setting for t in draw(thing, objects, case.index)])
    return rows


def _retrieval(scorers: Scorers, cases: Sequence[Case]) -> Judge:
    scene = _scene(scorers)
    candidates = _candidates(cases)
    captions = sorted({caption for rows in candidates.values() for row in rows for caption in row})
    embedded = scene.center(np.asarray(scorers.embed_text(captions)))
    embedded = dict(zip(captions, embedded / np.linalg.norm(embedded, axis=-1, keepdims=True)))
    places = {case.index: place for place, case in enumerate(cases)}

    def judge(case: Case, image: Image) -> dict[str, Ratio]:
        seen = scene.embed(image[None])[0]
        return {
            name: metrics.recall_at_1(
                (np.stack([embedded[c] for c in rows[places[case.index]]]) @ seen).astype(float)
            )
            for name, rows in candidates.items()
        }

    return judge


def _background(case: Case) -> Image:
    """The true picture with its objects painted over, row by row, with the median of the row's
    background.
    """
    image = case.example.target.copy()
    objects = case.record["masks"].any(axis=0).astype(np.uint8)
    objects = cv2.dilate(objects, np.ones((5, 5), np.uint8)) > 0  # with their soft edges
    color = np.full(3, renderings.GRAY, np.uint8)
    for row, covered in zip(image, objects):
        if not covered.all():
            color = np.median(row[~covered], axis=0).astype(np.uint8)
        row[covered] = color
    return image


def _edit(scorers: Scorers, cases: Sequence[Case]) -> Judge:
    def judge(case: Case, image: Image) -> dict[str, Ratio]:
        target = case.example.target
        return {
            "l1_changed": metrics.l1(image, target, case.record["edit_mask"]),
            "l1": metrics.l1(image, target),
            "psnr": metrics.psnr(image, target),
        }

    return judge


def _inpaint(scorers: Scorers, cases: Sequence[Case]) -> Judge:
    def judge(case: Case, image: Image) -> dict[str, Ratio]:
        target, hole = case.example.target, case.example.mask[..., 0]
        composited = np.where(hole[..., None] > 0, image, case.example.source)
        return {
            "l1_hole": metrics.l1(image, target, hole),
            "l1": metrics.l1(image, target),
            "l1_composited": metrics.l1(composited, target),
        }

    return judge


def _layout(scorers: Scorers, cases: Sequence[Case]) -> Judge:
    scene = _scene(scorers)

    def judge(case: Case, image: Image) -> dict[str, Ratio]:
        found = scene.detect(image)
        nothing = np.zeros((0, 4))
        nouns = [scene.noun_of(phrase) for phrase in case.record["phrases"]]
        ious = metrics.best_box_iou(
            np.asarray(case.record["boxes"], float), [found.get(noun, nothing) for noun in nouns]
        )
        count = float(len(ious))
        return {
            "layout_miou": Ratio.of(ious.sum(), count),
            "layout_success": Ratio.of(float(np.sum(ious >= 0.5)), count),
        }

    return judge


def _depth(scorers: Scorers, cases: Sequence[Case]) -> Judge:
    def judge(case: Case, image: Image) -> dict[str, Ratio]:
        depth = case.record["depth"]
        valid = (depth > DEPTH_RANGE[0]) & (depth < DEPTH_RANGE[1])
        return metrics.depth_errors(renderings.decode_depth(image), depth, valid)

    return judge


def _pose(scorers: Scorers, cases: Sequence[Case]) -> Judge:
    def judge(case: Case, image: Image) -> dict[str, Ratio]:
        size = image.shape[0]
        joints, truth = renderings.decode_pose(image), case.record["joints"]
        xy = np.where(joints[:, 2:] > 0, joints[:, :2] * size, np.nan)
        box = case.record["boxes"][0]
        side = float(max(box[2] - box[0], box[3] - box[1])) * size
        return {"pck": metrics.pck(xy, truth[:, :2] * size, visible=truth[:, 2] > 0, box_size=side)}

    return judge


def _segment(scorers: Scorers, cases: Sequence[Case]) -> Judge:
    def judge(case: Case, image: Image) -> dict[str, Ratio]:
        prediction = renderings.decode_mask(image) > 0
        # exact: the rendering is black and white
        truth = renderings.decode_mask(case.example.target) > 0
        return {
            "miou": metrics.mean_iou(prediction, truth),
            "oiou": metrics.overall_iou(prediction, truth),
        }

    return judge


def _identity(scorers: Scorers, cases: Sequence[Case]) -> Judge:
    if scorers.embed_face is None:
        raise ValueError("this benchmark needs a face encoder (`Scorers.embed_face`)")
    embed = scorers.embed_face

    def judge(case: Case, image: Image) -> dict[str, Ratio]:
        return {
            "identity_cosine": metrics.cosine(
                embed(case.example.face[None])[0], embed(image[None])[0]
            )
        }

    return judge


BENCHMARKS: dict[str, Benchmark] = {
    "t2i": Benchmark(
        title="Text to image",
        metrics={
            "retrieval_objects_r1": Metric(
                label="True objects ranked first", better="higher", percent=True
            ),
            "retrieval_r1": Metric(
                label="The same, against other settings too", better="higher", percent=True
            ),
        },
        judge=_retrieval,
        trivial=_mean_image,
        chance=lambda cases: {
            name: float(np.mean([1 / len(row) for row in rows]))
            for name, rows in _candidates(cases).items()
        },
        references={"the true background without objects": _background},
        needs=("masks",),
        needs_scene=True,
        difficulty="Objects need more training than ground and sky, which this metric does not count.",
        note=f"In-domain retrieval among {CANDIDATES} captions, by a scorer fitted on the train split. All share the "
        "true setting: against captions of other settings, ground and sky alone go far.",
    ),
    "ie": Benchmark(
        title="Instruction editing",
        metrics={
            "l1_changed": Metric(label="L1 in the changed region", better="lower"),
            "l1": Metric(label="L1, whole image", better="lower"),
            "psnr": Metric(label="PSNR, dB", better="higher"),
        },
        judge=_edit,
        trivial=_copy,
        needs=("edit_mask",),
        difficulty="A copy is exact outside the change; inside, the model must also place and draw what is new.",
    ),
    "ip": Benchmark(
        title="In- and outpainting",
        metrics={
            "l1_hole": Metric(label="L1 in the hole", better="lower"),
            "l1": Metric(label="L1, whole image, raw", better="lower"),
            "l1_composited": Metric(label="L1, whole image, composited", better="lower"),
        },
        judge=_inpaint,
        trivial=_filled,
        difficulty="A flat mean color is the safest guess under L1; a sharp object in the wrong place costs more.",
    ),
    "lg": Benchmark(
        title="Layout to image",
        metrics={
            "layout_miou": Metric(label="IoU of the named boxes", better="higher", percent=True),
            "layout_success": Metric(label="Boxes found at IoU 0.5", better="higher", percent=True),
        },
        judge=_layout,
        trivial=_layout_answers,
        needs_scene=True,
        difficulty="The scorer must recognize the noun in the box, so shapes must be readable.",
        note="Detections by the scene scorer fitted on this data's train split.",
    ),
    "depth": Benchmark(
        title="Depth estimation",
        metrics={
            "abs_rel": Metric(label="AbsRel", better="lower"),
            "delta1": Metric(label="delta1", better="higher", percent=True),
        },
        judge=_depth,
        trivial=lambda train: {"the mean training depth": _constant(_mean_target(train))},
        difficulty="Scenes share their geometry, so the mean depth is already close.",
        note=f"After least-squares scale and shift, on surfaces nearer than {DEPTH_RANGE[1]:g} m.",
    ),
    "pose": Benchmark(
        title="Pose estimation",
        metrics={"pck": Metric(label="PCK at 0.1 of the box", better="higher", percent=True)},
        judge=_pose,
        trivial=_mean_pose,
        needs=("boxes",),
        difficulty="Limbs are a few pixels wide and must have exactly their own colors to be read.",
    ),
    "seg": Benchmark(
        title="Referring segmentation",
        metrics={
            "miou": Metric(label="Mean IoU", better="higher", percent=True),
            "oiou": Metric(label="Overall IoU", better="higher", percent=True),
        },
        judge=_segment,
        trivial=_mask_answers,
        difficulty="The expression must be understood to choose the object.",
        note=f"A pixel belongs to the mask from a brightness of {renderings.MASK_THRESHOLD:g}.",
    ),
    "id": Benchmark(
        title="Identity preservation",
        metrics={"identity_cosine": Metric(label="Cosine of face embeddings", better="higher")},
        judge=_identity,
        trivial=_person_answers,
        difficulty="Only the face embedding carries the identity, and its projector is new in the last stage.",
        note="Held-out persons; the embedding is that of the encoder the model is conditioned on.",
    ),
}
