"""TensorBoard's event files: records with checksums, each an Event message in protobuf's wire format.

Only the few fields that scalars need are encoded here: the packages that write event files also import torch where it is installed, which
takes seconds and hundreds of megabytes. Formats: tensorflow/core/util/event.proto, summary.proto and lib/io/record_writer.h.
"""

import functools
import socket
import struct
import time
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

_START = 1  # SessionLog.SessionStatus
_POLYNOMIAL = 0x82F63B78  # of CRC-32C, reflected


class EventFile:
    """A new event file; every event is flushed when its method returns.

    Args:
      folder: exists.
      first_step: of the events to come. TensorBoard drops this step and later ones of earlier files.

    Raises:
      OSError: the disk is full or fails; so do the methods.
    """

    def __init__(self, folder: Path, first_step: int):
        path = folder / f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}.{first_step:06d}"
        self._file: BinaryIO = path.open("wb")
        self._write(_event(0, _text(3, b"brain.Event:2")))  # Event.file_version
        self._write(_event(first_step, _text(7, _integer(1, _START))))  # Event.session_log

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        """Adds the numbers of a step by name."""
        values = b"".join(_text(1, _text(1, name.encode()) + _float(2, number)) for name, number in numbers.items())
        self._write(_event(step, _text(5, values)))  # Event.summary

    def close(self) -> None:
        self._file.close()

    def _write(self, event: bytes) -> None:
        length = struct.pack("<Q", len(event))
        self._file.write(length + _checksum(length) + event + _checksum(event))
        self._file.flush()


def _event(step: int, content: bytes) -> bytes:
    return b"\x09" + struct.pack("<d", time.time()) + _integer(2, step) + content  # field 1: wall_time


def _integer(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _text(field: int, value: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(value)) + value


def _float(field: int, value: float) -> bytes:
    try:
        packed = struct.pack("<f", value)
    except OverflowError:  # beyond float32, as protobuf stores it
        packed = struct.pack("<f", float("inf") if value > 0 else float("-inf"))
    return _varint(field << 3 | 5) + packed


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


def _checksum(data: bytes) -> bytes:
    """CRC-32C, masked as TensorFlow's records have it."""
    table = _crc_table()
    crc = 0xFFFFFFFF
    for byte in data:
        crc = crc >> 8 ^ table[(crc ^ byte) & 0xFF]
    crc ^= 0xFFFFFFFF
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


@functools.cache
def _crc_table() -> tuple[int, ...]:
    table = []
    for crc in range(256):
        for _ in range(8):
            crc = crc >> 1 ^ (_POLYNOMIAL if crc & 1 else 0)
        table.append(crc)
    return tuple(table)
