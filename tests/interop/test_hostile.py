"""Folders that are broken or made to do harm: one line with the file's name, soon, or success."""

import json
import time

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save, save_file

from tests.sd3_folder import write_image_encoder, write_sd3
from univg_jax.errors import NotFoundError, UserError
from univg_jax.files import MAX_JSON_BYTES
from univg_jax.interop import fingerprint
from univg_jax.interop.diffusers import open_transformer, open_vae, transformer_folder
from univg_jax.interop.tensors import TensorFolder
from univg_jax.interop.transformers import open_clip_text, open_clip_vision, open_t5

FILE = "model.safetensors"
GOOD = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(4, np.float16)}
SECONDS = 10  # of the processor; the slowest takes 1
fuzz = settings(
    max_examples=100,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def entry(start, stop, shape=(2, 3), dtype="F32"):
    return dict(dtype=dtype, shape=list(shape), data_offsets=[start, stop])


def stored(header, data=bytes(32), length=None):
    """The bytes of a safetensors file with any header, whose length may be a lie."""
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(header) if length is None else length).to_bytes(8, "little") + header + data


def read(folder):
    """All tensors of a folder, or the message that it gets."""
    try:
        tensors = TensorFolder(folder, FILE)
        return {name: tensors.read(name) for name in tensors.file_of}
    except UserError as error:
        return str(error)


def check(message):
    """One short line that names a file."""
    assert "\n" not in message
    assert len(message) < 3000
    assert FILE in message or "config.json" in message, message


A, B = json.dumps(entry(0, 24)).encode(), json.dumps(entry(24, 32, (4,), "F16")).encode()
BROKEN = {
    "one-name-twice": stored(b'{"a": %b, "b": %b, "a": %b}' % (A, B, A)),
    "overlap": stored(dict(a=entry(0, 24), b=entry(16, 24, (4,), "F16")), bytes(24)),
    "hole": stored(dict(a=entry(0, 24), b=entry(32, 40, (4,), "F16")), bytes(40)),
    "hole-before": stored(dict(a=entry(8, 32))),
    "hole-after": stored(dict(a=entry(0, 24)), bytes(25)),
    "reversed": stored(dict(a=entry(24, 0)), bytes(24)),
    "negative": stored(dict(a=entry(-24, 0)), bytes(24)),
    "another-size": stored(dict(a=entry(0, 24, (2, 2))), bytes(24)),
    "negative-shape": stored(dict(a=entry(0, 24, (-2, -3))), bytes(24)),
    "huge-shape": stored(dict(a=entry(0, 24, (2**62, 2**62))), bytes(24)),
    "no-dtype": stored(dict(a=dict(shape=[6], data_offsets=[0, 24])), bytes(24)),
    "unknown-dtype": stored(dict(a=entry(0, 24, dtype="P32")), bytes(24)),
    "list": stored([entry(0, 24)], bytes(24)),
    "text-for-entry": stored(dict(a="entry"), bytes(24)),
    "not-utf-8": stored(b'{"\xff": {}}'),
    "deep": stored(b'{"a":' * 10**5 + b"1" + b"}" * 10**5),
    "cut": stored(dict(a=entry(0, 24)), bytes(23)),
    "length-beyond-the-file": stored(dict(a=entry(0, 24)), bytes(24), length=10**6),
    "length-of-nearly-all": stored(dict(a=entry(0, 24)), bytes(24), length=2**63 - 1),
    "length-too-short": stored(dict(a=entry(0, 24)), bytes(24), length=5),
    "large-header": stored(b"{}" + b" " * MAX_JSON_BYTES),
    "no-header": stored(b"", b""),
    "seven-bytes": bytes(7),
    "empty": b"",
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_header_is_refused_by_name(tmp_path, name):
    (tmp_path / FILE).write_bytes(BROKEN[name])
    start = time.process_time()
    message = read(tmp_path)
    assert isinstance(message, str), "it was read"
    check(message)
    assert time.process_time() - start < SECONDS


@fuzz
@given(flips=st.lists(st.tuples(st.integers(0, 10**6), st.integers(1, 255)), min_size=1))
def test_whatever_bytes_change_a_file_is_read_or_named(tmp_path, flips):
    content = bytearray(save(GOOD))
    for place, mask in flips:
        content[place % len(content)] ^= mask
    (tmp_path / FILE).write_bytes(content)
    if isinstance(found := read(tmp_path), str):
        check(found)


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.floats()
    | st.sampled_from([0, 1, -1, 2**31, 2**63, 10**300, "", "wide", ".", "..", "F16", FILE])
    | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=9) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=9,
)


@fuzz
@given(
    changes=st.dictionaries(
        st.tuples(st.sampled_from("ab"), st.sampled_from(["dtype", "shape", "data_offsets", "x"])),
        VALUES,
    ),
    more=st.dictionaries(st.text(max_size=3) | st.just("__metadata__"), VALUES, max_size=2),
)
def test_whatever_a_header_says_it_is_read_or_named(tmp_path, changes, more):
    header = dict(a=entry(0, 24), b=entry(24, 32, (4,), "F16"))
    for (name, key), value in changes.items():
        header[name][key] = value
    (tmp_path / FILE).write_bytes(stored(header | more))
    if isinstance(found := read(tmp_path), str):
        check(found)


def test_an_index_does_not_lead_out_of_its_folder(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    (tmp_path / "inner").mkdir()
    for outside in (tmp_path / "outside.safetensors", tmp_path / "inner" / FILE):
        save_file(GOOD, outside)
    for name in ("../outside.safetensors", str(tmp_path / "inner" / FILE), "../inner/" + FILE):
        (folder / f"{FILE}.index.json").write_text(json.dumps(dict(weight_map=dict(a=name))))
        assert "is no index of safetensors files in its folder" in read(folder)


def test_a_tensor_in_two_files_is_refused(tmp_path):
    names = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    for name in names:
        save_file(GOOD, tmp_path / name)
    index = dict(weight_map=dict(zip("ab", names, strict=True)))
    (tmp_path / f"{FILE}.index.json").write_text(json.dumps(index))
    assert "a is in model-00001-of-00002.safetensors too" in read(tmp_path)


@fuzz
@given(index=VALUES | st.fixed_dictionaries(dict(weight_map=VALUES)))
def test_whatever_an_index_says_it_is_read_or_named(tmp_path, index):
    save_file(GOOD, tmp_path / "a.safetensors")
    (tmp_path / f"{FILE}.index.json").write_text(json.dumps(index))
    if isinstance(found := read(tmp_path), str):
        check(found)


OPEN = {
    "transformer": open_transformer,
    "vae": open_vae,
    "text_encoder": open_clip_text,
    "text_encoder_3": open_t5,
    "image_encoder": open_clip_vision,
}


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    folder = write_sd3(tmp_path_factory.mktemp("hostile") / "sd3")
    write_image_encoder(folder / "image_encoder")
    return folder


def opened(pipeline, name, content):
    """The message that a configuration gets; None if it is the network's own."""
    (pipeline / name / "config.json").write_bytes(content)
    start = time.process_time()
    try:
        OPEN[name](pipeline / name)
        message = None
    except UserError as error:
        check(message := str(error))
    assert time.process_time() - start < SECONDS
    return message


@pytest.fixture(params=OPEN)
def config(pipeline, request):
    """(pipeline, name, its configuration), which is restored."""
    file = pipeline / request.param / "config.json"
    content = file.read_bytes()
    yield pipeline, request.param, json.loads(content)
    file.write_bytes(content)


@pytest.mark.parametrize(
    "value", [10**9, 2**20, 10**300, -1, 0, 1.5, "wide", None, [], [2**20] * 8, {}, True]
)
def test_no_size_of_a_config_is_taken_unchecked(config, value):
    """One key at a time; what is no size may be ignored, but then the network is the same."""
    pipeline, name, good = config
    for key in good:
        opened(pipeline, name, json.dumps({**good, key: value}).encode())


@settings(parent=fuzz, max_examples=15)
@given(data=st.data())
def test_whatever_a_config_says_it_is_read_or_named(config, data):
    pipeline, name, good = config
    changes = data.draw(st.dictionaries(st.sampled_from(sorted(good)), VALUES, min_size=1))
    opened(pipeline, name, json.dumps({**good, **changes}).encode())


@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b"{", b'{"\xff": 1}', b'{"a":' * 10**5, b'{"model_type": "t5"'],
)
def test_a_config_that_is_no_json_object_is_named(config, content):
    pipeline, name, _ = config
    assert "config.json is not " in opened(pipeline, name, content)


def test_all_of_a_file_counts_for_its_fingerprint(tmp_path, monkeypatch):
    """Samples of it would miss most changes of single values; so would the configuration."""
    monkeypatch.setattr(fingerprint, "FOLDER", str(tmp_path / "cache"))
    file = tmp_path / FILE
    save_file({"a": np.zeros(2**20, np.float32)}, file)
    (tmp_path / "config.json").write_text('{"hidden_act": "gelu"}')
    seen = {TensorFolder(tmp_path, FILE).fingerprint()}
    content = bytearray(file.read_bytes())
    for place in (100, len(content) // 3, len(content) - 1):
        content[place] ^= 1
        file.write_bytes(content)
        seen.add(TensorFolder(tmp_path, FILE).fingerprint())
    (tmp_path / "config.json").write_text('{"hidden_act": "quick_gelu"}')
    seen.add(TensorFolder(tmp_path, FILE).fingerprint())
    assert len(seen) == 5


def test_a_file_is_hashed_once_and_anew_when_it_has_changed(tmp_path, monkeypatch):
    monkeypatch.setattr(fingerprint, "FOLDER", str(tmp_path / "cache"))
    monkeypatch.setattr(fingerprint, "SETTLED_SECONDS", -1.0)
    hashed = []
    file_digest = fingerprint.hashlib.file_digest

    def count(opened, name):
        hashed.append(opened.name)
        return file_digest(opened, name)

    monkeypatch.setattr(fingerprint.hashlib, "file_digest", count)
    file = tmp_path / "a"
    file.write_bytes(b"before")
    before = fingerprint.file_sha256(file)
    assert fingerprint.file_sha256(file) == before
    assert len(hashed) == 1
    (remembered,) = (tmp_path / "cache").iterdir()
    for damaged in ("", "0" * 64, remembered.read_text().replace(before, "0" * 64)):
        remembered.write_text(damaged)
        assert fingerprint.file_sha256(file) == before
    assert len(hashed) == 4
    file.write_bytes(b"after!")  # of the same size
    assert fingerprint.file_sha256(file) != before
    # Where nothing can be written, it is hashed every time.
    monkeypatch.setattr(fingerprint, "FOLDER", str(file / "below a file"))
    assert fingerprint.file_sha256(file) == fingerprint.file_sha256(file)
    assert len(hashed) == 7


def test_a_file_that_may_still_change_is_not_remembered(tmp_path, monkeypatch):
    monkeypatch.setattr(fingerprint, "FOLDER", str(tmp_path / "cache"))
    (tmp_path / "a").write_bytes(b"new")
    fingerprint.file_sha256(tmp_path / "a")
    assert not (tmp_path / "cache").exists()


def test_a_missing_part_is_named(tmp_path):
    index = dict(weight_map=dict(a="a.safetensors"))
    (tmp_path / f"{FILE}.index.json").write_text(json.dumps(index))
    with pytest.raises(NotFoundError, match=r"lacks a\.safetensors"):
        TensorFolder(tmp_path, FILE)


def test_a_broken_pipeline_is_named_and_a_run_of_ours_is_none(tmp_path):
    """`init_from.path` may be either."""
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json is not JSON"):
        transformer_folder(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    assert transformer_folder(tmp_path) is None
    assert transformer_folder("") is None
