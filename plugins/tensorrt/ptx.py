"""What PTX says of a kernel's parameters, and how those are dropped that the launcher does not pass."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import PluginError

_BYTES = {"b64": 8, "u64": 8, "s64": 8, "f64": 8, "b32": 4, "u32": 4, "s32": 4, "f32": 4}


class UnusablePtx(PluginError):
    """PTX is not what Triton writes, or uses a parameter that is to be dropped."""


@dataclass(frozen=True)
class PtxParameter:
    """One parameter of an entry.

    Attributes:
        name: Its symbol.
        bytes: Its size.
        declaration: Its text, without the comma.
    """

    name: str
    bytes: int
    declaration: str


def parameters(ptx: str, entry: str) -> tuple[PtxParameter, ...]:
    """The parameters of the kernel `entry`, in order.

    Raises:
        UnusablePtx: there is no such kernel, or more than one, or a parameter is no number or pointer.
    """
    begin, end = _list_of(ptx, entry)
    found = []
    for declaration in filter(None, (text.strip() for text in ptx[begin:end].split(","))):
        words = declaration.split()
        kind = words[1].lstrip(".") if len(words) > 2 else ""
        if words[0] != ".param" or kind not in _BYTES:
            raise UnusablePtx(f"{entry} declares {declaration!r}: only numbers and pointers were expected")
        found.append(PtxParameter(words[-1], _BYTES[kind], declaration))
    return tuple(found)


def drop_trailing(ptx: str, entry: str, expected: Sequence[int]) -> str:
    """The kernel `entry` without the parameters after the expected ones.

    Triton ends every kernel's parameters with pointers to scratch memory. A launcher that does not know of them passes
    fewer arguments than the kernel declares, and the driver then reads what lies behind the array of arguments. Where
    the kernel never reads them they can go.

    Args:
        ptx: Text of the module, with this one kernel.
        entry: Its name.
        expected: Bytes of each parameter that is passed.

    Raises:
        UnusablePtx: the first parameters are others than expected, or a dropped one is used.
    """
    declared = parameters(ptx, entry)
    kept, dropped = declared[: len(expected)], declared[len(expected) :]
    sizes = [parameter.bytes for parameter in kept]
    if sizes != list(expected):
        raise UnusablePtx(f"{entry} has parameters of {sizes} bytes; the launcher passes {list(expected)}")
    begin, end = _list_of(ptx, entry)
    rest = ptx[:begin] + ptx[end:]
    for parameter in dropped:
        if re.search(rf"(?<![\w$]){re.escape(parameter.name)}(?![\w$])", rest):
            raise UnusablePtx(
                f"{entry} uses {parameter.name}, which the launcher does not pass; a kernel for it needs no scratch "
                "memory"
            )
    listed = ",\n".join(f"\t{parameter.declaration}" for parameter in kept)
    return f"{ptx[:begin]}\n{listed}\n{ptx[end:]}"


def renamed(ptx: str, entry: str, name: str) -> str:
    """The module with its kernel `entry`, and the parameters that are called after it, under another name."""
    return re.sub(rf"(?<![\w$]){re.escape(entry)}(?=(?:_param_\d+)?(?![\w$]))", name, ptx)


def _list_of(ptx: str, entry: str) -> tuple[int, int]:
    """Where the parameter list of `entry` begins and ends, without its brackets."""
    entries = re.findall(r"\.entry\s+([\w$]+)", ptx)
    if entries != [entry]:
        raise UnusablePtx(f"the module has the kernels {', '.join(entries) or 'none'}; expected {entry} alone")
    start = re.search(rf"\.entry\s+{re.escape(entry)}\s*\(", ptx)
    end = ptx.find(")", start.end()) if start else -1
    if start is None or end < 0:
        raise UnusablePtx(f"{entry} has no list of parameters")
    return start.end(), end
