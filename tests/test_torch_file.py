"""Files of torch.save: what is written without torch, and what is refused unread."""

import argparse
import contextlib
import io
import pickle
import struct
import zipfile

import ml_dtypes
import numpy as np
import pytest

from gigatok_jax.errors import CheckpointError
from gigatok_jax.weights import torch_file
from gigatok_jax.weights.names import Promise

SAVED = {
    "model": {
        "matrix": np.arange(6, dtype=np.float32).reshape(2, 3),
        "turned": np.arange(6, dtype=np.float64).reshape(2, 3).T,
        "brain": np.ones((4, 1), ml_dtypes.bfloat16) / 3,
        "half": np.ones(3, np.float16) / 3,
        "count": np.asarray(7, np.int64),
        "none": np.zeros((0, 3), np.float32),
    },
    "steps": 5_000_000_000,
    "optimizer": {
        "state": {0: {"step": np.asarray(2.0, np.float32)}},
        "param_groups": [{"lr": 1e-4}],
    },
    "rest": [1, -2.5, "drei", None, True, (0.9, 0.95)],
}


def same(found, expected):
    if isinstance(expected, dict):
        assert list(found) == list(expected)
        for key, value in expected.items():
            same(found[key], value)
    elif isinstance(expected, np.ndarray):
        assert found.shape == expected.shape and found.dtype == expected.dtype
        np.testing.assert_array_equal(found, expected)
    else:
        assert found == expected


def test_what_is_written_is_read_again(tmp_path):
    torch_file.save(tmp_path / "x.pt", SAVED)
    same(torch_file.load(tmp_path / "x.pt"), SAVED)
    assert zipfile.ZipFile(tmp_path / "x.pt").testzip() is None  # every checksum is right


@pytest.mark.parametrize("mapped", [False, True])
def test_pytorch_reads_what_is_written(tmp_path, mapped):
    torch = pytest.importorskip("torch")
    torch_file.save(tmp_path / "x.pt", SAVED)
    found = torch.load(tmp_path / "x.pt", weights_only=True, mmap=mapped)
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}

    def as_numpy(value):
        if isinstance(value, dict):
            return {key: as_numpy(x) for key, x in value.items()}
        if not isinstance(value, torch.Tensor):
            return value
        kind = str(value.dtype).removeprefix("torch.")
        kind = ml_dtypes.bfloat16 if kind == "bfloat16" else kind
        return value.contiguous().view(bits[value.element_size()]).numpy().view(kind)

    same(as_numpy(found), SAVED)


def test_promises_are_read_by_their_order_and_one_at_a_time(tmp_path):
    read = []

    def promise(name, order):
        def make():
            read.append(name)
            return np.full((2,), order, np.float32)

        return Promise((2,), np.dtype(np.float32), make, order)

    torch_file.save(
        tmp_path / "x.pt",
        {name: promise(name, i) for name, i in zip("abc", (2, 0, 1), strict=True)},
    )
    assert read == ["b", "c", "a"]
    found = torch_file.load(tmp_path / "x.pt")
    assert {name: x[0] for name, x in found.items()} == {"a": 2, "b": 0, "c": 1}


def test_other_objects_are_not_written(tmp_path):
    with pytest.raises(CheckpointError, match="cannot write a Namespace"):
        torch_file.save(tmp_path / "x.pt", {"args": argparse.Namespace(lr=1)})


# Files that mean harm. A storage is one of four numbers.


def storage(elements=4, key="0"):
    return (
        b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x00"
        + key.encode()
        + b"X\x03\x00\x00\x00cpu"
        + pickle.dumps(elements, 2)[2:-1]
        + b"tQ"
    )


def tensor(shape=(4,), strides=(1,), offset=0, **rest):
    numbers = [pickle.dumps(x, 2)[2:-1] for x in (offset, shape, strides)]
    hooks = b"\x89ccollections\nOrderedDict\n)R"
    start = b"ctorch._utils\n_rebuild_tensor_v2\n("
    return start + storage(**rest) + b"".join(numbers) + hooks + b"tR"


def write(path, body, name="x/data.pkl", compression=zipfile.ZIP_STORED, twice=False):
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr(name, b"\x80\x02" + body + b".")
        for _ in range(2 if twice else 1):
            archive.writestr("x/data/0", np.arange(4, dtype=np.float32).tobytes())


def laughs(levels=60):
    """A list that holds the same list ten times, and so on: 10^60 of them when written out."""
    inner = []
    for _ in range(levels):
        inner = [inner] * 10
    return pickle.dumps(inner, 2)[2:-1]


CRAFTED = {
    "code": (b"cos\nsystem\n(X\x04\x00\x00\x00true" + b"tR", "holds os.system"),
    "builtins": (b"cbuiltins\neval\n(X\x01\x00\x00\x001tR", "holds builtins.eval"),
    "module": (b"ctorch.hub\nload\n(tR", "holds torch.hub.load"),
    "array": (b"cnumpy\nndarray\n(J\x00\x00\x00\x7ftR", "holds numpy.ndarray"),
    "shape": (tensor((1 << 40,)), "refused"),
    "repeated": (tensor((1 << 40,), (0,)), "refused"),
    "negative": (tensor((-1,)), "refused"),
    "outside": (tensor(offset=3), "refused"),
    "no storage": (tensor(key="9"), "damaged"),
    "huge storage": (tensor(elements=1 << 60), "ends in the middle"),
    "negative storage": (tensor(elements=-4), "storage of -4"),
    "memory": (b"Nr\xff\xff\xff\x7f", "remembers object"),
    "unfinished": (b"X\xff\x00\x00\x00", "damaged"),
    "endless": (b"]q\x00h\x00a", None),
    "laughs": (laughs(), None),
}


@pytest.mark.parametrize("case", CRAFTED)
def test_crafted_files_are_refused_or_read_in_no_time(tmp_path, case):
    body, message = CRAFTED[case]
    write(tmp_path / "x.pt", body)
    if message is None:
        torch_file.load(tmp_path / "x.pt")
        return
    with pytest.raises(CheckpointError, match=message) as refused:
        torch_file.load(tmp_path / "x.pt")
    assert str(refused.value).startswith(str(tmp_path / "x.pt"))


def test_archives_that_are_not_torchs_are_refused(tmp_path):
    path = tmp_path / "x.pt"
    write(path, tensor(), compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(CheckpointError, match="compressed"):
        torch_file.load(path)
    write(path, tensor(), name="other")
    with pytest.raises(CheckpointError, match=r"without one data\.pkl"):
        torch_file.load(path)
    with pytest.warns(UserWarning, match="Duplicate"):
        write(path, tensor(), twice=True)
    with pytest.raises(CheckpointError, match="x/data/0 twice"):
        torch_file.load(path)


def test_a_pickle_that_grows_while_it_is_read_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(torch_file, "_LARGEST_PICKLE", 1000)
    write(tmp_path / "x.pt", b"X" + struct.pack("<I", 2000) + bytes(2000))
    with pytest.raises(CheckpointError, match="has a pickle of"):
        torch_file.load(tmp_path / "x.pt")


def test_a_file_cut_anywhere_is_refused(tmp_path):
    torch_file.save(tmp_path / "x.pt", SAVED)
    whole = (tmp_path / "x.pt").read_bytes()
    for length in [0, 1, 3, 100, *range(200, len(whole), 397)]:
        (tmp_path / "y.pt").write_bytes(whole[:length])
        with pytest.raises(CheckpointError):
            torch_file.load(tmp_path / "y.pt")


def test_random_bytes_never_raise_anything_else(tmp_path):
    torch_file.save(tmp_path / "x.pt", SAVED)
    archive = zipfile.ZipFile(tmp_path / "x.pt")
    pickled, rng = archive.read("archive/data.pkl"), np.random.default_rng(0)
    for _ in range(300):
        body = bytearray(pickled)
        for place in rng.integers(2, len(body), 3):
            body[place] = rng.integers(256)
        with zipfile.ZipFile(tmp_path / "y.pt", "w") as made:
            made.writestr("archive/data.pkl", bytes(body))
            for name in archive.namelist():
                if "/data/" in name:
                    made.writestr(name, archive.read(name))
        with contextlib.suppress(CheckpointError):
            torch_file.load(tmp_path / "y.pt")


def test_a_plain_pickle_may_hold_arrays_but_not_code(tmp_path):
    (tmp_path / "x.pkl").write_bytes(pickle.dumps({"w": np.arange(3.0)}))
    np.testing.assert_array_equal(torch_file.load_pickle(tmp_path / "x.pkl")["w"], np.arange(3.0))
    (tmp_path / "y.pkl").write_bytes(pickle.dumps(io.BytesIO))
    with pytest.raises(CheckpointError, match=r"holds _?io\.BytesIO"):
        torch_file.load_pickle(tmp_path / "y.pkl")
