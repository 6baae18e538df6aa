"""Layers through a real engine: OpenCV 4's Caffe importer (cv2.dnn), in a process of its own.

No Caffe can be installed from a package index, and OpenCV 5 dropped the importer. The engine gets a net of each layer
and nothing else of the file, with the layer's own bytes where the file is binary; whatever those do to it, it does not
happen in this process.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from typing import TYPE_CHECKING

from bnport._lazy import np
from bnport.adapters.caffe.norm import held_layers
from bnport.containers.protobuf import encoded, encoded_varint
from bnport.errors import BnportError, InvalidValue, MissingDependency, NotFound, listed, printable

if TYPE_CHECKING:
    from collections.abc import Mapping

    from bnport.adapters.caffe.net import Net, Node
    from bnport.adapters.caffe.values import Choices, Held
    from bnport.record import Array

TIMEOUT = 120.0  # seconds; importing cv2 takes under one

_NO_ENGINE, _OLD_IMPORTER_GONE = 3, 4
_CHILD = f"""
import sys
try:
    import cv2, numpy
except ImportError as error:
    print(error, file=sys.stderr)
    sys.exit({_NO_ENGINE})
if not hasattr(cv2.dnn, "readNetFromCaffe"):
    print(cv2.__version__, file=sys.stderr)
    sys.exit({_OLD_IMPORTER_GONE})
for i in range(int(sys.argv[1])):
    net = cv2.dnn.readNetFromCaffe(f"{{i}}.prototxt", f"{{i}}.caffemodel")
    net.setPreferableBackend(cv2.dnn.DNN_BACKEND_OPENCV)
    net.enableFusion(False)
    net.setInput(numpy.load(f"x{{i}}.npy"))
    numpy.save(f"y{{i}}.npy", net.forward())
"""


def forward(
    net: Net, choices: Choices, inputs: Mapping[str, Array], epsilon: float | None = None
) -> dict[str, dict[str, Array]]:
    """x of shape (N, C), float32, through each layer named in `inputs`: name -> {"cv2.dnn": output of shape (N, C)}.

    epsilon: of the layers for which the net holds none. All layers share one process, each in a net of its own. Raises
    MissingDependency without OpenCV 4; NotFound for a layer that is not there or that OpenCV cannot run (BN, Bias, Intel's
    four blobs, legacy DIGITS, double blobs); BnportError if the engine fails, crashes or takes longer than TIMEOUT.
    """
    known = {layer.name: (held, layer) for held, layer in held_layers(net, choices)[0]}
    prepared = {}
    for name, x in inputs.items():
        if name not in known:
            raise NotFound(f"{printable(net.path)}: no BatchNorm layer {printable(name)!r}; it has {listed(known)}")
        held, layer = known[name]
        x = np.ascontiguousarray(x, np.float32)
        if x.ndim != 2 or x.shape[1] != held.channels or not x.shape[0]:
            raise InvalidValue(f"{printable(name)}: x of shape (N, {held.channels}) expected, got {x.shape}")
        _refuse_what_cannot_run(net, held)
        chosen = epsilon if epsilon is not None and "epsilon" in layer.assumed else held.node.settings.get("eps")
        prepared[name] = held, x, chosen
    with tempfile.TemporaryDirectory(prefix="bnport-") as folder:
        for number, (held, x, chosen) in enumerate(prepared.values()):
            at = os.path.join(folder, str(number))
            with open(f"{at}.prototxt", "w", encoding="utf-8") as file:
                file.write(_description(held, len(x), chosen))
            with open(f"{at}.caffemodel", "wb") as binary:
                for i, node in enumerate((held.node, *held.tail)):
                    binary.write(_encoded_layer(net, node, f"l{i}"))
            np.save(os.path.join(folder, f"x{number}.npy"), x.reshape(len(x), held.channels, 1, 1))
        where = f"{printable(net.path)}: {listed(inputs, 3)}"
        _call(folder, len(prepared), where)
        return {
            name: {"cv2.dnn": _output(os.path.join(folder, f"y{number}.npy"), x.size, where).reshape(x.shape)}
            for number, (name, (_, x, _)) in enumerate(prepared.items())
        }


def _call(folder: str, count: int, where: str) -> None:
    try:
        done = subprocess.run(
            [sys.executable, "-c", _CHILD, str(count)],
            cwd=folder,  # also keeps modules of the caller's folder out
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=TIMEOUT,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise BnportError(f"{where}: cv2.dnn did not finish within {TIMEOUT:.0f} seconds") from None
    said = printable(done.stderr.decode("utf-8", "replace").strip().rsplit("\n", 1)[-1], 120)
    if done.returncode == _NO_ENGINE:
        raise MissingDependency('running a Caffe layer needs OpenCV 4: pip install "opencv-python-headless>=4.5,<5"')
    if done.returncode == _OLD_IMPORTER_GONE:
        raise MissingDependency(
            f"running a Caffe layer needs OpenCV 4 (this is {said}, which cannot read Caffe any more):"
            ' pip install "opencv-python-headless>=4.5,<5"'
        )
    if done.returncode < 0:
        raise BnportError(f"{where}: cv2.dnn crashed (signal {-done.returncode})")
    if done.returncode:
        raise BnportError(f"{where}: cv2.dnn failed: {said}")


def _output(path: str, size: int, where: str) -> Array:
    try:
        y: Array = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        raise BnportError(f"{where}: cv2.dnn gave no output") from None
    if y.size != size:
        raise BnportError(f"{where}: cv2.dnn gave {y.size} numbers, {size} expected")
    return y


def _refuse_what_cannot_run(net: Net, held: Held) -> None:
    roles = tuple(held.fields)
    why = ""
    if held.node.type != "BatchNorm":
        why = f"a layer of type {held.node.type}"
    elif any(node.type == "Bias" for node in held.tail):
        why = "a Bias layer"
    elif held.node.blob_count == 4:
        why = "Intel's BatchNorm of four blobs"
    elif held.node.blob_count == 5 and roles[0] == "gamma":
        why = "a BatchNorm in the order of legacy DIGITS"
    elif held.node.blob_count == 5 and float(held.fields["factor"].tensor.array()[0]) != 1:
        why = "Intel's BatchNorm of five blobs with a factor other than 1"
    elif any(blob.tensor.dtype == "float64" for blob in held.fields.values()):
        why = "blobs of double precision"
    elif any(blob.count == 1 != held.channels for field, blob in held.fields.items() if field != "factor"):
        why = "a Scale of one number for all channels"
    if why:
        raise NotFound(
            f"{printable(net.path)}: {printable(held.name)}: no engine that can be installed runs {why}; cv2.dnn cannot"
        )


def _description(held: Held, count: int, epsilon: object) -> str:
    lines = [f'input: "x" input_shape {{ dim: {count} dim: {held.channels} dim: 1 dim: 1 }}']
    inner = "" if epsilon is None else f" eps: {epsilon!r}"
    if held.node.blob_count == 5:
        inner += " scale_bias: true"
    lines.append(_layer_text("BatchNorm", 0, f"batch_norm_param {{{inner} use_global_stats: true }}"))
    for i, node in enumerate(held.tail, 1):
        bias = "true" if node.settings.get("bias_term") else "false"
        lines.append(_layer_text("Scale", i, f"scale_param {{ bias_term: {bias} }}"))
    return "\n".join(lines) + "\n"


def _layer_text(kind: str, index: int, parameters: str) -> str:
    bottom = "x" if index == 0 else f"t{index - 1}"
    return f'layer {{ name: "l{index}" type: "{kind}" bottom: "{bottom}" top: "t{index}" {parameters} }}'


def _encoded_layer(net: Net, node: Node, name: str) -> bytes:
    """The layer's own bytes from a binary file under a name of ours (the last name in a message is the one that counts);
    from HDF5, its blobs as BlobProto."""
    if net.buffer is not None and node.message is not None:
        return encoded(100, net.buffer.read(node.message, "a layer") + encoded(1, name))
    message = encoded(1, name) + encoded(2, node.type)
    for index in range(node.blob_count):
        blob = node.blob(index)
        data = blob.tensor.array().astype("<f4").tobytes()
        shape = encoded(7, encoded(1, b"".join(map(encoded_varint, blob.shape))))
        message += encoded(7, shape + encoded(5, data))
    return encoded(100, message)
