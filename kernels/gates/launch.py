"""Gate sampling (K1) and its backward (K2), one launch for all layers of a model.

Forward   w_eff = g w z,  z = sample(s, u),  u = Philox(seed, step, layer, index), g a gain per layer.
Backward  dR/ds = g slope(z, s) sum over the unit of (w dR/dw_eff);  in the same pass the sums that
balance and gains need: |dR/ds|^2, sum of size density(s), |size d density/ds|^2, <dR/dw_eff, w_eff>.

u is drawn again in the backward, or its factor q = g w slope was stored (in w_eff's dtype).  The sums
are two-phase and deterministic: a row of `partials` for each program here, added up in `balance`.
Index counts a gate's place in its logits' memory.
"""

from torch import Tensor

from ..launching import Launch, remembered
from ..reference import BERNOULLI, CONCRETE, GAUSSIAN, HARD_CONCRETE, GateSpec
from ..static import StaticCase, static_case
from ..units import Unit
from .flat import backward_flat_kernel, sample_flat_kernel
from .segments import FLAT_BLOCK, Hints, Programs, Segments, tile_of
from .tiled import backward_tiled_kernel, sample_tiled_kernel


def launch_sample(
    plan: Segments, spec: GateSpec, unit: Unit, *, weight: Tensor, logits: Tensor, out: Tensor,
    q: Tensor | None, log_gain: Tensor | None, seed: Tensor, step: Tensor,
    control: Tensor | None = None, fast: bool = True,
) -> None:  # fmt: skip
    """K1.  Tensors are the first of each role; with `control` [2, groups] the state moves on a step.

    step: int64 [2] then ([1] otherwise), seed int64 [segments], log_gain fp32 [4, segments].
    """
    mode = (log_gain is not None, control is not None, q is not None)
    launch = _sample(plan.programs, plan.hints, spec, unit, fast, *mode)
    factor = (out if q is None else q,) if _flat(unit) else ()
    launch(
        weight, logits, out, *factor, step if log_gain is None else log_gain, seed, step,
        step if control is None else control, plan.table, plan.chunks,
    )  # fmt: skip


@remembered
def _sample(
    programs: Programs, hints: Hints, spec: GateSpec, unit: Unit, fast: bool, gain: bool,
    advance: bool, store: bool,
) -> Launch:  # fmt: skip
    gate = {"KIND": spec.kind, "A": spec.a, "B": spec.b, "C": spec.c, "FAST": fast}
    constants = gate | {"GAIN": gain, "ADVANCE": advance}
    kernel = sample_tiled_kernel
    if _flat(unit):
        kernel = sample_flat_kernel
        constants |= {"STORE_Q": store, "ALIGNED": hints.aligned}
    else:
        constants |= _tile(unit, hints)
    numbers = (programs.segments, programs.groups)
    return Launch(kernel, (programs.weights,), numbers, constants, {"num_warps": 4})


def launch_backward(
    plan: Segments, spec: GateSpec, unit: Unit, *, grad: Tensor, grad_offsets: Tensor,
    weight: Tensor, logits: Tensor, out: Tensor, q: Tensor | None, log_gain: Tensor | None,
    seed: Tensor, step: Tensor, ds: Tensor, dw: Tensor | None, partials: Tensor,
    multi: bool, fast: bool = True,
) -> None:  # fmt: skip
    """K2.  grad_offsets: int64 [segments], elements from `grad`; partials: fp32 [programs, 4].

    `step` and `log_gain` start at this step's values: what K1 has stored at [1].  `dw`, where it is wanted,
    has the offsets of `out` and may be `out`: each program reads its stretch before it writes there.
    """
    mode = (log_gain is not None, dw is not None, multi, q is not None)
    launch = _backward(plan.programs, plan.hints, spec, unit, fast, *mode)
    factor = (out, out if q is None else q) if _flat(unit) else ()
    launch(
        grad, grad_offsets, weight, logits, *factor, step if log_gain is None else log_gain, seed,
        step, ds, ds if dw is None else dw, partials, plan.table, plan.chunks,
    )  # fmt: skip


@remembered
def _backward(
    programs: Programs, hints: Hints, spec: GateSpec, unit: Unit, fast: bool, gain: bool,
    store: bool, multi: bool, load: bool,
) -> Launch:  # fmt: skip
    gate = {"KIND": spec.kind, "A": spec.a, "B": spec.b, "C": spec.c, "SHIFT": spec.shift}
    constants = gate | {"FAST": fast, "GAIN": gain, "STORE_DW": store, "MULTI": multi}
    kernel = backward_tiled_kernel
    if _flat(unit):
        kernel = backward_flat_kernel
        constants |= {"LOAD_Q": load, "ALIGNED": hints.aligned}
    else:
        constants |= _tile(unit, hints)
    return Launch(kernel, (programs.weights,), (), constants, {"num_warps": 4})


def _flat(unit: Unit) -> bool:
    """Whether every weight has a gate of its own."""
    return unit.single and not unit.keep


def _tile(unit: Unit, hints: Hints) -> dict[str, int]:
    units, elements = tile_of(unit)
    return {"KEEP": unit.keep, "U": units, "E": elements, "WIDE": unit.w, "VECTOR": hints.vector}


def static_cases() -> list[StaticCase]:
    """K1 and K2 over float32 logits and weights, in the search's bf16."""
    common = {
        "w_ptr": "*fp32", "s_ptr": "*fp32", "gain_ptr": "*fp32", "seed_ptr": "*i64",
        "step_ptr": "*i64", "table_ptr": "*i64", "chunk_ptr": "*i32",
    }  # fmt: skip
    sample = common | {
        "out_ptr": "*bf16", "q_ptr": "*bf16", "control_ptr": "*fp32", "segments_count": "i32",
        "groups_count": "i32",
    }  # fmt: skip
    backward = common | {
        "grad_ptr": "*bf16", "grad_offset_ptr": "*i64", "out_ptr": "*bf16", "q_ptr": "*bf16",
        "ds_ptr": "*bf16", "dw_ptr": "*bf16", "partial_ptr": "*fp32",
    }  # fmt: skip
    gates = {
        "concrete": GateSpec(CONCRETE),
        "concrete2/3": GateSpec(CONCRETE, 2 / 3),
        "hard-concrete": GateSpec(HARD_CONCRETE, 2 / 3, -0.1, 1.1),
        "gaussian": GateSpec(GAUSSIAN, 0.5),
        "bernoulli": GateSpec(BERNOULLI),
    }
    cases = []
    flat = {"GAIN": True, "ALIGNED": True}
    per_thread = FLAT_BLOCK // (4 * 32)
    for name, spec in gates.items():
        for fast in (True, False) if name == "hard-concrete" else (True,):
            gate = {"KIND": spec.kind, "A": spec.a, "B": spec.b, "C": spec.c, "FAST": fast}
            label = name if fast else f"{name} exact"
            for stored in (False, True) if name == "concrete" else (False,):
                mode = flat | {"STORE_Q": stored, "ADVANCE": True}
                config = f"{label}{' q' if stored else ''}"
                cases.append(
                    static_case(sample_flat_kernel, config, sample, gate | mode, gates=per_thread)
                )
                mode = flat | {"LOAD_Q": stored, "STORE_DW": False, "MULTI": True}
                mode["SHIFT"] = spec.shift
                cases.append(
                    static_case(
                        backward_flat_kernel, config, backward, gate | mode, gates=per_thread
                    )
                )
    spec = gates["hard-concrete"]
    gate = {"KIND": spec.kind, "A": spec.a, "B": spec.b, "C": spec.c, "FAST": True, "GAIN": True}
    for label, unit in {
        "block 64x64": Unit(64, 64),
        "channel": Unit(1, 0),
        "2:4": Unit(1, 4, 2),
    }.items():
        units, elements = tile_of(unit)
        tile = gate | {"KEEP": unit.keep, "U": units, "E": elements, "WIDE": unit.w}
        tile["VECTOR"] = 4 if unit.keep else 8
        types = {k: v for k, v in sample.items() if k != "q_ptr"}
        cases.append(static_case(sample_tiled_kernel, label, types, tile | {"ADVANCE": True}))
        mode = {"SHIFT": spec.shift, "STORE_DW": False, "MULTI": True}
        types = {k: v for k, v in backward.items() if k not in ("out_ptr", "q_ptr")}
        types["ds_ptr"] = "*bf16" if unit.keep else "*fp32"
        cases.append(static_case(backward_tiled_kernel, label, types, tile | mode))
    return cases
