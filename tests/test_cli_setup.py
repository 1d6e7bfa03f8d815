"""What a search is told reaches whatever comes after it; no run goes on from another's checkpoint."""

from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import images, one_error
from helpers import seeded
from PIL import Image
from safetensors.torch import save_file

import sparsecore as sc
from sparsecore import cli, data, experiment
from sparsecore.cli import main
from sparsecore.data import DataError
from sparsecore.experiment import setup_of
from sparsecore.tickets import Ticket

OUT = ["--out", "t"]
SEARCH = [
    "search",
    "--data",
    "folder:pictures",
    "--recipe",
    "batch=4",
    "--search-batch",
    "4",
    "--method",
    "magnitude",
]


@pytest.mark.parametrize("asked", [8, None])
def test_the_next_command_sees_images_of_the_size_searched(
    asked: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    images(Path("pictures"))
    sizes = []
    load = experiment.load

    def seen(*args: Any, **options: Any) -> data.Dataset:
        found = load(*args, **options)
        sizes.append(found.shape[-1])
        return found

    monkeypatch.setattr(experiment, "load", seen)
    monkeypatch.setattr(data, "load", seen)
    size = [] if asked is None else ["--image-size", str(asked)]
    model = ["--model", "resnet-20", "--rewind-epochs", "0"]
    command = [*SEARCH, *model]
    assert main([*command, "--epochs", "1", "--engine", "eager", *size, *OUT]) == 0
    if asked is None:  # images that are added move the median
        images(Path("pictures"), 20, count=40)
    named = ["t", "--data", "folder:pictures"]
    assert main(["train", *named, "--engine", "eager"]) == 0
    assert main(["plan", *named, "--plan", "mask"]) == 0
    assert main(["analyze", "instability", *named, "--points", "2", "--out", "a"]) == 0
    assert set(sizes) == {asked or 12} and setup_of(Ticket.load("t")).image_size == (asked or 12)
    assert main(["train", *named, "--engine", "eager", "--image-size", "16"]) == 0
    assert sizes[-1] == 16


def test_a_size_that_the_data_does_not_have(capsys: pytest.CaptureFixture[str]) -> None:
    assert data.load("digits", image_size=8).shape == (1, 8, 8)
    for size, said in (
        (32, "whose images are of 8 x 8 pixels, got 32"),
        (0, "1 to 16,384"),
        (10**6, "1 to 16,384"),
    ):
        with pytest.raises(DataError, match=said):
            data.load("digits", image_size=size)


def test_other_images_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    images(Path("pictures"))
    model = ["--model-option", "width=0.05", "--rewind-epochs", "0"]
    command = [*SEARCH, *model, "--epochs", "0.5"]
    assert main([*command, "--engine", "eager", *OUT]) == 0
    places = ("pictures", "./pictures/", str(tmp_path / "pictures"))
    for changed in (False, True):
        if changed:
            images(Path("pictures"), seed=1)
        for place in places:
            named = ["--data", f"folder:{place}"]
            assert main(["train", "t", *named, "--engine", "eager"]) == 0
            told = f"warning: folder:{place}: these are other images" in capsys.readouterr().err
            assert told is changed


def test_digests_tell_data_apart_wherever_it_lies(tmp_path: Path) -> None:
    first = data.load(f"folder:{images(tmp_path / 'a')}")
    assert data.load(f"folder:{images(tmp_path / 'b')}").digest == first.digest
    others = [
        data.load(f"folder:{images(tmp_path / 'c', seed=1)}"),
        data.load(f"folder:{tmp_path / 'a'}", image_size=8),
        data.limited(first, 6),
        data.corrupted(first, 0),
    ]
    assert len({first.digest, *(other.digest for other in others)}) == 5


def interrupted(monkeypatch: pytest.MonkeyPatch, *command: str) -> None:
    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(cli, "find_ticket", stop)
        assert main([*command]) == 130
    assert Path("t.dense").exists()


VIT = [
    "search", "--model", "vit-small", "--model-option", "dim=12", "--model-option", "depth=1", "--model-option",
    "hidden=8", "--data", "folder:pictures", "--method", "magnitude", "--sparsity", "0.5", "--engine", "eager",
    "--recipe", "batch=4", "--rewind-epochs", "1", "--epochs", "1", "--search-batch", "4", *OUT,
]  # fmt: skip


def test_the_dense_checkpoint_of_another_search_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    images(Path("pictures"))
    own = {"dim": 12, "depth": 1, "hidden": 8}
    for name, scale in (("w1", 1.0), ("w2", 2.0)):
        dense = seeded(lambda: sc.models.vit_small((3, 12, 12), 2, **own))
        save_file({k: scale * v for k, v in dense.state_dict().items()}, name)
    start = [*VIT, "--weights", "w1"]
    interrupted(monkeypatch, *start)
    kept = Path("t.dense").read_bytes()
    for other in (
        ["--weights", "w2"],
        ["--model-option", "heads=4"],  # of the same parameters
        ["--model-option", "heads=4", "--weights", "w2"],
        ["--image-size", "8", "--weights", "w1"],
        ["--train-samples", "9"],
        ["--epochs", "2"],
        ["--seed", "1"],
    ):
        capsys.readouterr()
        assert main([*start, *other]) == 2
        assert "t.dense" in (error := one_error(capsys)) or "shape" in error
        assert Path("t.dense").read_bytes() == kept and not Path("t").exists()
    assert main(start) == 0 and not Path("t.dense").exists()


def test_a_rewind_point_on_replaced_images_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    images(Path("pictures"))
    interrupted(monkeypatch, *VIT)
    capsys.readouterr()
    # One pixel of a test image, which no training batch has.
    image = Image.open("pictures/a/0.png")
    image.putpixel((0, 0), (1, 2, 3))
    image.save("pictures/a/0.png")
    assert main(VIT) == 2
    assert "expected the rewind point of this search" in one_error(capsys)
    assert main([*VIT, "--rewind-epochs", "0"]) == 0 and Path("t.dense").exists()  # not its own


def test_a_search_checkpoint_of_other_options_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Heads change what a model computes, not its weights."""
    monkeypatch.chdir(tmp_path)
    images(Path("pictures"))
    command = [*VIT, "--method", "cts", "--search-epochs", "2", "--rewind-epochs", "0"]
    batches = data.Batches.order

    def stop(self: data.Batches, index: int) -> torch.Tensor | None:
        if index == 1:
            raise KeyboardInterrupt
        return batches(self, index)

    with monkeypatch.context() as patch:
        patch.setattr(data.Batches, "order", stop)
        assert main(command) == 130
    assert Path("t.part").exists()
    capsys.readouterr()
    assert main([*command, "--model-option", "heads=4"]) == 2
    assert "belongs to another search" in one_error(capsys)
    assert main(command) == 0
