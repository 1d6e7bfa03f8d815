"""The loop: schedules, exact resume after a kill, and what must stay as it was."""

import json
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers import DEVICE, Blobs, convolutional, mlp, rand, seeded
from torch import Tensor, nn

import sparsecore as sc
from sparsecore.training import History, Recipe, Step, TrainingError, evaluate, train

RECIPE = Recipe(optimizer="adam", lr=1e-2, batch=64, epochs=4, milestones=(0.5,))


def run(model: nn.Module, recipe: Recipe = RECIPE, **options) -> History:
    blobs, device = Blobs(), next(model.parameters()).device
    blobs.x, blobs.y = blobs.x.to(device), blobs.y.to(device)
    return train(model, blobs, blobs, recipe, **options)


def states_equal(a: nn.Module, b: nn.Module) -> bool:
    other = b.state_dict()
    return all(torch.equal(v, other[k]) for k, v in a.state_dict().items())


def test_it_learns_and_keeps_a_history() -> None:
    model = mlp()
    history = run(model)
    assert history.accuracy > 95 and history.accuracy == evaluate(model, Blobs())
    assert [e["epoch"] for e in history.epochs] == [1, 2, 3, 4]
    assert history.epochs[0]["loss"] > history.epochs[-1]["loss"]
    assert history.seconds > 0


def test_schedules() -> None:
    step = Recipe(lr=1.0, schedule="step", milestones=(0.5, 0.75), gamma=0.1)
    assert [step.lr_at(e, 8) for e in (0, 3.9, 4, 6)] == pytest.approx([1, 1, 0.1, 0.01])
    cosine = Recipe(lr=1.0, schedule="cosine", warmup_epochs=2)
    assert [cosine.lr_at(e, 10) for e in (1, 2, 6, 10)] == pytest.approx([0.5, 1, 0.5, 0])
    assert Recipe(lr=1.0, schedule="constant").lr_at(7, 8) == 1.0


def test_the_schedule_is_indexed_by_the_absolute_epoch() -> None:
    history = run(mlp(), start_epoch=1, stop_epoch=3, total_epochs=4)
    assert [(e["epoch"], e["lr"]) for e in history.epochs] == [(2, 1e-2), (3, pytest.approx(1e-3))]


def test_training_in_two_parts_differs_only_by_the_optimiser_state() -> None:
    # Plain SGD has no state, so rewinding to a snapshot and going on gives the same weights.
    recipe = Recipe(lr=0.05, momentum=0.0, batch=64, epochs=4)
    whole, parts = mlp(), mlp(seed=1)
    history = run(whole, recipe, snapshots=(0, 2))
    assert torch.equal(history.snapshots[0]["0.weight"], mlp()[0].weight)
    parts.load_state_dict(history.snapshots[2])
    run(parts, recipe, start_epoch=2)
    assert states_equal(whole, parts)


def test_accumulation_gives_the_numbers_of_the_whole_batch() -> None:
    whole, cut = mlp(), mlp()
    run(whole, Recipe(lr=0.05, batch=64, epochs=2))
    run(cut, Recipe(lr=0.05, batch=64, epochs=2, accumulate=3))
    for a, b in zip(whole.parameters(), cut.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
@pytest.mark.parametrize("extra", [{}, {"amp": "bf16"}, {"ema": 0.9}, {"clip_norm": 0.1}], ids=str)
def test_pruned_weights_stay_exactly_zero(optimizer: str, extra: dict) -> None:
    model = sc.sparsify_(mlp())
    for i, layer in enumerate(sc.sparse_layers(model).values()):
        layer.set_mask_(rand(*layer.weight.shape, seed=i) > 0.7)
    before = sc.sparse_layers(model)["0"].raw_weight.detach().clone()
    run(model, Recipe(optimizer=optimizer, lr=0.02, weight_decay=0.1, epochs=3, batch=64, **extra))
    for layer in sc.sparse_layers(model).values():
        pruned = layer.raw_weight.detach()[~layer.pattern.mask].view(torch.int32)
        assert torch.equal(pruned, torch.zeros_like(pruned))  # not even a negative zero
    assert not torch.equal(before, sc.sparse_layers(model)["0"].raw_weight)


def test_label_smoothing_and_ema_change_the_run() -> None:
    plain, smooth, averaged = mlp(), mlp(), mlp()
    run(plain)
    run(smooth, Recipe(**{**RECIPE.__dict__, "label_smoothing": 0.2}))
    run(averaged, Recipe(**{**RECIPE.__dict__, "ema": 0.99}))
    assert not states_equal(plain, smooth) and not states_equal(plain, averaged)


def test_evaluate_puts_every_mode_back() -> None:
    model = nn.Sequential(mlp(), nn.Dropout(0.5))
    model.train()
    model[0].eval()
    evaluate(model, Blobs())
    assert model.training and model[1].training and not model[0].training


def test_dropout_is_seeded_without_the_global_generator() -> None:
    def net() -> nn.Module:
        return seeded(lambda: nn.Sequential(nn.Dropout(0.3), nn.Linear(12, 4)))

    first, second, third = net(), net(), net()
    run(first, seed=1)
    run(second, seed=1)
    run(third, seed=2)
    assert states_equal(first, second) and not states_equal(first, third)


def test_a_loss_that_blows_up_is_told() -> None:
    with pytest.raises(TrainingError, match="lower lr"):
        run(mlp(), Recipe(lr=1e30, momentum=0.9, epochs=3))


@pytest.mark.parametrize(
    "bad",
    [
        {"optimizer": "lion"},
        {"schedule": "linear"},
        {"amp": "fp8"},
        {"lr": 0},
        {"lr": float("nan")},
        {"momentum": 1.0},
        {"weight_decay": -1},
        {"batch": 0},
        {"epochs": 0},
        {"milestones": (1.2,)},
        {"gamma": 0},
        {"label_smoothing": 1.0},
        {"accumulate": 0},
        {"ema": 1.0},
        {"clip_norm": 0.0},
        {"warmup_epochs": -1},
    ],
    ids=str,
)
def test_bad_recipes_are_refused(bad: dict) -> None:
    with pytest.raises(ValueError, match=f"recipe {next(iter(bad))}: expected"):
        Recipe(**bad)


def test_fp16_on_the_cpu_is_refused() -> None:
    with pytest.raises(ValueError, match="use bf16"):
        run(mlp(), Recipe(amp="fp16"))


class Stops(Blobs):
    """Batches of a run that is interrupted in the middle of its third epoch."""

    def epoch(self, index: int) -> Iterator[tuple[Tensor, Tensor]]:
        for i, batch in enumerate(super().epoch(index)):
            if index == 2 and i == 2:
                raise KeyboardInterrupt
            yield batch


@pytest.mark.parametrize("extra", [{}, {"ema": 0.9}, {"optimizer": "sgd"}], ids=str)
def test_an_interrupted_run_resumes_to_the_same_numbers(extra: dict, tmp_path: Path) -> None:
    recipe = Recipe(**{**RECIPE.__dict__, "lr": 0.01, **extra})
    whole, resumed = mlp(), mlp()
    expected = run(whole, recipe)
    metrics, checkpoint = tmp_path / "m.jsonl", tmp_path / "c"
    options = {"metrics": metrics, "checkpoint": checkpoint}
    with pytest.raises(KeyboardInterrupt):
        train(resumed, Stops(), Blobs(), recipe, **options)
    resumed = mlp()
    history = run(resumed, recipe, **options)
    assert states_equal(whole, resumed)

    def numbers(records: list[dict]) -> list[tuple]:
        return [(r["epoch"], r["lr"], r["loss"], r["accuracy"]) for r in records]

    assert numbers(history.epochs) == numbers(expected.epochs)
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert numbers(lines) == numbers(expected.epochs)
    # Once finished, running again trains nothing and gives the same.
    again = mlp()
    assert numbers(run(again, recipe, **options).epochs) == numbers(expected.epochs)
    assert states_equal(whole, again)


class Layouts:
    """After each step: what an optimiser holds for a parameter lies in memory as the parameter does.

    Fused optimisers insist on it (on a GPU; on a CPU they would mix the entries up or copy).
    """

    def __init__(self, remask_at: int = -1) -> None:
        self.remask_at, self.images = remask_at, 0

    def __call__(self, step: Step) -> None:
        if step.index == self.remask_at:
            layers = sc.sparse_layers(step.model)
            masks = {
                n: rand(*m.weight_shape, seed=i) < 0.6 for i, (n, m) in enumerate(layers.items())
            }
            sc.remask_(step.model, masks, step.optimizer)
        for p, slots in step.optimizer.state.items():
            for value in slots.values():
                if isinstance(value, Tensor) and value.shape == p.shape:
                    assert value.stride() == p.stride()
                    self.images += p.ndim == 4 and not p.is_contiguous()


@pytest.mark.gpu
@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
@pytest.mark.parametrize("plan", ["dense", "mask", "state", "compact"])
def test_a_channels_last_run_goes_on_from_its_checkpoint(
    plan: str, optimizer: str, tmp_path: Path
) -> None:
    def build() -> nn.Module:
        model = sc.sparsify_(convolutional().to(DEVICE, memory_format=torch.channels_last))
        if plan != "dense":
            for i, layer in enumerate(sc.sparse_layers(model).values()):
                layer.set_mask_((rand(*layer.weight_shape, seed=i) < 0.5).to(DEVICE))
                assert layer.weight.stride() == layer.raw_weight.stride()
            sc.plan_(model, plan)
        return model

    recipe = Recipe(optimizer=optimizer, lr=0.01, batch=64, epochs=4)
    remask_at = -1 if plan == "dense" else 9
    whole, resumed = build(), build()
    run(whole, recipe, after_step=Layouts(remask_at))
    run(resumed, recipe, stop_epoch=2, after_step=Layouts(), checkpoint=tmp_path / "c")
    resumed, seen = build(), Layouts(remask_at)
    run(resumed, recipe, after_step=seen, checkpoint=tmp_path / "c")
    assert seen.images or plan in ("state", "compact")  # whose parameters are vectors
    if DEVICE == "cpu":
        assert states_equal(whole, resumed)
    for name, layer in sc.sparse_layers(resumed).items():
        assert layer.unplan_().raw_weight.stride() == build().get_submodule(name).weight.stride()


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    checkpoint = tmp_path / "c"
    run(mlp(), checkpoint=checkpoint)
    for other in (
        lambda: run(mlp(), checkpoint=checkpoint, seed=1),
        lambda: run(mlp(seed=1), checkpoint=checkpoint),
        lambda: run(mlp(), Recipe(), checkpoint=checkpoint),
    ):
        with pytest.raises(ValueError, match="belongs to another run"):
            other()


def test_a_checkpoint_tells_runs_apart_by_the_facts_it_is_given(tmp_path: Path) -> None:
    checkpoint = tmp_path / "c"
    run(mlp(), checkpoint=checkpoint, facts=("a hook", 0.1))
    run(mlp(), checkpoint=checkpoint, facts=("a hook", 0.1))
    for other in (("a hook", 0.2), ()):
        with pytest.raises(ValueError, match="belongs to another run"):
            run(mlp(), checkpoint=checkpoint, facts=other)


def test_a_run_is_watched_after_every_epoch(tmp_path: Path) -> None:
    plain, watched, seen = mlp(), mlp(), []

    def watch(model: nn.Module) -> float:
        seen.append(model)
        return float(len(seen))

    run(plain)
    options = {"watch": watch, "checkpoint": tmp_path / "c"}
    history = run(watched, **options)
    assert [e["watched"] for e in history.epochs] == [1, 2, 3, 4] and seen == [watched] * 4
    assert states_equal(plain, watched)
    assert [e["watched"] for e in run(mlp(), **options).epochs] == [1, 2, 3, 4]


def test_of_metrics_half_a_line_is_cut_and_other_runs_stay(tmp_path: Path) -> None:
    metrics = tmp_path / "m.jsonl"
    metrics.write_text('{"epoch": 9, "loss": 9}\n{"epo')
    run(mlp(), metrics=metrics)
    found = [json.loads(line)["epoch"] for line in metrics.read_text().splitlines()]
    assert found == [9, 1, 2, 3, 4]


def test_metrics_that_a_kill_left_out_are_caught_up(tmp_path: Path) -> None:
    options = {"metrics": tmp_path / "m.jsonl", "checkpoint": tmp_path / "c"}
    run(mlp(), **options)
    whole = options["metrics"].read_text()
    options["metrics"].write_text("".join(whole.splitlines(keepends=True)[:-1]) + '{"epo')
    run(mlp(), **options)
    lines = options["metrics"].read_text().splitlines()
    assert list(map(json.loads, lines)) == list(map(json.loads, whole.splitlines()))


def test_a_mask_that_an_average_does_not_know_is_refused() -> None:
    model = sc.sparsify_(mlp())

    def masked(step: Step) -> None:
        for layer in sc.sparse_layers(model).values():
            layer.set_mask_(torch.ones(layer.weight_shape, dtype=torch.bool))

    recipe = Recipe(lr=0.1, epochs=1, ema=0.9)
    with pytest.raises(ValueError, match="set masks and plans before training"):
        train(model, Blobs(), None, recipe, after_step=masked)


def test_a_killed_process_resumes_to_the_same_weights(tmp_path: Path) -> None:
    script = textwrap.dedent(
        """
        import os, signal, sys
        from pathlib import Path
        import torch
        from helpers import Blobs, mlp
        from sparsecore.safefile import write
        from sparsecore.training import Recipe, train

        class Killed(Blobs):
            def epoch(self, index):
                for i, batch in enumerate(super().epoch(index)):
                    if index == 2 and i == 1:
                        os.kill(os.getpid(), signal.SIGKILL)
                    yield batch

        out, batches = Path(sys.argv[1]), Killed() if sys.argv[2] == "kill" else Blobs()
        checkpoint = out / "checkpoint" if sys.argv[2] != "whole" else None
        model = mlp()
        recipe = Recipe(optimizer="adamw", lr=1e-2, weight_decay=0.1, epochs=4, batch=64)
        train(model, batches, Blobs(), recipe, checkpoint=checkpoint)
        write(out / sys.argv[2], model.state_dict(), {}, kind="weights")
        """
    )
    tests = str(Path(__file__).parent)

    def process(mode: str) -> int:
        command = [sys.executable, "-c", script, str(tmp_path), mode]
        return subprocess.run(command, cwd=tests, check=False).returncode

    assert process("kill") == -9
    assert process("resume") == 0 and process("whole") == 0
    assert (tmp_path / "resume").read_bytes() == (tmp_path / "whole").read_bytes()


def test_warm_up_never_steps_by_zero() -> None:
    model = mlp()
    before = model[0].weight.detach().clone()
    run(model, Recipe(lr=0.1, warmup_epochs=1, batch=64, epochs=1))
    assert not torch.equal(before, model[0].weight) and bool(model[0].weight.isfinite().all())


def test_a_resumed_run_still_has_its_snapshots(tmp_path: Path) -> None:
    whole, resumed, epochs = mlp(), mlp(), (0, 0.5, 1, 2.25, 3)
    expected = run(whole, snapshots=epochs)
    checkpoint = tmp_path / "c"
    with pytest.raises(KeyboardInterrupt):
        train(resumed, Stops(), Blobs(), RECIPE, checkpoint=checkpoint, snapshots=epochs)
    resumed = mlp()
    history = run(resumed, checkpoint=checkpoint, snapshots=epochs)
    assert states_equal(whole, resumed)
    assert list(history.snapshots) == list(expected.snapshots) == list(epochs)
    for epoch, state in expected.snapshots.items():
        assert state.keys() == history.snapshots[epoch].keys()
        assert all(torch.equal(v, history.snapshots[epoch][k]) for k, v in state.items())


@pytest.mark.parametrize("start", [-1, 4.5, float("nan")])
def test_a_start_outside_of_the_run_is_refused(start: float) -> None:
    with pytest.raises(ValueError, match="start_epoch: expected 0 to 4, the end"):
        run(mlp(), start_epoch=start)


def test_a_checkpoint_in_the_middle_of_an_epoch_goes_on_from_there(tmp_path: Path) -> None:
    whole, parts, checkpoint = mlp(), mlp(), tmp_path / "c"
    run(whole)
    run(parts, stop_epoch=1.5, checkpoint=checkpoint)
    parts = mlp()
    history = run(parts, snapshots=(3,), checkpoint=checkpoint)
    assert [e["epoch"] for e in history.epochs] == [1, 1.5, 2, 3, 4]
    assert states_equal(whole, parts)


@pytest.mark.parametrize("options", [{"stop_epoch": 2}, {"snapshots": (1, 3)}], ids=str)
def test_a_checkpoint_that_went_too_far_is_refused(options: dict, tmp_path: Path) -> None:
    run(mlp(), stop_epoch=3, snapshots=(1,), checkpoint=tmp_path / "c")
    with pytest.raises(ValueError, match=r"is at epoch 3 and holds no state of epoch [23]: remove"):
        run(mlp(), checkpoint=tmp_path / "c", **options)
