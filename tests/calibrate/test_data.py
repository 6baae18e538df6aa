"""Every kind of data as the same batches; what is refused; hostile array files."""

from __future__ import annotations

import io
import itertools
import sys
import tracemalloc
import zipfile

import numpy as np
import pytest

from bnport.calibrate import arrays
from bnport.calibrate.data import Batches, read
from bnport.errors import BnportError, FormatError, InvalidValue, MissingDependency, NotFound, Question

X = np.random.default_rng(0).normal(size=(70, 4, 5, 3)).astype(np.float32)
INPUTS = {"image": (None, 4, 5, 3)}
TWO = {"left": (None, 3), "right": (None, 2)}


def together(batches):
    found = list(batches)
    assert all(isinstance(batch, np.ndarray) for batch in found)
    return np.concatenate(found)


def npy(path, array):
    np.save(path, array)
    return str(path)


def dataset(x, *more, size=32):
    import tensorflow as tf

    return tf.data.Dataset.from_tensor_slices((x, *more) if more else x).batch(size)


def loader(*x, **settings):
    import torch

    tensors = [torch.from_numpy(np.asarray(a)) for a in x]
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*tensors), batch_size=32, **settings)


def py_dataset(x, y=None):
    import keras

    class Mine(keras.utils.PyDataset):
        def __len__(self):
            return -(-len(x) // 32)

        def __getitem__(self, k):
            part = x[32 * k : 32 * k + 32]
            return part if y is None else (part, y[32 * k : 32 * k + 32])

    return Mine()


LABELS = np.arange(70)
SOURCES = {
    "array": lambda tmp: X,
    "array and labels": lambda tmp: (X, LABELS),
    "npy": lambda tmp: npy(tmp / "x.npy", X),
    "path object": lambda tmp: (npy(tmp / "x.npy", X), tmp / "x.npy")[1],
    "fortran npy": lambda tmp: npy(tmp / "f.npy", np.asfortranarray(X)),
    "big-endian npy": lambda tmp: npy(tmp / "b.npy", X.astype(">f4")),
    "npz": lambda tmp: (np.savez(tmp / "x.npz", anything=X), str(tmp / "x.npz"))[1],
    "fortran npz": lambda tmp: (np.savez(tmp / "x.npz", anything=np.asfortranarray(X)), str(tmp / "x.npz"))[1],
    "compressed npz": lambda tmp: (np.savez_compressed(tmp / "x.npz", a=X), str(tmp / "x.npz"))[1],
    "compressed fortran npz": lambda tmp: (
        np.savez_compressed(tmp / "x.npz", a=np.asfortranarray(X)),
        str(tmp / "x.npz"),
    )[1],
    "big-endian array": lambda tmp: X.astype(">f4"),
    "big-endian fortran npy": lambda tmp: npy(tmp / "f.npy", np.asfortranarray(X.astype(">f4"))),
    "npz named like the input": lambda tmp: (np.savez(tmp / "n.npz", image=X, y=LABELS), str(tmp / "n.npz"))[1],
    "folder of npy": lambda tmp: (
        npy(tmp / "0.npy", X[:33]),
        npy(tmp / "1.npy", X[33:41]),
        npy(tmp / "2.npy", X[41:]),
        tmp,
    )[3],
    "folder opened by the caller": lambda tmp: ((tmp / "a.png").write_bytes(b""), str(tmp))[1],
    "generator": lambda tmp: (X[k : k + 32] for k in range(0, 70, 32)),
    "generator of pairs": lambda tmp: ((X[k : k + 32], LABELS) for k in range(0, 70, 32)),
    "function": lambda tmp: lambda: (X[k : k + 32] for k in range(0, 70, 32)),
    "iterator with empty batches": lambda tmp: iter([X[:0], X[:32], X[32:32], X[32:64], X[64:]]),
    "dict": lambda tmp: {"image": X, "label": LABELS},
    "tf.data": lambda tmp: dataset(X),
    "tf.data of pairs": lambda tmp: dataset(X, LABELS),
    "DataLoader": lambda tmp: loader(X),
    "DataLoader of pairs": lambda tmp: loader(X, LABELS),
    "PyDataset": lambda tmp: py_dataset(X),
    "PyDataset of pairs": lambda tmp: py_dataset(X, LABELS),
    "torch tensor": lambda tmp: __import__("torch").from_numpy(X),
    "tf tensor": lambda tmp: __import__("tensorflow").constant(X),
    "jax array": lambda tmp: __import__("jax").numpy.asarray(X),
}


@pytest.mark.parametrize("kind", SOURCES)
def test_every_kind_of_data_gives_the_same_rows_in_the_same_batches(kind, tmp_path):
    batches = read(SOURCES[kind](tmp_path), inputs=INPUTS, images=lambda path: X)
    found = list(batches)
    assert [len(batch) for batch in found] == [32, 32, 6]
    assert all(batch.dtype == np.float32 for batch in found)
    assert (np.concatenate(found) == X).all()
    assert batches.samples in (None, 70)
    assert batches.length in (None, 3)


@pytest.mark.parametrize("kind", ["array", "npy", "compressed npz", "tf.data", "DataLoader", "PyDataset", "function"])
def test_a_run_resumes_at_any_batch_and_data_that_can_be_read_again_are(kind, tmp_path):
    batches = read(SOURCES[kind](tmp_path), inputs=INPUTS)
    assert batches.repeatable
    assert (together(batches) == X).all()
    assert (together(batches.iterate(skip=1)) == X[32:]).all()
    assert (together(batches.iterate(skip=2)) == X[64:]).all()
    assert list(batches.iterate(skip=3)) == []


def test_a_generator_that_was_read_is_refused_the_second_time():
    batches = read(X[k : k + 7] for k in range(0, 70, 7))
    assert (together(batches) == X).all()
    assert not batches.repeatable
    with pytest.raises(InvalidValue, match="only once"):
        list(batches)


def test_a_limit_stops_in_the_middle_of_a_batch_and_ends_endless_data():
    assert len(together(read(X, limit=40))) == 40
    assert read(X, limit=40).length == 2
    assert len(together(read(itertools.repeat(X), limit=100))) == 100
    assert len(together(read(dataset(X).repeat(), limit=71))) == 71
    with pytest.raises(InvalidValue, match="never ends"):
        read(dataset(X).repeat())


@pytest.mark.parametrize("data", [X, lambda: iter([X[:32], X[32:64], X[64:]])])
def test_a_limit_counts_from_the_first_sample_also_when_a_run_resumes(data):
    assert len(together(read(data, limit=40).iterate(skip=1))) == 8
    assert list(read(data, limit=32).iterate(skip=1)) == []
    assert list(read(data, limit=10).iterate(skip=2)) == []


def test_several_inputs_come_as_dict_or_list_whatever_carries_them(tmp_path):
    left, right = np.ones((9, 3), np.float32), np.zeros((9, 2), np.float32)
    np.savez(tmp_path / "two.npz", right=right, left=left, other=LABELS[:9])
    by_name = [
        {"left": left, "right": right},
        str(tmp_path / "two.npz"),
        [{"left": left, "right": right, "y": 1}].__iter__(),
    ]
    for data in by_name:
        batches = read(data, inputs=TWO)
        (batch,) = batches
        assert list(batch) == ["left", "right"]
        assert batch["right"].shape == (9, 2)
    assert batches.notes == ["left out, not inputs of the model: y"]
    for data in ([left, right], ([left, right], LABELS[:9]), iter([((left, right), LABELS)]), iter([[left, right]])):
        (batch,) = read(data, inputs=TWO)
        assert isinstance(batch, list)
        assert [a.shape for a in batch] == [(9, 3), (9, 2)]


def test_a_loader_says_what_it_drops_and_that_it_shuffles():
    notes = read(loader(X, drop_last=True, shuffle=True)).notes
    assert len(notes) == 2
    assert "drops the last" in notes[0]
    assert "shuffles" in notes[1]
    assert read(loader(X)).notes == []
    assert read(loader(X)).samples == 70


def test_bfloat16_tensors_of_torch_widen_exactly():
    import torch

    (batch,) = read(torch.tensor([[1.5, -2.0]], dtype=torch.bfloat16))
    assert batch.dtype == np.float32
    assert batch.tolist() == [[1.5, -2.0]]


def spoilt(where, value):
    x = X.copy()
    x[where] = value
    return x


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (X[:0], "no samples at all, at least 1 needed"),
        (iter([]), "no samples at all"),
        (iter([()]), "batch 0: is empty"),
        (lambda: iter([[], []]), "batch 0: is empty"),
        (spoilt((40, 1, 2, 0), np.nan), r"batch 1, input 'image': sample 8 holds nan at \(1, 2, 0\) \(1 such"),
        (spoilt((0, 0, 0, 0), -np.inf), "batch 0, input 'image': sample 0 holds -inf"),
        (X.transpose(0, 3, 1, 2), "channels-first, the model is channels-last"),
        (iter(X), "single samples: put them into batches"),
        (X[:, :3], r"shape \(32, 3, 5, 3\) for input 'image', the model takes \(any, 4, 5, 3\)"),
        (iter([[X, LABELS]]), r"2 arrays, the model takes 1 \(image\); if the second is the target, yield a tuple"),
        (iter([X, X[0]]), "batch 1: inputs and ranks"),
        (iter([{"other": X}]), r"has the inputs other; the model takes image"),
        (iter(["text"]), "expected numbers, got dtype <U4"),
        (iter([np.float32(3)]), "a single number"),
        (np.float32(3), "a single number"),
        (iter([X.astype(complex)]), "dtype complex64|dtype complex128"),
        (np.array([None, None]), "expected numbers, got dtype object"),
        ({"image": X, "more": X[:5]}, "different lengths"),
        ({}, "a dict as data"),
        (["a", "b"], "a list as data"),
        (3, "not data"),
    ],
)  # fmt: skip
def test_data_that_cannot_be_used_are_refused_with_the_batch_and_the_reason(data, message):
    with pytest.raises(InvalidValue, match=message):
        list(read(data, inputs=INPUTS))


def test_inputs_of_different_lengths_within_a_batch_are_refused():
    with pytest.raises(InvalidValue, match="different lengths"):
        list(read(iter([{"left": np.ones((4, 3)), "right": np.ones((5, 2))}]), inputs=TWO))


def test_too_few_samples_are_refused_at_the_end():
    with pytest.raises(InvalidValue, match="70 samples, at least 100 needed"):
        list(read(X, minimum=100))
    assert len(together(read(X, minimum=70))) == 70


def test_large_finite_numbers_are_not_taken_for_infinity():
    big = np.full((4, 2), 3e38, np.float32)
    assert (together(read(big)) == big).all()


def test_what_can_mean_two_things_is_asked(tmp_path):
    np.savez(tmp_path / "two.npz", x_train=X, y_train=LABELS)
    with pytest.raises(Question, match=r"x_train, y_train.*--key"):
        read(tmp_path / "two.npz", inputs=INPUTS)
    assert (together(read(tmp_path / "two.npz", key="x_train", inputs=INPUTS)) == X).all()
    with pytest.raises(NotFound, match="no array 'z'"):
        read(tmp_path / "two.npz", key="z")
    with pytest.raises(Question, match="a list of 2 arrays"):
        read([X, X], inputs=INPUTS)
    with pytest.raises(Question, match=r"a list of 2 arrays: batches, or inputs.*a tuple \(list, None\)"):
        read([X, X])
    for first, second in read(([X, X + 1], None), batch_size=50):
        assert (second == first + 1).all()


def test_what_is_no_dense_array_is_named_with_what_to_do():
    import tensorflow as tf

    ragged, sparse = tf.ragged.constant([[1.0, 2.0], [3.0]]), tf.sparse.from_dense(np.eye(3, dtype="f4"))
    for item, kind in ((ragged, "RaggedTensor"), (sparse, "SparseTensor"), ({"a": {"b": X}}, "dict")):
        with pytest.raises(InvalidValue, match=f"a {kind} as data, where a dense array of numbers is expected"):
            together(read(iter([item])))
    with pytest.raises(InvalidValue, match="a list as data, where"):
        together(read(iter([{"a": [[1, 2], [3]]}])))


@pytest.mark.parametrize(
    "settings", [{"batch_size": 0}, {"limit": 0}, {"limit": "10"}, {"limit": 1.5}, {"limit": True}]
)
def test_settings_that_are_no_count_are_refused(settings):
    with pytest.raises(InvalidValue, match="a whole number, 1 or more, got"):
        read(X, **settings)


def test_a_batch_size_for_data_in_batches_is_refused():
    with pytest.raises(InvalidValue, match="in batches already"):
        read(iter([X]), batch_size=3)
    assert [len(b) for b in read(X, batch_size=50)] == [50, 20]


def test_a_generator_may_fill_one_buffer_again_and_again():
    def reusing():
        buffer = np.empty((10, 4, 5, 3), np.float32)
        for k in range(0, 70, 10):
            buffer[:] = X[k : k + 10]
            yield {"image": buffer}

    for data in (reusing(), reusing):
        assert (np.concatenate(list(read(data, inputs=INPUTS))) == X).all()
    assert np.shares_memory(next(iter(read(X))), X)  # an array is nobody else's to fill


@pytest.mark.parametrize("wrapped", [lambda x: x, lambda x: (x, LABELS), lambda x: {"image": x}, lambda x: iter([x])])
def test_masked_arrays_are_refused(wrapped):
    masked = np.ma.masked_greater(X, 2)
    with pytest.raises(InvalidValue, match="a masked array as data"):
        list(read(wrapped(masked), inputs=INPUTS))


def test_only_the_asked_member_of_an_npz_is_opened(tmp_path):
    path = str(tmp_path / "x.npz")
    names = np.array([{}] * 70, dtype=object)
    for save in (np.savez, np.savez_compressed):
        save(path, x=X, labels=np.array(["a"] * 70), n=70, names=names)
        assert (together(read(path, key="x")) == X).all()
        for bad, message in (("labels", "expected plain numbers"), ("n", "single number"), ("names", "never read")):
            with pytest.raises(FormatError, match=message):
                list(read(path, key=bad))
        with pytest.raises(Question, match="holds 4 arrays"):
            read(path)


def test_a_key_for_what_has_no_keys_is_refused(tmp_path):
    for data in (npy(tmp_path / "x.npy", X), X, tmp_path):
        with pytest.raises(InvalidValue, match=r"names an array of an \.npz file"):
            read(data, key="x")


def test_batches_are_handed_through():
    batches = read(X)
    assert read(batches) is batches
    assert isinstance(batches, Batches)
    assert "70 samples" in repr(batches)


def test_a_file_that_changes_has_another_fingerprint(tmp_path):
    path = npy(tmp_path / "x.npy", X)
    first = read(path).fingerprint
    assert first == read(path).fingerprint
    npy(tmp_path / "x.npy", X[:69])
    assert read(path).fingerprint != first


# Hostile array files.


def npy_bytes(array=None, header=None, version=1):
    if header is None:
        file = io.BytesIO()
        np.lib.format.write_array(file, X if array is None else array)
        return file.getvalue()
    text = header.encode() + b"\n"
    size = len(text).to_bytes(2 if version == 1 else 4, "little")
    return b"\x93NUMPY" + bytes([version, 0]) + size + text


def with_shape(shape, descr="'<f4'", order="False"):
    return npy_bytes(header=f"{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}, }}") + bytes(64)


HOSTILE = {
    "empty": b"",
    "text": b"hello, this is not an array",
    "magic only": b"\x93NUMPY",
    "version 9": b"\x93NUMPY\x09\x00" + bytes(100),
    "header past the end": b"\x93NUMPY\x01\x00\xff\xff{",
    "200 MB header": b"\x93NUMPY\x02\x00" + (200 << 20).to_bytes(4, "little") + bytes(100),
    "terabytes": with_shape("(1099511627776, 4)"),
    "overflow": with_shape("(9223372036854775807, 9223372036854775807)"),
    "negative": with_shape("(-1, 4)"),
    "too few rows": with_shape("(2, 4)"),
    "float shape": with_shape("(4.0, 4)"),
    "boolean shape": with_shape("(True, 16)"),
    "list shape": with_shape("[4, 4]"),
    "no shape": with_shape("()"),
    "object": with_shape("(8,)", "'|O'"),
    "text dtype": with_shape("(4,)", "'<U4'"),
    "record dtype": with_shape("(4,)", "[('a', '<f4')]"),
    "complex": with_shape("(8,)", "'<c8'"),
    "void": with_shape("(32,)", "'|V2'"),
    "nonsense dtype": with_shape("(32,)", "'zz'"),
    "order is text": with_shape("(4, 4)", order="'yes'"),
    "a call": npy_bytes(header="__import__('os').system('true')"),
    "deep nesting": npy_bytes(header="(" * 9000),
    "not a dict": npy_bytes(header="[1, 2, 3]"),
    "truncated": npy_bytes()[:-5],
    "trailing bytes": npy_bytes() + b"more",
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_npy_is_refused_in_one_line_that_names_it(kind, tmp_path):
    path = tmp_path / "x.npy"
    path.write_bytes(HOSTILE[kind])
    tracemalloc.start()
    with pytest.raises(FormatError, match=r"x\.npy") as error:
        list(read(path))
    assert tracemalloc.get_traced_memory()[1] < 5e6
    tracemalloc.stop()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", HOSTILE)
@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_hostile_npz_is_refused_in_one_line_that_names_it(kind, method, tmp_path):
    path = tmp_path / "x.npz"
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr("x.npy", HOSTILE[kind])
    with pytest.raises(FormatError, match=r"x\.npz"):
        list(read(path))


def test_a_bomb_is_read_with_the_memory_of_one_batch(tmp_path):
    path = tmp_path / "bomb.npz"
    head = npy_bytes(header=f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({100 << 10}, 256), }}")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("x.npy", "w") as file:
        file.write(head)
        for _ in range(100):
            file.write(bytes(1 << 20))
    assert path.stat().st_size < 200_000
    batches = read(path)
    tracemalloc.start()
    assert sum(len(batch) for batch in batches) == 100 << 10
    assert tracemalloc.get_traced_memory()[1] < 8e6
    tracemalloc.stop()


@pytest.mark.parametrize("spoil", [40, 300, 3000, -200])
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_an_npz_with_a_flipped_bit_is_refused(spoil, save, tmp_path):
    path = tmp_path / "x.npz"
    save(path, x=np.round(X, 1))
    data = bytearray(path.read_bytes())
    data[spoil] ^= 4
    path.write_bytes(data)
    with pytest.raises(BnportError):
        list(read(path))


def test_an_npz_with_other_members_or_none_is_refused(tmp_path):
    path = tmp_path / "x.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("evil.pkl", b"cos\nsystem\n")
    with pytest.raises(FormatError, match="is not an"):
        arrays.npz(str(path))
    with zipfile.ZipFile(path, "w"):
        pass
    with pytest.raises(FormatError, match="without arrays"):
        arrays.npz(str(path))


def test_paths_that_are_no_data_are_refused(tmp_path):
    with pytest.raises(NotFound, match="no such file"):
        read(tmp_path / "missing.npy")
    with pytest.raises(NotFound, match="no such file or folder"):
        read(tmp_path / "missing")
    (tmp_path / "x.csv").write_text("1,2")
    with pytest.raises(FormatError, match=r"reads \.npy"):
        read(tmp_path / "x.csv")
    with pytest.raises(NotFound, match="nothing here opens images"):
        read(tmp_path)
    npy(tmp_path / "a.npy", X)
    npy(tmp_path / "b.npy", X[:, :2])
    with pytest.raises(InvalidValue, match="in one file"):
        read(tmp_path)


def test_an_array_that_is_cut_off_in_its_first_bytes_is_not_called_something_else(tmp_path):
    path = npy(tmp_path / "x.npy", X)
    with open(path, "r+b") as file:
        file.truncate(8)
    with pytest.raises(FormatError, match=r"x\.npy: an \.npy array that is cut off: it has 8 bytes"):
        arrays.npy(path)


@pytest.mark.parametrize(("version", "package"), [("3.8.0", "'bnport.tensorflow.'"), ("2.4.0", "tf_keras")])
def test_a_missing_keras_is_named_with_what_installs_it(version, package, monkeypatch):
    from bnport.calibrate.loading import load

    monkeypatch.setitem(sys.modules, "keras", None)
    monkeypatch.setitem(sys.modules, "tf_keras", None)
    with pytest.raises(MissingDependency, match=f"pip install {package}"):
        load("model.keras", version)
