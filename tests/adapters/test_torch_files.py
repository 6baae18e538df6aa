"""What torch users keep in files: nested checkpoints, prefixes, views, old formats; and how little of them is read."""

from __future__ import annotations

import collections
import io
import pickle
import struct
import subprocess
import sys
import tarfile
import zipfile

import numpy as np
import pytest
import safetensors.torch
import torch

from bnport import adapters
from bnport.containers import files
from bnport.errors import FormatError, NotFound, Question
from bnport.match import match
from tests.adapters.contract import assert_same_bits, telling_record
from tests.adapters.torch_models import chain, norm_of
from tests.zoo import timm, torchvision

RECORDS = [telling_record(c, seed=c, epsilon=1e-5) for c in (5, 8)]


def saved(value, tmp_path, name="model.pth", **more):
    path = str(tmp_path / name)
    torch.save(value, path, **more)
    return path


def check(layers, names=("0", "2"), records=RECORDS):
    assert list(layers) == list(names)
    for layer, record in zip(layers.values(), records, strict=True):
        assert_same_bits(layer.record, record)


@pytest.fixture
def state():
    return chain(RECORDS).state_dict()


# ---- nested checkpoints


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("key", ["state_dict", "model", "net", "model_state_dict", "teacher"])
def test_the_only_model_of_a_checkpoint_is_taken_and_said(tmp_path, state, key, legacy):
    optimizer = torch.optim.Adam(chain(RECORDS).parameters())
    checkpoint = {"epoch": 3, key: state, "optimizer": optimizer.state_dict(), "args": {"lr": 0.1, "names": ["a", "b"]}}
    layers = adapters.read(saved(checkpoint, tmp_path, _use_new_zipfile_serialization=not legacy))
    check(layers)
    assert f"taken from key '{key}'" in layers.notes


def test_several_models_are_asked_about_and_the_key_decides(tmp_path, state):
    other = chain(list(reversed(RECORDS))).state_dict()
    path = saved({"model": state, "model_ema": {"module": other}}, tmp_path)
    for source in (path, {"model": state, "model_ema": {"module": other}}):
        with pytest.raises(
            Question, match=r"holds 2 models with BatchNorm: model, model_ema\.module; choose one with --key"
        ):
            adapters.read(source)
        check(adapters.read(source, key="model"))
        check(adapters.read(source, key="model_ema.module"), records=RECORDS[::-1])
        with pytest.raises(
            NotFound, match=r"no BatchNorm under key 'ema'; BatchNorm is under model, model_ema\.module"
        ):
            adapters.read(source, key="ema")


def test_one_state_dict_under_two_keys_is_one_model(tmp_path, state):
    check(adapters.read(saved({"model": state, "state_dict": state}, tmp_path)))


def test_whole_modules_in_a_checkpoint_are_found_as_yolov5_keeps_them(tmp_path):
    path = saved(
        {"epoch": 1, "model": chain(RECORDS).half().float(), "ema": None, "optimizer": None}, tmp_path, "best.pt"
    )
    layers = adapters.read(path)
    assert list(layers) == ["0", "2"]
    both = saved({"model": chain(RECORDS), "ema": chain(RECORDS), "criterion": torch.nn.MSELoss()}, tmp_path)
    with pytest.raises(Question, match=": model, ema; choose"):
        adapters.read(both)


def test_a_checkpoint_without_batchnorm_is_empty_and_says_so(tmp_path):
    for value in (
        {"model": torch.nn.Linear(2, 2).state_dict()},
        {"epoch": 1},
        [1, 2],
        torch.nn.Linear(2, 2),
        torch.zeros(3),
    ):
        layers = adapters.read(saved(value, tmp_path))
        assert not layers
        (said,) = layers.notes
        assert said.startswith("No running statistics (running_mean and running_var) anywhere in it. If its BatchNorm")
        assert "--calibrate DATA" in said


# ---- prefixes


def test_wrappers_are_left_out_of_the_names(tmp_path):
    model = chain(RECORDS)
    wrapped = torch.nn.DataParallel(model)
    averaged = torch.optim.swa_utils.AveragedModel(model)
    compiled = torch.compile(model)
    for source in (wrapped, averaged, compiled):
        for form in (source, source.state_dict(), saved(source.state_dict(), tmp_path)):
            check(adapters.read(form))
    notes = adapters.read(saved(wrapped.state_dict(), tmp_path)).notes
    assert "names are given without the prefix 'module.'" in notes
    notes = adapters.read(saved(averaged.state_dict(), tmp_path)).notes
    assert any("running statistics are not averaged" in note for note in notes)
    check(adapters.read(saved(torch.nn.DataParallel(compiled).state_dict(), tmp_path)))


@pytest.mark.parametrize(("use_buffers", "module_says", "state_says"), [(False, 1, 1), (True, 0, 1)])
def test_statistics_that_were_not_averaged_are_said_in_every_form(tmp_path, use_buffers, module_says, state_says):
    averaged = torch.optim.swa_utils.AveragedModel(chain(RECORDS), use_buffers=use_buffers)
    whole = str(tmp_path / "whole.pth")
    torch.save(averaged, whole)
    forms = {averaged: module_says, whole: module_says, saved(averaged.state_dict(), tmp_path): state_says}
    for form, says in forms.items():
        notes = [note for note in adapters.read(form).notes if "running statistics are not averaged" in note]
        assert len(notes) == says, form
    notes = adapters.read(torch.nn.Sequential(averaged, chain(RECORDS))).notes  # also where it is inside another
    assert any("running statistics are not averaged" in note for note in notes) == module_says


def test_a_prefix_that_not_all_names_carry_stays(tmp_path, state):
    mixed = collections.OrderedDict((f"module.{name}", value) for name, value in state.items())
    mixed["head.weight"] = torch.zeros(2, 2)
    assert list(adapters.read(saved(mixed, tmp_path))) == ["module.0", "module.2"]


def test_a_compiled_submodule_leaves_no_trace_in_the_names(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.compile(chain(RECORDS)))
    assert "1._orig_mod.0.weight" in model.state_dict()
    check(adapters.read(saved(model.state_dict(), tmp_path)), ["1.0", "1.2"])


# ---- tensors


def test_views_strides_and_shared_storages_are_read_as_torch_reads_them(tmp_path):
    record = RECORDS[0]
    flat = torch.arange(100, dtype=torch.float32)
    flat[10:15] = torch.from_numpy(np.array(record.mean))
    flat[20:30:2] = torch.from_numpy(np.array(record.variance))
    grid = torch.zeros(5, 7)
    grid[:, 3] = torch.from_numpy(np.array(record.gamma))
    state = {
        "bn.weight": grid[:, 3],
        "bn.bias": torch.full((1,), 0.25).expand(5),
        "bn.running_mean": flat[10:15],
        "bn.running_var": flat[20:30:2],
    }
    for legacy in (False, True):
        path = saved(state, tmp_path, _use_new_zipfile_serialization=not legacy)
        theirs = torch.load(path, weights_only=True)
        got = adapters.read(path)["bn"].record
        for field, name in (
            ("gamma", "weight"),
            ("beta", "bias"),
            ("mean", "running_mean"),
            ("variance", "running_var"),
        ):
            assert getattr(got, field).tobytes() == theirs[f"bn.{name}"].contiguous().numpy().tobytes()


def test_a_kernels_contents_are_those_of_torch(tmp_path):
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 6, 3), torch.nn.BatchNorm2d(6), torch.nn.ConvTranspose2d(6, 4, 2), torch.nn.BatchNorm2d(4),
        torch.nn.Conv2d(4, 4, 3, groups=4), torch.nn.BatchNorm2d(4), torch.nn.Conv2d(4, 8, 3, groups=2),
        torch.nn.BatchNorm2d(8), torch.nn.Flatten(), torch.nn.LazyLinear(7), torch.nn.BatchNorm1d(7),
    )  # fmt: skip
    model(torch.randn(2, 3, 12, 12))
    model = model.to(memory_format=torch.channels_last)
    weights = [model[i].weight.detach() for i in (0, 2, 4, 6, 9)]
    weights[1] = weights[1].transpose(0, 1)
    kinds = ["conv", "transposed", "depthwise", "grouped", "dense"]
    for source in (model, saved(model, tmp_path)):
        kernels = [layer.kernel for layer in adapters.read(source).values()]
        assert [k.kind for k in kernels] == kinds
        assert [k.name for k in kernels] == ["0", "2", "4", "6", "9"]
        for kernel, weight in zip(kernels, weights, strict=True):
            assert kernel.shape == tuple(weight.shape)
            assert (kernel.values() == weight.numpy()).all()
    kernels = [layer.kernel for layer in adapters.read(saved(model.state_dict(), tmp_path)).values()]
    # a state dict tells neither groups nor whether a kernel is transposed; (6, 4, 2, 2) does not fit 4 channels
    assert [k and (k.kind, k.shape) for k in kernels] == [
        ("conv", (6, 3, 3, 3)), None, ("depthwise", (4, 1, 3, 3)), ("conv", (8, 2, 3, 3)), ("dense", tuple(weights[4].shape)),
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["resnet50", "densenet121", "mobilenet_v2", "shufflenet_v2_x1_0"])
def test_kernels_by_order_of_definition_never_contradict_the_traced_graph(tmp_path, name):
    model = getattr(torchvision.models, name)(weights=None)
    traced = adapters.read(model)
    assert all(layer.inputs is not None for layer in traced.values())
    for path in (saved(model.state_dict(), tmp_path), saved(model, tmp_path)):
        found = adapters.read(path)
        assert list(found) == list(traced)
        for layer in found.values():
            assert layer.kernel is None or layer.kernel.name == traced[layer.name].kernel.name
    assert sum(layer.kernel is not None for layer in found.values()) * 3 > len(found)


def test_the_graph_of_a_live_model_and_of_its_export_agree(tmp_path):
    model = timm.create_model("resnetv2_50", pretrained=False).eval()  # pre-activation: BatchNorm before convolution
    path = str(tmp_path / "model.pt2")
    torch.export.save(torch.export.export(model, (torch.zeros(1, 3, 64, 64),)), path)
    live, exported = adapters.read(model), adapters.read(path)
    assert set(live) == set(exported)
    for name, layer in exported.items():
        assert set(layer.inputs) == set(live[name].inputs)
        assert (layer.kernel and layer.kernel.name) == (live[name].kernel and live[name].kernel.name)
        assert layer.record == live[name].record
        assert layer.epsilon == model.get_submodule(name).eps
    assert live["stages.0.blocks.0.norm1"].inputs == ()
    before = {"stages.0.blocks.0.norm3", "stages.0.blocks.0.norm1"}  # through the branch and through the shortcut
    assert set(live["stages.0.blocks.1.norm1"].inputs) == before


# ---- how little is read


@pytest.mark.parametrize("legacy", [False, True])
def test_only_the_bytes_of_batchnorm_and_the_index_are_read(tmp_path, monkeypatch, legacy):
    parts = []
    for _ in range(4):
        parts += [torch.nn.Conv2d(64, 64, 5), torch.nn.BatchNorm2d(64)]
    path = saved(torch.nn.Sequential(*parts).state_dict(), tmp_path, _use_new_zipfile_serialization=not legacy)
    read = []
    original = files.ReadFile.pread

    def counting(self, offset, length, what="data"):
        read.append(length)
        return original(self, offset, length, what)

    monkeypatch.setattr(files.ReadFile, "pread", counting)
    layers = adapters.load("torch").read(path)
    assert len(layers) == 4
    [layer.record for layer in layers.values()]
    batchnorm = 4 * 4 * 64 * 4
    assert sum(read) < batchnorm + 150_000 < (tmp_path / "model.pth").stat().st_size / 8


def test_a_small_view_of_a_large_storage_is_read_alone_but_its_checksum_is_checked(tmp_path):
    flat = torch.zeros(1_000_000)
    flat[500:510] = 3.0
    state = {"running_mean": flat[500:505], "running_var": flat[505:510]}
    path = saved(state, tmp_path)
    assert (adapters.read(path)["root"].record.mean == 3).all()
    data = bytearray((tmp_path / "model.pth").read_bytes())
    with zipfile.ZipFile(path) as archive:
        info = archive.getinfo("model/data/0")
    data[info.header_offset + 200_000] ^= 1
    (tmp_path / "model.pth").write_bytes(data)
    with pytest.raises(FormatError, match="CRC-32"):
        _ = adapters.read(path)["root"].record


# ---- other ways in which files were written


def test_a_big_endian_file_reads_as_torch_reads_it(tmp_path, state):
    path = saved(state, tmp_path)
    swapped = str(tmp_path / "big.pth")
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(swapped, "w") as new:
        for info in old.infolist():
            data = old.read(info)
            if info.filename.endswith("/byteorder"):
                data = b"big"
            elif "/data/" in info.filename:
                item = 8 if len(data) == 8 else 4  # num_batches_tracked is one int64
                data = b"".join(data[i : i + item][::-1] for i in range(0, len(data), item))
            new.writestr(info.filename.replace("model/", "big/"), data)
    assert torch.load(swapped, weights_only=True)["0.weight"].equal(state["0.weight"])
    check(adapters.read(swapped))


def test_an_archive_compressed_by_somebody_else_is_read(tmp_path, state):
    path = saved(state, tmp_path)
    again = str(tmp_path / "again.pth")
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(again, "w", zipfile.ZIP_DEFLATED) as new:
        for info in old.infolist():
            new.writestr(info.filename, old.read(info))
    check(adapters.read(again))


def test_a_file_written_without_checksums_says_so(tmp_path, state):
    torch.serialization.set_crc32_options(False)
    try:
        path = saved(state, tmp_path)
    finally:
        torch.serialization.set_crc32_options(True)
    layers = adapters.read(path)
    check(layers)
    assert any("without checksums" in note for note in layers.notes)


def test_every_pickle_protocol_and_non_ascii_file_names(tmp_path, state):
    for protocol in (2, 3, 4, 5):
        check(adapters.read(saved(state, tmp_path, f"modèle{protocol}.pth", pickle_protocol=protocol)))
        legacy = {"pickle_protocol": protocol, "_use_new_zipfile_serialization": False}
        check(adapters.read(saved(state, tmp_path, f"ancien{protocol}.pth", **legacy)))


def tar_of(state, path):
    """The tar that torch wrote before 0.1.10, from its documented parts; torch.load is the judge of it."""
    storages, tensors = io.BytesIO(), io.BytesIO()
    pickle.dump(len(state), storages, 2)
    pickle.dump(len(state), tensors, 2)

    class Reference:
        def __init__(self, key):
            self.key = key

    for key, tensor in enumerate(state.values()):
        kind = torch.LongStorage if tensor.dtype == torch.int64 else torch.FloatStorage
        pickle.dump((1000 + key, "cpu", kind), storages, 2)
        storages.write(struct.pack("<q", tensor.numel()) + tensor.numpy().tobytes())
        pickle.dump((key, 1000 + key, torch.FloatTensor), tensors, 2)
        tensors.write(struct.pack("<ii", tensor.dim(), 0))
        tensors.write(struct.pack(f"<{2 * tensor.dim()}q", *tensor.shape, *tensor.stride()) + struct.pack("<q", 0))
    pickle.dump([], storages, 2)

    class Pickler(pickle.Pickler):
        def persistent_id(self, value):
            return value.key if isinstance(value, Reference) else None

    body = io.BytesIO()
    Pickler(body, 2).dump(collections.OrderedDict((name, Reference(i)) for i, name in enumerate(state)))
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for name, content in (("sys_info", pickle.dumps({}, 2)), ("pickle", body.getvalue()),
                              ("tensors", tensors.getvalue()), ("storages", storages.getvalue())):  # fmt: skip
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def test_the_old_tar_reads_as_torch_reads_it(tmp_path, state):
    path = tar_of(state, str(tmp_path / "old.pth.tar"))
    theirs = torch.load(path, weights_only=False)
    assert theirs["2.running_var"].equal(state["2.running_var"])
    check(adapters.read(path))


def test_a_record_file_of_bnport_is_not_taken_for_a_pytorch_model(tmp_path, state):
    path = str(tmp_path / "x.safetensors")
    safetensors.torch.save_file(state, path, {"format": "pt"})
    assert adapters.find(path).__name__ == "bnport.adapters.torch"
    safetensors.torch.save_file(state, path, {"format": "bnport"})
    module = adapters.load("torch")
    with open(path, "rb") as file:
        assert not module.recognise(file.read(4096), path)
    with pytest.raises(FormatError, match="bnport's own record file"):
        module.read(path)


def test_a_file_is_recognised_whatever_it_is_called(tmp_path, state):
    for legacy in (False, True):
        path = saved(state, tmp_path, "weights.unknown", _use_new_zipfile_serialization=not legacy)
        assert adapters.find(path).__name__ == "bnport.adapters.torch"
        check(adapters.read(path))


def test_a_zip_of_something_else_is_not_recognised(tmp_path):
    path = tmp_path / "x.keras"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("config.json", "{}")
    assert not adapters.load("torch").recognise(path.read_bytes(), str(path))


def test_bytes_after_the_last_legacy_storage_are_noted(tmp_path, state):
    path = saved(state, tmp_path, _use_new_zipfile_serialization=False)
    with open(path, "ab") as file:
        file.write(b"more")
    layers = adapters.read(path)
    check(layers)
    assert "4 bytes after the last storage were not read" in layers.notes


def test_a_whole_module_is_read_where_its_class_does_not_exist(tmp_path):
    """The class lives in a module that only the child process which saves it has."""
    (tmp_path / "nets_of_somebody.py").write_text(
        "import torch\n"
        "class OddNorm(torch.nn.BatchNorm2d):\n    pass\n"
        "class Net(torch.nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.conv = torch.nn.Conv2d(3, 4, 3)\n"
        "        self.norm = OddNorm(4, eps=0.0625)\n"
        "        self.hook = self.conv.forward\n"
    )
    code = (
        "import torch, nets_of_somebody\n"
        "for zipped in (True, False):\n"
        "    torch.save(nets_of_somebody.Net(), f'net{zipped}.pt', _use_new_zipfile_serialization=zipped)"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=tmp_path, check=True)
    for zipped in (True, False):
        layers = adapters.read(str(tmp_path / f"net{zipped}.pt"))
        assert list(layers) == ["norm"]
        assert layers["norm"].epsilon == 0.0625
        assert layers["norm"].kernel.name == "conv"
    assert "nets_of_somebody" not in sys.modules


def test_a_pickled_graph_module_is_read(tmp_path):
    model = torch.fx.symbolic_trace(torch.nn.Sequential(torch.nn.Linear(3, 5), norm_of(RECORDS[0])))
    check(adapters.read(saved(model, tmp_path)), ["1"], RECORDS[:1])


def test_a_kernel_of_a_dtype_that_is_not_read_is_no_evidence_and_no_crash(tmp_path):
    net = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 1), torch.nn.BatchNorm2d(4), torch.nn.Conv2d(4, 4, 1), torch.nn.BatchNorm2d(4)
    )
    state = net.state_dict()
    state["2.weight"] = state["2.weight"].to(torch.float8_e4m3fn)
    torch.save(state, tmp_path / "net.pth")
    found = match(adapters.read(str(tmp_path / "net.pth")), adapters.read(net))
    assert found.pairs == {"1": "1", "3": "3"}
    with pytest.raises(FormatError, match="float8_e4m3fn, which is not read as numbers"):
        adapters.read(str(tmp_path / "net.pth"))["3"].kernel.values()
