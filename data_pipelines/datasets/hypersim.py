"""Hypersim: rendered rooms with exact depth."""

import dataclasses
import io
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, UInt8

from data_pipelines.native import TEST, TRAIN, VALIDATION, Dataset, Entry, Options
from univg_jax.errors import NotFoundError, UserError, needs_extra, quote
from univg_jax.fields import setting

_SPLIT_FILE = "metadata_images_split_scene_v1.csv"
_CAMERA_FILE = "metadata_camera_parameters.csv"
_FOLDERS = {
    _SPLIT_FILE: ("", "evermotion_dataset/analysis"),
    _CAMERA_FILE: ("", "contrib/mikeroberts3000"),
}
_SPLITS = {"train": TRAIN, "val": VALIDATION, "test": TEST}
_SCENE = re.compile(r"^ai_\d{3}_\d{3}$")
_MAX_PIXELS = 2**24

# The tone mapping of Hypersim's own tools: this percentile of brightness becomes this value.
_PERCENTILE, _BRIGHTNESS, _GAMMA = 90, 0.8, 1 / 2.2
_LUMA = np.array([0.3, 0.59, 0.11], np.float32)
JPEG_QUALITY = 95


@dataclasses.dataclass(frozen=True, kw_only=True)
class HypersimOptions(Options):
    """Where the two tables are, which are no part of the scenes."""

    splits_file: str = setting(
        "", f"path of {_SPLIT_FILE}; empty: looked for in source", is_path=True
    )
    cameras_file: str = setting(
        "", f"path of {_CAMERA_FILE}; empty: looked for in source", is_path=True
    )


@dataclasses.dataclass(frozen=True)
class Scene:
    """A part: the frames of a scene, as camera and frame id."""

    name: str
    frames: tuple[tuple[str, int], ...]
    camera: tuple[float, ...] | str  # M_cam_from_uv by rows, or why there is none

    def __str__(self) -> str:
        return self.name


@dataclasses.dataclass(frozen=True)
class Hypersim:
    """A record of each frame of the public release."""

    source: str
    splits_file: str
    cameras_file: str
    splits: tuple[str, ...] = (TRAIN, VALIDATION, TEST)
    fields: tuple[str, ...] = ("image", "depth", "depth_scale")

    def parts(self, split: str) -> Sequence[Scene]:
        frames = _read_frames(self.splits_file, split)
        cameras = _read_cameras(self.cameras_file)
        there = [scene for scene in sorted(frames) if _scene_place(self.source, scene)]
        if frames and not there:
            first = min(frames)
            raise NotFoundError(
                f"{self.source} has none of the {len(frames)} scenes of {split}: expected a "
                f"folder or zip of each, such as {first} or {first}.zip"
            )
        missing = f"{self.cameras_file} has no camera of the scene"
        return [
            Scene(scene, tuple(sorted(frames[scene])), cameras.get(scene, missing))
            for scene in there
        ]

    def entries(self, part: Scene) -> Iterator[Entry]:
        for camera, frame in part.frames:
            is_known = not isinstance(part.camera, str)
            raw = (part.name, camera, frame, part.camera) if is_known else UserError(part.camera)
            yield Entry(key=f"{part.name}/{camera}/{frame:04d}", raw=raw, ids=(part.name,))

    def make(self, raw: tuple[str, str, int, tuple[float, ...]]) -> Mapping[str, Any]:
        from data_pipelines import records
        from data_pipelines.native import coco

        scene, camera, frame, matrix = raw
        store = coco.open_store(_scene_place(self.source, scene))
        folder = f"images/scene_{camera}"

        def read(kind: str, name: str) -> np.ndarray:
            local = f"{folder}_{kind}_hdf5/frame.{frame:04d}.{name}.hdf5"
            inside = local if local in store else f"{scene}/{local}"
            return read_hdf5(store.read(inside), inside)

        color = read("final", "color")
        distance = read("geometry", "depth_meters")
        if color.ndim != 3 or color.shape[2] != 3 or color.shape[:2] != distance.shape:
            raise UserError(
                f"color is {list(color.shape)} and depth_meters {list(distance.shape)}: expected "
                "[h, w, 3] and [h, w]"
            )
        # NaN is where there is no geometry, such as a window to nothing.
        is_valid = np.isfinite(distance) & (distance > 0)
        if not is_valid.any():
            raise UserError("the frame has no geometry")
        meters = planar_depth(distance.astype(np.float32), np.reshape(matrix, (3, 3)))
        image = _jpeg(tone_map(color.astype(np.float32), is_valid))
        return {"image": image, **records.encode_depth(meters)}


def planar_depth(
    distance: Float[np.ndarray, "h w"], camera_from_uv: Float[np.ndarray, "3 3"]
) -> Float[np.ndarray, "h w"]:
    """Depth along the optical axis, of distances along the ray to the middle of each pixel.

    `camera_from_uv` takes (u, v, 1) to a ray, u to the right and v upwards in [-1, 1]; the camera
    looks along -z. Many scenes have a shifted or tilted sensor, so that no focal length will do.
    """
    height, width = distance.shape
    u = np.linspace(-1 + 1 / width, 1 - 1 / width, width)
    v = np.linspace(1 - 1 / height, -1 + 1 / height, height)
    uv = np.stack([*np.meshgrid(u, v), np.ones((height, width))], axis=-1)
    rays = uv @ np.asarray(camera_from_uv, np.float64).T
    cosine = -rays[..., 2] / np.linalg.norm(rays, axis=-1)
    return (distance * cosine).astype(np.float32)


def tone_map(
    color: Float[np.ndarray, "h w 3"], is_valid: Bool[np.ndarray, "h w"]
) -> UInt8[np.ndarray, "h w 3"]:
    """Linear light as a picture, exposed as Hypersim's own tools do by what is valid.

    What is not finite is black or, if infinite, white.
    """
    brightness = color @ _LUMA
    counted = brightness[is_valid & np.isfinite(brightness)]
    scale = 1.0
    if counted.size:
        now = np.percentile(counted, _PERCENTILE)
        scale = 0.0 if now < 1e-4 else _BRIGHTNESS ** (1 / _GAMMA) / now
    color = np.nan_to_num(color, nan=0.0, posinf=np.float32(1e30), neginf=0.0)
    shown = np.clip(np.maximum(scale * color, 0) ** _GAMMA, 0, 1)
    return np.rint(shown * 255).astype(np.uint8)


def read_hdf5(content: bytes, name: str) -> np.ndarray:
    """The only array of one of Hypersim's files. Raises UserError with `name` for another."""
    with needs_extra("data", "reading Hypersim"):
        import h5py
    try:
        with h5py.File(io.BytesIO(content), "r") as file:
            dataset = file["dataset"]
            if not isinstance(dataset, h5py.Dataset) or dataset.dtype.kind != "f":
                raise ValueError("its dataset is no array of floats")
            if not 2 <= dataset.ndim <= 3 or not 0 < dataset.size <= 3 * _MAX_PIXELS:
                raise ValueError(f"its dataset has the shape {dataset.shape}")
            return dataset[()]
    except Exception as error:  # HDF5's library raises many kinds for damaged files
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{name} is not an HDF5 file of `dataset`: {reason}") from None


def _jpeg(pixels: UInt8[np.ndarray, "h w 3"]) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    return buffer.getvalue()


def _scene_place(source: str, scene: str) -> str:
    """The folder or zip of a scene; "" without one."""
    for name in (scene, f"scenes/{scene}"):
        for path in (os.path.join(source, name), os.path.join(source, f"{name}.zip")):
            if os.path.exists(path):
                return path
    return ""


def _rows(file: str, columns: Sequence[str], what: str) -> Iterator[tuple[int, dict[str, Any]]]:
    from data_pipelines.native import tables

    table = tables.open_table(file, what=what)
    table.require(*columns)
    for part in table.parts():
        for number, row in table.rows(part, columns):
            if isinstance(row, UserError):
                raise UserError(f"{file} row {number}: {row}")
            yield number, row


def _read_frames(file: str, split: str) -> dict[str, list[tuple[str, int]]]:
    """The frames of a split by scene, without those that the release drops as broken."""
    from data_pipelines.native import tables

    columns = (
        *("scene_name", "camera_name", "frame_id"),
        *("included_in_public_release", "split_partition_name"),
    )
    frames: dict[str, list[tuple[str, int]]] = {}
    for number, row in _rows(file, columns, "Hypersim's frames by split"):
        if str(row["included_in_public_release"]).strip().lower() != "true":
            continue
        if _SPLITS.get(str(row["split_partition_name"]).strip()) != split:
            continue
        try:
            scene, camera = (tables.get(row, name, str) for name in columns[:2])
            frame = tables.get(row, "frame_id", int)
        except UserError as error:
            raise UserError(f"{file} row {number}: {error}") from None
        if not _SCENE.match(scene) or not re.fullmatch(r"cam_\d+", camera) or frame < 0:
            raise UserError(f"{file} row {number} is of {quote(f'{scene} {camera} {frame}')}")
        frames.setdefault(scene, []).append((camera, frame))
    return {scene: list(dict.fromkeys(found)) for scene, found in frames.items()}


def _read_cameras(file: str) -> dict[str, tuple[float, ...] | str]:
    """M_cam_from_uv by scene; where it is empty, or told twice in two ways, why it is unknown."""
    from data_pipelines.native import tables

    names = [f"M_cam_from_uv_{row}{column}" for row in range(3) for column in range(3)]
    cameras: dict[str, tuple[float, ...] | str] = {}
    for _, row in _rows(file, ("scene_name", *names), "Hypersim's cameras by scene"):
        scene = str(row["scene_name"])
        try:
            matrix: Any = tuple(tables.get(row, name, float) for name in names)
            if not any(matrix[6:]):
                raise UserError("its rays have no z")
        except UserError as error:
            matrix = f"{file}: the camera of {scene}: {error}"
        known = cameras.get(scene)
        if isinstance(known, tuple) and isinstance(matrix, tuple) and known != matrix:
            matrix = f"{file} has two cameras of {scene}"
        elif isinstance(known, tuple):
            continue
        cameras[scene] = matrix
    return cameras


def _open(options: HypersimOptions) -> dict[str, Hypersim]:
    given = {_SPLIT_FILE: options.splits_file, _CAMERA_FILE: options.cameras_file}
    found = {}
    for name, folders in _FOLDERS.items():
        looked = [given[name]] if given[name] else [
            os.path.join(options.source, folder, name) for folder in folders
        ]  # fmt: skip
        there = [path for path in looked if os.path.isfile(path)]
        if not there:
            raise NotFoundError(f"there is no {' or '.join(looked)}: expected Hypersim's {name}")
        found[name] = there[0]
    return {"hypersim": Hypersim(options.source, found[_SPLIT_FILE], found[_CAMERA_FILE])}


DATASET = Dataset(
    name="hypersim",
    summary="Hypersim: rendered rooms with exact depth at every pixel",
    tasks=("depth",),
    options=HypersimOptions,
    open=_open,
    size="74,619 pictures of 1024 x 768 in 457 scenes, 1.9 TB",
    license="CC BY-SA 3.0",
    where="apple/ml-hypersim on GitHub: its download script, and the two tables in the repository",
    layout=(
        "ai_VVV_NNN/images/scene_cam_XX_{final,geometry}_hdf5/frame.IIII.{color,depth_meters}.hdf5 "
        f"or ai_VVV_NNN.zip of the same; {_SPLIT_FILE} and {_CAMERA_FILE}"
    ),
    quirks=(
        "the distance along the ray becomes planar depth by the scene's own camera",
        "linear light is tone mapped as by Hypersim's tools, and stored as JPEG of quality 95",
        "frames that the release drops as broken are left out by its split file",
        "NaN is no geometry, and does not count in the loss; frames without a geometry file are "
        "left out",
        "a scene is read from its zip as downloaded, or unpacked; scenes that are not there are "
        "left out",
    ),
    example="--source=hypersim",
)
