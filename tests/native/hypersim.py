"""Hypersim in miniature: a scene in a folder, one in a zip, tilted cameras, broken frames."""

import io
import pathlib
import zipfile

import numpy as np

RECORDS = {"train": 3, "validation": 1, "test": 1}
SIZES = {"ai_001_001": (64, 48), "ai_001_002": (80, 48), "ai_002_001": (48, 64)}
# Which rays its pixels have: the usual camera, and one whose sensor is shifted and tilted.
STRAIGHT = (0.577, 0, 0, 0, 0.433, 0, 0, 0, -1)
TILTED = (0.6, 0, 0.05, 0, 0.45, 0.1, 0, 0.2, -1)
CAMERAS = {"ai_001_001": TILTED, "ai_001_002": STRAIGHT, "ai_002_001": STRAIGHT}
FRAMES = (  # scene, camera, frame, in the public release, split
    ("ai_001_001", "cam_00", 0, True, "train"),
    ("ai_001_001", "cam_00", 2, False, "train"),  # a broken render, which is on the disk
    ("ai_001_001", "cam_01", 5, True, "train"),
    ("ai_001_001", "cam_01", 7, True, "train"),  # without a geometry file
    ("ai_001_002", "cam_00", 0, True, "train"),
    ("ai_001_002", "cam_00", 1, True, "val"),
    ("ai_002_001", "cam_00", 3, True, "test"),
    ("ai_009_009", "cam_00", 3, True, "test"),  # not downloaded
    ("ai_001_002", "cam_00", 9, False, ""),
)


def write(root: pathlib.Path) -> dict:
    root.mkdir(parents=True, exist_ok=True)
    zipped = zipfile.ZipFile(root / "ai_001_002.zip", "w")
    for scene, camera, frame, _, _ in FRAMES:
        if scene not in SIZES:
            continue
        for kind, name, array in _arrays(scene, camera, frame):
            local = f"images/scene_{camera}_{kind}_hdf5/frame.{frame:04d}.{name}.hdf5"
            if scene == "ai_001_002":
                zipped.writestr(f"{scene}/{local}", hdf5(array))
            else:
                path = root / scene / local
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(hdf5(array))
    zipped.close()
    lines = ["scene_name,camera_name,frame_id,included_in_public_release,exclude_reason,"]
    lines[0] += "split_partition_name"
    lines += [f"{s},{c},{f},{public},,{split}" for s, c, f, public, split in FRAMES]
    (root / "metadata_images_split_scene_v1.csv").write_text("\r\n".join(lines))
    names = [f"M_cam_from_uv_{row}{column}" for row in range(3) for column in range(3)]
    lines = [",".join(["scene_name", "camera_physical_fov", *names])]
    for scene, matrix in CAMERAS.items():
        lines.append(",".join([scene, "", *map(str, matrix)]))
    lines += [lines[1], ",".join(["ai_003_003", "", *[""] * 9])]  # one is there twice, one is empty
    (root / "metadata_camera_parameters.csv").write_text("\n".join(lines) + "\n")
    return {"source": str(root)}


def distances(scene: str, frame: int) -> np.ndarray:
    """Distance along the ray to a wall 3 m and more away, as float16 with a hole."""
    width, height = SIZES[scene]
    matrix = np.reshape(CAMERAS[scene], (3, 3))
    x, y = np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5)
    uv = np.stack([2 * x / width - 1, 1 - 2 * y / height, np.ones_like(x)], -1)
    rays = uv @ matrix.T
    meters = (3 + frame) * np.linalg.norm(rays, axis=-1) / -rays[..., 2]
    meters[:4, :6] = np.nan  # a window to nothing
    return meters.astype(np.float16)


def _arrays(scene: str, camera: str, frame: int):
    width, height = SIZES[scene]
    rng = np.random.default_rng(frame)
    light = np.exp(rng.normal(size=(1, 1, 3))) * np.linspace(0.01, 20, width)[None, :, None]
    yield "final", "color", (light * np.ones((height, 1, 1))).astype(np.float16)
    if (camera, frame) != ("cam_01", 7):
        yield "geometry", "depth_meters", distances(scene, frame)


def hdf5(array: np.ndarray) -> bytes:
    import h5py

    buffer = io.BytesIO()
    with h5py.File(buffer, "w") as file:
        file.create_dataset("dataset", data=array, compression="gzip")
    return buffer.getvalue()
