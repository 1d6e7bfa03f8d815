"""A comparison's folder is of one setup, one set of images and one file of start weights."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import images
from helpers import seeded
from safetensors.torch import save_file

import sparsecore as sc
from sparsecore import data, experiment
from sparsecore.compare import Comparison
from sparsecore.experiment import Setup
from sparsecore.recipe import Recipe


def comparison(folder: Path, root: Path, **options: Any) -> Comparison:
    recipe = Recipe(optimizer="adam", batch=4)
    own = {"width": 0.05}
    setup = Setup(
        "lenet-300-100", f"folder:{root}", recipe, own, rewind_epochs=0, train_epochs=0.5, **options
    )
    found = Comparison(folder, setup)
    found.run(experiment.data_of(setup), ["magnitude"], [0.5], [0], torch.device("cpu"))
    return found


def test_a_comparison_is_of_one_size_and_one_set_of_images(tmp_path: Path) -> None:
    root, out = images(tmp_path / "pictures"), tmp_path / "runs"
    rows = comparison(out, root).rows
    assert comparison(out, root).rows == rows
    with pytest.raises(ValueError, match=r"another setup \(different: image_size\)"):
        comparison(out, root, image_size=8)
    known = json.loads((out / "setup.json").read_text())
    images(root, seed=1)
    with pytest.raises(ValueError, match="cells of other images or labels"):
        comparison(out, root)
    del known["data_digest"], known["weights_digest"]  # of an older version
    (out / "setup.json").write_text(json.dumps(known))
    assert comparison(out, root).rows == rows


def test_a_comparison_is_of_one_file_of_start_weights(tmp_path: Path) -> None:
    root, out, weights = images(tmp_path / "pictures"), tmp_path / "runs", tmp_path / "w"
    shape = (3, 12, 12)
    dense = seeded(lambda: sc.models.lenet_300_100(shape, 2, width=0.05)).state_dict()
    save_file(dense, weights)
    comparison(out, root, weights=str(weights))
    save_file({k: 2 * v for k, v in dense.items()}, weights)
    with pytest.raises(ValueError, match="other start weights than those now in the file"):
        comparison(out, root, weights=str(weights))


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("setup.json", "{", "expected what a comparison wrote"),
        ("setup.json", "[]", "expected what a comparison wrote"),
        ("results.csv", "a,b\n1,2", "expected the results of a comparison"),
        ("results.csv", "+garbage,\n", "expected a row of a comparison in line 4"),
    ],
)
def test_files_that_are_no_comparisons(name: str, text: str, said: str, tmp_path: Path) -> None:
    root, out = images(tmp_path / "pictures"), tmp_path / "runs"
    if text.startswith("+"):
        comparison(out, root)
        text = (out / name).read_text() + text[1:]
    out.mkdir(exist_ok=True)
    (out / name).write_text(text)
    with pytest.raises(ValueError, match=said):
        comparison(out, root)
    assert (out / name).read_text() == text


def test_sparsities_that_differ_in_the_seventh_digit_are_two(tmp_path: Path) -> None:
    root, out = images(tmp_path / "pictures"), tmp_path / "runs"
    found = comparison(out, root)
    dataset = experiment.data_of(found.setup)
    found.run(dataset, ["magnitude"], [0.6543210, 0.6543211], [0], torch.device("cpu"))
    assert len(Comparison(out, found.setup).summary()["magnitude"]) == 3


@pytest.mark.parametrize(
    ("method", "said"),
    [
        ("set+invert", "one whose mask moves"),
        ("gradual+invert", "one whose mask moves"),
        ("snip+corrupt", "expected images in memory to corrupt"),
        ("cts", "0 < sparsity < 1"),
    ],
)
def test_a_cell_that_cannot_be_is_told_before_all_others(
    method: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = images(tmp_path / "pictures")
    setup = Setup("lenet-300-100", f"folder:{root}", Recipe(batch=4), {"width": 0.05})
    monkeypatch.setattr(data, "EAGER_BYTES", 0)  # read when asked for
    found = Comparison(tmp_path / "runs", setup)
    with pytest.raises(ValueError, match=said):
        found.run(
            experiment.data_of(setup), ["magnitude", method], [0.5, 0.0], [0], torch.device("cpu")
        )
    assert not found.rows
