"""The benchmark's own correctness gates, that every path runs, and what a step allocates: all but times."""

import csv
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import seeded
from replay import Recording
from torch import nn

import bench.tickets
from bench import report, search_cases, search_suite
from bench.__main__ import main
from bench.cases import QUICK_STEP_CASES, StepBench, StepCase
from bench.measure import Job, WrongResult, large_allocations, require_as_exact, timed, times
from bench.rows import FIELDS, RESULTS, Rows, number, read
from bench.search_cases import FULL, QUICK, LayerCase, OpCase, StrategyCase, weights_of
from bench.search_layers import BankStep, Layer, layer_step
from bench.search_networks import network
from bench.search_ops import build_bank, bytes_a_weight, check_bank
from bench.search_strategies import GatedLayer, strategy
from sparsecore import engine
from sparsecore.kernels import Unit, reference
from sparsecore.kernels.gates import bank as gate_bank
from sparsecore.tickets import Ticket

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
CASE = StepCase("lenet-300-100", (1, 28, 28), 32, 3)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Steps are tiny here: threads that wait for a busy core would cost more than they bring."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def unbound() -> Iterator[None]:
    """For steps that draw from the global generator, as published code does."""
    with torch.random.fork_rng(devices=[]):
        yield


# --- Measuring --------------------------------------------------------------------------------------


def test_the_counter_counts() -> None:
    x = torch.ones(10)
    assert large_allocations(lambda: (x + 1).mul_(2).view(5, 2).relu_(), 10) == 1
    assert large_allocations(lambda: x.exp() + x.log(), 10) == 3
    assert large_allocations(lambda: x.exp() + x.log(), 11) == 0


def test_a_search_step_allocates_little() -> None:
    """z, its slope; dR/dw_eff; sigma(s), its slope, the sum of both gradients: six of the weight's size.

    On a GPU it is dR/dw_eff alone: the kernels keep the rest in registers.
    """
    bench = StepBench(CASE, CPU)
    bench.check()
    assert large_allocations(bench.search_step, 784 * 300) == 6
    bench.prepare_plain()
    bench.plain_step()
    assert large_allocations(bench.plain_step, 784 * 300) > 14
    bench.close()


def test_times_are_spreads_in_turn() -> None:
    spread = times({"a": lambda: None}, rounds=5)["a"]
    assert 0 <= spread.q20 <= spread.median <= spread.q80
    calls: list[str] = []
    jobs = {
        "a": Job(lambda: calls.append("a"), prepare=lambda: calls.append("before a")),
        "b": Job(lambda: calls.append("b")),
    }
    found = timed(jobs, CPU, rounds=2)
    assert calls == ["before a", "a", "b"] * 3  # once to warm up
    assert all(0 <= s.q20 <= s.median <= s.q80 for s in found.values())


def test_numbers_have_four_digits() -> None:
    shown = [number(v) for v in (12345.6, 123.456, 12.3456, 1.23456, 0.123456, 9.99999)]
    assert shown == ["12346", "123.5", "12.35", "1.235", "0.1235", "10.00"]


def test_rows_survive_a_kill(tmp_path: Path) -> None:
    path = tmp_path / "new" / "cpu-step.csv"
    rows = Rows(path, "step", CPU)
    rows.add("case", "one", "mode", "time", "ms", "1", "0.5", "2")
    assert tuple(path.read_text().splitlines()[0].split(",")) == FIELDS
    rows.add("case", "two", "mode", "time", "ms", "3")
    path.write_text(path.read_text()[:-10])
    again = Rows(path, "step", CPU, fresh=False)
    assert [r["provider"] for r in read(path)] == ["one"]
    again.add("case", "two", "mode", "time", "ms", "3")
    assert [r["provider"] for r in read(path)] == ["one", "two"]
    assert again.find(provider="two", metric="time") and not again.find(provider="three")
    with pytest.raises(ValueError, match="expected the columns"):
        read(RESULTS / "cpu-fashion-mnist.csv")


# --- The gates fail when what is timed is wrong -----------------------------------------------------


def test_the_gate_has_a_slack_of_two_and_refuses_nan() -> None:
    exact = torch.ones(4, dtype=torch.float64)
    require_as_exact("x", exact + 1.9e-3, exact + 1e-3, exact)
    for wrong in (exact + 2.1e-3, exact * torch.nan):
        with pytest.raises(WrongResult, match="nothing was timed"):
            require_as_exact("x", wrong, exact + 1e-3, exact)


@pytest.mark.parametrize("members", [1, 2])
def test_the_gate_fails_when_the_step_is_wrong(
    monkeypatch: pytest.MonkeyPatch, members: int
) -> None:
    bench = StepBench(StepCase("lenet-300-100", (1, 8, 8), 16, 3, members=members), CPU)
    bench.check()
    monkeypatch.setattr(reference, "concrete_slope_ref", lambda z: z * (1 - z) * 1.01)
    with pytest.raises(AssertionError):
        bench.check()
    bench.close()


def test_the_gates_of_the_search_suite_fail_when_the_bank_is_wrong(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    case, layer = OpCase("64x64", "concrete"), Layer(LayerCase(32, 48, 64), CPU)
    bank, grads = build_bank(case, CPU, torch.float32)
    check_bank(case, bank, grads)
    BankStep(layer, stored=False).check()
    right = gate_bank.gates_backward_ref_

    def wrong(grads: list[torch.Tensor], *rest: object) -> None:
        right(grads, *rest)
        grads[0][0] *= 1.01

    monkeypatch.setattr(gate_bank, "gates_backward_ref_", wrong)
    with pytest.raises(WrongResult, match=r"64x64.* dR/dlogits"):
        check_bank(case, bank, grads)
    with pytest.raises(WrongResult, match=r"T=64: dR/dlogits"):
        BankStep(layer, stored=True).check()
    # The suite times nothing of such a case, goes on, and says so in its exit status.
    monkeypatch.setattr(
        search_suite, "QUICK", search_cases.SearchCases((), (), (case,), (), 4096, 8, 16, 2)
    )
    assert main(["run", "--suite", "search", "--quick", "--device", "cpu", "--out", str(tmp_path),
                 "--parts", "ops"]) == 1  # fmt: skip
    (path,) = tmp_path.glob("*.csv")
    assert {row["case"].split("/")[0] for row in read(path)} == {"ceiling"}


def test_the_gate_fails_when_a_balanced_step_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    case = OpCase("64x64", "hard-concrete", stored=True)
    bank, grads = build_bank(case, CPU, torch.float32)
    right = gate_bank.balanced_step_ref_

    def wrong(logits: list[torch.Tensor], *rest: object) -> None:
        right(logits, *rest)
        logits[0] += 1e-3

    monkeypatch.setattr(gate_bank, "balanced_step_ref_", wrong)
    with pytest.raises(WrongResult, match="change of the logits"):
        check_bank(case, bank, grads)


def test_the_gate_fails_when_a_strategy_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = GatedLayer(StrategyCase(32, 16), CPU)
    layer.check()
    ways = layer.forwards()
    ways["fused"] = lambda x, s: 1.001 * ways["materialise"](x, s)
    monkeypatch.setattr(layer, "forwards", lambda: ways)
    with pytest.raises(WrongResult, match="fused: y"):
        layer.check()


# --- The suites -------------------------------------------------------------------------------------


def test_the_step_suite(tmp_path: Path) -> None:
    command = ["run", "--suite", "step", "--quick", "--device", "cpu", "--out", str(tmp_path)]
    assert main(command) == 0
    rows = read(tmp_path / "cpu-step-quick.csv")
    assert {row["case"] for row in rows} == {case.name for case in QUICK_STEP_CASES}
    plain = [row for row in rows if row["provider"] == "plain autograd search step"]
    assert {row["metric"]: row["median"] for row in plain}["speed-up over eager"] == "1.00"
    assert report.plot(tmp_path, "step-quick") == [tmp_path / "cpu-step-quick.png"]


def test_the_engine_suite(tmp_path: Path, eager_compiler: None) -> None:
    command = ["run", "--suite", "engine", "--quick", "--device", "cpu", "--out", str(tmp_path)]
    assert main(command) == 0
    rows = read(tmp_path / "cpu-engine-quick.csv")
    modes = {row["mode"] for row in rows if row["case"].startswith("resnet-20")}
    assert modes == {"eager", "compile", "eager, channels_last", "compile, channels_last"}
    compiled = {row["mode"] for row in rows if row["metric"] == "compile time"}
    assert compiled == {"compile", "compile, channels_last"}
    over = [row for row in rows if row["metric"] == "speed-up over eager"]
    assert len(over) == 2 + 4 and {r["median"] for r in over if r["mode"] == "eager"} == {"1.00"}


def test_the_search_suite(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], eager_compiler: None
) -> None:
    command = ["run", "--suite", "search", "--quick", "--device", "cpu", "--out", str(tmp_path)]
    assert main(command) == 0
    rows = read(tmp_path / "cpu-search-quick.csv")
    assert all(row["suite"] == "search-quick" and row["torch"] and row["date"] for row in rows)
    assert all(float(row["median"]) >= 0 for row in rows)
    assert {row["case"].split("/")[0] for row in rows} == set(report.SEARCH_PARTS)
    assert {row["case"] for row in rows} >= {
        case.name for case in (*QUICK.layers, *QUICK.ops, *QUICK.strategies)
    }
    layer = [row for row in rows if row["case"] == QUICK.layers[0].name]
    providers = Counter(row["provider"] for row in layer if row["metric"] == "time")
    assert providers == Counter(
        ["eager", "compiled", "no gates", "sparsecore", "sparsecore, stored q"]
    )
    networks = [row for row in rows if row["case"].startswith("network")]
    times = {(r["provider"], r["mode"]) for r in networks if r["metric"] == "time"}
    several = "sparsecore, fp32, 2 searches at once"
    assert (several, "eager") in times and (several, "compile") not in times
    assert ("eager autograd, fp32", "compile") not in times
    # What is compiled is held against eager autograd all the same.
    over = [r["mode"] for r in networks if r["metric"] == "speed-up over eager autograd, fp32"]
    assert set(over) == {"eager", "compile"}
    capsys.readouterr()
    (picture,) = report.plot(tmp_path, "search-quick")
    assert picture.read_bytes()[:4] == b"\x89PNG"
    suites = ["search-quick", "step"]
    assert report.table(tmp_path, suites, markdown=True) == suites
    shown = capsys.readouterr().out
    assert "| case | provider | mode | time, ms |" in shown
    assert "search-quick on a GPU: not measured" in shown and "step on a GPU: not measured" in shown


def test_what_is_captured_on_a_gpu_runs(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    unbound: None,
    recordings: list[Recording],
) -> None:
    """The paths of CUDA graphs, replayed as graphs would be."""
    adam = torch.optim.Adam
    engine.compiled_call.cache_clear()
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)  # hides its operations
    # Capturable optimisers take parameters of a GPU only, unless they are fused.
    monkeypatch.setattr(
        torch.optim, "Adam", lambda p, capturable=False, **rest: adam(p, **rest)
    )  # fmt: skip
    rows = Rows(tmp_path / "r.csv", "search", CPU)
    layer_step(LayerCase(16, 16, 8), QUICK, rows, CPU)
    strategy(StrategyCase(16, 8), QUICK, rows, CPU)
    few = search_cases.SearchCases((), (), (), (), 0, 0, 16, 1)
    small = lambda *_: seeded(lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 10)))  # noqa: E731
    monkeypatch.setattr("bench.cases.build", small)
    network([StepCase("small", (1, 8, 8), 8, 0)], few, rows, CPU)
    modes = {(row["case"].split("/")[0], row["mode"]) for row in rows.rows}
    both = {(p, m) for p in ("layer", "strategy", "network") for m in ("eager", "graph")}
    assert modes == both | {("network", "compile"), ("network", "compile-graph")}
    # The baselines' alone, whose optimiser is no capturable one here: the layer's and the network's.
    assert sum(bool(recording.touches) for recording in recordings) == 2 < len(recordings)


def test_a_compiled_search_that_is_wrong_is_not_timed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    wrong = lambda model, *inputs: 1.01 * model(*inputs)  # noqa: E731
    monkeypatch.setattr("sparsecore.search.steps.compiled_call", lambda facts: wrong)
    rows = Rows(tmp_path / "r.csv", "search", CPU)
    few = search_cases.SearchCases((), (), (), (), 0, 0, 32, 1)
    with pytest.raises(WrongResult, match="dR/dlogits"):
        network([StepCase("lenet-300-100", (1, 8, 8), 16, 0)], few, rows, CPU)
    assert {row["mode"] for row in rows.rows} == {"eager"}


def test_the_cases_are_as_large_as_they_claim() -> None:
    counts = {m: sum(torch.Size(s).numel() for s in weights_of(m))
              for m in ("resnet-20", "resnet-50", "vit-b/16", "4096x4096")}  # fmt: skip
    assert counts["resnet-20"] == 291_376 and counts["4096x4096"] == 2**24
    assert 25.4e6 < counts["resnet-50"] < 25.6e6 and 86.2e6 < counts["vit-b/16"] < 86.6e6
    cases = (*FULL.layers, *FULL.ops, *FULL.strategies)
    keys = [(case.name, getattr(case, "provider", "")) for case in cases]
    assert len(set(keys)) == len(keys)
    for case in FULL.layers:
        assert torch.Size(case.shape(case.k)).numel() == case.tokens * case.k
    sizes = bytes_a_weight(OpCase("1x1", "concrete", stored=True), torch.bfloat16)
    assert sizes == {"K1 sample": 12, "K2 backward": 12, "K2b balanced step": 26}


@pytest.mark.parametrize("unit", [Unit(16, 16), Unit(64, 64), Unit(1, 0)])
@pytest.mark.parametrize("density", [0.5, 0.05])
def test_strategies_open_the_share_they_claim(unit: Unit, density: float) -> None:
    layer = GatedLayer(StrategyCase(256, 1, unit, density), CPU)
    found = reference.density_ref(layer.gate, layer.logits.detach())
    torch.testing.assert_close(found, torch.full_like(found, density))


# --- Tickets ----------------------------------------------------------------------------------------


def test_the_plan_is_the_papers() -> None:
    plan = bench.tickets.PAPER
    assert plan.epochs == {"short": 20, "half": 80, "long": 160} and plan.training_epochs == 151
    assert plan.sparsity == pytest.approx(0.99262, abs=1e-5)
    model = bench.tickets.new_model(plan.setup, SimpleNamespace(shape=(3, 32, 32), classes=10), 0)
    assert sum(w.numel() for w in model.parameters() if w.ndim > 1) == 291_376
    search = plan.on(torch.device("cuda")).search("short", 3)
    assert (search.epochs, search.seed, search.channels_last) == (20, 3, True)
    assert search.dtype == torch.bfloat16 and search.objective.name == "reverse-kl"
    assert plan.on(torch.device("cuda")).setup.recipe.amp == "bf16"
    assert plan.on(torch.device("cuda"), amp="none").setup.recipe.amp is None
    assert plan.on(CPU) is plan


def test_tickets_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = ["tickets", "--suite", "cts-resnet20", "--quick", "--device", "cpu", "--out"]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert main([*command, str(whole), "--lengths", "short,half"]) == 0
    expected = _results(whole)
    assert {(r[0], r[1]) for r in expected} >= {
        (f"cts {length}", metric)
        for length in ("short", "half")
        for metric in ("density kept", "accuracy")
    }
    assert {p.suffix for p in whole.iterdir()} == {".csv", ".jsonl", ".safetensors"}
    assert len(list(whole.glob("*.safetensors"))) == 2
    name = "cts-resnet20-quick-short-seed0"
    assert Ticket.load(whole / f"{name}.safetensors").sparsity == pytest.approx(0.9, abs=1e-4)

    # Killed when the search is found and before it is saved, then in its training, then in a row.
    class Killed(BaseException):
        pass

    def kill(*args: object, **rest: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Ticket, "save", kill)
        with pytest.raises(Killed):
            main([*command, str(broken), "--lengths", "short"])
    with monkeypatch.context() as patch:
        patch.setattr(bench.tickets, "train_on", kill)
        with pytest.raises(Killed):
            main([*command, str(broken), "--lengths", "short"])
    (path,) = broken.glob("*.csv")
    path.write_text(path.read_text()[:-12])
    before = (broken / f"{name}.safetensors").stat().st_mtime_ns
    assert main([*command, str(broken), "--lengths", "short"]) == 0
    assert before == (broken / f"{name}.safetensors").stat().st_mtime_ns
    assert main([*command, str(broken), "--lengths", "half"]) == 0
    assert _results(broken) == expected
    # Nothing is done again.
    text = path.read_text()
    with monkeypatch.context() as patch:
        patch.setattr(bench.tickets, "train_on", kill)
        assert main([*command, str(broken), "--lengths", "short,half"]) == 0
    assert path.read_text() == text


def _results(folder: Path) -> list[tuple[str, str, str]]:
    """(provider, metric, value) of all that is no time, sorted."""
    (path,) = folder.glob("*.csv")
    with path.open() as file:
        rows = list(csv.DictReader(file))
    keys = Counter((r["provider"], r["metric"]) for r in rows)
    assert set(keys.values()) == {1}
    return sorted((r["provider"], r["metric"], r["median"]) for r in rows if r["unit"] != "s")


# --- The command line -------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [["bench"], ["-m", "bench"]])
def test_the_folder_runs(how: list[str]) -> None:
    command = [sys.executable, *how, "table", "--suite", "step"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    assert "lenet-300-100/batch=128" in done.stdout and "cpu-step.csv" in done.stdout


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["run", "--suite", "all"], "invalid choice"),
        (["run", "--suite", "search", "--device", "cpu"], "or --quick"),
        (["run", "--suite", "search", "--quick", "--parts", "ops,luck"], "got luck"),
        (["tickets", "--lengths", "shorter"], "short, half, long"),
        (["gpu", "--budget", "long"], "invalid float"),
        ([], "required"),
    ],
)
def test_bad_input(command: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(command)
    assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_without_data_or_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tickets", "--device", "cpu", "--data-dir", str(tmp_path / "none")]) == 2
    assert "found nothing there" in capsys.readouterr().err
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit):
            main(["run", "--device", "cuda"])
        assert "found none" in capsys.readouterr().err


def test_static_is_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []
    monkeypatch.setattr("bench.static.main", lambda argv: seen.append(argv) or 3)
    assert main(["static", "--check"]) == 3 and main(["static"]) == 3
    assert seen == [["--check"], []]
