"""Keras: `.keras`, `.weights.h5`, legacy `.h5`, `.weights.json`; live models and layers of Keras 3 and tf_keras.

    theirs                       ours                  note
    gamma                        gamma                 absent with scale=False: ones
    beta                         beta                  absent with center=False: zeros
    moving_mean                  mean
    moving_variance              variance              the variance, not its root, whatever older documentation says
    running_std                  variance              Keras 1; holds the std in files of 1.0.5 and older: --stat
    epsilon                      epsilon               default 1e-3; .keras and full .h5 hold it, weights files do not
    momentum                     momentum              the fraction of the old value kept; default 0.99
    moving_stddev, renorm_mean,  (kept consistent)     with renorm=True; inference uses only the first four
    renorm_stddev

A layer is called what a user of Keras calls it: its name, or outer/inner for one inside another model or wrapper; in a
`.weights.h5` by the names that Keras >= 3.6 stores, else by its path in the file.

The numbers lie in HDF5 as `<path>/vars/0..3` (gamma, beta, mean, variance, less those that are absent), in legacy files
as `<layer>/<weight name>`, there matched by name: the order changes when a layer is frozen. Three arrays in a
`.weights.h5` do not say whether gamma or beta is missing: --absent gamma or --absent beta does for all such layers,
--absent bn1=gamma,block*=beta layer by layer (patterns as for --skip). `running_std` in a file without keras_version
does not say whether it is a variance (Keras >= 1.0.6, TensorFlow) or a std: --stat variance or --stat std does;
--stat root is for 1.0.7 on Theano, which divided by sqrt(variance) + epsilon.

Not read: multi-axis layers, mode 1 and 2 of Keras 1 (no fixed function), npz weights (a pickle).
"""

from __future__ import annotations

from bnport._lazy import TYPE_CHECKING
from bnport.containers import HDF5_SIGNATURE, TORCH_ZIP, looks_like

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any

    from bnport.adapters.keras.entry import Contents
    from bnport.containers.patch import Patch
    from bnport.layer import Change, Layers

SUFFIXES = (".keras", ".h5", ".hdf5", ".json")
PACKAGES = ("keras", "tf_keras")


def recognise(head: bytes, path: str) -> bool:
    """A zip with a Keras config, HDF5 (also behind a user block), or a list of weight shards."""
    name = path.lower()
    if head.startswith(b"PK\x03\x04"):
        if name.endswith(".keras") and looks_like(head) != TORCH_ZIP:
            return True
        return _first_member(head) in (b"metadata.json", b"config.json", b"model.weights.h5")
    if name.endswith((".caffemodel.h5", ".mat")):
        return False
    if any(head.startswith(HDF5_SIGNATURE, at) for at in (0, 512, 1024, 2048)):
        return True
    if name.endswith((".h5", ".hdf5")):
        return _is_behind_block(path)
    return name.endswith(".weights.json") and b'"weight_map"' in head


def _is_behind_block(path: str) -> bool:
    """Whether HDF5 begins behind a user block larger than what was read: 4096 bytes, or twice, four times ... that."""
    from bnport.containers.files import ReadFile

    file, at = ReadFile(path), 4096
    while at + len(HDF5_SIGNATURE) <= file.size:
        if file.pread(at, len(HDF5_SIGNATURE)) == HDF5_SIGNATURE:
            return True
        at *= 2
    return False


def _first_member(head: bytes) -> bytes:
    return head[30 : 30 + int.from_bytes(head[26:28], "little")]


def read(source: Any, *, absent: str | Mapping[str, str] | None = None, stat: str | None = None) -> Layers:
    """The BatchNormalization layers of a file, a live model or a single live layer.

    `absent`: "gamma" or "beta", for layers of a `.weights.h5` with three arrays; or layer -> one of them, as a mapping or
    as "bn1=gamma,bn2=beta", patterns allowed; which layers were taken how is in the notes. `stat`: "variance", "std" or
    "root", what `running_std` holds in a Keras 1 file that does not say. Raises FormatError for what is not understood,
    Question where one of the options is needed, InvalidValue for an option that does not fit.
    """
    if isinstance(source, str):
        return contents(source, absent=absent, stat=stat, evidence=True).layers()
    from bnport.adapters.keras.live import read as read_live

    return read_live(source)


def contents(
    path: str, *, absent: str | Mapping[str, str] | None = None, stat: str | None = None, evidence: bool = False
) -> Contents:
    """What a file holds, for reading and for writing. `evidence`: with kernels and graph, which pairing wants."""
    from bnport.containers.files import ReadFile

    file, answers = ReadFile(path), None
    if absent is not None:
        from bnport.adapters.keras.absent import Absent

        answers = Absent(absent)
    if file.size >= 4 and file.pread(0, 4) == b"PK\x03\x04":
        from bnport.adapters.keras.archive import read as read_archive

        found = read_archive(file, answers, evidence=evidence)
    else:
        from bnport.adapters.keras.files import read as read_file

        found = read_file(file, answers, stat, evidence=evidence)
    if answers is not None:
        answers.check_names(path)
    return found


def write(
    target: str,
    changes: Mapping[str, Change],
    out: str,
    *,
    absent: str | Mapping[str, str] | None = None,
    stat: str | None = None,
    opened: Contents | None = None,
) -> None:
    """Make, at the new path `out`, a copy of the file `target` with the changes; all else stays byte for byte.

    The arrays are overwritten where they lie. A `.keras` gets epsilon and momentum into its config.json, a full legacy
    `.h5` into its model_config.
    """
    from bnport.adapters.keras.writing import write as write_file

    write_file(opened or contents(target, absent=absent, stat=stat), changes, out)


def patches(
    target: str,
    changes: Mapping[str, Change],
    *,
    absent: str | Mapping[str, str] | None = None,
    stat: str | None = None,
    opened: Contents | None = None,
) -> list[Patch]:
    """The changes as bytes at offsets of the file `target`, which keeps its length; InvalidValue where they are more.

    A `.keras` gets its epsilons into the config.json that is there, followed by blanks where they are shorter.
    """
    from bnport.adapters.keras.writing import patches as patches_of

    return patches_of(opened or contents(target, absent=absent, stat=stat), changes)


def apply(model: Any, changes: Mapping[str, Change]) -> None:
    """Write the changes into a live model or layer: all, or on any error none.

    An epsilon is set on the layer, and the functions that Keras has compiled are dropped on `model` and on every model
    that is known to hold the layer, so that predict, evaluate and fit use it.
    """
    from bnport.adapters.keras.live import apply as apply_live

    apply_live(model, changes)


def read_back(model: Any) -> Layers:
    """The layers of a live model or layer that was just written: without the evidence for pairing."""
    from bnport.adapters.keras.live import read as read_live

    return read_live(model, evidence=False)


def run(
    source: Any,
    layer: str,
    x: Any,
    *,
    epsilon: float | None = None,
    absent: str | Mapping[str, str] | None = None,
    stat: str | None = None,
) -> dict[str, Any]:
    """x of shape (N, C) through one real Keras layer at inference: {"model(x)": y, "predict": y}.

    Of a live model it is the layer itself that is called, directly and inside a one-layer model's predict. Of a file it
    is a BatchNormalization that Keras builds from the layer's config in the file, with the arrays of the file loaded by
    the layer's own `load_own_variables`; `epsilon` is for a file that holds none. Raises MissingDependency without Keras.
    """
    return run_all(source, {layer: x}, epsilon=epsilon, absent=absent, stat=stat)[layer]


def run_all(
    source: Any,
    inputs: Mapping[str, Any],
    *,
    epsilon: float | None = None,
    absent: str | Mapping[str, str] | None = None,
    stat: str | None = None,
) -> dict[str, dict[str, Any]]:
    """`run` for many layers (name -> x) with one model that is traced once."""
    from bnport.adapters.keras.running import run_all as run_layers

    return run_layers(source, inputs, epsilon=epsilon, absent=absent, stat=stat)


def tap(model: Any, x: Any, each: Callable[[str, Any, Any, str], None]) -> list[Any]:
    """Run a live model on x at inference; each(layer, input, output, dtype) for every layer call."""
    from bnport.adapters.keras.tapping import tap as tap_live

    return tap_live(model, x, each)


def input_form(model: Any) -> tuple[bool, tuple[int | None, ...] | None]:
    """(whether channels come first in the model's data, the shape that it declares for its one input, if it does)."""
    from bnport.adapters.keras.tapping import channels_first, input_shape

    return channels_first(model), input_shape(model)


def compiled_outputs(model: Any, x: Any) -> list[Any] | None:
    """What the model's already compiled predict function gives for x; None where it has none."""
    from bnport.adapters.keras.tapping import compiled_outputs as outputs

    return outputs(model, x)


def load_model(path: str) -> Any:
    """A live model by Keras' own loader in safe mode, which refuses Lambda layers: only for running the whole network."""
    from bnport.adapters.keras.running import loaded

    return loaded(path)
