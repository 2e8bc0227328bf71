"""Metrics survive what happens to their file: kills, full disks, resumed runs."""

import collections
import gc
import json
import resource
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tensorboardX.proto.event_pb2 import Event, SessionLog

from univg_jax import writers
from univg_jax.errors import UserError


def write(path, *steps, rows=()):
    writer = writers.JsonlWriter(path, rows)
    for step in steps:
        writer.write_scalars(step, {"loss": 1 / step})
        writer.flush()
    return writer


def test_a_file_cut_at_any_byte_keeps_its_whole_rows_and_goes_on(tmp_path, caplog):
    path = tmp_path / "metrics.jsonl"
    write(path, *range(1, 8))
    whole = path.read_bytes()
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut])
        caplog.clear()
        rows = writers.read_metrics(path)
        ends = [i for i in range(len(whole)) if whole[i : i + 1] == b"\n"]
        assert [row["step"] for row in rows] == list(range(1, 1 + sum(end <= cut for end in ends)))
        is_torn = cut not in (0, *ends, *(end + 1 for end in ends))
        assert ("the last line is torn" in caplog.text) == is_torn, cut
        write(path, 8, rows=rows)
        caplog.clear()
        assert writers.read_metrics(path) == [*rows, {"step": 8, "loss": 1 / 8}]
        assert not caplog.text


@given(line=st.integers(0, 4), content=st.binary(max_size=40))
def test_a_line_of_anything_costs_that_line_and_is_named(tmp_path_factory, line, content):
    path = tmp_path_factory.mktemp("any") / "metrics.jsonl"
    lines = [json.dumps({"step": step, "loss": 0.5}).encode() for step in range(1, 6)]
    lines[line] = content.replace(b"\n", b" ").replace(b"\r", b" ")
    path.write_bytes(b"\n".join(lines))
    expected = [step for step in range(1, 6) if step != line + 1]
    assert [row["step"] for row in writers.read_metrics(path)] == expected


def test_a_torn_line_in_the_middle_is_named(tmp_path, caplog):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "lo{"step": 3}\n{"step": 4}\n')
    assert [row["step"] for row in writers.read_metrics(path)] == [1, 4]
    assert "metrics.jsonl: line 2 is torn and left out (26 bytes, after step 1)" in caplog.text


def test_a_new_row_is_appended_and_an_old_one_may_change(tmp_path):
    path = tmp_path / "metrics.jsonl"
    writer = write(path, 1, 2)
    inode = path.stat().st_ino
    writer.write_scalars(3, {"loss": 0.25})
    writer.flush()
    assert path.stat().st_ino == inode  # the same file grew
    writer.write_scalars(3, {"time": 7.0})
    writer.close()
    assert path.stat().st_ino != inode  # written aside
    assert writers.read_metrics(path)[-1] == {"step": 3, "loss": 0.25, "time": 7.0}
    assert len(path.read_text().splitlines()) == 3
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize("room", [0, 1, 20])
def test_a_full_disk_loses_no_row_that_was_written(tmp_path, room):
    path = tmp_path / "metrics.jsonl"
    writer = write(path, 1, 2)
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + room, limits[1]))
    try:
        writer.write_scalars(3, {"loss": 0.25})
        for _ in range(2):  # the second as when the run ends
            with pytest.raises(
                UserError, match=r"metrics\.jsonl cannot be written: File too large"
            ):
                writer.flush()
            assert path.read_bytes()[: len(before)] == before
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    writer.close()  # there is room again
    assert [row["step"] for row in writers.read_metrics(path)] == [1, 2, 3]


def shown_events(folder):
    """(step, tag, value) of all that TensorBoard shows, in order; a session purges what is not
    before it. What a kill tore at the end of a file is not shown.
    """
    shown = []
    for file in sorted(folder.iterdir()):
        data = file.read_bytes()
        while len(data) >= 8:  # the length, its checksum, the event, its checksum
            (length,) = struct.unpack("<Q", data[:8])
            if len(data) < 16 + length:
                break
            event = Event.FromString(data[12 : 12 + length])
            data = data[16 + length :]
            if event.session_log.status == SessionLog.START:
                shown = [one for one in shown if one[0] < event.step]
            shown += [
                (event.step, value.tag, value.image.encoded_image_string or value.simple_value)
                for value in event.summary.value
            ]
    return shown


def test_what_is_flushed_is_on_the_disk(tmp_path):
    """A kill loses none of it, of rows larger than any queue."""
    writer = writers.create_writer(tmp_path, resume_step=0, rows=(), active=True)
    for step in range(1, 4):
        row = {f"share/{k}": step + k / 64 for k in range(64)}
        writer.write_scalars(step, row)
        writer.flush()
        shown = {event[1]: event[2] for event in shown_events(tmp_path / "tensorboard")[-64:]}
        assert shown == row
    writer.close()


@pytest.mark.parametrize("room", [0, 10, 100])
def test_a_full_disk_is_named_by_every_writer_and_loses_nothing_that_comes_later(tmp_path, room):
    writer = writers.create_writer(tmp_path, resume_step=0, rows=(), active=True)
    writer.write_scalars(1, {"loss": 1.0})
    writer.flush()
    (events,) = (tmp_path / "tensorboard").iterdir()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (events.stat().st_size + room, limits[1]))
    try:
        writer.write_scalars(2, {f"loss/{k}": 0.5 for k in range(8)})
        for write in (writer.flush, writer.flush, writer.close):
            with pytest.raises(UserError, match=f"{events} cannot be written: File too large"):
                write()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    writer.close()  # there is room again
    expected = [(1, "loss"), *((2, f"loss/{k}") for k in range(8))]
    assert sorted(event[:2] for event in shown_events(events.parent)) == expected
    assert [row["step"] for row in writers.read_metrics(tmp_path / "metrics.jsonl")] == [1, 2]


def test_where_one_file_cannot_be_written_the_others_are(tmp_path):
    (tmp_path / "tensorboard").write_text("in its place")
    writer = writers.create_writer(tmp_path, resume_step=0, rows=(), active=True)
    writer.write_scalars(1, {"loss": 1.0})
    with pytest.raises(UserError, match=r"tensorboard/events\S+ cannot be written: (Not|File)"):
        writer.flush()
    assert [row["step"] for row in writers.read_metrics(tmp_path / "metrics.jsonl")] == [1]


def test_who_may_not_write_any_more_writes_nothing(tmp_path):
    lost = []

    def before_write():
        if lost:
            raise UserError("was taken over")

    def content():
        files = [file for file in tmp_path.rglob("*") if file.is_file()]
        return {file: (file.read_bytes(), file.stat().st_mtime_ns) for file in files}

    options = dict(resume_step=0, rows=(), active=True, before_write=before_write)
    early = writers.create_writer(tmp_path, **options)
    writer = writers.create_writer(tmp_path, **options)
    assert content() == {}
    writer.write_scalars(1, {"loss": 1.0})
    writer.flush()
    before = content()
    lost.append(True)
    writer.write_scalars(1, {"time": 1.0})
    writer.write_images(2, {"sample": np.zeros((64, 64, 3), np.uint8)})
    writer.write_scalars(2, {"loss": 1.0})
    for write in (writer.flush, writer.close, early.flush, early.close):
        with pytest.raises(UserError, match="was taken over"):
            write()
    del early, writer
    gc.collect()
    assert content() == before


def test_tensorboard_shows_every_number_and_picture_of_a_step_once(tmp_path):
    for start, stop in ((0, 3), (2, 4)):  # step 3 was lost
        writer = writers.create_writer(tmp_path, resume_step=start, rows=(), active=True)
        for step in range(start + 1, stop + 1):
            writer.write_images(step, {"sample": np.zeros((2, 2, 3), np.uint8)})
            writer.write_scalars(step, {"val/loss": 1.0})
            writer.write_scalars(step, {"loss": 1.0, "time": 1.0})
            writer.flush()
        writer.write_scalars(stop, {"time": 2.0, "seconds/save": 1.0})  # the last row, completed
        writer.close()
    count = collections.Counter(event[:2] for event in shown_events(tmp_path / "tensorboard"))
    assert set(count.values()) == {1}, count
    expected = {(s, t) for s in range(1, 5) for t in ("sample", "val/loss", "loss", "time")}
    assert expected <= set(count)
