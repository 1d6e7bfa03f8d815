"""What the compiler makes of the kernels is not worse than committed, and the gate can see that it is.

Compiling needs a process without the interpreter, which conftest chooses where there is no GPU.
"""

import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import triton
import triton.language as tl

from bench import static

ROOT = Path(__file__).resolve().parents[2]


def compiling(*command: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, *command],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
def test_no_kernel_compiles_to_worse_code() -> None:
    result = compiling("-m", "bench.static", "--check")
    print(result.stderr)  # the waivers, which -rP shows
    assert result.returncode == 0, result.stdout + result.stderr[-3000:]


def test_the_tested_triton_has_rows() -> None:
    pinned = re.search(r"^triton==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    rows = list(csv.DictReader(static.TABLE.read_text().splitlines()))
    assert pinned and pinned[1] in {row["triton"] for row in rows}
    assert tuple(rows[0]) == static.FIELDS
    assert rows == sorted(rows, key=static._key)


# --- The gate can fail: kernels with one fault each ------------------------------------------------


@triton.jit
def _copy_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + index, tl.load(x_ptr + index, mask=index < n), mask=index < n)


@triton.jit
def _double_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + index, 2 * tl.load(x_ptr + index, mask=index < n), mask=index < n)


@triton.jit
def _product_kernel(
    x_ptr, w_ptr, y_ptr, k, GATED: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr
):
    rows, columns, inner = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    total = tl.zeros([M, N], tl.float32)
    for start in range(0, k, K):
        x = tl.load(x_ptr + rows[:, None] * k + start + inner[None, :])  # [M, K]
        w = tl.load(w_ptr + columns[:, None] * k + start + inner[None, :])  # [N, K]
        if GATED:  # through registers on its way to shared memory, so every product is waited for
            w = tl.exp2(w.to(tl.float32)).to(tl.bfloat16)
        total = tl.dot(x, w.T, total)
    tl.store(y_ptr + rows[:, None] * N + columns[None, :], total.to(tl.bfloat16))


def static_cases() -> list[tuple[Any, ...]]:
    copy = {"x_ptr": "*fp32", "y_ptr": "*fp32", "n": "i32", "BLOCK": "constexpr"}
    product = dict.fromkeys(("x_ptr", "w_ptr", "y_ptr"), "*bf16") | {"k": "i32"}
    product |= dict.fromkeys(("GATED", "M", "N", "K"), "constexpr")
    aligned = {(i,): [["tt.divisibility", 16]] for i in range(4)}
    all_three = {place: aligned[place] for place in list(aligned)[:3]}

    def case(name: str, gated: bool, m: int, n: int, k: int, **options: Any) -> tuple[Any, ...]:
        constants = {"GATED": gated, "M": m, "N": n, "K": k}
        return (name, "bf16", _product_kernel, product, constants, aligned, options)

    block = {"BLOCK": 1024}
    return [
        ("aligned copy", "fp32", _copy_kernel, copy, block, all_three, {"num_warps": 4}, 8),
        ("misaligned copy", "fp32", _copy_kernel, copy, block, {}, {"num_warps": 4}),
        ("no block", "fp32", _copy_kernel, copy, {}, {}, {}),
        case("product", False, 128, 128, 64),
        case("gated product", True, 128, 128, 64),
        case("waived product", True, 128, 128, 64, waive=["serialised_waits"]),
        case("elsewhere waived product", True, 128, 128, 64, waive=["serialised_waits@sm_80"]),
        case("spilling product", False, 256, 256, 64, num_stages=2),
        case("narrow product", False, 32, 64, 64),
        case("greedy product", False, 128, 128, 128, num_warps=8, num_stages=7),
    ]


def sources() -> list[str]:
    """Of cases that differ in one thing each."""
    case = static.StaticCase(*static_cases()[0])
    changes: list[dict[str, Any]] = [
        {},
        {"function": _double_kernel},
        {"constexprs": {"BLOCK": 512}},
        {"attributes": {}},
        {"options": {"num_warps": 8}},
        {"options": {"num_warps": 4, "waive": ["hgmma"]}},
        {"gates": 4},
    ]
    return [
        static.source_of(case, 80),
        *(static.source_of(case._replace(**c), 90) for c in changes),
    ]


def test_faults_are_found() -> None:
    result = compiling(__file__)
    assert result.returncode == 0, result.stderr
    rows, broken, sources = json.loads(result.stdout)
    assert len({*sources}) == len(sources)
    found = {(line.split(" [")[0], line.split(": ")[1]) for line in broken}
    assert found == {
        ("misaligned copy", "vector_loads"),
        ("no block", "compiles"),
        ("gated product", "serialised_waits"),
        ("elsewhere waived product", "serialised_waits"),
        ("spilling product", "spill_bytes"),
        ("spilling product", "serialised_waits"),
        ("narrow product", "hgmma"),
        ("greedy product", "shared_bytes"),
    }
    assert len(found) == len(broken)
    assert "waived waived product [bf16] sm_90: serialised_waits" in result.stderr
    assert "waived elsewhere" not in result.stderr
    numbers = {row["kernel"]: row for row in rows}
    assert {name for name, row in numbers.items() if row["source"]} == {"aligned copy", "product"}
    _, unchanged, again = result.stderr.partition("2 unchanged since their rows were made")
    assert unchanged
    for case in static_cases():
        assert (f"/8 {case[0]} [" in again) == (case[0] not in ("aligned copy", "product"))
    assert "no block" not in numbers
    copy, product = numbers["aligned copy"], numbers["product"]
    assert copy["vector_loads"] == "true" and copy["hgmma"] == 0
    whole = copy["instructions"] / 8  # it has no loop
    assert float(copy["instructions_per_gate"]) == pytest.approx(whole, abs=0.1)
    assert product["hgmma"] > 0 and product["instructions_per_gate"] == ""
    assert product["shared_bytes"] == 3 * (128 + 128) * 64 * 2  # three stages of both operands
    assert numbers["spilling product"]["registers"] == 255


# --- What is read from the compiler's output -------------------------------------------------------

SASS = """
 Function f:
  REG:255 STACK:8 SHARED:1024 LOCAL:16 CONSTANT[0]:584 TEXTURE:0 SURFACE:0 SAMPLER:0
        Function : f
        /*0000*/                   LDC R1, c[0x0][0x28] ;              /* 0x00000a00ff017b82 */
                                                                       /* 0x000e220000000800 */
        /*0010*/              @!P0 LDG.E.128 R4, desc[UR4][R2.64] ;    /* 0x0000000402048981 */
        /*0020*/             @!UPT UIADD3 URZ, URZ, URZ, URZ ;         /* 0x0000003f3f3ff290 */
        /*0030*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24, gsb0 ;
        /*10040*/                  BRA `(.L_x_1);                      /* 0xfffffffc00fc7947 */
        /*10050*/                  NOP;                                /* 0x0000000000007918 */
"""


def test_opcodes_and_spills() -> None:
    codes = ["LDC", "LDG.E.128", "UIADD3", "HGMMA.64x128x16.F32.BF16", "BRA"]
    assert static.opcodes(SASS) == codes
    assert static.spill_bytes(SASS) == 24


@pytest.mark.parametrize(
    ("code", "reads", "writes"),
    [
        ("LDG.E.128", True, False),
        ("LDG.E.128.CONSTANT", True, False),
        ("LDG.E.ENL2.256", True, False),
        ("LDGSTS.E.BYPASS.128", True, False),
        ("UTMALDG.2D", True, False),
        ("LDG.E.64", False, False),
        ("LDG.E", False, False),
        ("LDGDEPBAR", False, False),
        ("LDS.128", False, False),
        ("STG.E.128", False, True),
        ("STG.E.64", False, False),
        ("UTMASTG.2D", False, True),
    ],
)
def test_vector_accesses(code: str, reads: bool, writes: bool) -> None:
    tensor = "%x = tt.load %p, %m : tensor<1024x!tt.ptr<f32>, #blocked> loc(#loc1)"
    scalar = "%x = tt.load %p : !tt.ptr<i64> loc(#loc1)"
    assert static.vector_loads(["LDC", code], tensor) == reads
    assert static.vector_loads(["LDC", code], scalar) == writes


LOOP = """module {
  tt.func public @f(%n: i32 loc("n"(#loc))) attributes {noinline = false} {
    %0 = scf.for %i = %a to %n step %b iter_args(%acc = %c) -> (tensor<64x64xf32, #mma>) : i32 {
      %1 = ttng.warp_group_dot %x, %y, %acc {inputPrecision = 0 : i32, isAsync = ASYNC} : t
      %2 = scf.if %p -> (i32) {
        %3:3 = ttng.warp_group_dot_wait %1, %x, %y {pendings = INSIDE : i32} : t
        scf.yield %3 : i32
      } else {
        scf.yield %4 : i32
      } loc(#loc)
    } {tt.warp_specialize} loc(#loc)
    %5 = ttng.warp_group_dot_wait %0 {pendings = AFTER : i32} : t
  } loc(#loc)
} loc(#loc)
"""


def loop(asynchronous: str = "true", inside: int = 1, after: int = 0) -> str:
    text = LOOP.replace("ASYNC", asynchronous)
    return text.replace("INSIDE", str(inside)).replace("AFTER", str(after))


def test_serialised_waits() -> None:
    assert static.serialised_waits("") == 0
    assert static.serialised_waits(loop()) == 0  # the wait after the loop is none
    assert static.serialised_waits(loop(inside=0)) == 1
    assert static.serialised_waits(loop(asynchronous="false")) == 1
    assert static.serialised_waits(loop(inside=0).replace("scf.for", "scf.other")) == 0
    lines = loop().splitlines()
    for head in (["scf.for %t {"], ["scf.while (%t = %u) : (i32) -> i32 {", "} do {"]):
        persistent = "\n".join([*lines[:2], *head, *lines[2:-2], "}", *lines[-2:]])
        assert static.serialised_waits(persistent) == 0  # the wait drains the inner loop
        assert static.serialised_waits(persistent.replace("pendings = 1", "pendings = 0")) == 1
    stored = loop(inside=0).replace("scf.yield %3", "tt.store %p, %q : t\n        scf.yield %3")
    assert static.serialised_waits(stored) == 0  # the end of a tile
    assert static.serialised_waits(stored.replace("isAsync = true", "isAsync = false")) == 1
    while_ = loop(inside=0).replace("scf.for", "scf.while (%t = %u) {\n} do {\n%v = scf.if")
    assert static.serialised_waits(while_.replace("} {tt.", "}\n} {tt.")) == 1


@pytest.mark.parametrize(
    ("dot", "wanted"),
    [
        (
            "tt.dot %a, %b, %c, inputPrecision = tf32 : tensor<64x32xbf16> * tensor<32x64xbf16>",
            True,
        ),
        ("tt.dot %a, %b, %c : tensor<64x32xf16> * tensor<32x64xf16> -> tensor<64x64xf32>", True),
        ("tt.dot %a, %b, %c, inputPrecision = tf32 : tensor<64x32xf32> * tensor<32x64xf32>", True),
        ("tt.dot %a, %b, %c : tensor<64x32xf32> * tensor<32x64xf32> -> tensor<64x64xf32>", False),
        ("arith.addf %a, %b : tensor<64x32xbf16>", False),
    ],
)
def test_who_wants_tensor_cores(dot: str, wanted: bool) -> None:
    assert static.wants_tensor_cores(f"%0 = {dot} loc(#loc)") == wanted


# --- Against the committed rows --------------------------------------------------------------------


def row(**changes: Any) -> dict[str, Any]:
    values = ("k", "c", "sm_90", 100, 0, 1024, 1000, "", 8, 0, "true", "3.8.0", "f00d")
    return dict(zip(static.FIELDS, values, strict=True)) | changes


@pytest.mark.parametrize(
    ("change", "worse"),
    [
        ({}, False),
        ({"registers": 99, "instructions": 1020, "shared_bytes": 512, "hgmma": 4}, False),
        ({"registers": 101}, True),
        ({"spill_bytes": 4}, True),
        ({"shared_bytes": 1025}, True),
        ({"instructions": 1021}, True),
        ({"serialised_waits": 1}, True),
        ({"vector_loads": "false"}, True),
    ],
)
def test_a_row_may_not_get_worse(change: dict[str, Any], worse: bool) -> None:
    committed = {field: str(value) for field, value in row().items()}  # as read from the table
    problems = static.compare([row(**change)], [committed])
    assert len(problems) == worse
    assert all(field in problems[0] for field in change if worse)


def test_rows_and_cases_belong_together() -> None:
    missing, stale = static.compare([row(config="new")], [row(config="old")])
    assert "[new] sm_90: no committed row; `python -m bench static`" in missing
    assert "[old] sm_90: no compiled case; `python -m bench static`" in stale


def test_the_interpreter_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    if not triton.knobs.runtime.interpret:
        pytest.skip("runs with a GPU, without the interpreter")
    with pytest.raises(SystemExit):
        static.main(["--check"])
    assert "unset it" in capsys.readouterr().err


if __name__ == "__main__":
    places = {(Path(__file__).stem, i): static.StaticCase(*c) for i, c in enumerate(static_cases())}
    static.collect = lambda: places
    static.SHARED_LIMIT = {90: static.SHARED_LIMIT[90]}
    made = static.measure()
    print(json.dumps([*made, sources()]))
    static.measure(made[0])


def test_waits_that_the_assembler_adds_are_counted() -> None:
    line = "        /*0d40*/                   WARPGROUP.DEPBAR.LE gsb0, 0x{} ;"
    assert static.drains("\n".join(line.format(n) for n in (1, 1, 0)), loop()) == 0
    assert static.drains("\n".join(line.format(n) for n in (0, 0, 0)), loop()) == 2
    assert static.drains("\n".join(line.format(n) for n in (0, 0)), loop(inside=0)) == 0


def test_a_loop_is_from_where_it_jumps_back_to() -> None:
    def code(*texts: str) -> str:
        return "\n".join(
            f"        /*{16 * i:04x}*/   {text} ;   /* 0x00 */" for i, text in enumerate(texts)
        )

    loop = ("S2R R0", "LDG R1, [R2]", "IMAD R3, R1, -0x2daee0ad, RZ", "@P0 BRA 0x10", "EXIT", "NOP")
    assert static.loop_instructions(code(*loop)) == 3
    outside = ("IMAD R3, R1, -0x2daee0ad, RZ", "LDG R1, [R2]", "@!P0 BRA 0x10", "EXIT")
    assert static.loop_instructions(code(*outside)) == 4
    assert static.loop_instructions(code("LDG R1", "@P0 BRA 0x20", "EXIT")) == 3  # forward: no loop
