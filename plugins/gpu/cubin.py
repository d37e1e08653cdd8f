"""Read what a kernel needs of the machine from its cubin, which is an ELF file: no tool and no GPU is needed for it.

The sections ``.nv.info…`` are lists of attributes; two of them say how many registers a thread has and how deep its
stack is, which is where the compiler puts registers that it has to spill.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from ..errors import PluginError

_ELF = b"\x7fELF\x02\x01"  # 64 bits, little-endian
_HAS_PAYLOAD = 4  # format of an attribute whose size stands in its second half-word
_REGISTERS, _FRAME, _MINIMUM_STACK = 0x2F, 0x11, 0x12


class InvalidCubin(PluginError, ValueError):
    """Machine code is not a cubin, or not one with the expected kernel."""


@dataclass(frozen=True)
class Resources:
    """What a kernel needs.

    Attributes:
        registers: Per thread.
        stack: Bytes of local memory per thread; 0 where nothing is spilled.
    """

    registers: int
    stack: int


def resources(cubin: bytes, entry: str) -> Resources:
    """What the kernel `entry` of a cubin needs.

    Raises:
        InvalidCubin: it is no cubin, has no such kernel, or does not say what it needs.
    """
    try:
        sections = _sections(cubin)
        number = _symbol(cubin, sections, entry.encode())
        facts: dict[int, int] = {}
        for name, _, start, size in sections:
            if name == b".nv.info":
                facts |= _attributes(cubin[start : start + size], number)
        return Resources(facts[_REGISTERS], max(facts.get(_FRAME, 0), facts.get(_MINIMUM_STACK, 0)))
    except (struct.error, IndexError, KeyError, OverflowError) as error:
        raise InvalidCubin(f"not a cubin with a kernel {entry!r}: {type(error).__name__} at {error}") from error


def _sections(cubin: bytes) -> list[tuple[bytes, int, int, int]]:
    """(name, type, offset, size) of every section."""
    if not cubin.startswith(_ELF):
        raise InvalidCubin("not a cubin: it does not begin like a 64-bit ELF file")
    (table,) = struct.unpack_from("<Q", cubin, 40)
    entry_size, count, names = struct.unpack_from("<HHH", cubin, 58)
    raw = [struct.unpack_from("<IIQQQQ", cubin, table + entry_size * index) for index in range(count)]
    start = raw[names][4]
    return [(_string(cubin, start + name), kind, offset, size) for name, kind, _, _, offset, size in raw]


def _string(cubin: bytes, start: int) -> bytes:
    return cubin[start : cubin.index(b"\0", start)] if b"\0" in cubin[start:] else b""


def _symbol(cubin: bytes, sections: list[tuple[bytes, int, int, int]], name: bytes) -> int:
    places = {section: (start, size) for section, _, start, size in sections}
    (start, size), (names, _) = places[b".symtab"], places[b".strtab"]
    for index in range(size // 24):
        (at,) = struct.unpack_from("<I", cubin, start + 24 * index)
        if _string(cubin, names + at) == name:
            return index
    raise KeyError(name.decode())


def _attributes(section: bytes, symbol: int) -> dict[int, int]:
    """Value by attribute, of those that are about `symbol`."""
    facts = {}
    at = 0
    while at + 4 <= len(section):
        form, attribute, size = struct.unpack_from("<BBH", section, at)
        at += 4
        if form != _HAS_PAYLOAD:
            continue
        if size == 8:
            about, value = struct.unpack_from("<II", section, at)
            if about == symbol:
                facts[attribute] = value
        at += size
    return facts
