"""The pattern algebra: which keys a query counts, as values to combine, draw, cost and make block lists of."""

from .base import Pattern
from .block_lists import BlockLists, Widths, enumerate_lists
from .block_table import BlockTable, block_table
from .cost import block_of, shares
from .drawn import Explicit, Random, RandomBlocks
from .fast_lists import build_lists
from .lengths import Interval, Lengths, Structure
from .lowering import PatternLowering, lower_pattern, window_pattern
from .members import All, Causal, Chunked, Columns, Empty, Fixed, Global, Rows, Spans, Strided, Window
from .operators import Blocked, Intersection, Not, PerHead, Repeated, Shifted, Sum, Union, UpTo
from .serial import from_data, from_json, to_data, to_json
from .tabulated import Tabulated
from .tokens import Tokens

__all__ = [
    "All",
    "BlockLists",
    "BlockTable",
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
    "PatternLowering",
    "PerHead",
    "Random",
    "RandomBlocks",
    "Repeated",
    "Rows",
    "Shifted",
    "Spans",
    "Strided",
    "Structure",
    "Sum",
    "Tabulated",
    "Tokens",
    "Union",
    "UpTo",
    "Widths",
    "Window",
    "block_of",
    "block_table",
    "build_lists",
    "enumerate_lists",
    "from_data",
    "from_json",
    "lower_pattern",
    "shares",
    "to_data",
    "to_json",
    "window_pattern",
]
