"""What is known of an ahead-of-time plugin once its kernels are compiled: all that TensorRT asks, and no more.

The record travels as JSON in an attribute of the node it is for, so that whoever parses the model can define the plugin
without Triton.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any

from ..definition import DOMAIN
from ..errors import PluginError

RECORD_VERSION = 1
"""Raised whenever an older reader would misunderstand a record."""


class InvalidRecord(PluginError, ValueError):
    """The text is no record of an ahead-of-time plugin, or one of another version."""


@dataclass(frozen=True)
class AotKernel:
    """One kernel of a plugin, and how it is launched.

    Attributes:
        entry: Its name; no two kernels have the same.
        ptx: Text of its module. Its parameters are the plugin's inputs, `numbers` as int32, and its outputs.
        threads: Threads per block.
        shared: Bytes of dynamic shared memory.
        sizes: Further sizes by name, each an expression over those before it (``longspan.plugins.gpu.expressions``).
        grid: Size expressions.
        numbers: Meanings of the numbers: ``size:EXPRESSION`` or ``stride:OPERAND.AXIS``, as in kernel packs.
    """

    entry: str
    ptx: str
    threads: int
    shared: int
    sizes: tuple[tuple[str, str], ...]
    grid: tuple[str, str, str]
    numbers: tuple[str, ...]


@dataclass(frozen=True)
class AotPlugin:
    """A plugin with its kernels.

    Attributes:
        name: The operator's, with a digest of all that decides a result; also the op_type of its nodes.
        layout: Of Q, K, V and Y: ``"bhsd"`` or ``"bsd"``.
        heads: H_q.
        kv_heads: H_kv.
        head_size: D.
        v_head_size: D_v.
        operands: Formal names of the inputs, in order.
        results: Formal names of the outputs.
        types: TensorRT's names of the types of both.
        kernels: For tactics 1, 2, …: TensorRT takes the fastest.
    """

    name: str
    layout: str
    heads: int
    kv_heads: int
    head_size: int
    v_head_size: int
    operands: tuple[str, ...]
    results: tuple[str, ...]
    types: tuple[str, ...]
    kernels: tuple[AotKernel, ...]

    @property
    def plugin_id(self) -> str:
        """How ``tensorrt.plugin`` calls it: namespace and name."""
        return f"{DOMAIN}::{self.name}"

    def to_json(self) -> str:
        """The record as text."""
        return json.dumps({"version": RECORD_VERSION, **dataclasses.asdict(self)})

    @classmethod
    def from_json(cls, text: str) -> AotPlugin:
        """The record that `to_json` wrote.

        Raises:
            InvalidRecord: it is not one.
        """
        try:
            given = json.loads(text)
            version = given.pop("version")
            if version != RECORD_VERSION:
                raise InvalidRecord(f"a record of version {version}: this Longspan reads {RECORD_VERSION}")
            kernels = tuple(AotKernel(**_tuples(kernel)) for kernel in given.pop("kernels"))
            return cls(kernels=kernels, **_tuples(given))
        except (AttributeError, KeyError, TypeError, json.JSONDecodeError) as error:
            raise InvalidRecord(f"no record of an ahead-of-time plugin: {error}") from error


def _tuples(values: dict[str, Any]) -> dict[str, Any]:
    """JSON's lists as the tuples that the records hold."""

    def converted(value: Any) -> Any:
        return tuple(converted(item) for item in value) if isinstance(value, list) else value

    return {name: converted(value) for name, value in values.items()}
