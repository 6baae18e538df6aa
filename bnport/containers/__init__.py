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
