"""Folders, zips and tars give the same members, and damaged ones one line."""

import bz2
import contextlib
import gzip
import io
import lzma
import os
import pickle
import tarfile
import zipfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines.native import archives
from univg_jax.errors import NotFoundError, UserError

FILES = {"b/2.jpg": b"two", "a/1.JPG": b"one", "a/c/3.png": b"three" * 300, "0.jpeg": b""}
LEFT_BEHIND = {
    "a/._1.jpg": b"x",
    "__MACOSX/a/1.jpg": b"x",
    ".DS_Store": b"x",
    "a/Thumbs.db": b"x",
    ".cache/4.jpg": b"x",
    "list.txt": b"x",
}


def tar_bytes(files, *, prefix="", format=tarfile.PAX_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(prefix + name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def zip_bytes(files) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.mkdir("a")
        for name, data in files.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def write(path, content: bytes):
    path.write_bytes(content)
    return path


FORMS = {
    "files.zip": zip_bytes,
    "files.tar": tar_bytes,
    "dots.tar": lambda files: tar_bytes(files, prefix="./"),
    "rooted.tar": lambda files: tar_bytes(files, prefix="/"),
    "gnu.tar": lambda files: tar_bytes(files, format=tarfile.GNU_FORMAT),
    "files.tgz": lambda files: gzip.compress(tar_bytes(files)),
    "files.tar.bz2": lambda files: bz2.compress(tar_bytes(files)),
    "files.tar.xz": lambda files: lzma.compress(tar_bytes(files)),
    "wrong_suffix.bin": tar_bytes,
}


@pytest.mark.parametrize("form", FORMS)
def test_every_archive_gives_its_pictures_in_stored_order(form, tmp_path):
    path = write(tmp_path / form, FORMS[form](LEFT_BEHIND | FILES))
    assert list(archives.members(path)) == list(FILES.items())
    everything = dict(archives.members(path, None))
    assert everything == {**FILES, "list.txt": b"x"}


def test_a_folder_gives_its_pictures_in_sorted_order(tmp_path):
    for name, data in (LEFT_BEHIND | FILES).items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(data)
    os.symlink(tmp_path, tmp_path / "b" / "loop")
    found = dict(archives.members(tmp_path))
    assert found == FILES
    assert list(found) == ["0.jpeg", "a/1.JPG", "a/c/3.png", "b/2.jpg"]


def test_tars_in_tars_and_zips_are_entered(tmp_path):
    inner = tar_bytes({"1.jpg": b"one"})
    outer = {
        "a.tar": inner,
        "b.tar.gz": gzip.compress(inner),
        "c/d.tar": tar_bytes({"e.tar": inner}),
    }
    expected = ["a.tar/1.jpg", "b.tar.gz/1.jpg", "c/d.tar/e.tar/1.jpg"]
    for form in ("files.tar", "files.tgz", "files.zip"):
        path = write(tmp_path / form, FORMS[form](outer))
        assert list(archives.members(path)) == [(name, b"one") for name in expected]


def test_tars_in_tars_end_somewhere(tmp_path):
    inner = tar_bytes({"1.jpg": b"one"})
    for _ in range(6):
        inner = tar_bytes({"a.tar": inner})
    with pytest.raises(UserError, match="tars in tars"):
        list(archives.members(write(tmp_path / "deep.tar", inner)))


def test_links_in_tars_are_not_followed(tmp_path):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE):
            info = tarfile.TarInfo(f"{int(kind)}.jpg")
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
    path = write(tmp_path / "links.tar", buffer.getvalue())
    assert not list(archives.members(path))
    assert "1.jpg" not in archives.Store(path)


def test_names_that_are_not_utf8_are_made_valid_and_stay_different(tmp_path):
    path = write(tmp_path / "files.tar", b"")
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        for name in ("\udce9.jpg", "\udcea.jpg", "a\nb.jpg"):
            tar.addfile(tarfile.TarInfo(name), io.BytesIO())
    names = [name for name, _ in archives.members(path)]
    assert len(set(names)) == 3
    assert all(name.encode() and name.isprintable() for name in names)


@pytest.mark.parametrize("form", ["files.tar", "files.tgz", "files.zip", "files.tar.xz"])
def test_no_cut_goes_unnoticed(form, tmp_path):
    """tarfile alone takes a cut between members for the end."""
    content = FORMS[form](FILES)
    end = tarfile.BLOCKSIZE * (1 + len(FILES) + 1 + 1 + 3) if form == "files.tar" else len(content)
    for cut in range(0, end, 97 if end < 2000 else 256):
        path = write(tmp_path / "cut", content[:cut])
        with pytest.raises(UserError, match="cut is not a whole zip or tar"):
            list(archives.members(path))


def test_a_damaged_header_is_not_the_end(tmp_path):
    content = bytearray(tar_bytes(FILES))
    content[2 * tarfile.BLOCKSIZE + 3] ^= 1  # of the second member's name
    with pytest.raises(UserError, match=r"bad checksum|at byte"):
        list(archives.members(write(tmp_path / "flipped.tar", bytes(content))))


def test_a_damaged_member_of_a_zip_is_an_error_in_its_place(tmp_path):
    content = bytearray(zip_bytes(FILES))
    content[content.index(b"a/c/3.png") + 12] ^= 255
    found = dict(archives.members(write(tmp_path / "flipped.zip", bytes(content))))
    assert isinstance(found.pop("a/c/3.png"), UserError)
    assert found == {name: FILES[name] for name in found}


def test_sizes_are_not_believed(tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "MAX_FILE_BYTES", 1000)
    for form in ("files.tar", "files.tgz", "files.zip"):
        path = write(tmp_path / form, FORMS[form](FILES))
        found = dict(archives.members(path))
        assert str(found.pop("a/c/3.png")) == "'a/c/3.png' has 1500 bytes: more than 1000"
        assert found == {name: FILES[name] for name in found}
    with pytest.raises(UserError, match="1500 bytes"):
        archives.Store(tmp_path / "files.tar").read("a/c/3.png")


def test_absurd_sizes_in_headers_are_refused(tmp_path):
    for size in (2**40, 2**62, -512, -(2**40)):
        info = tarfile.TarInfo("1.jpg")
        info.size = size
        header = info.tobuf(tarfile.GNU_FORMAT)
        path = write(tmp_path / "absurd.tar", tar_bytes({"0.jpg": b"x"})[:1024] + header)
        with pytest.raises(UserError, match=r"absurd\.tar is not a whole"):
            list(archives.members(path))
        with pytest.raises(UserError, match=r"absurd\.tar is not a whole"):
            archives.Store(path).read("1.jpg")
    info.type, info.size = tarfile.GNUTYPE_LONGNAME, 2**40
    write(path, info.tobuf(tarfile.GNU_FORMAT) + bytes(2048))
    with pytest.raises(UserError, match=r"absurd\.tar is not a whole"):
        list(archives.members(path))


def test_a_zip_bomb_is_refused(tmp_path):
    """Its members lie over each other: each says 200 MiB."""
    path = tmp_path / "bomb.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("0.jpg", bytes(1000))
        info = archive.infolist()[0]
        info.file_size = 200 << 20
        archive.filelist += [info] * 20
    with pytest.raises(UserError, match="zip bomb"):
        list(archives.members(path))


def test_what_is_no_archive_is_named(tmp_path):
    with pytest.raises(NotFoundError, match=r"none\.zip does not exist: expected a folder"):
        next(archives.members(tmp_path / "none.zip"))
    with pytest.raises(UserError, match=r"text\.tar is not a whole zip or tar"):
        next(archives.members(write(tmp_path / "text.tar", b"<html>404" * 100)))
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(NotFoundError, match="pipe is not a file"):
        next(archives.members(tmp_path / "pipe"))


@pytest.mark.parametrize("form", ["files.zip", "files.tar", "rooted.tar", "folder"])
def test_a_store_reads_by_name_in_any_process(form, tmp_path):
    path = tmp_path / form
    if form == "folder":
        for name, data in FILES.items():
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_bytes(data)
    else:
        write(path, FORMS[form](FILES))
    (tmp_path / "secret.jpg").write_bytes(b"secret")
    store = pickle.loads(pickle.dumps(archives.Store(path)))
    for name, data in FILES.items():
        assert store.read(name) == data
        assert store.read(f"/{name}") == store.read(f"./{name}") == data
        assert store.read(f"{path}/{name}") == data
        assert name in store
    for name in ("../secret.jpg", "a/../../secret.jpg", "", ".", "a\0.jpg"):
        with pytest.raises(UserError, match="is not the name of a file"):
            store.read(name)
        assert name not in store
    for name in ("a", "none.jpg", str(tmp_path / "secret.jpg")):
        with pytest.raises(NotFoundError, match="there is no "):
            store.read(name)


def test_a_store_of_a_compressed_tar_says_what_to_do(tmp_path):
    path = write(tmp_path / "files.tgz", gzip.compress(tar_bytes(FILES)))
    with pytest.raises(UserError, match="unpack it"):
        archives.Store(path).read("a/1.JPG")
    with pytest.raises(NotFoundError, match="does not exist"):
        archives.Store(tmp_path / "none")


@given(data=st.data())
@settings(max_examples=200, deadline=None)
def test_damage_is_one_line(data, tmp_path_factory):
    form = data.draw(st.sampled_from(list(FORMS)))
    content = bytearray(FORMS[form](FILES | {"inner.tar": tar_bytes(FILES)}))
    for _ in range(data.draw(st.integers(1, 6))):
        place = data.draw(st.integers(0, len(content) - 1))
        content[place] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(0, len(content))) :]
    path = write(tmp_path_factory.getbasetemp() / "damaged", bytes(content))
    for read in (archives.members, lambda path: archives.Store(path).read("b/2.jpg")):
        with contextlib.suppress(UserError):
            list(read(path))
