"""A thousand damaged files: a build or a stream ends in one line, or leaves out by name.

Nothing else may come out of either, and no damaged picture vanishes silently.
"""

import contextlib
import dataclasses
import functools
import itertools
import json
import pathlib
import pkgutil
from collections.abc import Iterator

import numpy as np
import pytest
from array_record.python import array_record_module

from data_pipelines import dataset_files, records
from data_pipelines.build import build
from data_pipelines.datasets import DATASETS
from data_pipelines.native import Dataset, Entry
from data_pipelines.quarantine import quarantine_file, read_quarantine
from data_pipelines.reader import DamagedRecord, Reader, UnsuitableRecord
from data_pipelines.sources import open_source
from data_pipelines.tasks import TASKS
from tests import native
from tests.data_pipelines import toy
from tests.native import captions, drawing, identity, instructpix2pix, ultraedit
from tests.native.damage import damage, damage_picture, damaged
from univg_jax.errors import UserError
from univg_jax.images import png_bytes

pytestmark = pytest.mark.slow

MUTATIONS = 22  # of each dataset, about 770 in all


def _writers() -> dict:
    """Whatever writes native files, and the name of the dataset."""
    names = [m.name for m in pkgutil.iter_modules(native.__path__) if m.name in DATASETS]
    found = {name: (name, functools.partial(native.write, name)) for name in names}
    forms = {
        "captions": [form for name, form in captions.FORMS.items() if name != "write"],
        "identity": [identity.write_vggface2, _celeba, identity.write_table],
        "instructpix2pix": [instructpix2pix.zips, instructpix2pix.parquet],
        "ultraedit": [ultraedit.lines],
    }
    for name, writers in forms.items():
        found |= {f"{name}-{write.__name__.strip('_')}": (name, write) for write in writers}
    return found


def _celeba(root: pathlib.Path) -> dict:
    """Its only person of the split test has one picture, and so no pair."""
    return identity.write_celeba(root) | {"split": ("train", "validation")}


WRITERS = _writers()
COLLATOR = toy.make_collator()


@pytest.fixture(scope="module")
def others(tmp_path_factory) -> list[bytes]:
    """Files of other datasets, of most formats."""
    root = tmp_path_factory.mktemp("others")
    captions.write(root / "a")
    captions.webdataset(root / "b")
    identity.write_celeba(root / "c")
    native.write("hypersim", root / "d")
    native.write("refcoco", root / "e")
    return [
        drawing.picture(1),
        drawing.picture(2, ".png"),
        *(path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()),
    ]


@pytest.mark.parametrize("name", WRITERS)
def test_damaged_native_files_end_in_one_line_or_are_left_out_by_name(name, tmp_path, others):
    dataset_name, write = WRITERS[name]
    dataset, files = DATASETS[dataset_name], tmp_path / "files"
    options = dataset.make_options(write(files))
    entries = sum(built(dataset, tmp_path / "sound", options))
    paths = sorted(path for path in files.rglob("*") if path.is_file())
    labels = [path for path in paths if path.suffix not in (".jpg", ".png")] or paths
    rng = np.random.default_rng(sum(map(ord, name)))
    for number in range(MUTATIONS):
        choice = (paths, labels)[int(rng.integers(2))]
        path: pathlib.Path = choice[int(rng.integers(len(choice)))]
        out = tmp_path / f"out{number}"
        with damaged(path, rng, others) as kind:
            try:
                try:
                    found = built(dataset, out, options)
                except UserError as error:
                    assert_one_line(str(error))
                    assert not (out / dataset.name).exists()
                else:
                    assert kind != "picture" or sum(found) == entries, found
            except Exception as error:
                error.add_note(f"mutation {number} of {path.relative_to(files)}: {kind}")
                raise


def built(dataset, out: pathlib.Path, options) -> tuple[int, int]:
    """Builds a dataset and reads all: how many records there are and how many were left out."""
    build(dataset, out, options, processes=1)
    folder = out / dataset.name
    about = json.loads((folder / "build.json").read_text())
    skipped = folder / "skipped.jsonl"
    rows = (
        [json.loads(row) for row in skipped.read_bytes().splitlines()] if skipped.exists() else []
    )
    assert len(rows) == about["skipped"]
    for row in rows:
        assert list(row) == ["dataset", "split", "part", "key", "reason"]
        assert row["dataset"] == dataset.name
        for value in row.values():
            assert_one_line(value)
    for split, count in about["records"].items():
        source = open_source(dataset.name, split, data_dir=str(out))
        assert len(source) == count
        for task in dataset.tasks:
            assert not read_all(Reader(task, source, collator=COLLATOR))
    return sum(about["records"].values()), len(rows)


def read_all(reader: Reader) -> list[int]:
    """Which records are damaged. Others may not suit the task."""
    found = []
    for index in range(len(reader.source)):
        try:
            reader.row(index, np.random.default_rng(index))
        except UnsuitableRecord as error:
            assert_one_line(str(error))
        except DamagedRecord as error:
            assert_one_line(str(error))
            found.append(index)
    return found


def assert_one_line(text: str) -> None:
    assert text.strip()
    assert text.splitlines() == [text]
    assert text.encode()  # no half of a pair of surrogates


# --- streams ---

STREAMS = 240
COUNT, BATCHES = 6, 4  # records; of 4 rows: more than an epoch of two tasks
SHARD_BYTES = 3000  # two records, or three


@dataclasses.dataclass(frozen=True)
class Scenes:
    """Records for all tasks."""

    splits: tuple[str, ...] = ("train",)
    fields: tuple[str, ...] = tuple(records.FIELDS.keys() - {"caption"})

    def parts(self, split):
        return [split]

    def entries(self, part):
        return (Entry(key=str(k), raw=k) for k in range(COUNT))

    def make(self, raw):
        height, width = ((16, 12), (12, 16), (14, 14))[raw % 3]
        image = drawing.pixels(raw)[:height, :width]
        mask = np.zeros((height, width), np.uint8)
        mask[2:9, 3:9] = 255
        joints = np.full((1, 17, 3), 0.5, np.float32)
        joints[..., :2] += np.linspace(0, 0.2, 34, dtype=np.float32).reshape(1, 17, 2)
        joints[..., 2] = 2
        everything = dict(
            image=png_bytes(image),
            source=png_bytes(255 - image),
            captions=["<p> beside a pig", f"<p> with pig {raw}"],
            caption_kinds=["short", "long"],
            instruction=f"do {raw}",
            edit_mask=png_bytes(mask),
            **records.encode_depth(np.full((height, width), 1.0 + raw)),
            boxes=np.array([[0.1, 0.1, 0.6, 0.7]] * 2, np.float32),
            phrases=["a pig", f"pig {raw}"],
            phrase_captions=np.arange(2),
            masks=[png_bytes(mask), png_bytes(255 - mask)],
            expressions=["the pig", "all else", "it"],
            expression_masks=np.array([0, 1, 0]),
            joints=joints,
            ignore_mask=png_bytes(np.roll(mask, 3, 1)),
            face=png_bytes(image[:8, :8]),
            person=raw,
        )
        return {name: everything[name] for name in self.fields}


SCENES = Dataset(
    name="scenes",
    summary="records for all tasks",
    tasks=tuple(TASKS),
    open=lambda options: {"scenes": Scenes()},
)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> pathlib.Path:
    out = tmp_path_factory.mktemp("data")
    build(SCENES, out, SCENES.options(), processes=1, shard_bytes=SHARD_BYTES)
    return out / "scenes"


@pytest.mark.parametrize("part", range(4))
def test_a_stream_of_damaged_files_ends_in_one_line_or_names_what_it_left_out(
    part, scenes, tmp_path, others
):
    """The files of a built dataset are damaged, or records in them."""
    paths = sorted(path for path in scenes.iterdir() if path.is_file())
    shards = [path for path in paths if "array_record" in path.name]
    assert len(shards) > 2
    for number in range(part, STREAMS, 4):
        rng = np.random.default_rng(number)
        workdir = tmp_path / f"run{number}"
        try:
            if number // 4 % 2:
                with damaged_records(shards[int(rng.integers(len(shards)))], rng):
                    run(scenes.parent, workdir, rng)
                continue
            choice = (paths, shards)[int(rng.integers(2))]
            path = choice[int(rng.integers(len(choice)))]
            whole = path.read_bytes()
            with damaged(path, rng, others):
                run(scenes.parent, workdir, rng)
                assert not path.is_file() or path.read_bytes() != whole
                check_is_found(path)
        except Exception as error:
            error.add_note(f"mutation {number}")
            raise
    run(scenes.parent, tmp_path / "sound", rng)
    assert not read_quarantine(tmp_path / "sound")


@contextlib.contextmanager
def damaged_records(shard: pathlib.Path, rng: np.random.Generator) -> Iterator[None]:
    """A sound shard with one to three damaged records, while it lasts."""
    whole = shard.read_bytes()
    reader = array_record_module.ArrayRecordReader(str(shard))
    stored = reader.read_all()
    reader.close()
    for k in rng.integers(len(stored), size=rng.integers(1, 4)).tolist():
        stored[k] = (damage, damage_picture)[int(rng.integers(2))](stored[k], rng)
    shard.unlink()  # whoever holds the old file goes on with it
    writer = array_record_module.ArrayRecordWriter(str(shard), dataset_files.OPTIONS)
    for content in stored:
        writer.write(content)
    writer.close()
    try:
        yield
    finally:
        shard.write_bytes(whole)


def run(data: pathlib.Path, workdir: pathlib.Path, rng: np.random.Generator) -> None:
    """More than an epoch of two tasks; the quarantine has what is damaged for them."""
    tasks = rng.choice(list(TASKS), 2, replace=False).tolist()
    config = toy.make_config(4, **dict.fromkeys(tasks, 1.0))
    for task in tasks:
        config.tasks[task].sources = ("scenes",)
    config.data.dir = str(data)
    config.data.max_bad_fraction = (0.01, 1.0)[int(rng.integers(2))]
    config.data.buckets = ((), ((8, 12), (12, 8)))[int(rng.integers(2))]
    failure = None
    try:
        batches = toy.stream(config, sources=None, quarantine=quarantine_file(workdir))
        for batch in itertools.islice(batches, BATCHES):
            assert np.isfinite(batch.loss_mask).all()
    except UserError as error:
        assert_one_line(str(error))
        failure = error
    while toy.OPEN:
        toy.OPEN.pop().close()
    rows = read_quarantine(workdir)
    for row in rows:
        assert list(row) == ["dataset", "index", "shard", "key", "task", "reason"]
        assert row["dataset"] == "scenes/train"
        assert row["task"] in tasks
        assert (data / "scenes" / row["shard"]).is_file()
        assert_one_line(row["reason"])
    named = [row["index"] for row in rows]
    assert len(set(named)) == len(named)
    try:
        source = open_source("scenes", "train", data_dir=str(data))
    except UserError as error:
        reason = str(error)
        assert reason == str(failure)
        return
    readers = [Reader(task, source, collator=COLLATOR) for task in tasks]
    found = {index for reader in readers for index in read_all(reader)}
    assert set(named) <= found
    assert failure or set(named) == found


def check_is_found(path: pathlib.Path) -> None:
    """`univg data verify` names the file, or says in one line why it cannot."""
    try:
        found = list(dataset_files.verify(path.parent))
    except UserError as error:
        assert_one_line(str(error))
    else:
        unsealed = ("dataset_info.json", "build.json")
        assert path.name in unsealed or path.name in [name for name, _ in found]
    try:
        build(SCENES, path.parent.parent, SCENES.options(), processes=1, shard_bytes=SHARD_BYTES)
    except UserError as error:
        assert_one_line(str(error))
