"""The command line as a user meets it."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sparsecore.cli import main
from sparsecore.data import Batches
from sparsecore.tickets import Ticket

SEARCH = [
    "search", "--model", "lenet-300-100", "--data", "digits", "--rewind-epochs", "1",
    "--search-epochs", "2", "--search-batch", "128", "--sparsity", "0.9", "--seed", "0",
]  # fmt: skip


@pytest.fixture(scope="module")
def ticket(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cli") / "T.safetensors"
    result = path.with_name("search.json")
    assert main([*SEARCH, "--out", str(path), "--json", str(result)]) == 0
    found = json.loads(result.read_text())
    assert found["sparsity"] == pytest.approx(0.9, abs=1e-4) and found["seconds"] > 0
    assert sorted(p.name for p in path.parent.iterdir()) == ["T.safetensors", "search.json"]
    return path


def test_the_whole_command_line_of_the_paper(ticket: Path, tmp_path: Path) -> None:
    out = tmp_path / "t.safetensors"
    flags = ["--method", "cts", "--objective", "reverse-kl", "--control", "gradbalance"]
    assert main([*SEARCH, *flags, "--granularity", "weight", "--out", str(out)]) == 0
    again, first = Ticket.load(out), Ticket.load(ticket)
    assert again.meta["objective_by_epoch"] == first.meta["objective_by_epoch"]  # the defaults
    assert again.hash == first.hash


def test_a_search_too_short_for_its_gates_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def said(*command: str) -> str:
        assert main([*command]) == 0
        return " ".join(capsys.readouterr().out.split())

    out, told = str(tmp_path / "t.safetensors"), "the gates ended"
    assert told in said(*SEARCH, "--method", "joint:lr=0.01", "--out", out)
    natural = 100 * Ticket.load(Path(out)).meta["natural_sparsity"]
    assert f"{told} {natural:.1f} % sparse, not 90 %" in said("info", out)
    for enough in (["joint", "--search-epochs", "10"], ["cts"], ["snip"]):
        assert told not in said(*SEARCH, "--method", *enough, "--out", out) + said("info", out)
    compared = said(
        "compare", *SEARCH[1:-4], "--epochs", "1", "--out", str(tmp_path / "runs"), "--seeds", "1",
        "--methods", "joint:lr=0.01,joint:epochs=10,snip", "--sparsities", "0.9",
    )  # fmt: skip
    assert compared.count(told) == 1 and f"joint:lr=0.01, 90 %: {told}" in compared


KILLED = """
import sys
from sparsecore import data
from sparsecore.cli import main
from sparsecore.data import Batches
order = data.Batches.order
def killed(self, index):
    if index == 1:
        raise SystemExit("killed")
    return order(self, index)
data.Batches.order = killed
main(sys.argv[1:])
"""


def test_a_search_killed_in_another_process_goes_on(ticket: Path, tmp_path: Path) -> None:
    out = tmp_path / "T.safetensors"
    command = [sys.executable, "-c", KILLED, *SEARCH, "--out", str(out)]
    died = subprocess.run(command, capture_output=True, text=True, check=False)
    assert died.returncode == 1 and "killed" in died.stderr, died.stderr
    assert (tmp_path / "T.safetensors.part").exists() and not out.exists()
    assert main([*SEARCH, "--out", str(out)]) == 0
    assert Ticket.load(out).hash == Ticket.load(ticket).hash
    assert [p.name for p in tmp_path.iterdir()] == ["T.safetensors"]


def test_train_reports_accuracy_sparsity_and_every_epoch(ticket: Path, tmp_path: Path) -> None:
    result, metrics = tmp_path / "r.json", tmp_path / "m.jsonl"
    options = ["--epochs", "3", "--json", str(result), "--metrics", str(metrics)]
    options += ["--recipe", "lr=0.01"]
    assert main(["train", str(ticket), *options, "--save", str(tmp_path / "w")]) == 0
    found = json.loads(result.read_text())
    assert found["accuracy"] == found["epochs"][-1]["accuracy"] > 50
    assert found["sparsity"] == pytest.approx(0.9, abs=1e-4) and found["seconds"] > 0
    assert [e["epoch"] for e in found["epochs"]] == [2, 3, 4]
    assert len(metrics.read_text().splitlines()) == 3
    trained, masks = load_file(tmp_path / "w"), Ticket.load(ticket).masks
    for name, mask in masks.items():
        assert bool((trained[f"{name}.weight"][~mask] == 0).all())


@pytest.mark.parametrize("sanity", ["shuffle", "reinit", "invert"])
def test_controls(ticket: Path, tmp_path: Path, sanity: str) -> None:
    result = tmp_path / "r.json"
    command = ["train", str(ticket), "--epochs", "1", "--sanity", sanity, "--json", str(result)]
    assert main(command) == 0
    assert json.loads(result.read_text())["sanity"] == sanity


def test_info(ticket: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = tmp_path / "i.json"
    assert main(["info", str(ticket), "--json", str(result)]) == 0
    shown, found = capsys.readouterr().out, json.loads(result.read_text())
    assert "live rows" in shown and "reverse-kl" in shown and found["hash"] in shown
    mask = Ticket.load(ticket).masks["1"]
    first = found["layers"][0]
    assert first["live_rows"] == int(mask.any(1).sum())
    assert first["live_columns"] == int(mask.any(0).sum())


def test_compare_resumes_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "c"
    command = [
        "compare", "--data", "digits", "--methods", "cts,cts+shuffle,magnitude", "--seeds", "2",
        "--sparsities", "0.8,0.9", "--epochs", "1", "--rewind-epochs", "1", "--search-epochs", "1",
        "--out", str(out),
    ]  # fmt: skip
    assert main(command) == 0
    rows = list(csv.DictReader((out / "results.csv").open()))
    assert len(rows) == 2 + 2 * 2 * 3
    assert (out / "accuracy.png").read_bytes()[:4] == b"\x89PNG"
    table = capsys.readouterr().out
    assert "cts+shuffle" in table and "±" in table and "dense" in table

    # Half of the last row is lost, as by a kill: only that cell runs again.
    text = (out / "results.csv").read_text()
    (out / "results.csv").write_text(text[:-20])
    before = {p.name: p.stat().st_mtime_ns for p in (out / "tickets").iterdir()}
    assert main(command) == 0
    again = list(csv.DictReader((out / "results.csv").open()))
    assert [(r["method"], r["seed"], r["accuracy"]) for r in again] == [
        (r["method"], r["seed"], r["accuracy"]) for r in rows
    ]
    assert before == {p.name: p.stat().st_mtime_ns for p in (out / "tickets").iterdir()}
    assert main([*command, "--search-epochs", "2"]) == 2
    assert "another setup (different: search_epochs)" in capsys.readouterr().err


def test_a_finished_ticket_is_used_as_it_is(tmp_path: Path) -> None:
    out, result = tmp_path / "s", tmp_path / "r.json"
    command = [*SEARCH[:-4], "--method", "strong:epochs=40:gate=bernoulli:lr=0.05", "--watch"]
    assert main([*command, "--sparsity", "0.5", "--out", str(out)]) == 0
    ticket = Ticket.load(out)
    assert ticket.finished and ticket.meta["setup"]["rewind_epochs"] == 0
    assert main(["train", str(out), "--json", str(result)]) == 0
    found = json.loads(result.read_text())
    told = ticket.meta["progress"][-1]["hard_accuracy"]
    assert found["accuracy"] == pytest.approx(told) and found["accuracy"] > 60
    assert (
        main(["train", str(out), "--epochs", "1", "--json", str(result)]) == 0
    )  # and trains, if asked
    assert len(json.loads(result.read_text())["epochs"]) == 1


def test_rounds_are_kept_and_shared_by_sparsities(tmp_path: Path) -> None:
    command = [
        *SEARCH[:-4],
        "--method",
        "ltr:rate=0.4",
        "--epochs",
        "1",
        "--rounds",
        str(tmp_path / "r"),
    ]
    for sparsity, count in (("0.5", 2), ("0.7", 3)):
        assert main([*command, "--sparsity", sparsity, "--out", str(tmp_path / sparsity)]) == 0
        assert len(list((tmp_path / "r").glob("round-*"))) == count
    assert len(Ticket.load(tmp_path / "0.7").meta["rounds"]) == 3


def test_a_stable_recipe_and_a_part_of_the_data(tmp_path: Path) -> None:
    out = tmp_path / "t"
    options = ["--recipe", "stable", "--recipe", "optimizer=adam", "--recipe", "lr=0.01"]
    command = [
        *SEARCH[:5],
        "--model-option",
        "width=0.2",
        "--method",
        "imp:rate=0.5",
        "--epochs",
        "2",
    ]
    assert (
        main([*command, *options, "--train-samples", "300", "--sparsity", "0.5", "--out", str(out)])
        == 0
    )
    setup = Ticket.load(out).meta["setup"]
    assert (
        setup["train_samples"] == 300 and setup["rewind_epochs"] == 0 and setup["train_epochs"] == 4
    )
    assert main(["search", "--recipe", "steady", "--out", str(out)]) == 2


SMALL = ["--data", "digits", "--out", "x.safetensors"]


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["search", *SMALL, "--method", "luck"], "erk, uniform, random, got 'luck'"),
        (["search", *SMALL, "--model", "lenet"], "one of lenet-300-100, conv-4"),
        (["search", *SMALL, "--objective", "kl"], "reverse-kl"),
        (["search", *SMALL, "--control", "pid"], "gradbalance, band, lagrangian, fixed"),
        (["search", *SMALL, "--granularity", "rows"], "block:HxW"),
        (["search", "--data", "imagenet", "--out", "x"], "digits, mnist, fashion-mnist"),
        (["search", *SMALL, "--sparsity", "1"], "0 <= sparsity < 1, got 1"),
        (["search", *SMALL, "--sparsity", "-0.2"], "got -0.2"),
        (["search", *SMALL, "--sparsity", "nan"], "got nan"),
        (["search", *SMALL, "--sparsity", "high"], "--sparsity"),
        (["search", *SMALL, "--device", "tpu"], "auto, cpu, cuda"),
        (["search", *SMALL, "--device", "cuda:77"], "usable GPUs"),
        (["search", *SMALL, "--recipe", "speed=9"], "recipe field: expected one of accumulate"),
        (["search", *SMALL, "--recipe", "lr"], "KEY=VALUE"),
        (["search", *SMALL, "--recipe", "lr=-1"], "recipe lr"),
        (["search", *SMALL, "--recipe", "lr=abc"], "recipe lr: expected float, got 'abc'"),
        (["search", *SMALL, "--recipe", "batch=1.5"], "recipe batch: expected int, got 1.5"),
        (["search", *SMALL, "--recipe", "milestones=0.5"], "recipe milestones: expected tuple"),
        (["search", *SMALL, "--model-option", "speed=9"], "expected options that it takes"),
        (["search", *SMALL, "--layers", "conv*"], "no layer matches"),
        (["search", *SMALL, "--rewind-epochs", "-1"], "rewind epochs"),
        (
            ["search", "--data", "mnist", "--data-dir", "/nowhere", "--out", "x"],
            "found nothing there",
        ),
        (["search", *SMALL[:2], "--out", "/nowhere/x"], "its folder does not exist"),
        (["train", "missing.safetensors"], "nothing there"),
        (["train", "missing.safetensors", "--epochs", "-1"], "at least 0"),
        (["info", "missing.safetensors"], "nothing there"),
        (["compare", "--methods", "cts+luck"], "shuffle, reinit, invert"),
        (["compare", "--sparsities", "a,b"], "numbers with commas"),
        (["compare", "--sparsities", "0.5,1.0"], "0 <= sparsity < 1"),
        (["compare", "--methods", ""], "at least one"),
        (["search"], "--out"),
        (["find"], "No such command"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)
def test_bad_input_is_one_line_and_exit_code_2(
    command: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert main(command) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1
    assert message in captured.err
    assert list(tmp_path.iterdir()) == []


def test_as_a_module_without_a_terminal() -> None:
    command = [sys.executable, "-m", "sparsecore", "search", "--sparsity", "2", "--out", "x"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ, check=False)
    assert done.returncode == 2 and done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr


def test_fashion_mnist_from_a_folder(data_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "t.safetensors"
    command = ["search", "--data", "fashion-mnist", "--data-dir", str(data_dir), "--method"]
    assert main([*command, "magnitude", "--rewind-epochs", "0", "--out", str(out)]) == 0
    assert Ticket.load(out).sparsity == pytest.approx(0.99)


def test_a_search_in_bf16_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "T.safetensors"
    flags = ["--search-dtype", "bf16", "--channels-last", "--out", str(out)]
    assert main([*SEARCH, *flags]) == 0
    assert Ticket.load(out).meta["dtype"] == "bfloat16"
    assert main([*SEARCH, "--search-dtype", "int8", "--out", str(out)]) == 2
    assert "search dtype: expected one of fp32, bf16, fp16, got 'int8'" in capsys.readouterr().err


def test_training_by_a_plan_gives_what_the_mask_gives(ticket: Path, tmp_path: Path) -> None:
    cache = ["--plan-cache", str(tmp_path / "plans.json")]
    accuracies, weights = {}, {}
    for plan in ("mask", "auto", "csr", "state"):
        out, saved = tmp_path / f"{plan}.json", tmp_path / plan
        options = [
            "--epochs",
            "2",
            "--plan",
            plan,
            "--json",
            str(out),
            "--save",
            str(saved),
            *cache,
        ]
        assert main(["train", str(ticket), *options]) == 0
        found = json.loads(out.read_text())
        assert found["plan"] == plan
        accuracies[plan], weights[plan] = found["accuracy"], load_file(saved)
    assert max(accuracies.values()) - min(accuracies.values()) < 1
    for plan, state in weights.items():
        assert list(state) == list(weights["mask"]), plan
        for name, mask in Ticket.load(ticket).masks.items():
            weight, other = state[f"{name}.weight"], weights["mask"][f"{name}.weight"]
            assert weight.shape == mask.shape and bool((weight[~mask] == 0).all())
            assert (weight - other).norm() < 0.05 * other.norm()


def test_a_planned_run_killed_goes_on(ticket: Path, tmp_path: Path) -> None:
    cache = ["--plan", "auto", "--plan-cache", str(tmp_path / "plans.json")]
    whole, part = tmp_path / "whole", tmp_path / "part"
    run = ["train", str(ticket), "--epochs", "3", *cache]
    assert main([*run, "--save", str(whole)]) == 0
    command = [sys.executable, "-c", KILLED.replace("order", "plan").replace("== 1", "== 3"), *run]
    command += ["--checkpoint", str(tmp_path / "c"), "--save", str(part)]
    died = subprocess.run(command, capture_output=True, text=True, check=False)
    assert died.returncode == 1 and "killed" in died.stderr and not part.exists(), died.stderr
    assert main([*run, "--checkpoint", str(tmp_path / "c"), "--save", str(part)]) == 0
    for key, value in load_file(whole).items():
        torch.testing.assert_close(load_file(part)[key], value, rtol=1e-4, atol=1e-5)


def test_a_run_goes_on_under_another_plan(
    ticket: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = Batches.plan

    def killed(self: Batches, index: int):
        if index == 3:
            raise KeyboardInterrupt
        return plan(self, index)

    run = ["train", str(ticket), "--recipe", "optimizer=adamw", "--recipe", "lr=0.002"]
    assert main([*run, "--epochs", "3", "--save", str(tmp_path / "whole")]) == 0
    for first, then in (("mask", "csr"), ("state", "mask"), ("csr", "state")):
        checkpoint = ["--checkpoint", str(tmp_path / first), "--epochs", "3"]
        with monkeypatch.context() as patch:
            patch.setattr(Batches, "plan", killed)
            assert main([*run, "--plan", first, *checkpoint]) == 130
        saved = tmp_path / f"{first}-{then}"
        assert main([*run, "--plan", then, *checkpoint, "--save", str(saved)]) == 0
        for key, value in load_file(tmp_path / "whole").items():
            torch.testing.assert_close(load_file(saved)[key], value, rtol=1e-3, atol=1e-4)


def test_plan_shows_choices_and_reasons(
    ticket: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = tmp_path / "p.json"
    options = ["--batch", "64", "--json", str(result), "--plan-cache", str(tmp_path / "plans.json")]
    assert main(["plan", str(ticket), *options]) == 0
    shown, found = capsys.readouterr().out, json.loads(result.read_text())
    assert found["batch"] == 64 and len(found["layers"]) == 3
    for word in ("dense*mask", "predicted", "AdamW state", "ms a step"):
        assert word in shown
    for layer in found["layers"]:
        assert layer["reason"] and len(layer["formats"]) == 3
        assert layer["milliseconds"] <= 1.3 * layer["dense_mask"]
        assert layer["state_bytes"] <= 8 * layer["shape"][0] * layer["shape"][1]
    assert main(["plan", str(ticket), *options]) == 0
    assert json.loads(result.read_text()) == found  # remembered
    assert main(["plan", str(ticket), "--plan", "nope"]) == 2
