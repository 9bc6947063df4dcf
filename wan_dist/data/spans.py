"""A part of a file that reads like a file: a member of a tar, or all of a plain file."""

import io
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast


@dataclass(frozen=True)
class FileSpan:
    """Where the bytes of a clip lie.

    Attributes:
        path: the file.
        offset: bytes before the part.
        size: bytes of the part; -1 is all of the file.
    """

    path: Path
    offset: int = 0
    size: int = -1

    def open(self) -> IO[bytes]:
        """Open the part, unbuffered."""
        stream = self.path.open("rb", buffering=0)
        if self.size < 0:
            return cast(IO[bytes], stream)
        return cast(IO[bytes], _Part(stream, self.offset, self.size))


class _Part(io.RawIOBase):
    def __init__(self, stream: io.FileIO, offset: int, size: int) -> None:
        self._stream, self._offset, self._size, self._position = stream, offset, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer)[: max(0, self._size - self._position)]
        self._stream.seek(self._offset + self._position)
        count = self._stream.readinto(view)
        self._position += count
        return count

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._position = (0, self._position, self._size)[whence] + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def close(self) -> None:
        self._stream.close()
        super().close()
