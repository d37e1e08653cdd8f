"""The pattern algebra: which keys a query counts, as values that can be combined, drawn, costed and made into block lists."""

from .base import Blocked, Intersection, Not, Pattern, PerHead, Repeated, Sum, Union
from .block_lists import BlockLists, Widths, enumerate_lists
from .drawn import Explicit, Random, RandomBlocks
from .lengths import Interval, Lengths, Structure
from .members import All, Causal, Chunked, Columns, Empty, Fixed, Global, Rows, Spans, Strided, Window
from .serial import from_data, from_json, to_data, to_json
from .tokens import Tokens

__all__ = [
    "All",
    "BlockLists",
    "Blocked",
    "Causal",
    "Chunked",
    "Columns",
    "Empty",
    "Explicit",
    "Fixed",
    "Global",
    "Intersection",
    "Interval",
    "Lengths",
    "Not",
    "Pattern",
    "PerHead",
    "Random",
    "RandomBlocks",
    "Repeated",
    "Rows",
    "Spans",
    "Strided",
    "Structure",
    "Sum",
    "Tokens",
    "Union",
    "Widths",
    "Window",
    "enumerate_lists",
    "from_data",
    "from_json",
    "to_data",
    "to_json",
]
