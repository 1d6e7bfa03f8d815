"""`python -m bench static` compiles every kernel for three generations of GPU and reads the machine code.

No GPU is needed.  The rows in results/static.csv say what each kernel cost when they were made;
`--check` compiles again what has changed since and fails where one breaks a rule or costs more than its
row.  Rules for all:

compiles, and its shared memory fits the GPU; spill_bytes = 0; vector_loads; a kernel whose product
belongs on tensor cores uses them and, on sm_90, does so by wgmma (hgmma > 0) with no
serialised_waits.  A case that knowingly falls short names its rules in options["waive"], for all
architectures ("hgmma") or one ("spill_bytes@sm_80"); every waiver is printed.

registers             a thread
spill_bytes           stack and local memory a thread, by cuobjdump -res-usage
shared_bytes          a block
instructions          in the machine code, unrolled loops as they stand there, without NOP padding
instructions_per_gate those of the longest loop (of the whole kernel, where the gates are drawn behind
                      it) over the gates that a thread draws in one turn, where the case says how many
hgmma                 wgmma instructions (sm_90 only)
serialised_waits      loops' products that are waited for at once, so that nothing overlaps (sm_90):
                      in the ttgir or by the assembler, whichever shows more; not where a condition ends
                      a tile, whose sums are then stored
vector_loads          16-byte loads from global memory, or stores where only scalars are loaded
source                a digest of all that the row follows from; none where it breaks a rule, waived or not
"""

import argparse
import csv
import hashlib
import importlib
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from operator import itemgetter
from pathlib import Path
from typing import Any

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sparsecore import kernels
from sparsecore.kernels.static import StaticCase, static_case

TABLE = Path(__file__).parent / "results" / "static.csv"
FIELDS: tuple[str, ...] = (
    "kernel", "config", "arch", "registers", "spill_bytes", "shared_bytes", "instructions",
    "instructions_per_gate", "hgmma", "serialised_waits", "vector_loads", "triton", "source",
)  # fmt: skip
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes a block may ask for
COSTS = ("registers", "spill_bytes", "shared_bytes", "serialised_waits", "instructions")
Row = dict[str, Any]
_key = itemgetter("kernel", "config", "arch", "triton")
_say = partial(print, file=sys.stderr, flush=True)


def opcodes(sass: str) -> list[str]:
    """The instructions of a disassembly with their modifiers, without predicates and padding."""
    found = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", sass)
    return [code for code in found if code != "NOP"]


def loop_instructions(sass: str) -> int:
    """Those of the longest loop, or of everything if there is none or the noise is drawn outside of it."""
    lines = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(\S[^;]*);", sass)
    places = {int(address, 16): text for address, text in lines if text.strip() != "NOP"}
    longest = range(0)
    for address, text in places.items():
        jump = re.search(r"\bBRA(?:\.\w+)* .*?0x([0-9a-f]+)", text)
        if jump and address - int(jump[1], 16) > len(longest):
            longest = range(int(jump[1], 16), address + 1)
    inside = [text for address, text in places.items() if address in longest]
    philox = "-0x2daee0ad"  # a multiplier of its rounds
    drawn = any(philox in text for text in places.values())
    if not inside or (drawn and not any(philox in text for text in inside)):
        return len(places)
    return len(inside)


def spill_bytes(usage: str) -> int:
    """The stack frame and local memory of `cuobjdump -res-usage`."""
    return sum(int(n) for n in re.findall(r"\b(?:STACK|LOCAL):(\d+)", usage))


def serialised_waits(ttgir: str) -> int:
    """Products in a loop's body with a wait for all of them, or that do not run asynchronously.

    A wait in an outer loop drains the inner one once a tile: not counted, as an outer loop has no
    product of its own.  Nor is one in a branch that stores: there a loop over several tiles ends one.
    """
    regions: list[_Region] = []
    total = 0
    for line in ttgir.splitlines():
        text = line.strip()
        if text.startswith("}") and regions:
            closed = regions.pop()
            if closed.loop:
                total += closed.waits if closed.products else 0
            elif not closed.stores and regions:
                regions[-1].waits += closed.waits
        loop = next((region for region in reversed(regions) if region.loop), None)
        if loop and re.search(r"\bwarp_group_dot\b", text):
            loop.products += 1
            loop.waits += "isAsync = true" not in text
        if regions:
            regions[-1].waits += bool(_DRAIN.search(text))
            regions[-1].stores |= bool(re.search(r"\btt\.store\b|\basync_tma_copy_local_to", text))
        if text.endswith("{"):  # "do": a while's second part
            regions.append(_Region(bool(re.search(r"\bscf\.(for|while)\b|^} do\b", text))))
    return total


_DRAIN = re.compile(r"\bwarp_group_dot_wait\b.*pendings = 0\b")


@dataclass
class _Region:
    """What stands between two braces, in branches inside too."""

    loop: bool
    products: int = 0
    waits: int = 0
    stores: bool = False


def drains(sass: str, ttgir: str) -> int:
    """Waits for all products in flight that the assembler adds by itself (its warning C7515)."""
    asked = len(_DRAIN.findall(ttgir))
    return max(0, len(re.findall(r"\bWARPGROUP\.DEPBAR\.LE gsb0, 0x0\b", sass)) - asked)


def vector_loads(codes: Iterable[str], ttgir: str) -> bool:
    """Whether global memory is read 16 bytes at a time; written, for a kernel that reads scalars."""
    tensors = r"tt\.load .*tensor<|async_copy_global_to_local|async_tma_|descriptor_load"
    access = r"LDG(STS)?|UTMALDG|UBLKCP" if re.search(tensors, ttgir) else r"STG|UTMASTG"
    wide = [code for code in codes if re.search(r"UTMA|UBLKCP|\.(128|256)\b", code)]
    return any(re.match(rf"({access})\b", code) for code in wide)


def wants_tensor_cores(ttir: str) -> bool:
    """Whether there is a product of a type that tensor cores take; float32 only by tf32 or bf16."""
    dots = re.findall(r"\btt\.dot(?:_scaled)? (.*)", ttir)
    plain = r": tensor<[\dx]*x(f32|f64)>"
    return any("inputPrecision" in dot or not re.search(plain, dot) for dot in dots)


def _compiled_from(case: StaticCase) -> ASTSource:
    return ASTSource(case.function, case.signature, case.constexprs, case.attributes)


def source_of(case: StaticCase, arch: int) -> str:
    """A digest of the kernel, what it calls, how it is compiled, the compiler, and how its code is read."""
    reader = Path(__file__).read_text()
    parts = (
        _compiled_from(case).hash(),
        arch,
        sorted(case.options.items()),
        case.gates,
        triton.__version__,
        reader,
    )
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def read(case: StaticCase, arch: int) -> tuple[Row, list[tuple[str, str]]]:
    """A case's row, and the rules it breaks: (rule, what is wrong).  No row if it does not compile."""
    options = {name: value for name, value in case.options.items() if name != "waive"}
    try:
        compiled = triton.compile(
            _compiled_from(case), target=GPUTarget("cuda", arch, 32), options=options
        )
    except Exception as error:  # whatever the compiler raises is the finding
        return {}, [("compiles", f"{type(error).__name__}: {' '.join(str(error).split())[:500]}")]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", "-sass", file.name]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    codes, ttgir, limit = opcodes(report), compiled.asm["ttgir"], SHARED_LIMIT[arch]
    (registers,) = map(int, re.findall(r"\bREG:(\d+)", report))  # one function to a cubin
    spills, shared = spill_bytes(report), int(compiled.metadata.shared)
    hgmma = sum(code.startswith("HGMMA") for code in codes)  # sm_90 alone has it
    waits = max(serialised_waits(ttgir), drains(report, ttgir)) if arch == 90 else 0
    wide = vector_loads(codes, ttgir)
    per_gate = f"{loop_instructions(report) / case.gates:.1f}" if case.gates else ""
    numbers = (registers, spills, shared, len(codes), per_gate, hgmma, waits, str(wide).lower())
    values = (case.name, case.config, f"sm_{arch}", *numbers, triton.__version__)
    product = r"HGMMA" if arch == 90 else r"[HIQ]MMA|UTC\w*MMA"  # sm_100: tcgen05 is UTC..MMA
    used = not wants_tensor_cores(compiled.asm["ttir"]) or any(re.match(product, c) for c in codes)
    rules = [
        ("spill_bytes", spills == 0, f"{spills} bytes of registers spilled"),
        ("shared_bytes", shared <= limit, f"{shared} bytes of shared memory, the GPU has {limit}"),
        ("vector_loads", wide, "no 16-byte access to global memory"),
        ("hgmma" if arch == 90 else "tensor_cores", used, f"no {product}"),
        ("serialised_waits", waits == 0, f"{waits} products in loops are waited for at once"),
    ]
    broken = [(rule, message) for rule, kept, message in rules if not kept]
    source = "" if broken else source_of(case, arch)
    return dict(zip(FIELDS, (*values, source), strict=True)), broken


def static_cases() -> list[StaticCase]:
    """The noise by itself."""
    types = {"out_ptr": "*fp32", "seed_ptr": "*i64", "step_ptr": "*i64", "layer": "i32", "n": "i64"}
    case = static_case(kernels.philox._uniform_kernel, "fp32", types, {"BLOCK": 256}, gates=8)
    return [case._replace(attributes=case.attributes | {(4,): [["tt.divisibility", 16]]})]


def collect() -> dict[tuple[str, int], StaticCase]:
    """The cases of every module that has some, by module and position."""
    found: dict[tuple[str, int], StaticCase] = {}
    names = [m.name for m in pkgutil.walk_packages(kernels.__path__, kernels.__name__ + ".")]
    for name in [*names, "bench.static"]:
        cases = getattr(importlib.import_module(name), "static_cases", list)()
        found |= {(name, i): StaticCase(*case) for i, case in enumerate(cases)}
    keys = [(case.name, case.config) for case in found.values()]
    if twice := {key for key in keys if keys.count(key) > 1}:
        raise ValueError(f"expected one case per kernel and config, got several of {sorted(twice)}")
    return found


def _read_in_worker(module: str, position: int, arch: int) -> tuple[Row, list[tuple[str, str]]]:
    # Functions under @triton.jit do not pickle, so a worker looks its case up again.
    return read(StaticCase(*importlib.import_module(module).static_cases()[position]), arch)


def measure(known: Iterable[Row] = (), workers: int = 2) -> tuple[list[Row], list[str]]:
    """Rows of all that compiles, and broken rules that no waiver names; `known` rows stand while their source does."""
    held = {(_key(row), row["source"]): row for row in known if row["source"]}
    rows, broken, jobs = [], [], {}
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        for place, case in collect().items():
            for arch in SHARED_LIMIT:
                key = case.name, case.config, f"sm_{arch}", triton.__version__
                if row := held.get((key, source_of(case, arch))):
                    rows.append(row)
                else:
                    jobs[pool.submit(_read_in_worker, *place, arch)] = case, arch
        if rows:
            _say(f"{len(rows)} unchanged since their rows were made")
        for done, job in enumerate(as_completed(jobs), 1):
            (case, arch), (row, faults) = jobs[job], job.result()
            name = f"{case.name} [{case.config}] sm_{arch}"
            _say(f"{done}/{len(jobs)} {name}")
            rows += [row] if row else []
            waived = case.options.get("waive", ())
            for rule, message in faults:
                if rule in waived or f"{rule}@sm_{arch}" in waived:
                    _say(f"waived {name}: {rule}: {message}")
                else:
                    broken.append(f"{name}: {rule}: {message}")
    return sorted(rows, key=_key), sorted(broken)


def compare(rows: list[Row], committed: list[Row]) -> list[str]:
    """What costs more than its committed row, and rows or cases without the other."""
    now, before = {_key(row): row for row in rows}, {_key(row): row for row in committed}
    worse = []
    for key in sorted(now.keys() | before.keys()):
        name = f"{key[0]} [{key[1]}] {key[2]}"
        if key not in now or key not in before:
            missing = "committed row" if key in now else "compiled case"
            worse.append(f"{name}: no {missing}; `python -m bench static` makes the table again")
            continue
        for field in COSTS:
            new, old = int(now[key][field]), int(before[key][field])
            if new > old * (1.02 if field == "instructions" else 1):
                worse.append(f"{name}: {field} went from {old} to {new}")
        if now[key]["vector_loads"] < before[key]["vector_loads"]:  # "false" < "true"
            worse.append(f"{name}: vector_loads went from true to false")
    return worse


def main(argv: list[str] | None = None) -> int:
    """Makes the table, or with --check compares with it; returns the process's exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench static")
    parser.add_argument("--check", action="store_true", help="compare with the committed rows")
    arguments = parser.parse_args(argv)
    if knobs.runtime.interpret:
        parser.error("nothing is compiled under TRITON_INTERPRET; unset it")
    committed = list(csv.DictReader(TABLE.read_text().splitlines())) if TABLE.exists() else []
    rows, problems = measure(committed if arguments.check else ())
    others = [row for row in committed if row["triton"] != triton.__version__]
    mine = [row for row in committed if row not in others]
    if not arguments.check:
        cases = {(case.name, case.config) for case in collect().values()}
        table = sorted(rows + [row for row in others if _key(row)[:2] in cases], key=_key)
        with TABLE.open("w", newline="") as file:
            writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(table)
    elif mine:
        problems += compare(rows, mine)
    else:
        _say(
            f"no rows of this Triton to compare with, only of {sorted({r['triton'] for r in others})}"
        )
    sys.stdout.writelines(f"{problem}\n" for problem in problems)
    _say(f"{len(rows)} kernels by Triton {triton.__version__}, {len(problems)} problems")
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
