"""The embedded data's own benchmark: eight tasks on held-out emoji scenes, puppets and portraits.

| task | primary metric | other metrics | trivial answers |
|---|---|---|---|
| t2i | caption ranked first of 16 of the true setting | of any setting | chance; the mean image |
| ie | L1 in the changed region | L1, PSNR | a copy of the source |
| ip | L1 in the hole | L1 raw and composited | the hole filled with the mean visible color |
| lg | IoU of each box's best detection | success at IoU 0.5 | the layout; the mean image |
| depth | AbsRel after scale and shift | delta1 | the mean training depth |
| pose | PCK at 0.1 of the box | | the mean training pose |
| seg | mean IoU | overall IoU | everything; the mean training mask |
| id | cosine of face embeddings | | the mean image; another person's picture |

Ground truth is the record's own label, not its rendering, where they differ.

Captions differ in ground and sky, so the true background without any object (a reference) ranks its
caption first about every other time: 0.51 on 256 scenes of 16 nouns. Plain retrieval therefore says
little about objects. With the true setting in all 16 captions that reference falls to 0.18, while
the real pictures stay at 0.97. It does not fall to chance, 0.06, for reasons that were not found
(shadows are not the reason), so compare a model with the reference and not with chance.
"""

from collections.abc import Sequence

import cv2
import numpy as np
from etils import epath

from data_pipelines import renderings
from data_pipelines.collate import Collator
from data_pipelines.held_out import HeldOut
from data_pipelines.sources import open_source
from univg_jax.errors import UserError
from univg_jax.evaluation import answers, metrics
from univg_jax.evaluation.benchmark import (
    AnswerFn,
    Benchmark,
    BenchmarkTask,
    Case,
    Cases,
    Metric,
    ScoreFn,
)
from univg_jax.evaluation.metrics import Image, Ratio, unit_vectors
from univg_jax.evaluation.scorers import Scorers
from univg_jax.evaluation.scorers.embedders import embedders
from univg_jax.evaluation.scorers.scene import open_scene_scorer
from univg_jax.pipeline import Pipeline
from univg_jax.settings import Config

CANDIDATES = 16  # captions of the retrieval: the true one and 15 others
DEPTH_RANGE = (0.001, 10.0)  # meters that count, as in NYUv2; the scenes' sky is farther


# --- the data and its scorers ---


def cases(config: Config, task: str, *, split: str, num: int, collator: Collator) -> Cases:
    """The first `num` records of a split that serve the task. Raises UserError if it has none."""
    fields = BENCHMARK.tasks[task].needs_fields
    records = HeldOut(
        config, task, split=split, num=num, collator=collator, seed=config.seed, fields=fields
    )
    return Cases(task, records, resolution=config.data.resolution, seed=config.seed, fields=fields)


def fingerprint(config: Config) -> str:
    """What the data was built from, or TFDS's descriptions of it if another program built it."""
    folder = epath.Path(config.data.dir)
    if (build := folder / "build.json").exists():
        return build.read_text()
    # A description has the number of records and of bytes in each shard.
    patterns = [f"{depth}dataset_info.json" for depth in ("*/", "*/*/", "*/*/*/")]
    infos = sorted(path for pattern in patterns for path in folder.glob(pattern))
    return "\n".join([config.data.dir, *(path.read_text() for path in infos)])


def open_scorers(pipeline: Pipeline, *, needs: Sequence[str]) -> Scorers:
    """The run's own encoders, and the scene scorer of this data, fitted on its train split."""
    scorers, config = embedders(pipeline, needs=needs), pipeline.config
    if "scene" in needs:
        # Both tasks that need the scorer are served by the scenes.
        task = next(config.tasks[name] for name in ("t2i", "lg") if name in config.tasks)
        scorers["scene"] = open_scene_scorer(
            open_source(task.source_names[0], "train", data_dir=config.data.dir),
            noun_of=emoji_noun,
            embed_text=scorers["text_embed"],
            cache_dir=epath.Path(config.data.dir) / "scorers",
            key=fingerprint(config),
        )
    return scorers


def emoji_noun(phrase: str) -> str:
    """The noun of a phrase: "two red apples" -> "apple". Raises UserError if it ends in none."""
    # Imported here, since the artwork behind it is an optional dependency that few tasks need.
    from data_pipelines.datasets.emoji_scenes.sprites import WHITELIST

    ending = [n.name for n in WHITELIST if f" {phrase}".endswith((f" {n.name}", f" {n.plural}"))]
    if not ending:
        raise UserError(f"phrase {phrase!r} ends in no noun of emoji_scenes")
    return max(ending, key=len)  # "a teddy bear" is not a bear


# --- answers that know the data ---


def _person_answers(train: Cases) -> dict[str, AnswerFn]:
    def other(case: Case) -> Image:
        chosen = np.random.default_rng([1, case.index]).integers(len(train))
        return train[int(chosen)].example.target

    return {"another person's picture": other} | answers.mean_image(train)


def _background(case: Case) -> Image:
    """The true picture, its objects painted over in the median color of each row's background."""
    image = case.example.target.copy()
    objects = case.record["masks"].any(axis=0).astype(np.uint8)
    objects = cv2.dilate(objects, np.ones((5, 5), np.uint8)) > 0  # with their soft edges
    color = np.full(3, renderings.GRAY, np.uint8)
    for row, covered in zip(image, objects, strict=True):
        if not covered.all():
            color = np.median(row[~covered], axis=0).astype(np.uint8)
        row[covered] = color
    return image


# --- retrieval of the caption ---


class Candidates:
    """The captions among which a picture must find its own: the true one, then up to 15 others.

    They are those of other cases, chosen by the case's index. For `retrieval_objects_r1` all have
    the true setting, so that only the objects tell them apart.
    """

    def __init__(self, texts: Sequence[str]):
        self._captions = sorted(set(texts))
        self._objects = sorted({split_caption(caption)[0] for caption in self._captions})

    def __call__(self, text: str, index: int) -> dict[str, list[str]]:
        """The candidates of each metric for the case with this caption and index."""
        objects, setting = split_caption(text)
        chosen = self._choose(objects, self._objects, index)
        return {
            "retrieval_r1": self._choose(text, self._captions, index),
            "retrieval_objects_r1": [other + setting for other in chosen],
        }

    def chance(self) -> dict[str, float]:
        """The expected values of a guess."""
        pools = {"retrieval_r1": self._captions, "retrieval_objects_r1": self._objects}
        return {name: 1 / min(CANDIDATES, len(pool)) for name, pool in pools.items()}

    def _choose(self, true: str, pool: list[str], index: int) -> list[str]:
        others = [text for text in pool if text != true]
        order = np.random.default_rng([CANDIDATES, index]).permutation(len(others))
        return [true, *(others[i] for i in order[: CANDIDATES - 1])]


def split_caption(caption: str) -> tuple[str, str]:
    """The objects and the setting of a caption: "a pig", " on grass under a blue sky"."""
    objects, on, setting = caption.rpartition(" on ")
    return (objects, on + setting) if on else (caption, "")


def _retrieval(scorers: Scorers, cases: Cases) -> ScoreFn:
    scene = scorers["scene"]
    candidates = Candidates(cases.texts)
    of_case = [candidates(text, index) for index, text in enumerate(cases.texts)]
    captions = sorted({text for lists in of_case for texts in lists.values() for text in texts})
    vectors = unit_vectors(scene.center(np.asarray(scorers["text_embed"](captions))))
    embedding = dict(zip(captions, vectors, strict=True))

    def score(case: Case, image: Image) -> dict[str, Ratio]:
        seen = scene.embed(image[None])[0]
        return {
            name: metrics.recall_at_1(np.stack([embedding[text] for text in texts]) @ seen)
            for name, texts in of_case[case.index].items()
        }

    return score


# --- scores of the other tasks ---


def _score_edit(case: Case, image: Image) -> dict[str, Ratio]:
    target = case.example.target
    return {
        "l1_changed": metrics.l1(image, target, case.record["edit_mask"]),
        "l1": metrics.l1(image, target),
        "psnr": metrics.psnr(image, target),
    }


def _score_inpainting(case: Case, image: Image) -> dict[str, Ratio]:
    target, hole = case.example.target, case.example.mask[..., 0]
    composited = np.where(hole[..., None] > 0, image, case.example.source)
    return {
        "l1_hole": metrics.l1(image, target, hole),
        "l1": metrics.l1(image, target),
        "l1_composited": metrics.l1(composited, target),
    }


def _layout(scorers: Scorers, cases: Cases) -> ScoreFn:
    scene = scorers["scene"]

    def score(case: Case, image: Image) -> dict[str, Ratio]:
        found, nothing = scene.detect(image), np.zeros((0, 4))
        nouns = [emoji_noun(phrase) for phrase in case.record["phrases"]]
        boxes = np.asarray(case.record["boxes"], float)
        ious = metrics.best_box_iou(boxes, [found.get(noun, nothing) for noun in nouns])
        return {
            "layout_miou": Ratio.of(ious.sum(), len(ious)),
            "layout_success": Ratio.of(np.sum(ious >= 0.5), len(ious)),
        }

    return score


def _score_depth(case: Case, image: Image) -> dict[str, Ratio]:
    depth = case.record["depth"]
    valid = (depth > DEPTH_RANGE[0]) & (depth < DEPTH_RANGE[1])
    return metrics.depth_errors(renderings.decode_depth(image), depth, valid)


def _score_pose(case: Case, image: Image) -> dict[str, Ratio]:
    size = image.shape[0]
    joints, truth = renderings.decode_pose(image), case.record["joints"]
    xy = np.where(joints[:, 2:] > 0, joints[:, :2] * size, np.nan)
    box = case.record["boxes"][0]
    side = float(max(box[2] - box[0], box[3] - box[1])) * size
    return {"pck": metrics.pck(xy, truth[:, :2] * size, visible=truth[:, 2] > 0, box_size=side)}


def _score_segmentation(case: Case, image: Image) -> dict[str, Ratio]:
    # Decoding the target loses nothing: the rendering is black and white.
    masks = [renderings.decode_mask(picture) > 0 for picture in (image, case.example.target)]
    return {"miou": metrics.mean_iou(*masks), "oiou": metrics.overall_iou(*masks)}


def _identity(scorers: Scorers, cases: Cases) -> ScoreFn:
    embed = scorers["face_embed"]

    def score(case: Case, image: Image) -> dict[str, Ratio]:
        face, made = (embed(picture[None])[0] for picture in (case.example.face, image))
        return {"identity_cosine": metrics.cosine(face, made)}

    return score


BENCHMARK = Benchmark(
    name="emoji_scenes",
    version=1,
    cases=cases,
    fingerprint=fingerprint,
    open_scorers=open_scorers,
    tasks={
        "t2i": BenchmarkTask(
            title="Text to image",
            metrics={
                "retrieval_objects_r1": Metric(
                    "True objects ranked first", better="higher", percent=True
                ),
                "retrieval_r1": Metric(
                    "The same, against other settings too", better="higher", percent=True
                ),
            },
            make_score=_retrieval,
            make_trivial=answers.mean_image,
            chance=lambda cases: Candidates(cases.texts).chance(),
            references={"the true background without objects": _background},
            needs_fields=("masks",),
            needs_scorers=("scene", "text_embed"),
            difficulty="Objects need more training than ground and sky, which this metric does "
            "not count.",
            note=f"In-domain retrieval among {CANDIDATES} captions, by a scorer fitted on the "
            "train split. All share the true setting: against captions of other settings, ground "
            "and sky alone go far.",
        ),
        "ie": BenchmarkTask(
            title="Instruction editing",
            metrics={
                "l1_changed": Metric("L1 in the changed region", better="lower"),
                "l1": Metric("L1, whole image", better="lower"),
                "psnr": Metric("PSNR, dB", better="higher"),
            },
            make_score=lambda *_: _score_edit,
            make_trivial=answers.copy,
            needs_fields=("edit_mask",),
            difficulty="A copy is exact outside the change; inside, the model must also place and "
            "draw what is new.",
        ),
        "ip": BenchmarkTask(
            title="In- and outpainting",
            metrics={
                "l1_hole": Metric("L1 in the hole", better="lower"),
                "l1": Metric("L1, whole image, raw", better="lower"),
                "l1_composited": Metric("L1, whole image, composited", better="lower"),
            },
            make_score=lambda *_: _score_inpainting,
            make_trivial=answers.filled,
            difficulty="A flat mean color is the safest guess under L1; a sharp object in the "
            "wrong place costs more.",
        ),
        "lg": BenchmarkTask(
            title="Layout to image",
            metrics={
                "layout_miou": Metric("IoU of the named boxes", better="higher", percent=True),
                "layout_success": Metric("Boxes found at IoU 0.5", better="higher", percent=True),
            },
            make_score=_layout,
            make_trivial=answers.layout_answers,
            needs_scorers=("scene", "text_embed"),
            difficulty="The scorer must recognize the noun in the box, so shapes must be readable.",
            note="Detections by the scene scorer fitted on this data's train split.",
        ),
        "depth": BenchmarkTask(
            title="Depth estimation",
            metrics={
                "abs_rel": Metric("AbsRel", better="lower"),
                "delta1": Metric("delta1", better="higher", percent=True),
            },
            make_score=lambda *_: _score_depth,
            make_trivial=answers.mean_depth,
            difficulty="Scenes share their geometry, so the mean depth is already close.",
            note="After least-squares scale and shift, on surfaces nearer than "
            f"{DEPTH_RANGE[1]:g} m.",
        ),
        "pose": BenchmarkTask(
            title="Pose estimation",
            metrics={"pck": Metric("PCK at 0.1 of the box", better="higher", percent=True)},
            make_score=lambda *_: _score_pose,
            make_trivial=answers.mean_pose,
            needs_fields=("boxes",),
            difficulty="Limbs are a few pixels wide and must have exactly their own colors to be "
            "read.",
        ),
        "seg": BenchmarkTask(
            title="Referring segmentation",
            metrics={
                "miou": Metric("Mean IoU", better="higher", percent=True),
                "oiou": Metric("Overall IoU", better="higher", percent=True),
            },
            make_score=lambda *_: _score_segmentation,
            make_trivial=answers.mask_answers,
            difficulty="The expression must be understood to choose the object.",
            note=f"A pixel belongs to the mask from a brightness of {renderings.MASK_THRESHOLD:g}.",
        ),
        "id": BenchmarkTask(
            title="Identity preservation",
            metrics={"identity_cosine": Metric("Cosine of face embeddings", better="higher")},
            make_score=_identity,
            make_trivial=_person_answers,
            needs_scorers=("face_embed",),
            difficulty="Only the face embedding carries the identity, and its projector is new in "
            "the last stage.",
            note="Held-out persons; the embedding is that of the encoder the model is "
            "conditioned on.",
        ),
    },
)
