"""The patterns of published systems, each with the place that defines it.

They are ordinary patterns: combine them, take them apart, write your own like them.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import InvalidRequest
from .base import Pattern, whole
from .drawn import Random
from .members import All, Causal, Chunked, Columns, Fixed, Global, Rows, Strided, Window
from .operators import Blocked, PerHead, Shifted, UpTo
from .tokens import Tokens


def sliding_window(left: int, right: int, *, dilation: int | Sequence[int] = 1) -> Pattern:
    """A band around each query (Beltagy et al. 2020, Longformer, section 3.1, figures 2b and 2c).

    Args:
        left: Keys before the query's own; -1 is no bound.
        right: Keys after it.
        dilation: Step between keys: one, or one per query head.
    """
    if isinstance(dilation, int):
        return Window(left, right, dilation)
    return PerHead(tuple(Window(left, right, step) for step in dilation))


def longformer(attention_window: int, *, global_tokens: int = 0, dilation: int | Sequence[int] = 1) -> Pattern:
    """Half of `attention_window` on each side, and global tokens at the start (Longformer, section 3.1).

    A key that is global and in the window counts once. ``transformers`` gives the rows of global tokens projections
    of their own, which no pattern can say; see ``global_Q`` of SlidingWindowAttention.

    Args:
        attention_window: Keys around the query's own, an even number.
        global_tokens: Tokens at the start that see, and are seen by, all.
        dilation: Step between keys: one, or one per query head.

    Raises:
        InvalidRequest: the window is odd.
    """
    if attention_window % 2:
        raise InvalidRequest(f"attention_window = {attention_window}: must be even, half of it lies on each side")
    window = sliding_window(attention_window // 2, attention_window // 2, dilation=dilation)
    return window | Global(global_tokens) if global_tokens else window


def chunked_causal(size: int) -> Pattern:
    """Keys up to the query's own within its chunk (Llama 4's local layers)."""
    return Chunked(size) & Causal()


def big_bird(block: int, random: int = 0) -> Pattern:
    """What ``transformers`` computes for BigBird's block-sparse attention in evaluation.

    The first and the last block see all and are seen by all, the others see themselves and their neighbours. Every
    "random" block is then block 0, so that all rows but the first and the last count it `random` times more
    (``BigBirdBlockSparseAttention``, whose ``_bigbird_block_rand_mask`` returns zeros outside of training). The text's
    length is to be a multiple of the block; ``transformers`` needs more than ``5 + 2 · random`` blocks.

    Args:
        block: Tokens in a block.
        random: Random blocks per row, ``num_random_blocks``.
    """
    ends = Tokens(first=1, last=1)
    blocks = Window(1, 1) | Global(ends)
    if not random:
        return Blocked(block, blocks)
    return Blocked(block, blocks + (Columns(Tokens(first=1)) & ~Rows(ends)) * random)


def big_bird_of_any_length(block: int, random: int = 0) -> Pattern:
    """`big_bird`, and full attention to texts of at most ``5 + 2 · random`` blocks, as ``transformers`` has it.

    Args:
        block: Tokens in a block.
        random: Random blocks per row, ``num_random_blocks``.
    """
    whole("big_bird_of_any_length", "random", random, 0)
    sparse = big_bird(block, random)
    assert isinstance(sparse, Blocked)
    return Blocked(block, UpTo(5 + 2 * random, All(), sparse.of))


def big_bird_itc(
    block: int, *, random: int = 3, window: int = 3, heads: int = 1, seed: int = 0, causal: bool = False
) -> Pattern:
    """BigBird with internal global tokens (Zaheer et al. 2020, section 2 and appendix D): window, ends, random blocks.

    Random blocks are those that the row does not see anyway, drawn anew for every row and head.

    Args:
        block: Tokens in a block.
        random: Random blocks per row.
        window: Blocks in the window, an odd number.
        heads: Query heads, each with blocks of its own; 1 draws once for all.
        seed: Which draw.
        causal: Whether keys after the query are hidden; random blocks may then be hidden too.
    """
    whole("big_bird_itc", "heads", heads, 1)
    side = _half("window", window)
    seen = Window(side, side) | Global(Tokens(first=1, last=1))
    drawn = PerHead(tuple(Random(random, seed + head, seen) for head in range(heads)))
    pattern = Blocked(block, seen | drawn if random else seen)
    return pattern & Causal() if causal else pattern


def big_bird_etc(
    block: int, global_tokens: int, *, random: int = 0, window: int = 3, heads: int = 1, seed: int = 0
) -> Pattern:
    """BigBird with extra global tokens before the text (Zaheer et al. 2020, section 2), which see and are seen by all.

    Args:
        block: Tokens in a block; blocks are counted after the global tokens.
        global_tokens: Extra tokens at the start.
        random: Random blocks per row.
        window: Blocks in the window, an odd number.
        heads: Query heads, each with random blocks of its own.
        seed: Which draw.
    """
    whole("big_bird_etc", "heads", heads, 1)
    side = _half("window", window)
    seen = Window(side, side)
    drawn = PerHead(tuple(Random(random, seed + head, seen) for head in range(heads)))
    return Global(global_tokens) | Shifted(global_tokens, Blocked(block, seen | drawn if random else seen))


def sparse_transformer_strided(stride: int, *, heads: int = 0) -> Pattern:
    """Strided factorised attention (Child et al. 2019, section 4.3): the last `stride` keys, and every `stride`-th.

    ``A(1) = {max(0, i - l), …, i}`` and ``A(2) = {j ≤ i: (i - j) mod l = 0}``.

    Args:
        stride: l, tokens.
        heads: 0 merges both sets in every head; else the first half of that many heads has A(1), the second A(2)
            (section 5.2).
    """
    return _factorised(Window(stride, 0), Strided(stride) & Causal(), heads)


def sparse_transformer_fixed(stride: int, summary: int = 1, *, heads: int = 0) -> Pattern:
    """Fixed factorised attention (Child et al. 2019, section 4.3): the own block, and the end of every block.

    ``A(1) = {j ≤ i: ⌊j/l⌋ = ⌊i/l⌋}`` and ``A(2) = {j ≤ i: j mod l ≥ l - c}``.

    Args:
        stride: l, tokens in a block.
        summary: c, keys at the end of each block that all later queries see.
        heads: 0 merges both sets in every head; else the first half of that many heads has A(1), the second A(2)
            (section 5.2).
    """
    if not heads:
        return Fixed(stride, summary) & Causal()
    whole("sparse_transformer_fixed", "summary", summary, 1)
    columns = Columns(Tokens(period=stride, residues=tuple(range(stride - summary, stride))))
    return _factorised(Chunked(stride) & Causal(), columns & Causal(), heads)


def local_attention(reach: int) -> Pattern:
    """Keys at a distance of at most `reach` (Su 2019, "local self attention")."""
    return Window(reach, reach)


def atrous_attention(step: int) -> Pattern:
    """Keys at distances that are multiples of `step` (Su 2019, "atrous self attention")."""
    return Strided(step)


def local_atrous_attention(step: int) -> Pattern:
    """Keys at a distance of at most `step` or a multiple of it (Su 2019, "sparse self attention")."""
    return Window(step, step) | Strided(step)


def phi3_small(
    block: int = 64, *, local_blocks: int = 16, stride: int = 8, heads: int = 32, alike: bool = False
) -> Pattern:
    """Blocks near the query, and vertical stripes of blocks that differ between heads (Phi-3-small; causal).

    Block k is in a stripe of head h where ``(k + h · step + 1) % stride == 0`` with ``step = max(1, stride // heads)``:
    ``blocksparse_block_size``, ``blocksparse_num_local_blocks``, ``blocksparse_vert_stride`` and
    ``blocksparse_homo_head_pattern`` of its configuration. ONNX Runtime's SparseAttention is made for this pattern.

    Args:
        block: Tokens in a block.
        local_blocks: Blocks up to the query's own, itself included.
        stride: Blocks from stripe to stripe.
        heads: Query heads.
        alike: Whether all heads have the stripes of head 0.
    """
    for name, value in (("local_blocks", local_blocks), ("stride", stride), ("heads", heads)):
        whole("phi3_small", name, value, 1)
    step = max(1, stride // heads)
    shifts = [0] if alike else [head * step for head in range(heads)]
    stripes = [Columns(Tokens(period=stride, residues=(-(shift + 1) % stride,))) for shift in shifts]
    # Stripes repeat after `stride` heads at the latest; PerHead goes round, so that equal ones need no second list.
    once = len(dict.fromkeys(stripes))
    repeats = all(stripe == stripes[head % once] for head, stripe in enumerate(stripes))
    of = PerHead(tuple(stripes[:once] if repeats else stripes))
    return Blocked(block, Window(local_blocks - 1, 0) | of) & Causal()


def _factorised(one: Pattern, other: Pattern, heads: int) -> Pattern:
    if not heads:
        return one | other
    if heads < 2 or heads % 2:
        raise InvalidRequest(f"heads = {heads}: must be 0 (both sets in every head) or an even number of heads")
    return PerHead((one,) * (heads // 2) + (other,) * (heads // 2))


def _half(name: str, blocks: int) -> int:
    if blocks < 1 or blocks % 2 == 0:
        raise InvalidRequest(f"{name} = {blocks}: must be an odd number of blocks, the query's own in the middle")
    return blocks // 2
