"""PyTorch: checkpoints, whole modules, TorchScript, torch.export, safetensors, and live models.

| theirs                  | ours      | note                                                                      |
|-------------------------|-----------|---------------------------------------------------------------------------|
| weight                  | gamma     | absent with affine=False: ones. InPlaceABN: gamma = abs(weight) + eps     |
| bias                    | beta      | absent with affine=False or bias=False: zeros                             |
| running_mean            | mean      | track_running_stats=False holds none: listed, and refused without data    |
| running_var             | variance  | the unbiased estimate, copied as it is                                    |
| eps                     | epsilon   | not in a state dict: 1e-5 is assumed and said; --epsilon sets it          |
| momentum                | momentum  | ours = 1 - theirs (theirs weighs the new value); None: cumulative average |
| num_batches_tracked     | -         | 0 with mean 0 and variance 1: noted as untrained                          |

Read without torch, and without running anything that is in the file:

.pt .pth .bin .ckpt .tar   torch.save: zip (1.6 and later), legacy stream, old tar. State dicts; checkpoints that nest
                           them (state_dict, model, model_ema, ...): with several, --key chooses; whole modules.
.pt .pth .jit              TorchScript, scripted or traced: epsilon from the code.
.pt2                       torch.export: epsilon, kernels and graph.
.safetensors               with torch's names.
.index.json                a model in several of these files, as Hugging Face saves large ones; read, not written.

Written into a copy, all else byte for byte the same: gamma, beta, mean and variance, where they lie as plain runs of
numbers (not strided views, not in a compressed archive). epsilon and momentum are not written into files.

Names are given without the prefixes module. (DataParallel) and _orig_mod. (torch.compile).
A pruned weight is read as weight_orig * weight_mask. What weight_norm, spectral_norm or a parametrization computes is
refused in files and read live. A tensor of the channels' size beside the statistics that is none of the above is
refused by name. Nothing of these is written. A class that is not known is noted: a live one is run by convert, a file does
not hold what it computes. A bare state dict does not tell an InstanceNorm with running statistics from a BatchNorm,
nor a subclass with its own forward().
Options: key (where in the checkpoint), inplace_abn (gamma = abs(weight) + eps; a state dict does not tell).
Live: any nn.Module or state dict; torch's own, SyncBatchNorm, timm's and FrozenBatchNorm2d (torchvision, detectron2).
"""

from __future__ import annotations

from bnport._lazy import TYPE_CHECKING
from bnport.containers import looks_like
from bnport.containers.files import ReadFile
from bnport.errors import BnportError, FormatError, printable
from bnport.layer import Layers

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from typing import Any

    from bnport.adapters.torch.checkpoint import Checkpoint
    from bnport.containers.patch import Patch
    from bnport.containers.tensor import Tensor
    from bnport.layer import Change, Layer

SUFFIXES = (".pt", ".pth", ".pt2", ".bin", ".ckpt", ".tar", ".jit", ".safetensors", ".json")
PACKAGES = ("torch",)

STATE_WITHOUT = (
    "If its BatchNorm has track_running_stats=False, a state dict does not show it: save the module itself"
    " (torch.save(model, path)) or export it to ONNX, and use bnport convert --calibrate DATA."
)
_NONE_FOUND = f"No running statistics (running_mean and running_var) anywhere in it. {STATE_WITHOUT}"


def recognise(head: bytes, path: str) -> bool:
    """A zip with a data.pkl or models/model.json in its top folder, a legacy stream or tar, or safetensors not ours."""
    if path.lower().endswith(".json"):
        return path.lower().endswith(".index.json") and head.lstrip().startswith(b"{")
    if head.startswith(b"PK"):
        return _first_member_is_torchs(head, path) or _is_zip_of_torch(path)
    if head[8:9] == b"{" and path.lower().endswith(".safetensors") and b"bnport" not in head:
        return True  # bnport's own records begin with their metadata; any other header is parsed once, by read
    from bnport.adapters.torch.checkpoint import is_legacy, is_tar

    if is_legacy(head) or is_tar(head):
        return True
    if head[8:9] == b"{" and not head.startswith(b"{"):
        from bnport.containers.safetensors import is_safetensors, open_safetensors

        if not is_safetensors(head):
            return path.lower().endswith(".safetensors")
        try:
            return open_safetensors(path)[1].get("format") != "bnport"
        except BnportError:
            return path.lower().endswith(".safetensors")
    return path.lower().endswith(".safetensors") and len(head) > 0 and not looks_like(head)


def _first_member_is_torchs(head: bytes, path: str) -> bool:
    """Whether a file with one of our suffixes begins as torch.save, torch.jit.save and torch.export do."""
    name = head[30 : 30 + int.from_bytes(head[26:28], "little")]
    inside = name.partition(b"/")[2]
    return path.lower().endswith(SUFFIXES) and (inside == b"data.pkl" or inside.startswith((b"data/", b"code/")))


def _is_zip_of_torch(path: str) -> bool:
    """Whether a zip is torch.save's or torch.export's; a damaged one with one of our suffixes counts: reading refuses it."""
    from bnport.adapters.torch.checkpoint import zip_root
    from bnport.containers.zip import Archive

    try:
        archive = Archive(ReadFile(path), without_checksums=True)
    except BnportError:
        return path.lower().endswith(SUFFIXES)
    return any(zip_root(archive, member) is not None for member in ("data.pkl", "models/model.json"))


def read(
    source: Any, *, key: str | None = None, inplace_abn: bool | None = None, epsilon: float | None = None
) -> Layers:
    """The BatchNorm layers of a file (str) or of a live module or state dict.

    `key`: which model of a nested checkpoint ("model_ema", "nets.generator"). `inplace_abn`: whether the weights are
    InPlaceABN's, whose gamma is abs(weight) + eps; None takes that from the class where it is known, else False.
    `epsilon`: what to assume, instead of 1e-5, for layers whose epsilon the source does not hold.
    Raises FormatError for a file that is not understood, Question if several models fit and no key is given.
    """
    if not isinstance(source, str):
        from bnport.adapters.torch.live import read_live

        return read_live(source, key, inplace_abn, epsilon)
    if source.lower().endswith(".index.json"):
        return _read_index(source, inplace_abn, epsilon)
    if "-of-" in source:
        from bnport.adapters.torch.shards import refuse_part

        refuse_part(source)
    file = ReadFile(source)
    head = file.pread(0, min(512, file.size))
    if head[8:9] == b"{" or (source.lower().endswith(".safetensors") and not looks_like(head)):
        return _read_safetensors(source, inplace_abn, epsilon)
    opened = _opened(file)
    if isinstance(opened, Layers):
        return opened
    checkpoint = opened
    where = checkpoint.where
    if checkpoint.is_script:
        from bnport.adapters.torch.script import layers_of_script

        scripted, more = layers_of_script(checkpoint, inplace_abn)
        return Layers(scripted, source=source, format="torch", notes=[*checkpoint.notes, *more])
    from bnport.adapters.torch.search import chosen, models_in, state_of

    found = models_in(checkpoint.value, checkpoint, lambda value: state_of(value) is not None)
    if len(found) > 1:  # modules without BatchNorm are no candidates
        found = [c for c in found if c.tensors is not None or _module_layers(c.value, checkpoint, inplace_abn)[0]]
    model, notes = chosen(found, key, where)
    notes = [*checkpoint.notes, *notes]
    if model is None:
        return Layers(source=source, format="torch", notes=[*notes, _NONE_FOUND])
    if model.tensors is not None:
        from bnport.adapters.torch.state import layers_of_state

        versions = checkpoint.versions(model.value)
        layers, more = layers_of_state(model.tensors, versions, where, inplace_abn, epsilon)
    else:
        layers, more = _module_layers(model.value, checkpoint, inplace_abn)
    return Layers(layers, source=source, format="torch", notes=[*notes, *more, *([] if layers else [_NONE_FOUND])])


def _module_layers(value: Any, checkpoint: Checkpoint, inplace_abn: bool | None) -> tuple[list[Layer], list[str]]:
    from bnport.adapters.torch.modules import layers_of_module

    return layers_of_module(value, checkpoint, inplace_abn)


def _opened(file: ReadFile) -> Checkpoint | Layers:
    """The checkpoint in a file of torch.save or torch.jit.save; the layers themselves in one of torch.export."""
    from bnport.adapters.torch.checkpoint import is_legacy, is_tar, open_legacy, open_tar, open_zip, zip_root
    from bnport.containers.zip import Archive

    head = file.pread(0, min(512, file.size))
    if head.startswith(b"PK"):
        archive = Archive(file, without_checksums=True)
        root = zip_root(archive)
        exported = zip_root(archive, "models/model.json")
        if exported is not None:
            from bnport.adapters.torch.export import layers_of_export

            layers, notes = layers_of_export(archive, exported, printable(file.path))
            return Layers(layers, source=file.path, format="torch", notes=notes if layers else [*notes, _NONE_FOUND])
        if root is None:
            raise FormatError(f"{printable(file.path)}: a zip archive without a data.pkl in its one top folder")
        return open_zip(file, archive, root)
    if is_legacy(head):
        return open_legacy(file)
    if is_tar(head):
        return open_tar(file)
    raise FormatError(f"{printable(file.path)}: neither a zip, a legacy stream nor a tar of torch.save")


def _read_safetensors(path: str, inplace_abn: bool | None, epsilon: float | None) -> Layers:
    from bnport.containers.safetensors import open_safetensors

    tensors, metadata = open_safetensors(path)
    if metadata.get("format") == "bnport":
        raise FormatError(f"{printable(path)}: is bnport's own record file, not a PyTorch model")
    return _layers_of(path, tensors, {}, inplace_abn, epsilon)


def _read_index(path: str, inplace_abn: bool | None, epsilon: float | None) -> Layers:
    from bnport.adapters.torch.shards import tensors_of_index

    tensors, versions, parts = tensors_of_index(path, _opened)
    layers = _layers_of(path, tensors, versions, inplace_abn, epsilon, parts)
    layers.read_only = (
        f"{printable(path)}: a model in several files is read, not written; save it as one file (max_shard_size)"
    )
    return layers


def _layers_of(
    path: str,
    tensors: Mapping[str, Tensor],
    versions: Mapping[str, int],
    inplace_abn: bool | None,
    epsilon: float | None,
    parts: Iterable[str] = (),
) -> Layers:
    """The layers of tensors that may be sorted by name; `parts`: the files that they lie in, where that is not `path`."""
    from bnport.adapters.torch.order import as_defined
    from bnport.adapters.torch.state import layers_of_state

    defined, ordered = as_defined(tensors)
    layers, notes = layers_of_state(defined, versions, printable(path), inplace_abn, epsilon)
    notes = notes if layers else [*notes, _NONE_FOUND]
    return Layers(layers, source=path, format="torch", notes=notes, ordered=ordered, files=parts)


def write(
    target: str,
    changes: Mapping[str, Change],
    out: str,
    *,
    key: str | None = None,
    inplace_abn: bool | None = None,
) -> None:
    """Make, at the new path `out`, a copy of the file `target` with the changes; all else stays byte for byte.

    gamma, beta, mean and variance are replaced where they lie (zip and legacy checkpoints, whole modules, TorchScript,
    torch.export, safetensors), the archive's checksums brought up to date. epsilon and momentum are not written: a state
    dict holds none, and in other files they are code or pickled attributes. Raises InvalidValue for numbers that are not
    rounded to the file's dtype, strided views, compressed archives, and memory shared with another layer.
    """
    from bnport.adapters.torch.writing import write_file

    write_file(target, _target(target, key, inplace_abn), changes, out)


def patches(
    target: str, changes: Mapping[str, Change], *, key: str | None = None, inplace_abn: bool | None = None
) -> list[Patch]:
    """The changes as bytes at offsets of the file `target`, which keeps its length. Raises as `write` does."""
    from bnport.adapters.torch.writing import file_patches

    return file_patches(target, _target(target, key, inplace_abn), changes)


def _target(path: str, key: str | None, inplace_abn: bool | None) -> Layers:
    layers = read(path, key=key, inplace_abn=inplace_abn)
    if layers.read_only:
        raise FormatError(layers.read_only)
    return layers


def apply(model: Any, changes: Mapping[str, Change], *, inplace_abn: bool | None = None) -> None:
    """Write into a live module or state dict: all layers, or on any error none.

    epsilon and momentum are set as attributes (eps; momentum = 1 - ours). Raises NotFound for an unknown layer,
    InvalidValue for a wrong width or a value that the stored dtype cannot hold.
    """
    from bnport.adapters.torch.live import apply_live

    apply_live(model, changes, inplace_abn)


def run(
    source: Any,
    layer: str,
    x: Any,
    *,
    key: str | None = None,
    inplace_abn: bool | None = None,
    epsilon: float | None = None,
) -> dict[str, Any]:
    """x of shape (N, C) through one layer by torch itself, at inference.

    A live module: its own layer's forward, without hooks and without an activation that it may carry, in eval mode.
    A file or state dict: torch.nn.functional.batch_norm, which is what such a layer calls, with the stored numbers;
    `epsilon` is for one that holds none.
    """
    return run_all(source, {layer: x}, key=key, inplace_abn=inplace_abn, epsilon=epsilon)[layer]


def run_all(
    source: Any,
    inputs: Mapping[str, Any],
    *,
    key: str | None = None,
    inplace_abn: bool | None = None,
    epsilon: float | None = None,
) -> dict[str, dict[str, Any]]:
    """`run` for many layers (name -> x) of a source that is read once."""
    from bnport.adapters.torch.running import run_live

    return run_live(source, inputs, key, inplace_abn, epsilon)


def tap(model: Any, x: Any, each: Callable[[str, Any, Any, str], None]) -> list[Any]:
    """Run a live module on x (N, C, ...) at inference; each(layer, input, output, dtype) for every layer call."""
    from bnport.adapters.torch.tapping import tap as tap_live

    return tap_live(model, x, each)


def is_script(path: str) -> bool:
    """Whether a file is TorchScript: a whole network, but one that takes no hooks, so that `tap` refuses it."""
    file = ReadFile(path)
    opened = _opened(file) if file.pread(0, min(2, file.size)) == b"PK" else None
    return opened is not None and not isinstance(opened, Layers) and opened.is_script


def input_form(model: Any) -> tuple[bool, None]:  # noqa: ARG001
    """(channels come first, no shape is declared): torch's convention."""
    return True, None
