"""Which operators compute in the narrow type, which in float32, and why: the table of `convert_precision`."""

from __future__ import annotations

import enum
from dataclasses import dataclass


class Group(enum.Enum):
    """How the type of a node is decided."""

    CONTRACTION = "contraction"
    """Sums of products, accumulated in float32 by every runtime: the narrow type."""
    ELEMENTWISE = "elementwise"
    """The narrow type, unless an operand has to stay float32."""
    MOVEMENT = "movement"
    """Copies numbers: the type of what it copies."""
    COMPARISON = "comparison"
    """Makes no floating-point number: the type of what it compares."""
    WIDE = "wide"
    """Always float32."""
    CONTROL = "control"
    """Holds graphs: each of their values has a type of its own."""


class Pull(enum.Enum):
    """How far a float32 operator pulls the nodes before it to float32, so that its operands are not rounded first."""

    NONE = "none"
    SQUARE = "square"
    """The square of what a norm measures, where it is a product of a value with itself."""
    ALL = "all"
    """Nodes that serve it alone, whatever they add up: scale, bias and mask of attention scores."""
    ANGLE = "angle"
    """Everything as far as the first contraction of activations: an angle is a large number whose fraction counts."""


@dataclass(frozen=True)
class Rule:
    """What is known of an operator.

    Attributes:
        group: How its type is decided.
        reason: Why it is float32; empty where it need not be.
        statistic: Whether its result may leave the narrow type's range, so that elementwise nodes on it are float32
            until data is multiplied with it, or two of them are divided.
        pull: How far it pulls what comes before.
        keeps_size: Whether a result is as large as the operands: a mask of -3e38 is one still.
    """

    group: Group
    reason: str = ""
    statistic: bool = False
    pull: Pull = Pull.NONE
    keeps_size: bool = False


SOFTMAX = "softmax: a sum of exponentials over many keys"
NORM = "norm: squares overflow float16 from 256 on, and epsilons vanish in it"
SUM = "a sum of many terms: rounded at every step in a narrow accumulator"
RANGE = "results leave the narrow type's range, or lose their relative accuracy"
ANGLE = "angles: rounding a large angle changes its sine completely"
POSITION = "positions: float16 holds integers up to 2048 only, bfloat16 up to 256"
INDEX = "depends on positions, masks and constants alone: computed once, and not for every channel"
CONSTANT = "a constant operand beyond the narrow type's range"
STATISTIC = "an operand is a statistic of a norm or softmax, or another value that may leave the narrow type's range"
UNNORMALISED = "contracts sums or exponentials that nothing has normalised yet"
STATE = "recurrent state: rounding errors add up from step to step"
SEQUENCE = "sequences and optional values keep the type of what is put in"
QUANTISED = "scales of quantised tensors are float32"
TYPED = "the type of its result is an attribute"
WHOLE_ATTENTION = "its softmax has the type of its operands, and TensorRT takes no softmax_precision"
UNCLASSIFIED = "not known to be accurate in a narrow type"

_T_CONTRACTION = Rule(Group.CONTRACTION)
_T_ELEMENTWISE = Rule(Group.ELEMENTWISE, keeps_size=True)
_BOUNDED = Rule(Group.ELEMENTWISE)
_MOVEMENT = Rule(Group.MOVEMENT, keeps_size=True)
_COMPARISON = Rule(Group.COMPARISON)
_CONTROL = Rule(Group.CONTROL, keeps_size=True)

_NAMES: dict[Rule, str] = {
    _T_CONTRACTION: "MatMul Gemm Conv ConvTranspose DeformConv Einsum",
    _T_ELEMENTWISE: (
        "Add Sub Mul Div Neg Abs Relu LeakyRelu PRelu Elu Celu Selu ThresholdedRelu Shrink HardSwish Gelu Swish Mish "
        "Min Max Sum Mean Clip Where Floor Ceil Round Mod Dropout RotaryEmbedding"
    ),
    _BOUNDED: "Sigmoid HardSigmoid Tanh Erf Sign Softsign Hardmax",
    _MOVEMENT: (
        "Identity Reshape Flatten Squeeze Unsqueeze Transpose Concat Split Slice Gather GatherElements GatherND "
        "Scatter ScatterElements ScatterND TensorScatter Expand Tile Pad Compress ReverseSequence Trilu DepthToSpace "
        "SpaceToDepth CenterCropPad Col2Im OneHot TopK ReduceMax ReduceMin MaxPool GlobalMaxPool Unique"
    ),
    _COMPARISON: ("Equal Less LessOrEqual Greater GreaterOrEqual IsNaN IsInf ArgMax ArgMin NonZero Shape Size"),
    _CONTROL: "If Loop Scan",
    Rule(Group.WIDE, SOFTMAX, pull=Pull.ALL): "Softmax LogSoftmax",
    Rule(Group.WIDE, WHOLE_ATTENTION): "Attention",
    Rule(Group.WIDE, SOFTMAX, statistic=True, pull=Pull.ALL): "Exp ReduceLogSumExp",
    Rule(Group.WIDE, NORM): (
        "LayerNormalization RMSNormalization GroupNormalization InstanceNormalization BatchNormalization "
        "MeanVarianceNormalization LpNormalization LRN"
    ),
    Rule(Group.WIDE, NORM, statistic=True, pull=Pull.SQUARE): "Sqrt ReduceL2 ReduceSumSquare",
    Rule(Group.WIDE, SUM, statistic=True, pull=Pull.SQUARE, keeps_size=True): (
        "ReduceSum ReduceMean ReduceL1 ReduceLogSum ReduceProd CumSum CumProd GlobalAveragePool AveragePool LpPool "
        "GlobalLpPool"
    ),
    Rule(Group.WIDE, RANGE, statistic=True, pull=Pull.SQUARE): "Pow Reciprocal Log Softplus Sinh Cosh Tan",
    Rule(Group.WIDE, ANGLE, pull=Pull.ANGLE): "Sin Cos Asin Acos Atan Asinh Acosh Atanh",
    Rule(Group.WIDE, POSITION, statistic=True): "Range",
    Rule(Group.WIDE, STATE): "RNN LSTM GRU LinearAttention CausalConvWithState",
    Rule(Group.WIDE, QUANTISED): "QuantizeLinear DequantizeLinear DynamicQuantizeLinear QLinearMatMul QLinearConv",
    Rule(Group.WIDE, TYPED): (
        "RandomNormal RandomNormalLike RandomUniform RandomUniformLike Bernoulli Multinomial EyeLike HannWindow "
        "HammingWindow BlackmanWindow MelWeightMatrix"
    ),
    Rule(Group.WIDE, INDEX): "Cast ConstantOfShape Constant",
    Rule(Group.WIDE, SEQUENCE): (
        "SequenceConstruct SequenceInsert SequenceErase SequenceAt SequenceEmpty SequenceLength SplitToSequence "
        "ConcatFromSequence Optional OptionalGetElement OptionalHasElement"
    ),
}

RULES: dict[str, Rule] = {name: rule for rule, names in _NAMES.items() for name in names.split()}
"""The rule of every standard operator that is classified."""

_UNCLASSIFIED = Rule(Group.WIDE, UNCLASSIFIED)


def rule_of(op_type: str, reduction: str = "none") -> Rule:
    """The rule of a standard operator; float32 for those that nobody has classified, which costs time only.

    Args:
        op_type: The operator.
        reduction: What an operator that scatters does with entries that meet; sums are sums.
    """
    return RULES["ReduceSum"] if reduction in ("add", "mul") else RULES.get(op_type, _UNCLASSIFIED)
