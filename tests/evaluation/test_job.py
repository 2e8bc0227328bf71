"""A job makes the files that are missing, each a function of the seed, the item and its number."""

import contextlib
import signal

import numpy as np
import pytest
from PIL import Image

from tests.evaluation import evaluation_cases as data
from univg_jax.errors import Ended, UserError
from univg_jax.evaluation import job
from univg_jax.evaluation.benchmarks import dpg
from univg_jax.evaluation.job import generate, join, missing
from univg_jax.evaluation.official import Output, Request
from univg_jax.images import write_png


def requests(count: int = 5, files: int = 2, cells: int = 1, task: str = "t2i") -> list[Request]:
    return [
        Request(
            index=i,
            task=task,
            inputs=dict(prompt=f"a pig number {i}"),
            files=tuple(f"{i:05d}/samples/{k:04d}.png" for k in range(files)),
            cells=cells,
        )
        for i in range(count)
    ]


def noise(batch, task: str) -> np.ndarray:
    """Images of the sample id alone."""
    shape = batch.target.shape[1:]
    rngs = (np.random.default_rng(int(i)) for i in batch.sample_id)
    return np.stack([rng.integers(0, 256, shape, dtype=np.uint8) for rng in rngs])


def run(folder, asked, *, batch_size: int = 4, answer=noise) -> int:
    return generate(asked, folder, answer=answer, collator=data.COLLATOR, batch_size=batch_size)


def contents(folder) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*.png")}


@pytest.mark.parametrize("cells", [1, 4])
def test_files_do_not_depend_on_the_batch(tmp_path, cells):
    asked = requests(cells=cells)
    assert run(tmp_path / "a", asked, batch_size=4) == 10 * cells
    assert run(tmp_path / "b", asked, batch_size=7) == 10 * cells
    found = contents(tmp_path / "a")
    assert found == contents(tmp_path / "b")
    assert set(found) == {name for request in asked for name in request.files}
    assert len(set(found.values())) == 10, "every image has noise of its own"
    side = int(cells**0.5)
    with Image.open(tmp_path / "a" / asked[0].files[0]) as picture:
        assert picture.size == (48 * side, 48 * side)


def test_what_is_there_is_not_made_again(tmp_path):
    """A preemption ends the job at the last finished images."""
    asked = requests()
    run(tmp_path / "whole", asked)
    made = []

    def answer(batch, task):
        if len(made) == 2:
            raise Ended(signal.SIGTERM)
        made.append(batch.sample_id[batch.valid])
        return noise(batch, task)

    with pytest.raises(Ended) as end:
        run(tmp_path / "killed", asked, answer=answer)
    assert end.value.exit_code == 143
    left = {name for file in missing(asked, tmp_path / "killed") for name in [file.name]}
    there = contents(tmp_path / "killed")
    assert left == set(contents(tmp_path / "whole")) - set(there)
    theirs = b"another model's"
    (first,) = sorted(there)[:1]
    (tmp_path / "killed" / first).write_bytes(theirs)
    assert run(tmp_path / "killed", asked) == len(left)
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole") | {first: theirs}
    assert run(tmp_path / "killed", asked, answer=answer) == 0  # nothing is called


@pytest.mark.parametrize("files", [1, 3])
def test_two_processes_make_the_files_of_one(tmp_path, monkeypatch, files):
    """Each its own files, in equally many batches; those of the first have not been seen yet."""
    asked, calls = requests(files=files, cells=4), []
    run(tmp_path / "one", asked)
    monkeypatch.setattr("jax.process_count", lambda: 2)
    monkeypatch.setattr(job, "missing", lambda r, f: todo)
    monkeypatch.setattr(job, "each_together", lambda items: items)
    monkeypatch.setattr(job, "together", contextlib.nullcontext)
    todo = missing_alone(asked)
    for index in (0, 1):
        monkeypatch.setattr("jax.process_index", lambda index=index: index)
        calls.append(0)

        def answer(batch, task):
            calls[-1] += 1
            assert batch.size == 3
            return noise(batch, task)

        run(tmp_path / f"{index}", asked, batch_size=6, answer=answer)
    assert calls[0] == calls[1]
    first, second = contents(tmp_path / "0"), contents(tmp_path / "1")
    assert not set(first) & set(second)
    assert first | second == contents(tmp_path / "one")


def missing_alone(asked):
    return [job._File(request, k) for request in asked for k in range(len(request.files))]


def test_what_a_mask_keeps_is_the_pictures_own(tmp_path):
    image = np.full((48, 48, 3), 77, np.uint8)
    mask = np.zeros((48, 48), np.uint8)
    mask[:24] = 255
    write_png(tmp_path / "image.png", image)
    write_png(tmp_path / "mask.png", mask)
    inputs = dict(image=str(tmp_path / "image.png"), mask=str(tmp_path / "mask.png"))
    asked = [Request(index=0, task="ip", inputs=inputs, files=("a.png",))]
    run(tmp_path / "out", asked)
    with Image.open(tmp_path / "out" / "a.png") as picture:
        found = np.asarray(picture)
    assert (found[24:] == 77).all()
    assert found[:24].std() > 50


def test_what_the_model_made_outside_a_mask_is_kept_where_it_is_asked_for(tmp_path):
    image, mask = np.full((48, 48, 3), 77, np.uint8), np.zeros((48, 48), np.uint8)
    mask[:24] = 255
    inputs = dict(image=image, mask=mask)
    asked = [Request(index=0, task="ip", inputs=inputs, files=("a.png",), composite=False)]
    run(tmp_path, asked)
    with Image.open(tmp_path / "a.png") as picture:
        assert np.asarray(picture)[24:].std() > 50


def darker(batch, task: str) -> np.ndarray:
    """Half of each source, so that a file tells how often its picture was changed."""
    return batch.source // 2


def turns(first, *, count: int = 3) -> list[Request]:
    """A chain of edits, the last one first."""
    inputs = [str(first), *(Output(f"7/7_{k}.png") for k in range(1, count))]
    return [
        Request(
            index=k,
            task="ie",
            inputs=dict(prompt="darker", image=inputs[k]),
            files=(f"7/7_{k + 1}.png",),
        )
        for k in reversed(range(count))
    ]


def test_a_picture_may_be_made_when_it_is_due(tmp_path):
    inputs = dict(prompt="darker", image=lambda: np.full((48, 48, 3), 160, np.uint8))
    asked = [Request(index=0, task="ie", inputs=inputs, files=("a.png",))]
    run(tmp_path, asked, answer=darker)
    assert level(tmp_path / "a.png") == 80


def level(path) -> int:
    with Image.open(path) as picture:
        (value,) = np.unique(np.asarray(picture))
    return int(value)


def test_a_request_takes_the_file_of_another_one(tmp_path):
    write_png(tmp_path / "first.png", np.full((48, 48, 3), 160, np.uint8))
    asked, out = turns(tmp_path / "first.png"), tmp_path / "out"
    assert run(out, asked, answer=darker) == 3
    assert [level(out / f"7/7_{k}.png") for k in (1, 2, 3)] == [80, 40, 20]
    # Whoever made the file that is taken.
    write_png(out / "7/7_2.png", np.full((48, 48, 3), 200, np.uint8))
    (out / "7/7_3.png").unlink()
    assert run(out, asked, answer=darker) == 1
    assert level(out / "7/7_3.png") == 100


def test_what_is_taken_must_be_there_or_asked_for(tmp_path):
    (last,) = turns(tmp_path / "first.png")[:1]
    with pytest.raises(UserError, match=r"item 2 \(7/7_3\.png\): image=.*7_2\.png does not exist"):
        run(tmp_path, [last], answer=darker)
    inputs = dict(prompt="darker", image=Output("a.png"))
    with pytest.raises(ValueError, match=r"wait for one another: a\.png"):
        run(tmp_path, [Request(index=0, task="ie", inputs=inputs, files=("a.png",))])


def test_the_model_is_given_the_middle_of_a_picture_or_all_of_it(tmp_path):
    picture = np.zeros((48, 96, 3), np.uint8)
    picture[:, :24] = 200  # left of the middle
    for whole, expected in ((False, 0.0), (True, 0.25)):
        inputs = dict(prompt="it", image=picture)
        name = f"{whole}.png"
        asked = [Request(index=0, task="seg", inputs=inputs, files=(name,), whole=whole)]
        run(tmp_path, asked, answer=darker)
        with Image.open(tmp_path / name) as made:
            assert (np.asarray(made) > 50).mean() == pytest.approx(expected, abs=0.03)


def test_bad_inputs_are_one_line_that_names_the_item(tmp_path):
    asked = [Request(index=3, task="ie", inputs=dict(prompt="x", image="no.png"), files=("b.png",))]
    with pytest.raises(UserError, match=r"item 3 \(b\.png\): image=no\.png"):
        run(tmp_path, asked)
    with pytest.raises(UserError, match="two items of the benchmark ask for the file 00000"):
        run(tmp_path, requests(1) * 2)
    with pytest.raises(ValueError, match="square"):
        requests(cells=3)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file"):
        run(tmp_path / "file", requests())


def test_a_square_has_its_images_row_by_row_as_the_official_scorer_cuts_it():
    images = [np.full((4, 4, 3), k, np.uint8) for k in range(4)]
    np.testing.assert_array_equal(dpg.cells(join(images)), images)


def test_a_jpeg_is_written_where_the_layout_has_one(tmp_path):
    asked = [Request(index=0, task="t2i", inputs=dict(prompt="a pig"), files=("photo/00000.jpg",))]
    run(tmp_path, asked)
    with Image.open(tmp_path / "photo" / "00000.jpg") as picture:
        assert (picture.format, picture.size) == ("JPEG", (48, 48))
