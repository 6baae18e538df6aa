"""How bytes lie in files. Nothing here knows what BatchNorm is.

files.py        positioned reads that check bounds; a file replaced whole or not at all
tensor.py       an array in a file that has not been read yet
zip.py          the central directory of an archive; members read by position; CRC-32 patched, not recomputed
pickle.py       a pickle read into plain data and inert stand-ins; nothing in it is ever called
safetensors.py  header and positions
hdf5.py         HDF5 opened so that no other file can be reached through it
hdf5_data.py    the numbers of one dataset of it, chunks and filters undone with a limit
hdf5_text.py    texts of its attributes, read without the library
patch.py        a copy of a file with some bytes replaced, and the zip checksums brought up to date
protobuf.py     wire format, walked lazily
json_text.py    JSON without duplicate keys
textproto.py    protocol buffers' text format
in_place.py     bytes of a file replaced where they lie, with an undo file
"""

HDF5_SIGNATURE = b"\x89HDF\r\n\x1a\n"  # here, so that a look at a file's first bytes imports nothing for it
TEXT, TORCH_ZIP = "a text file", "a zip archive of PyTorch"
ARRAY, ARRAYS = "an .npy array", "an .npz archive"
_TEXTS = {
    b"version https://git-lfs": "a Git LFS pointer: 'git lfs pull' fetches the file itself",
    b"<!doctype": "a web page: the download failed",
    b"<html": "a web page: the download failed",
}
_SIGNATURES = {
    HDF5_SIGNATURE: "an HDF5 file",
    b"PK\x05\x06": "an empty zip archive",
    b"\x1f\x8b": "a gzip file: unpack it first",
    b"\x93NUMPY": ARRAY,
    b"\x80\x02\x8a\nl\xfc\x9cF\xf9": "a legacy file of PyTorch",
    **{bytes((0x80, protocol)): "a pickle" for protocol in (2, 3, 4, 5)},
}
_NEVER_IN_TEXT = bytes(byte for byte in range(32) if byte not in b"\t\n\f\r")


def looks_like(head: bytes) -> str:
    """What a file is by its first bytes, in words for a message; nothing where they do not say it.

    ONNX files and binary caffemodels have no signature. A file need not be undamaged to begin so.
    """
    if head and len(head.translate(None, _NEVER_IN_TEXT)) == len(head):
        start = head[:64].lstrip().lower()
        return next((what for begin, what in _TEXTS.items() if start.startswith(begin)), TEXT)
    if head.startswith(b"PK\x03\x04"):
        name = head[30 : 30 + int.from_bytes(head[26:28], "little")]
        if name.partition(b"/")[2].startswith((b"data.pkl", b"data/", b"code/")):
            return TORCH_ZIP
        if name in (b"metadata.json", b"config.json", b"model.weights.h5"):
            return "a .keras file"
        return ARRAYS if name.endswith(b".npy") else "a zip archive"
    if head[4:9] == b"\0\0\0\0{":  # the length of its header, and this
        return "a .safetensors file"
    return next((what for signature, what in _SIGNATURES.items() if head.startswith(signature)), "")
