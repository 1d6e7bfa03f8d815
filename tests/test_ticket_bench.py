"""The ticket suite: its providers, its correctness gate, its rows; and how its cases are chosen."""

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from replay import Recording
from torch import nn

from bench import measure, report, ticket_steps, ticket_suite, ticket_training
from bench.__main__ import main
from bench.measure import WrongResult, times_within
from bench.rows import Row, Rows, read
from bench.ticket_cases import (
    CPU,
    DENSE,
    GPU,
    MASKED,
    QUICK,
    OpCase,
    TrainCase,
    network,
    random_mask,
    random_masks,
)
from bench.ticket_ops import DW, FORWARD, check, ours, problem_of, torch_bsr
from bench.ticket_steps import Reference, Step, Task, make
from bench.ticket_suite import parts_on
from bench.ticket_training import tasks_of, train_case
from sparsecore import capture, engine
from sparsecore.engine import EngineError, Way
from sparsecore.kernels.sparse import state

HERE = torch.device("cpu")
(SMALL, *_) = (case for case in QUICK if isinstance(case, TrainCase))
(OP, *_) = (case for case in QUICK if isinstance(case, OpCase))
RUN = ["run", "--suite", "ticket", "--quick", "--device", "cpu", "--out"]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def found(rows: list[Row], metric: str) -> dict[tuple[str, str, str], str]:
    return {
        (r["case"], r["provider"], r["mode"]): r["median"] for r in rows if r["metric"] == metric
    }


def the_task(tmp_path: Path, case: TrainCase = SMALL, sparsity: float = 0.8) -> Task:
    return tasks_of(case, HERE, tmp_path / "plans.json")[sparsity]


# --- The suite --------------------------------------------------------------------------------------


def test_the_suite(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], eager_compiler: None
) -> None:
    assert main([*RUN, str(tmp_path)]) == 0
    rows = read(tmp_path / "cpu-ticket-quick.csv")
    times, over = found(rows, "time"), found(rows, f"speed-up over {MASKED}")
    for sparsity in SMALL.sparsities:
        at = SMALL.at(sparsity)
        wanted = {p for p in SMALL.providers if p != "sparselab" and SMALL.wants(p, sparsity)}
        here = {(p, mode) for name, p, mode in times if name == at and p != "sparselab"}
        assert here == {(p, "eager") for p in wanted} | {(MASKED, "compile")}
        assert ("plan auto" in wanted) == (sparsity == 0.95)
        assert {(p, mode) for name, p, mode in over if name == at and p != "sparselab"} == here
        for (name, provider, mode), ratio in over.items():
            if name == at:
                expected = float(times[at, MASKED, mode]) / float(times[at, provider, mode])
                assert float(ratio) == pytest.approx(expected, rel=0.02, abs=0.01)
        assert over[at, MASKED, "eager"] == "1.00"
        assert (at, MASKED, "compile") in found(rows, "speed-up over eager")
        assert (at, MASKED, "compile") in found(rows, "compile time")
    resnet = next(c for c in QUICK if c.name.startswith("model/resnet")).at(0.9)
    assert {m for name, _, m in times if name == resnet} == {"eager", "eager, channels_last"}
    # A plan's optimiser holds two numbers for each kept weight and bias, and nothing else.
    model, _ = network(SMALL.model, SMALL.shape)
    kept = sum(int(m.sum()) for m in random_masks(SMALL, model, 0.95).values())
    biases = sum(p.numel() for p in model.parameters() if p.ndim == 1)
    moments = found(rows, "optimiser state")
    assert moments[SMALL.at(0.95), "plan csr", "eager"] == str(8 * (kept + biases))
    formats = found(rows, "formats")[SMALL.at(0.95), "plan auto", "eager"]
    assert [part.split(":")[0] for part in formats.split("; ")] == ["0", "2", "4"]
    assert {row["case"].partition("/")[0] for row in rows} == set(report.TICKET_PARTS) - {"lenet"}
    # Products have a mode each.
    assert {mode for name, _, mode in times if name == OP.name} == {"forward", "dX", "dW"}
    assert (OP.name, "torch BSR", "dX") in times and (OP.name, "state", "dW") in times

    capsys.readouterr()
    (picture,) = report.plot(tmp_path, "ticket-quick")
    assert picture.read_bytes()[:4] == b"\x89PNG"
    report.table(tmp_path, ["ticket-quick"], markdown=True)
    shown = capsys.readouterr().out
    head = "| case | provider | mode | time, ms | speed-up over eager, x | speed-up over dense*mask, x |"
    assert head in shown
    assert "| mlp/batch=16/sparsity=0.95 | plan auto | eager |" in shown
    assert "ticket-quick on a GPU: not measured" in shown


def test_parts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert parts_on(HERE, quick=False) == ("mlp", "lenet", "models")
    assert set(parts_on(torch.device("cuda"), quick=False)) == {"models", "ops", "convs"}
    assert main([*RUN, str(tmp_path), "--parts", "convs"]) == 0
    rows = read(tmp_path / "cpu-ticket-quick.csv")
    assert {row["case"].partition("/")[0] for row in rows} == {"conv"}
    with pytest.raises(SystemExit):
        main(["run", "--suite", "ticket", "--device", "cpu", "--parts", "ops"])
    assert "expected some of mlp, lenet, models, got ops" in capsys.readouterr().err


FOUR = ("eager", "graph", "compile", "compile-graph")
GRAPHS = next(c for c in QUICK if isinstance(c, TrainCase) and c.label.startswith("model/mlp"))
GRAPHS = replace(GRAPHS, providers=(DENSE, MASKED, "plan state"), compiled=(DENSE, "plan state"))


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled code hides its operations from what replays them."""
    engine.compiled_call.cache_clear()
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)


def test_every_provider_in_every_way_of_a_gpu(
    tmp_path: Path, recordings: list[Recording], uncompiled: None
) -> None:
    """Graphs replayed as a graph would be: their first replay is right, and nothing touches the host."""
    rows = Rows(tmp_path / "rows.csv", "ticket", HERE)
    train_case(GRAPHS, rows, HERE, tmp_path / "plans.json")
    expected = {(p, m) for p in GRAPHS.providers for m in FOUR[:2]}
    expected |= {(p, m) for p in GRAPHS.compiled for m in FOUR}
    assert {(p, m) for _, p, m in found(rows.rows, "time")} == expected
    assert [recording.touches for recording in recordings] == [[]] * 5
    over = found(rows.rows, "speed-up over dense, compile-graph")
    assert {(p, m) for _, p, m in over} == expected
    assert over[GRAPHS.at(0.9), DENSE, "compile-graph"] == "1.00"
    assert {m for _, _, m in found(rows.rows, "speed-up over eager")} == set(FOUR[1:])
    assert {m for _, _, m in found(rows.rows, "compile time")} == {"compile"}


def test_what_no_graph_can_hold_is_told_and_leaves_the_others(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, recordings: list[Recording],
    uncompiled: None, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def record(run, *rest):
        asked.append(run)
        if len(asked) == 3:  # the plan's
            raise RuntimeError("operation not permitted")
        return replayed(run, *rest)

    asked, replayed = [], capture.record
    monkeypatch.setattr(capture, "record", record)
    rows = Rows(tmp_path / "rows.csv", "ticket", HERE)
    with pytest.raises(EngineError, match="cannot be captured"):  # our own
        train_case(GRAPHS, rows, HERE, tmp_path / "plans.json")
    times = {(p, m) for _, p, m in found(rows.rows, "time")}
    assert {m for p, m in times if p == "plan state"} == {"eager", "compile"}
    assert (MASKED, "graph") in times and (DENSE, "compile-graph") in times
    assert ", graph: EngineError" in capsys.readouterr().err


def test_a_wrong_replay_is_not_timed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, recordings: list[Recording], uncompiled: None
) -> None:
    def record(run, *rest):
        replay, (p, *_) = replayed(run, *rest), run.__closure__[1].cell_contents.model.parameters()
        return lambda: (replay(), p.data.mul_(1.1))

    replayed = capture.record
    monkeypatch.setattr(capture, "record", record)
    rows = Rows(tmp_path / "rows.csv", "ticket", HERE)
    with pytest.raises(WrongResult, match=r"plan state .*, graph: weights after the step"):
        train_case(GRAPHS, rows, HERE, tmp_path / "plans.json")
    assert {m for _, p, m in found(rows.rows, "time") if p != DENSE} == {"eager", "compile"}


def test_without_time_nothing_more_is_compiled(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ticket_training, "Compiling", lambda: measure.Compiling(1.0))
    rows = Rows(tmp_path / "rows.csv", "ticket", HERE)
    train_case(GRAPHS, rows, HERE, tmp_path / "plans.json")
    assert {m for _, _, m in found(rows.rows, "time")} == {"eager"}
    said = capsys.readouterr().err
    assert said.count("compile: compiling takes up to 30 s, of which 1 s are left") == 2
    known = measure.Compiling(100.0)
    assert not known.refused()
    known.took(120.0)
    assert known.refused().startswith("compiling takes up to 120 s")


# --- The gate ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", ["forward", "gradient", "update"])
def test_the_gate_refuses_a_wrong_step(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, wrong: str
) -> None:
    task = the_task(tmp_path)
    reference = Reference(task)

    def require(what: str, step: Step) -> None:
        with step.launched(Way()) as launched:
            reference.require(what, step, launched)

    require("right", make("plan state", task))
    if wrong == "update":
        step = make("plan state", task)
        step.optimiser.param_groups[0]["lr"] = 2e-3
    else:
        name = "_forward" if wrong == "forward" else "_grad_values"
        right = getattr(state, name)
        format = state.STATE._replace(**{name.strip("_"): lambda *args: 1.01 * right(*args)})
        monkeypatch.setitem(ticket_steps.sc.kernels.FORMATS, "state", format)
        step = make("plan state", task)
    what = {"forward": "outputs", "gradient": "gradients", "update": "weights"}[wrong]
    with pytest.raises(WrongResult, match=f"plan state: {what}"):
        require("plan state", step)


def test_a_wrong_provider_leaves_the_others(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    eager_compiler: None,
) -> None:  # fmt: skip
    format = state.STATE
    broken = format._replace(forward=lambda *args: format.forward(*args) + 0.1)
    monkeypatch.setitem(ticket_steps.sc.kernels.FORMATS, "state", broken)
    case = replace(SMALL, providers=(DENSE, MASKED, "plan state", "plan csr"), sparsities=(0.8,))
    monkeypatch.setattr(ticket_suite, "QUICK", (case, OP))
    assert main([*RUN, str(tmp_path)]) == 1
    times = found(read(tmp_path / "cpu-ticket-quick.csv"), "time")
    assert {p for name, p, _ in times if name == case.at(0.8)} == {DENSE, MASKED, "plan csr"}
    assert (OP.name, "state", "forward") not in times and (OP.name, "state", "dW") in times
    assert (
        "left out: plan state of mlp/batch=16/sparsity=0.8: WrongResult" in capsys.readouterr().err
    )


def test_the_gate_of_products(monkeypatch: pytest.MonkeyPatch) -> None:
    p = problem_of(OP, HERE)
    products = ours(p, "state")
    check("state", p, DW, products[DW])
    with pytest.raises(WrongResult, match="dW"):
        check("dW", p, DW, products[DW]._replace(read=lambda dw: 1.001 * dw))
    check("BSR", p, FORWARD, torch_bsr(p, 16)[FORWARD])


def test_a_package_may_be_absent_or_wrong(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "sparselab.nn", None)  # as if it were not installed
    case = replace(SMALL, providers=(MASKED, "sparselab"), sparsities=(0.8, 0.95))
    rows = Rows(tmp_path / "rows.csv", "ticket", HERE)
    train_case(case, rows, HERE, tmp_path / "plans.json")
    assert capsys.readouterr().err.count("left out: sparselab:") == 1

    class Layer(nn.Module):
        def __init__(self, *_: object, **__: object) -> None:
            raise RuntimeError("not on this machine")

    for name in ("nn", "layout", "ops"):
        module = ModuleType(f"sparselab.{name}")
        vars(module).update(SparseLinear=Layer, to_dense=None, _clear_transpose_cache=lambda: None)
        monkeypatch.setitem(sys.modules, f"sparselab.{name}", module)
    train_case(case, rows, HERE, tmp_path / "plans.json")
    assert (
        "left out: sparselab of mlp/batch=16/sparsity=0.95: RuntimeError" in capsys.readouterr().err
    )
    assert {row["provider"] for row in rows.rows} == {MASKED}


# --- Cases and clocks -------------------------------------------------------------------------------


def test_cases_are_named_once_and_telling_ones_come_first() -> None:
    for cases in (CPU, GPU):
        assert len({case.name for case in cases}) == len(cases)
    ops = [case for case in GPU if isinstance(case, OpCase)]
    blocks = {(c.k, c.tokens, c.format, c.sparsity) for c in ops if c.part == "ops"}
    assert len(blocks) == 3 * 4 * 4
    assert {c.k for c in ops if c.taps == 3} == {64, 128, 256, 512}
    for case in ops:
        assert torch.Size(case.shape(case.k)).numel() == case.tokens * case.k
    assert GPU.index(ops[0]) < 5 and all(case.name.startswith("op/") for case in ops[:4])
    batches = {case.batch for case in CPU if case.part == "mlp"}
    assert batches == {128, 256, 512, 2048}


def test_masks_keep_the_share_they_claim() -> None:
    mask = random_mask((640, 320), "block:64x32", 0.9)
    assert mask.sum() == 10 * 64 * 32
    blocks = mask.unfold(0, 64, 64).unfold(1, 32, 32).sum((2, 3))
    assert blocks.unique().tolist() == [0, 64 * 32]
    assert torch.equal(mask, random_mask((640, 320), "block:64x32", 0.9))
    resnet = next(c for c in GPU if isinstance(c, TrainCase) and "resnet50" in c.label)
    with torch.device("meta"):
        model, classes = network(resnet.model, resnet.shape)
    assert classes == 1000
    model.to_empty(device="cpu")
    masks = random_masks(resnet, model, 0.9)
    assert "conv1" not in masks and "fc" not in masks and "layer1.0.conv1" not in masks
    share = sum(int(m.sum()) for m in masks.values()) / sum(m.numel() for m in masks.values())
    assert share == pytest.approx(0.1, abs=0.01)


def test_slow_steps_leave_early() -> None:
    calls: list[str] = []

    def slow() -> None:
        calls.append("slow")
        torch.ones(1 << 22).sum()

    steps = {"a": lambda: calls.append("a"), "b": lambda: calls.append("b"), "slow": slow}
    spreads = times_within(steps, 1e9, least=2, most=5)
    assert calls == ["a", "b", "slow"] * 2 + ["a", "b"] * 3
    assert all(s.q20 <= s.median <= s.q80 for s in spreads.values())
    calls.clear()
    times_within(steps, 0.0, least=2)
    assert calls == ["a", "b", "slow"] * 2
