"""Where the members of a zip file lie, so that those stored as they are can be mapped.

Reference: PKWARE, ".ZIP File Format Specification" (APPNOTE.TXT), sections 4.3.7 and 4.4.
"""

import mmap
import pathlib
import struct
import zipfile
import zlib
from typing import NamedTuple

from dense_jax.errors import UserError
from dense_jax.weights.tensors import damaged, most_unpacked

_LOCAL = struct.Struct("<4s22xHH")  # signature, ..., lengths of name and extra field
_SIGNATURE = b"PK\x03\x04"
_ENCRYPTED = 1
_PIECE = 2**18


class Member(NamedTuple):
    """A file in a zip file.

    Attributes:
      start: where its bytes, packed or not, begin in the zip file.
      packed: how many they are there.
      size: how many they are unpacked.
      checksum: CRC-32 of the unpacked bytes.
      is_packed: they are deflated; else they are stored as they are.
    """

    start: int
    packed: int
    size: int
    checksum: int
    is_packed: bool

    def unpack(self, data: mmap.mmap) -> bytes | bytearray:
        """Returns the unpacked bytes.

        Raises:
          ValueError: they are not of the size and checksum that the zip file declares.
        """
        end = self.start + self.packed
        content = self._inflate(data, end) if self.is_packed else data[self.start : end]
        if len(content) != self.size or zlib.crc32(content) != self.checksum:
            raise ValueError("its bytes do not match their size and checksum")
        return content

    def _inflate(self, data: mmap.mmap, end: int) -> bytearray:
        """Unpacks piece by piece into place, so that the bytes are there only once."""
        content, filled, stream = bytearray(self.size), 0, zlib.decompressobj(-zlib.MAX_WBITS)
        for start in range(self.start, end, _PIECE):
            try:
                piece = stream.decompress(
                    data[start : min(start + _PIECE, end)], self.size - filled + 1
                )
            except zlib.error as error:
                raise ValueError(str(error)) from error
            if filled + len(piece) > self.size:
                raise ValueError("its bytes are more than it declares")
            content[filled : filled + len(piece)] = piece
            filled += len(piece)
            if hasattr(data, "madvise"):  # what is unpacked needs no memory any more
                page = start - start % mmap.PAGESIZE
                data.madvise(mmap.MADV_DONTNEED, page, start + _PIECE - page)
        if filled < self.size:
            raise ValueError("its bytes are fewer than it declares")
        return content


def members(path: pathlib.Path, data: mmap.mmap) -> dict[str, Member]:
    """Returns the members of a zip file by name.

    Args:
      path: the file.
      data: the same, mapped.

    Raises:
      UserError: the file is damaged, encrypted, packed in a rare way, or unpacks to too much.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
        found = {entry.filename: _member(entry, data) for entry in entries}
        if len(found) < len(entries):
            raise ValueError("two members of one name")
    except (zipfile.BadZipFile, NotImplementedError, ValueError, OverflowError, OSError) as error:
        raise damaged(path, error) from error
    unpacked = sum(member.size for member in found.values() if member.is_packed)
    if unpacked > most_unpacked(len(data)):
        raise UserError(
            f"{path} of {len(data) / 1e6:.1f} MB would unpack to {unpacked / 1e6:,.0f} MB: save it "
            "without packing"
        )
    return found


def _member(entry: zipfile.ZipInfo, data: mmap.mmap) -> Member:
    local = data[entry.header_offset : entry.header_offset + _LOCAL.size]
    if len(local) < _LOCAL.size:
        raise ValueError(f"{entry.filename!r} lies beyond the end")
    signature, *lengths = _LOCAL.unpack(local)
    start = entry.header_offset + _LOCAL.size + sum(lengths)
    if signature != _SIGNATURE or start + entry.compress_size > len(data):
        raise ValueError(f"{entry.filename!r} is cut off")
    if entry.flag_bits & _ENCRYPTED:
        raise ValueError(f"{entry.filename!r} is encrypted")
    is_packed = entry.compress_type == zipfile.ZIP_DEFLATED
    if not is_packed and entry.compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"{entry.filename!r} is packed by method {entry.compress_type}")
    if not is_packed and entry.compress_size != entry.file_size:
        raise ValueError(f"{entry.filename!r} has two sizes")
    return Member(start, entry.compress_size, entry.file_size, entry.CRC, is_packed)
