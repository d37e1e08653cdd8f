"""Kernel packs: the same bytes every time, everything read back, and nothing damaged or forged gets through."""

from __future__ import annotations

import dataclasses
import random
import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from longspan.plugins.gpu.expressions import InvalidExpression, evaluate
from longspan.plugins.gpu.pack import InvalidPack, Pack, pack_id, read_pack, write_pack
from longspan.plugins.gpu.postfix import check, evaluate_postfix, to_postfix
from longspan.plugins.gpu.variants import Buffer, Parameter

from .packs import INDEX_START, kernel, pack, path, recipe, sealed, with_index

DATA = pack().to_bytes()
INDEX = DATA[INDEX_START : INDEX_START + struct.unpack_from("<Q", DATA, 24)[0]]


def test_what_is_written_is_read() -> None:
    assert Pack.from_bytes(DATA) == pack()
    assert pack().to_bytes() == DATA
    assert pack().architectures == ((80, "cubin"), (80, "ptx"))


def test_the_layout_is_the_documented_one() -> None:
    magic, version, _, size, index = struct.unpack_from("<8sIIQQ", DATA)
    assert (magic, version, size, index) == (b"\x89LSPACK\n", 1, len(DATA), len(INDEX))
    assert pack_id(DATA) == DATA[32:64].hex()
    assert INDEX.startswith(b"compiler\tcompiler 1\nkernel\tforward\t80\tcubin\tforward\t128\t1024\t64\t0\n")
    assert INDEX.endswith(b"launch\t1\nend\n")
    offsets = [int(line.split(b"\t")[1]) for line in INDEX.split(b"\n") if line.startswith(b"code\t")]
    assert [offset % 16 for offset in offsets] == [0, 0]
    assert DATA[offsets[0] : offsets[0] + 44] == kernel().code and DATA[offsets[1] :] == kernel(form="ptx").code


def test_files_are_written_whole_or_not_at_all(tmp_path: Path) -> None:
    file = tmp_path / "some.pack"
    write_pack(pack(), file)
    assert read_pack(file) == pack() and file.stat().st_mode & 0o777 == 0o644
    with pytest.raises(InvalidPack):
        write_pack(pack(kernels=(kernel(threads=33),)), file)
    file.with_name("folder").mkdir()
    with pytest.raises(OSError):
        write_pack(pack(), file.with_name("folder"))
    assert read_pack(file) == pack() and {entry.name for entry in tmp_path.iterdir()} == {"folder", "some.pack"}


def test_an_empty_pack_is_a_pack() -> None:
    nothing = Pack("compiler 1", (), ())
    assert Pack.from_bytes(nothing.to_bytes()) == nothing


def test_every_flipped_byte_is_refused() -> None:
    for position in range(len(DATA)):
        damaged = bytearray(DATA)
        damaged[position] ^= 1 << position % 8
        with pytest.raises(InvalidPack):
            Pack.from_bytes(bytes(damaged))


def test_every_truncation_and_every_extension_is_refused() -> None:
    for length in range(len(DATA)):
        with pytest.raises(InvalidPack, match="bytes long"):
            Pack.from_bytes(DATA[:length])
    with pytest.raises(InvalidPack, match="or has more"):
        Pack.from_bytes(DATA + b"\0")


def test_flipped_bytes_under_a_right_hash_are_refused_or_change_what_is_read() -> None:
    """Nobody can tell that a compiler's name was forged; but what is accepted is well-formed, and not the original."""
    generator = random.Random(0)
    for position in [*range(32), *range(INDEX_START, len(DATA))]:
        forged = bytearray(DATA)
        forged[position] ^= generator.randrange(1, 256)
        content = _read_or_refuse(sealed(bytes(forged)))
        assert content is None or content != pack()


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.data())
def test_forged_indexes_are_refused_or_well_formed(data: st.DataObject) -> None:
    lines = INDEX.split(b"\n")
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(lines) - 2))
        fields = lines[at].split(b"\t")
        field = data.draw(st.integers(0, len(fields) - 1))
        match data.draw(st.sampled_from(("replace", "drop", "add", "swap", "remove line", "repeat line"))):
            case "replace":
                fields[field] = data.draw(
                    st.sampled_from(
                        (b"", b"-1", b"00", b"1e9", b"9" * 18, b"9" * 40, b"S_q", b"+", b"none", b"Q", b" ")
                    )
                    | st.binary(max_size=12)
                )
            case "drop":
                del fields[field]
            case "add":
                fields.insert(field, b"1")
            case "swap":
                other = data.draw(st.integers(0, len(lines) - 2))
                lines[at], lines[other] = lines[other], lines[at]
                continue
            case "remove line":
                fields = []
            case "repeat line":
                fields = [lines[at] + b"\n" + lines[at]]
        lines[at : at + 1] = [b"\t".join(fields)] if fields else []
        if len(lines) < 3:
            break
    _read_or_refuse(with_index(DATA, b"\n".join(lines)))


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.binary(max_size=300), st.booleans())
def test_noise_is_refused(noise: bytes, as_index: bool) -> None:
    with pytest.raises(InvalidPack):
        Pack.from_bytes(with_index(DATA, noise) if as_index else noise)


def _read_or_refuse(data: bytes) -> Pack | None:
    try:
        content = Pack.from_bytes(data)
    except InvalidPack as error:
        assert len(str(error)) > 10
        return None
    assert content.to_bytes() == data
    return content


HEADERS = {
    "not a kernel pack": (0, b"\x88"),
    "format version 2": (8, struct.pack("<I", 2)),
    "contract version 0": (12, struct.pack("<I", 0)),
    "it is truncated, or has more": (16, struct.pack("<Q", len(DATA) + 16)),
    "an index of 18446744073709551615 bytes": (24, b"\xff" * 8),
    "SHA-256": (40, b"\0\0\0"),
}


@pytest.mark.parametrize("reason", HEADERS)
def test_a_wrong_header_is_refused(reason: str) -> None:
    position, value = HEADERS[reason]
    forged = DATA[:position] + value + DATA[position + len(value) :]
    with pytest.raises(InvalidPack, match=reason):
        Pack.from_bytes(sealed(forged) if position < 32 else forged)


LINES = {
    "is not lines of ASCII text": (b"compiler 1", b"compiler \xc3"),
    "expected 'compiler'": (b"compiler\t", b"composer\t"),
    "has 9 fields after 'kernel', expected 8": (b"\t64\t0\n", b"\t64\t0\t0\n"),
    "an empty field after 'kernel'": (b"cubin\tforward\t", b"cubin\t\t"),
    "'007' is not a whole number": (b"\t128\t", b"\t007\t"),
    "expected 'grid'": (b"grid\t", b"grip\t"),
    "'2' says whether the buffer is zeroed": (b"buffer\tparts\tfp32\t1", b"buffer\tparts\tfp32\t2"),
    "ends where a line 'end' belongs": (b"end\n", b""),
    "follows the end": (b"end\n", b"end\nend\n"),
}


@pytest.mark.parametrize("reason", LINES)
def test_a_wrong_line_is_refused(reason: str) -> None:
    old, new = LINES[reason]
    assert INDEX.count(old) >= 1
    with pytest.raises(InvalidPack, match=reason):
        Pack.from_bytes(with_index(DATA, INDEX.replace(old, new, 1)))


@pytest.mark.parametrize(("field", "by"), [(1, 16), (1, -16), (2, 1), (2, 2**40), (2, -44)])
def test_code_that_lies_elsewhere_is_refused(field: int, by: int) -> None:
    line = next(line for line in INDEX.split(b"\n") if line.startswith(b"code\t"))
    fields = line.split(b"\t")
    fields[field] = b"%0*d" % (len(fields[field]), int(fields[field]) + by)
    with pytest.raises(InvalidPack, match=r"expected at|differs|whole number|bytes long"):
        Pack.from_bytes(sealed(DATA.replace(line, b"\t".join(fields))))


def test_code_under_another_hash_is_refused() -> None:
    with pytest.raises(InvalidPack, match=r"forward: its code differs"):
        Pack.from_bytes(sealed(DATA[:-1] + b" "))


def _parameters(**changes: Any) -> tuple[Parameter, ...]:
    first, *rest = kernel().parameters
    return dataclasses.replace(first, **changes), *rest


ONE = {"kernels": (kernel(),), "recipes": (recipe(),)}
RULES: dict[str, dict[str, Any]] = {
    "architecture: '75'; allowed: 80": {"kernels": (kernel(architecture=75),)},
    "form: 'sass'; allowed: cubin, ptx": {"kernels": (kernel(form="sass"),)},
    "threads: '33'; allowed: multiples of 32": {"kernels": (kernel(threads=33),)},
    "shared memory: '232449'; allowed: 0 to 232448": {"kernels": (kernel(shared=232449),)},
    "registers: '256'": {"kernels": (kernel(registers=256),)},
    "entry: 'a b'": {"kernels": (kernel(entry="a b"),)},
    "type: 'float64'": {"kernels": (kernel(dtype="float64"),)},
    "head size: '257'": {"kernels": (kernel(head_size=257),)},
    "parameters: 'q'; allowed: each name once": {"kernels": (kernel(parameters=kernel().parameters[:1] * 2),)},
    "bytes of parameters: '4800'": {
        "kernels": (kernel(parameters=tuple(Parameter(f"p{i}", "*fp16", "input:Q") for i in range(600))),)
    },
    "its code is not a cubin": {"kernels": (kernel(code=b"MZ"),)},
    "not the text of PTX": {
        "kernels": (kernel(form="ptx", code=b"\0"),), "recipes": (recipe("ptx"),),
    },
    "parameter q: type: 'fp64'": {"kernels": (kernel(parameters=_parameters(type="fp64")),)},
    "parameter q: divisor: '3'": {"kernels": (kernel(parameters=_parameters(divisor=3)),)},
    "q: type: '.fp32'; allowed: .fp16": {"kernels": (kernel(parameters=_parameters(type="*fp32")),)},
    "q: input: 'sinks'; allowed: Q, K, V, attn_mask": {
        "kernels": (kernel(parameters=_parameters(meaning="input:sinks")),)
    },
    "q: output: 'lse'; allowed: Y": {"kernels": (kernel(parameters=_parameters(meaning="output:lse")),)},
    "q: buffer: 'other'; allowed: parts": {"kernels": (kernel(parameters=_parameters(meaning="buffer:other")),)},
    "q: stride: 'Y.3'": {"kernels": (kernel(parameters=_parameters(meaning="stride:Y.3")),)},
    "q: attribute: 'scale'": {"kernels": (kernel(parameters=_parameters(meaning="attribute:scale")),)},
    "q: 'nonsense' is no kind": {"kernels": (kernel(parameters=_parameters(meaning="nonsense:Q")),)},
    "q: 'S_q .' needs|lacks an operand": {"kernels": (kernel(parameters=_parameters(meaning="size:S_q *")),)},
    "grid x: 'rows' needs rows": {"kernels": (kernel(grid=("rows", "1", "1")),)},
    "grid x: 'W' needs W": {"kernels": (kernel(grid=("W", "1", "1")),)},
    "forward is not in order, or is there twice": {"kernels": (kernel(), kernel())},
    "nothing launches it": {"kernels": (kernel(), kernel("zweiter"))},
    "operator: 'Attention'": {"recipes": (recipe(operator="Attention"),)},
    "inputs: 'Q,V,K'": {"recipes": (recipe(inputs=("Q", "V", "K")),)},
    "inputs: 'Q,K'": {"recipes": (recipe(inputs=("Q", "K")),)},
    "outputs:": {"recipes": (recipe(outputs=("lse",)),)},
    "match: 'D'; allowed: D,D_v": {"recipes": (recipe(match=(("D", (8,)),)),)},
    "match D: '0'; allowed: 1 to 256": {"recipes": (recipe(match=(("D", (0,)), *recipe().match[1:])),)},
    "match is_causal: '2'": {
        "recipes": (recipe(match=(*recipe().match[:3], ("is_causal", (2,)), *recipe().match[4:])),)
    },
    "match dilation repeats one value": {"recipes": (recipe(match=(*recipe().match[:5], ("dilation", (2, 2)))),)},
    "match group: .*one value": {
        "recipes": (recipe(match=(*recipe().match[:2], ("group", (1, 2)), *recipe().match[3:])),)
    },
    "paths: 'none'": {"recipes": (recipe(paths=()),)},
    "condition of the last path: '0'": {"recipes": (recipe(paths=(path(condition="0"),)),)},
    "size: 'le'": {"recipes": (recipe(paths=(path(sizes=(("tiles", "1"), ("le", "1"))),)),)},
    "size: 'B'": {"recipes": (recipe(paths=(path(sizes=(("tiles", "1"), ("B", "1"))),)),)},
    "buffer parts: type: 'f64'": {"recipes": (recipe(paths=(path(buffers=(Buffer("parts", "f64", "1"),)),)),)},
    "launches: 'none'": {"recipes": (recipe(paths=(path(launches=()),)),)},
    "launch: '1'; allowed: numbers below 1": {"recipes": (recipe(paths=(path(launches=(1,)),)),)},
    "float16 cubin for sm_80'; allowed: float16 cubin for sm_90": {"recipes": (recipe(architecture=90),)},
}  # fmt: skip


@pytest.mark.parametrize("reason", RULES)
def test_a_broken_rule_is_refused_when_writing_and_when_reading(reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    content = Pack("compiler 1", **{**ONE, **RULES[reason]})
    with pytest.raises(InvalidPack, match=reason):
        content.to_bytes()
    with monkeypatch.context() as forger:
        forger.setattr("longspan.plugins.gpu.pack_rules.check_pack", lambda pack: None)
        forged = content.to_bytes()
    with pytest.raises(InvalidPack, match=reason):
        Pack.from_bytes(forged)


EXPRESSIONS = (
    "max(1, min(32, cdiv(2 * SMS, max(B * H_kv * tiles, 1)), cdiv(min(S_k, LEFT + RIGHT + 4), 256)))",
    "-(B - 3) + both(S_q, le(B, 2)) * (S_q // 7 - S_k % 5)",
    "S_q",
    "0",
)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.sampled_from(EXPRESSIONS), st.lists(st.integers(0, 2**20), min_size=8, max_size=8))
def test_postfix_has_the_value_of_the_expression(expression: str, values: list[int]) -> None:
    names = ("SMS", "B", "H_kv", "tiles", "S_q", "S_k", "LEFT", "RIGHT")
    sizes = dict(zip(names, values, strict=True))
    assert evaluate_postfix(to_postfix(expression), sizes) == evaluate(expression, sizes)


def test_postfix_is_what_the_documentation_says() -> None:
    assert to_postfix("cdiv(S_q, 128) * H_kv * B") == "S_q 128 cdiv H_kv * B *"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("S_q 0 //", "at least 1"), ("S_q 0 %", "at least 1"), ("0 1 - 2 cdiv", "at least 0"), ("S_q +", "lacks"),
        ("S_q S_q", "leaves 2"), ("", "no number, name or operator"), ("1  +", "no number"), ("01", "no number"),
        ("-1", "no number"), ("other", "needs other"), ("4611686018427387904", "too large"),
        ("1 " * 33, "more than 32"),
        ("1" + " 1 +" * 300, "601 tokens"), (f"{2**61} 4 *", "overflows"), ("S_q 2\t*", "no number"),
    ],
)  # fmt: skip
def test_bad_postfix_is_refused(text: str, reason: str) -> None:
    with pytest.raises(InvalidExpression, match=reason):
        evaluate_postfix(text.strip(" "), {"S_q": 5})


def test_the_largest_number_and_the_deepest_stack_are_allowed() -> None:
    check(str(2**62 - 1), set())
    check(" ".join(["1"] * 32 + ["+"] * 31), set())
