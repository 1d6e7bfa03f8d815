"""Start weights of one's own: every file a user may have, and what torchvision has trained."""

import urllib.error
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from helpers import seeded
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils import prune

from sparsecore import torchvision_models
from sparsecore.recipes import build
from sparsecore.start_weights import WeightsWarning, read_state, start_from_, start_trained_


def net(classes: int = 3) -> nn.Module:
    return seeded(lambda: nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, classes)))


@pytest.mark.parametrize("nested", [None, "state_dict", "model"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "model.", "module.net.student."])
def test_files_of_torch_save(nested: str | None, prefix: str, tmp_path: Path) -> None:
    state: Any = {f"{prefix}{name}": value for name, value in net().state_dict().items()}
    torch.save(state if nested is None else {nested: state, "epoch": 3}, tmp_path / "w.pt")
    model = net()
    nn.init.zeros_(model[0].weight)  # type: ignore[index, arg-type]
    start_from_(model, read_state(tmp_path / "w.pt"), "w.pt")
    for name, value in net().state_dict().items():
        assert torch.equal(model.state_dict()[name], value)


def test_files_of_safetensors(tmp_path: Path) -> None:
    save_file(net().state_dict(), tmp_path / "w.bin")  # whatever its name
    assert read_state(tmp_path / "w.bin").keys() == net().state_dict().keys()


class Hostile:
    def __reduce__(self) -> tuple[Callable, tuple]:
        return Path.touch, (Path("ran"),)


def test_files_that_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("text").write_text("weights")
    Path("empty").write_bytes(b"")
    torch.save({"w": torch.zeros(2), "code": Hostile()}, "hostile")
    torch.save([torch.zeros(2)], "list")
    torch.save({"epoch": 3}, "numbers")
    whole = Path("whole")
    torch.save(net().state_dict(), whole)
    Path("half").write_bytes(whole.read_bytes()[:-300])
    save_file(net().state_dict(), "half.safetensors")
    Path("half.safetensors").write_bytes(Path("half.safetensors").read_bytes()[:-300])
    for name in ("text", "empty", "hostile", "half", "half.safetensors"):
        with pytest.raises(ValueError, match="damaged file or one with more than tensors"):
            read_state(Path(name))
    for name in ("list", "numbers"):
        with pytest.raises(ValueError, match="expected tensors by name"):
            read_state(Path(name))
    for name, found in (("none", "nothing there"), (".", "a folder")):
        with pytest.raises(ValueError, match=f"expected a file or DEFAULT, found {found}"):
            read_state(Path(name))
    assert not Path("ran").exists()


def quantised(value: Tensor) -> Tensor:
    return torch.quantize_per_tensor(value, 0.1, 0, torch.qint8)


@pytest.mark.filterwarnings("ignore")  # PyTorch's, of quantised tensors
@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda v: (100 * v).to(torch.int8), "int8"),
        (lambda v: v.long(), "int64"),
        (lambda v: v > 0, "bool"),
        (lambda v: v.to(torch.complex64), "complex64"),
        (lambda v: v.to(torch.float8_e4m3fn), "float8_e4m3fn"),
        (lambda v: v.to_sparse(), "sparse_coo"),
        (lambda v: v.to_sparse_csr(), "sparse_csr"),
        (lambda v: v.to("meta"), "no data"),
        (lambda v: torch.nested.nested_tensor([v, v]), "a nested tensor"),
        (quantised, "qint8"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_weights_that_are_no_plain_numbers(change: Callable[[Tensor], Tensor], found: str) -> None:
    model, state = net(), net().state_dict()
    given = state | {"0.weight": change(state["0.weight"])}
    with pytest.raises(
        ValueError, match=rf"plain floating-point numbers as 0.weight in f, got {found}"
    ):
        start_from_(model, given, "f")
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    with pytest.raises(ValueError, match=r"expected plain torch.int64 as 1.num_batches_tracked"):
        start_from_(model, state | {"1.num_batches_tracked": torch.tensor(1.0)}, "f")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_weights_of_another_width(dtype: torch.dtype) -> None:
    state = {k: v.to(dtype) if v.is_floating_point() else v for k, v in net().state_dict().items()}
    model = net()
    start_from_(model, state, "f")
    assert all(torch.equal(v, state[k].to(v.dtype)) for k, v in model.state_dict().items())
    wide = state | {"0.weight": torch.full((5, 4), 1e300, dtype=torch.float64)}
    with pytest.raises(ValueError, match="not finite"):
        start_from_(model, wide, "f")


def test_weights_under_masks_of_another_tool() -> None:
    pruned = net()
    prune.l1_unstructured(pruned[0], "weight", 0.5)  # type: ignore[index, arg-type]
    for prefix in ("", "model."):
        state = {prefix + name: value for name, value in pruned.state_dict().items()}
        with pytest.raises(
            ValueError, match=r"got 0.weight_orig of torch.nn.utils.prune; call prune.remove"
        ):
            start_from_(net(), state, "f")


def test_a_prefix_that_is_not_of_all_is_another_model() -> None:
    state = {f"model.{name}": value for name, value in net().state_dict().items()}
    with pytest.raises(ValueError, match=r"with no 0.bias"):
        start_from_(net(), state | {"loss.weight": torch.ones(3)}, "f")


def test_weights_of_another_model_change_nothing() -> None:
    state = net().state_dict()
    wrong: dict[str, dict[str, Tensor]] = {
        "with no 0.bias": {k: v for k, v in state.items() if k != "0.bias"},
        "with head, which it does not have": state | {"head": torch.zeros(1)},
        r"expected 2.weight of shape \(3, 5\), got \(7, 5\)": net(7).state_dict(),
        "0.weight in f has values that are not finite": state
        | {"0.weight": torch.full((5, 4), torch.nan)},
    }
    for message, given in wrong.items():
        model = net()
        with pytest.raises(ValueError, match=message):
            start_from_(model, given, "f")
        assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize(
    ("name", "head", "classes"),
    [
        ("squeezenet1_1", "classifier.1", 10),
        ("squeezenet1_1", "classifier.1", 1000),
        ("googlenet", "fc", 10),
        ("googlenet", "fc", 1000),
        ("vit_b_32", "heads.head", 10),
    ],
)
def test_trained_weights_and_a_head_of_other_classes(
    name: str, head: str, classes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape, further = (3, 96, 96), ("googlenet", "inception_v3")
    options: dict[str, Any] = {"init_weights": False, "aux_logits": True} if name in further else {}
    whole = seeded(lambda: torchvision.models.get_model(name, weights=None, **options)).state_dict()
    monkeypatch.setattr(
        torchvision.models.WeightsEnum, "get_state_dict", lambda *_, **__: whole
    )  # offline
    model = build(f"torchvision:{name}", shape, classes)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", WeightsWarning)
        start_trained_(model, f"torchvision:{name}", shape, {})
    replaced = [] if classes == 1000 else [f"{head}.weight", f"{head}.bias"]
    said = [str(w.message) for w in told if w.category is WeightsWarning]
    assert bool(said) == bool(replaced) and all(", ".join(replaced) in text for text in said)
    for key, value in model.state_dict().items():
        if not key.endswith("pos_embedding"):  # which is of fewer patches here
            assert torch.equal(value, before[key] if key in replaced else whole[key]), key


def test_trained_weights_that_are_not_to_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any, **__: Any) -> None:
        raise urllib.error.URLError("no route to host")

    model = build("torchvision:squeezenet1_1", (3, 64, 64), 2)
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", refused)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", refused)
    with pytest.raises(
        ValueError, match=r"could not be loaded: .*no route to host.*; give --weights"
    ):
        start_trained_(model, "torchvision:squeezenet1_1", (3, 64, 64), {})
    with pytest.raises(ValueError, match="DEFAULT is of torchvision's models, and conv-4 is not"):
        start_trained_(model, "conv-4", (3, 64, 64), {})


def test_models_are_built_for_the_images(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("torchvision:googlenet", (3, 64, 64), 2)
    assert model.aux1 is None  # one output while training too
    for name, shape, message in (
        ("vit_b_32", (3, 50, 50), r"sides divisible by 32, got 50 x 50; give --image-size 32"),
        ("alexnet", (3, 16, 16), r"a size that it takes, got 16 x 16 .*--image-size"),
        ("maxvit_t", (3, 64, 64), r"that it takes, got 64 x 64 .*--image-size"),
        ("resnet18", (1, 64, 64), "expected images with 3 channels"),
        ("resnet19", (3, 64, 64), "torchvision has no 'resnet19'"),
    ):
        with pytest.raises(ValueError, match=message):
            build(f"torchvision:{name}", shape, 2)
    with pytest.raises(ValueError, match="expected options that it takes, got speed"):
        build("torchvision:resnet18", (3, 64, 64), 2, speed=9)
    assert "resnet18" in torchvision_models.names()
    assert not {"raft_small", "fcn_resnet50"} & {*torchvision_models.names()}
