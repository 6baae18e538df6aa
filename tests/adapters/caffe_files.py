"""Makes Caffe files without bnport: google.protobuf with Caffe's message types declared here, and h5py.

Field numbers and types: BVLC/caffe src/caffe/proto/caffe.proto; raw_* NVIDIA/caffe; bn_param 137 yjxiong/caffe, 152
hszhao/PSPNet, 45 alexgkendall/caffe-segnet. cv2.dnn, which has caffe.proto built in, reads what this writes.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile

import numpy as np
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

_TYPES = {"double": 1, "float": 2, "int64": 3, "int32": 5, "bool": 8, "string": 9, "bytes": 12, "enum": 5}

_MESSAGES = {
    "BlobShape": "1 *int64 dim packed",
    "BlobProto": """1 int32 num, 2 int32 channels, 3 int32 height, 4 int32 width, 5 *float data packed,
        7 BlobShape shape, 8 *double double_data packed, 10 int32 raw_data_type, 12 bytes raw_data""",
    "UnpackedBlobProto": """1 int32 num, 2 int32 channels, 3 int32 height, 4 int32 width, 5 *float data,
        7 BlobShape shape, 8 *double double_data""",
    "BatchNormParameter": "1 bool use_global_stats, 2 float moving_average_fraction, 3 float eps, 7 bool scale_bias",
    "ScaleParameter": "1 int32 axis, 2 int32 num_axes, 4 bool bias_term",
    "BiasParameter": "1 int32 axis, 2 int32 num_axes",
    "ConvolutionParameter": """1 int32 num_output, 2 bool bias_term, 4 *int32 kernel_size, 5 int32 group,
        3 *int32 pad""",
    "InnerProductParameter": "1 int32 num_output, 2 bool bias_term, 6 bool transpose",
    "BNParameter": "3 float momentum, 4 float eps",
    "SegNetBNParameter": "3 int32 bn_mode",
    "LayerParameter": """1 string name, 2 string type, 3 *string bottom, 4 *string top, 7 *BlobProto blobs, 10 int32 phase,
        106 ConvolutionParameter convolution_param, 117 InnerProductParameter inner_product_param,
        139 BatchNormParameter batch_norm_param, 141 BiasParameter bias_param, 142 ScaleParameter scale_param,
        137 BNParameter bn_param, 152 BNParameter bn_param_pspnet, 41 BNParameter bn_param_chen,
        45 SegNetBNParameter bn_param_segnet""",
    "V1LayerParameter": """2 *string bottom, 3 *string top, 4 string name, 5 int32 type, 6 *BlobProto blobs""",
    "NetParameter": """1 string name, 2 *V1LayerParameter layers, 3 *string input, 8 *BlobShape input_shape,
        100 *LayerParameter layer""",
}


def _declared():
    file = descriptor_pb2.FileDescriptorProto(name="bnport_test_caffe.proto", package="bnport_test", syntax="proto2")
    for name, text in _MESSAGES.items():
        message = file.message_type.add(name=name)
        for line in text.split(","):
            number, kind, field, *packed = line.split()
            entry = message.field.add(name=field, number=int(number), label=3 if kind.startswith("*") else 1)
            kind = kind.lstrip("*")
            if kind in _TYPES:
                entry.type = _TYPES[kind]
            else:
                entry.type, entry.type_name = 11, f".bnport_test.{kind}"
            if packed:
                entry.options.packed = True
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return {
        name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"bnport_test.{name}")) for name in _MESSAGES
    }


T = _declared()


def net(*layers):
    """A NetParameter of `layer(...)` results."""
    message = T["NetParameter"](name="net")
    message.layer.extend(layers)
    return message


def layer(name, kind, bottom="", top="", blobs=(), **parameters):
    """A LayerParameter; `blobs` are arrays or BlobProto, parameters are dicts: batch_norm_param={"eps": 1e-4}."""
    message = T["LayerParameter"](name=name, type=kind)
    message.bottom.extend(bottom.split())
    message.top.extend((top or bottom).split())
    for array in blobs:
        message.blobs.append(array if isinstance(array, T["BlobProto"]) else blob(array))
    for field, value in parameters.items():
        if isinstance(value, dict):
            getattr(message, field).SetInParent()
            for key, item in value.items():
                if isinstance(item, list):
                    getattr(getattr(message, field), key).extend(item)
                else:
                    setattr(getattr(message, field), key, item)
        else:
            setattr(message, field, value)
    return message


def blob(array, shape=None, form="packed"):
    """A BlobProto in one of the forms files have: packed, double, half, raw float, legacy (4-D)."""
    array = np.asarray(array)
    message = T["BlobProto"]()
    shape = array.shape if shape is None else shape
    if form == "legacy":
        four = (1,) * (4 - len(shape)) + tuple(shape)
        message.num, message.channels, message.height, message.width = four
    else:
        message.shape.dim.extend(shape)
    flat = array.reshape(-1)
    if form == "double":
        message.double_data.extend(flat.astype(np.float64))
    elif form == "half":
        message.raw_data_type, message.raw_data = 2, flat.astype("<f2").tobytes()
    elif form == "raw float":
        message.raw_data_type, message.raw_data = 1, flat.astype("<f4").tobytes()
    else:
        message.data.extend(flat.astype(np.float32))
    return message


def tag(number, wire):
    return varint(number << 3 | wire)


def varint(value):
    value &= (1 << 64) - 1
    out = b""
    while value > 127:
        out += bytes((value & 127 | 128,))
        value >>= 7
    return out + bytes((value,))


def field(number, data):
    """One length-delimited field."""
    return tag(number, 2) + varint(len(data)) + data


def unpacked(message, legacy=False):
    """The bytes of a net whose blob floats are each a field of their own, as protobuf wrote them before [packed].

    legacy: with four-axis shapes (num, channels, height, width) too.
    """
    out = b"" if not message.name else field(1, message.name.encode())
    for one in message.layer:
        bare = T["LayerParameter"].FromString(one.SerializeToString())
        bare.ClearField("blobs")
        data = bare.SerializeToString()
        for stored in one.blobs:
            loose = T["UnpackedBlobProto"](data=list(stored.data))
            if legacy:
                four = [1] * (4 - len(stored.shape.dim)) + list(stored.shape.dim)
                loose.num, loose.channels, loose.height, loose.width = four
            else:
                loose.shape.CopyFrom(stored.shape)
            data += field(7, loose.SerializeToString())
        out += field(100, data)
    return out


def save(path, message):
    with open(path, "wb") as file:
        file.write(message if isinstance(message, bytes) else message.SerializeToString())


def save_hdf5(path, message):
    """As Net::ToHDF5 does: /data/<layer>/<index>."""
    import h5py

    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        for one in message.layer:
            group = data.create_group(one.name)
            for index, stored in enumerate(one.blobs):
                group.create_dataset(
                    str(index), data=np.array(stored.data, np.float32).reshape(tuple(stored.shape.dim))
                )


def batch_norm(name, record, bottom, top="", factor=1.0, **parameters):
    """BVLC's BatchNorm with a record's statistics times `factor` (float32), and its epsilon."""
    sums = [np.float32(np.float32(factor) * v.astype(np.float64)) for v in (record.mean, record.variance)]
    return layer(
        name,
        "BatchNorm",
        bottom,
        top,
        [*sums, np.float32([factor])],
        batch_norm_param={"eps": record.epsilon, **parameters},
    )


def scale(name, record, bottom, top="", bias=True, **parameters):
    """A Scale with a record's gamma, and beta if `bias`."""
    blobs = [record.gamma, record.beta] if bias else [record.gamma]
    return layer(name, "Scale", bottom, top, blobs, scale_param={"bias_term": bias, **parameters})


def prototxt(message, input_name="data", input_shape=(1, 3, 4, 4)):
    """The net as text, without blobs, by google.protobuf's own printer."""
    from google.protobuf import text_format

    lines = [f'input: "{input_name}" input_shape {{ {" ".join(f"dim: {n}" for n in input_shape)} }}']
    for one in message.layer:
        bare = T["LayerParameter"].FromString(one.SerializeToString())
        bare.ClearField("blobs")
        text = text_format.MessageToString(bare).replace("bn_param_pspnet", "bn_param")
        lines.append(f"layer {{\n{text}}}")
    return "\n".join(lines) + "\n"


_RUN = """
import sys, numpy, cv2
net = cv2.dnn.readNetFromCaffe(sys.argv[1], sys.argv[2])
net.setPreferableBackend(cv2.dnn.DNN_BACKEND_OPENCV)
net.enableFusion(False)  # a fused layer's own output is not kept
net.setInput(numpy.load(sys.argv[3]))
outputs = sys.argv[5:]
numpy.savez(sys.argv[4], *[net.forward(name).copy() for name in outputs] if outputs else [net.forward()])
"""


def cv2_outputs(prototxt_path, caffemodel_path, x, layers=()):
    """What OpenCV's Caffe importer computes, in a child process: the arrays of `layers`, or the net's last output."""
    with tempfile.TemporaryDirectory() as folder:
        given, made = os.path.join(folder, "x.npy"), os.path.join(folder, "y.npz")
        np.save(given, np.ascontiguousarray(x, np.float32))
        command = [sys.executable, "-c", _RUN, prototxt_path, caffemodel_path, given, made, *layers]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
        assert done.returncode == 0, done.stderr[-800:]
        with np.load(made) as arrays:
            return [arrays[f"arr_{i}"] for i in range(len(arrays.files))]
