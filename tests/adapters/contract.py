"""What every adapter must do, as tests that an adapter's own test class inherits.

A file format fills in FileContract, a live object LiveContract; a format with several kinds of files has one class for
each kind. The hooks build a real model with the framework's own tools and run it with the framework's own engine: the
expected values never come from our reader.

    class TestStateDict(FileContract):
        adapter = "torch"
        suffix = ".pth"
        holds_epsilon = False
        optional = (("gamma", "beta"), ("beta",))

        def build(self, records, path, absent=()): ...
        def run(self, path, x): ...
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import pytest

from bnport import adapters
from bnport.containers.files import replace_file
from bnport.errors import BnportError, FormatError, InvalidValue, NotFound
from bnport.layer import Change
from bnport.record import FIELDS, BatchNorm

if TYPE_CHECKING:
    from collections.abc import Sequence

    from bnport.layer import Layer, Layers

FRAMEWORKS = (
    "torch", "torchvision", "timm", "tensorflow", "keras", "tf_keras", "jax", "flax", "onnx", "onnxruntime", "cv2", "caffe",
    "mxnet", "paddle", "safetensors", "google.protobuf", "scipy", "pandas",
)  # fmt: skip


def telling_record(channels: int = 7, *, seed: int = 0, epsilon: float = 2.5e-3, dtype: str = "float32") -> BatchNorm:
    """Numbers that tell mistakes apart.

    Variances from 1e-6 to 1e-2 among larger ones, gamma of both signs, mean != beta, C != 1, an epsilon that is
    nobody's default. `dtype` may be a 16-bit one: the numbers are then exactly representable there.
    """
    random_ = np.random.default_rng(1000 * seed + channels)
    small = 10 ** random_.uniform(-4 if dtype == "float16" else -6, -2, channels)  # float16's normals begin at 6e-5
    large = 10 ** random_.uniform(-1, 2, channels)
    record = BatchNorm(
        gamma=random_.uniform(0.3, 2.0, channels) * np.where(np.arange(channels) % 3 == 1, -1, 1),
        beta=random_.normal(0.5, 1.0, channels),
        mean=random_.normal(-1.0, 2.0, channels),
        variance=np.where(np.arange(channels) % 2 == 0, small, large),
        epsilon=epsilon,
    )
    return record.rounded(dtype)


def without(record: BatchNorm, absent: Sequence[str]) -> BatchNorm:
    """The record of a layer that lacks gamma (then ones) or beta (then zeros)."""
    neutral = {"gamma": np.ones_like(record.gamma), "beta": np.zeros_like(record.beta)}
    return record.replace(**{name: neutral[name] for name in absent})


def assert_same_bits(got: BatchNorm, expected: BatchNorm) -> None:
    """The four arrays equal bit for bit (widened to float64), and the epsilon equal."""
    for field in FIELDS:
        a, b = (np.asarray(getattr(r, field)).astype(np.float64) for r in (got, expected))
        assert a.shape == b.shape, field
        assert a.tobytes() == b.tobytes(), f"{field}: {a} is not {b}"
    assert got.epsilon == expected.epsilon


def assert_within_bound(y: np.ndarray, record: BatchNorm, x: np.ndarray, output_dtype: str = "float32") -> None:
    """|y - record(x)| is within the derived bound everywhere, and the bound is not vacuous."""
    bound = record.error_bound(x, output_dtype=output_dtype)
    error = np.abs(np.asarray(y, np.float64) - record(x))
    assert np.isfinite(bound).all()
    assert (error <= bound).all(), f"{(error / bound).max():.3g} times the bound"


class _Contract:
    adapter: ClassVar[str]
    holds_epsilon: ClassVar[bool] = True
    default_epsilon: ClassVar[float] = 1e-5  # read where the source holds none
    optional: ClassVar[tuple[tuple[str, ...], ...]] = ()  # sets of fields that a layer may lack: ("gamma",), ...
    options: ClassVar[dict[str, object]] = {}  # for read
    dtype: ClassVar[str] = "float32"  # of the stored arrays
    output_dtype: ClassVar[str] = "float32"  # of what `run` returns

    @property
    def epsilon(self) -> float:
        return 2.5e-3 if self.holds_epsilon else self.default_epsilon

    def records(self, seed: int = 0) -> list[BatchNorm]:
        """Three layers; two of them equally wide."""
        return [telling_record(c, seed=seed + c, epsilon=self.epsilon, dtype=self.dtype) for c in (5, 8, 5)]

    def one(self, seed: int = 0) -> BatchNorm:
        return telling_record(7, seed=seed, epsilon=self.epsilon, dtype=self.dtype)

    def probes(self, record: BatchNorm) -> np.ndarray:
        """Telling inputs, float32 values that the engine sees as they are: exact in a 16-bit output_dtype."""
        dtype = self.output_dtype if self.output_dtype in ("float16", "bfloat16") else "float32"
        return record.probes(dtype).astype(np.float32)

    def in_build_order(self, layers: Layers) -> list[Layer]:
        """The layers in the order of the records that `build` was given. Override where a file has another order."""
        return list(layers.values())

    def read(self, source: object) -> list[Layer]:
        return self.in_build_order(adapters.load(self.adapter).read(source, **self.options))

    @property
    def module(self) -> adapters.Adapter:
        return adapters.load(self.adapter)


class FileContract(_Contract):
    """For a kind of file. Hooks: build, run; perhaps others, in_build_order; `read_only` if it has no write."""

    suffix: ClassVar[str]
    mutants: ClassVar[int] = 60
    write_options: ClassVar[dict[str, object]] = {}
    read_only: ClassVar[bool] = False

    def build(self, records: Sequence[BatchNorm], path: str, absent: Sequence[str] = ()) -> None:
        """Make, with the framework's own tools, a model holding BN layers with these numbers in this order, and save it.

        With one record the model is that BN layer and nothing else. With several, other layers lie between. `absent`
        names what the layers lack.
        """
        raise NotImplementedError

    def run(self, path: str, x: np.ndarray) -> np.ndarray:
        """x (N, C) float32 through the framework's own inference of a file made by `build` with one record."""
        raise NotImplementedError

    def others(self, path: str) -> dict[str, bytes]:
        """Everything in the file that is no BN parameter, as the framework reads it; compared before and after."""
        return {}

    def path(self, folder: object, name: str = "model") -> str:
        return os.path.join(str(folder), name + self.suffix)

    # ---- reading

    def test_reading_gives_what_was_built_bit_for_bit(self, tmp_path):
        path = self.path(tmp_path)
        records = self.records()
        self.build(records, path)
        layers = self.read(path)
        assert len(layers) == len(records)
        for layer, record in zip(layers, records, strict=True):
            assert layer.channels == record.channels
            assert_same_bits(layer.record, record)

    def test_epsilon_is_assumed_exactly_where_the_file_does_not_hold_it(self, tmp_path):
        path = self.path(tmp_path)
        self.build(self.records(), path)
        for layer in self.read(path):
            assert ("epsilon" in layer.assumed) is not self.holds_epsilon
            assert layer.epsilon == self.epsilon

    def test_the_formula_is_within_its_bound_of_the_frameworks_own_output(self, tmp_path):
        path = self.path(tmp_path)
        self.build([self.one()], path)
        (layer,) = self.read(path)
        x = self.probes(layer.record)
        assert_within_bound(self.run(path, x), layer.record, x, self.output_dtype)

    def test_an_absent_gamma_is_ones_and_an_absent_beta_zeros(self, tmp_path):
        for number, absent in enumerate(self.optional):
            path = self.path(tmp_path, f"model{number}")
            record = without(self.one(), absent)
            self.build([record], path, absent)
            (layer,) = self.read(path)
            assert_same_bits(layer.record, record)
            assert {"gamma", "beta"} - layer.stores == set(absent)
            x = self.probes(record)
            assert_within_bound(self.run(path, x), layer.record, x, self.output_dtype)

    def test_the_file_is_found_by_its_content_and_reading_it_imports_no_framework(self, tmp_path):
        path = self.path(tmp_path)
        self.build(self.records(), path)
        script = (
            "import sys; from bnport import adapters\n"
            f"adapter = adapters.find({path!r})\n"
            f"layers = adapter.read({path!r}, **{self.options!r})\n"
            "[layer.record for layer in layers.values()]\n"
            f"bad = [m for m in {FRAMEWORKS!r} if m in sys.modules]\n"
            "print(adapter.__name__, bad, len(layers))"
        )
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
        assert done.stdout.split() == [f"bnport.adapters.{self.adapter}", "[]", str(len(self.records()))], done.stderr

    def test_reading_leaves_the_file_as_it_was(self, tmp_path):
        path = self.path(tmp_path)
        self.build(self.records(), path)
        before = _bytes_under(path)
        [layer.record for layer in self.read(path)]
        assert _bytes_under(path) == before

    # ---- hostile

    def read_all(self, path: str) -> list[BatchNorm]:
        return [layer.record for layer in self.read(path)]

    def test_a_truncated_file_is_refused_by_name_or_reads_the_same(self, tmp_path):
        path, cut = self.path(tmp_path), self.path(tmp_path, "cut-short")
        self.build(self.records(), path)
        if os.path.isdir(path):
            pytest.skip("a folder is truncated by its own tests")
        with open(path, "rb") as file:
            data = file.read()
        expected = self.read_all(path)
        for length in sorted({0, 1, 7, len(data) - 1, *(len(data) * k // 24 for k in range(24))}):
            with open(cut, "wb") as file:
                file.write(data[:length])
            try:
                records = self.read_all(cut)
            except BnportError as error:
                _assert_one_line_naming(error, cut)
            else:
                assert records == expected, f"cut to {length} of {len(data)} bytes, other numbers were read"

    def test_a_file_with_flipped_bits_is_read_or_refused_and_nothing_else(self, tmp_path):
        path, bad = self.path(tmp_path), self.path(tmp_path, "flipped")
        self.build(self.records(), path)
        if os.path.isdir(path):
            pytest.skip("a folder is mutated by its own tests")
        with open(path, "rb") as file:
            data = file.read()
        random_ = random.Random(20)
        for _ in range(self.mutants):
            mutant = bytearray(data)
            for _ in range(random_.choice((1, 1, 4))):
                mutant[random_.randrange(len(mutant))] ^= 1 << random_.randrange(8)
            with open(bad, "wb") as file:
                file.write(mutant)
            try:
                self.read_all(bad)
            except BnportError as error:
                _assert_one_line_naming(error, bad)

    # ---- writing

    def rewritten(self, path: str, out: str, changes: dict[str, Change]) -> None:
        write = self.module.write
        replace_file(out, lambda temporary: write(path, changes, temporary, **self.write_options), inputs=[path])

    @property
    def writes(self) -> bool:
        return not self.read_only and hasattr(self.module, "write")

    def test_writing_then_reading_is_the_identity_and_the_framework_agrees(self, tmp_path):
        if not self.writes:
            return
        path, out = self.path(tmp_path), self.path(tmp_path, "out")
        old, new = self.one(), self.one(seed=5)
        self.build([old], path)
        before = _bytes_under(path)
        (layer,) = self.read(path)
        if "epsilon" in layer.stores:
            new = new.replace(epsilon=7.5e-3)
        self.rewritten(path, out, {layer.name: Change(new, frozenset(layer.stores) & {*FIELDS, "epsilon"})})
        (again,) = self.read(out)
        assert_same_bits(again.record, new)
        assert _bytes_under(path) == before
        x = self.probes(new)
        assert_within_bound(self.run(out, x), new, x, self.output_dtype)

    def test_writing_one_layer_leaves_the_others_untouched(self, tmp_path):
        if not self.writes:
            return
        path, out = self.path(tmp_path), self.path(tmp_path, "out")
        records = self.records()
        self.build(records, path)
        middle = self.read(path)[1]
        new = telling_record(8, seed=6, epsilon=self.epsilon, dtype=self.dtype)
        self.rewritten(path, out, {middle.name: Change(new, frozenset(FIELDS))})
        for layer, expected in zip(self.read(out), (records[0], new, records[2]), strict=True):
            assert_same_bits(layer.record, expected)
        assert self.others(out) == self.others(path)

    def test_writing_some_fields_leaves_the_others_untouched(self, tmp_path):
        if not self.writes:
            return
        path, out = self.path(tmp_path), self.path(tmp_path, "out")
        old, new = self.one(), self.one(seed=5)
        self.build([old], path)
        (layer,) = self.read(path)
        self.rewritten(path, out, {layer.name: Change(new, frozenset({"gamma", "beta"}))})
        (again,) = self.read(out)
        assert_same_bits(again.record, old.replace(gamma=new.gamma, beta=new.beta))

    def test_writing_an_unknown_layer_or_a_wrong_width_is_refused_and_writes_nothing(self, tmp_path):
        if not self.writes:
            return
        path, out = self.path(tmp_path), self.path(tmp_path, "out")
        self.build([self.one()], path)
        (layer,) = self.read(path)
        wide = telling_record(9, epsilon=self.epsilon, dtype=self.dtype)
        for name, record in (("no such layer", self.one()), (layer.name, wide)):
            with pytest.raises(BnportError):
                self.rewritten(path, out, {name: Change(record, frozenset(FIELDS))})
        assert sorted(os.listdir(tmp_path)) == [os.path.basename(path)]


class LiveContract(_Contract):
    """For live objects. Hooks: build, run, weights; `read_only` if the adapter has no apply for them."""

    read_only: ClassVar[bool] = False

    def build(self, records: Sequence[BatchNorm], absent: Sequence[str] = ()) -> object:
        """A live model with BN layers holding these numbers, as in FileContract."""
        raise NotImplementedError

    def run(self, model: object, x: np.ndarray) -> np.ndarray:
        """x (N, C) float32 through the framework's own inference of a model made by `build` with one record."""
        raise NotImplementedError

    def weights(self, model: object) -> dict[str, bytes]:
        """Every array of the model, as the framework gives it."""
        raise NotImplementedError

    def test_reading_gives_what_was_built_bit_for_bit_and_leaves_the_model_as_it_was(self):
        records = self.records()
        model = self.build(records)
        before = self.weights(model)
        assert adapters.find(model).__name__ == f"bnport.adapters.{self.adapter}"
        layers = self.read(model)
        assert len(layers) == len(records)
        for layer, record in zip(layers, records, strict=True):
            assert layer.channels == record.channels
            assert_same_bits(layer.record, record)
            assert ("epsilon" in layer.assumed) is not self.holds_epsilon
        assert self.weights(model) == before

    def test_the_formula_is_within_its_bound_of_the_frameworks_own_output(self):
        model = self.build([self.one()])
        (layer,) = self.read(model)
        x = self.probes(layer.record)
        assert_within_bound(self.run(model, x), layer.record, x, self.output_dtype)

    def test_an_absent_gamma_is_ones_and_an_absent_beta_zeros(self):
        for absent in self.optional:
            record = without(self.one(), absent)
            model = self.build([record], absent)
            (layer,) = self.read(model)
            assert_same_bits(layer.record, record)
            assert {"gamma", "beta"} - layer.stores == set(absent)
            x = self.probes(record)
            assert_within_bound(self.run(model, x), layer.record, x, self.output_dtype)

    def test_the_adapter_runs_the_real_layer(self):
        if not hasattr(self.module, "run"):
            return
        model = self.build([self.one()])
        before = self.weights(model)
        (layer,) = self.read(model)
        x = self.probes(layer.record)
        outputs = self.module.run(model, layer.name, x)
        assert outputs
        for y in outputs.values():
            assert np.shape(y) == x.shape
            assert_within_bound(y, layer.record, x, self.output_dtype)
        assert self.weights(model) == before

    @property
    def applies(self) -> bool:
        return not self.read_only and hasattr(self.module, "apply")

    def test_applying_then_reading_is_the_identity_and_the_framework_agrees(self):
        if not self.applies:
            return
        model = self.build([self.one()])
        (layer,) = self.read(model)
        new = self.one(seed=5)
        if "epsilon" in layer.stores:
            new = new.replace(epsilon=7.5e-3)
        self.module.apply(model, {layer.name: Change(new, frozenset(layer.stores) & {*FIELDS, "epsilon"})})
        (again,) = self.read(model)
        assert_same_bits(again.record, new)
        x = self.probes(new)
        assert_within_bound(self.run(model, x), new, x, self.output_dtype)

    def test_applying_is_all_layers_or_none(self):
        if not self.applies:
            return
        model = self.build(self.records())
        before = self.weights(model)
        names = [layer.name for layer in self.read(model)]
        good = Change(telling_record(5, seed=9, epsilon=self.epsilon, dtype=self.dtype), frozenset(FIELDS))
        for name, change in (("no such layer", good), (names[1], good)):  # the second is 8 wide
            with pytest.raises((NotFound, InvalidValue, FormatError)):
                self.module.apply(model, {names[0]: good, name: change})
            assert self.weights(model) == before

    def test_applying_some_fields_leaves_the_others_untouched(self):
        if not self.applies:
            return
        records = self.records()
        model = self.build(records)
        layers = self.read(model)
        new = telling_record(8, seed=6, epsilon=self.epsilon, dtype=self.dtype)
        self.module.apply(model, {layers[1].name: Change(new, frozenset({"mean", "variance"}))})
        expected = [records[0], records[1].replace(mean=new.mean, variance=new.variance), records[2]]
        for layer, record in zip(self.read(model), expected, strict=True):
            assert_same_bits(layer.record, record)


def _bytes_under(path: str) -> dict[str, bytes]:
    """The content of a file, or of every file in a folder."""
    paths = [path]
    if os.path.isdir(path):
        paths = [os.path.join(folder, name) for folder, _, names in os.walk(path) for name in names]
    found = {}
    for each in sorted(paths):
        with open(each, "rb") as file:
            found[os.path.relpath(each, path)] = file.read()
    return found


def _assert_one_line_naming(error: BnportError, path: str) -> None:
    message = str(error)
    assert "\n" not in message
    assert message.isprintable()
    if isinstance(error, FormatError):
        assert os.path.basename(path) in message
