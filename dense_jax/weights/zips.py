"""Finds the members of a zip file, so that the uncompressed ones can be mapped.

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
      start: position of its bytes in the zip file.
      packed: number of its bytes in the zip file.
      size: number of its bytes after decompression.
      checksum: CRC-32 of the decompressed bytes.
      is_packed: whether the bytes are compressed (deflated).
    """

    start: int
    packed: int
    size: int
    checksum: int
    is_packed: bool

    def unpack(self, data: mmap.mmap) -> bytes | bytearray:
        """Returns the decompressed bytes.

        Raises:
          ValueError: their size or checksum is not the one in the zip file.
        """
        end = self.start + self.packed
        content = self._inflate(data, end) if self.is_packed else data[self.start : end]
        if len(content) != self.size or zlib.crc32(content) != self.checksum:
            raise ValueError("its bytes do not match their size and checksum")
        return content

    def _inflate(self, data: mmap.mmap, end: int) -> bytearray:
        """Decompresses piece by piece into one buffer, so that memory holds the bytes once."""
        content, filled, stream = bytearray(self.size), 0, zlib.decompressobj(-zlib.MAX_WBITS)
        for start in range(self.start, end, _PIECE):
            try:
                piece = stream.decompress(
                    data[start : min(start + _PIECE, end)], self.size - filled + 1
                )
            except zlib.error as error:
                raise ValueError(str(error)) from error
            if filled + len(piece) > self.size:
                raise ValueError("it has more bytes than it declares")
            content[filled : filled + len(piece)] = piece
            filled += len(piece)
            if hasattr(data, "madvise"):  # the pages of this piece are no longer needed
                page = start - start % mmap.PAGESIZE
                data.madvise(mmap.MADV_DONTNEED, page, start + _PIECE - page)
        if filled < self.size:
            raise ValueError("it has fewer bytes than it declares")
        return content


def members(path: pathlib.Path, data: mmap.mmap) -> dict[str, Member]:
    """Returns the members of a zip file by name.

    Args:
      path: the file.
      data: the mapped file.

    Raises:
      UserError: the file is damaged, encrypted, compressed by a rare method, or too large after
        decompression.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
        found = {entry.filename: _member(entry, data) for entry in entries}
        if len(found) < len(entries):
            raise ValueError("two members have one name")
    except (zipfile.BadZipFile, NotImplementedError, ValueError, OverflowError, OSError) as error:
        raise damaged(path, error) from error
    unpacked = sum(member.size for member in found.values() if member.is_packed)
    if unpacked > most_unpacked(len(data)):
        raise UserError(
            f"{path} would grow from {len(data) / 1e6:.1f} to {unpacked / 1e6:,.0f} MB: save it "
            "without compression"
        )
    return found


def _member(entry: zipfile.ZipInfo, data: mmap.mmap) -> Member:
    local = data[entry.header_offset : entry.header_offset + _LOCAL.size]
    if len(local) < _LOCAL.size:
        raise ValueError(f"{entry.filename!r} is beyond the end")
    signature, *lengths = _LOCAL.unpack(local)
    start = entry.header_offset + _LOCAL.size + sum(lengths)
    if signature != _SIGNATURE or start + entry.compress_size > len(data):
        raise ValueError(f"{entry.filename!r} is cut off")
    if entry.flag_bits & _ENCRYPTED:
        raise ValueError(f"{entry.filename!r} is encrypted")
    is_packed = entry.compress_type == zipfile.ZIP_DEFLATED
    if not is_packed and entry.compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"{entry.filename!r} is compressed by method {entry.compress_type}")
    if not is_packed and entry.compress_size != entry.file_size:
        raise ValueError(f"{entry.filename!r} has two sizes")
    return Member(start, entry.compress_size, entry.file_size, entry.CRC, is_packed)
