"""Tickets: exact round trips, controls that do what they say, and files that nobody should trust."""

import copy
import itertools
import json
import pickle
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import GRANULARITIES, Blobs, mlp, rand, seeded
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

import sparsecore as sc
from sparsecore import safefile, writing
from sparsecore.granularity import NM, Granularity
from sparsecore.sparsities import kept_count
from sparsecore.tickets import Ticket, TicketError, dense_state


def ticket_of(
    model: nn.Module, sparsity: float = 0.7, granularity: Granularity | None = None
) -> Ticket:
    layers = sc.sparse_layers(model)
    units = granularity.units if granularity else lambda shape: shape
    scores = {
        n: rand(*units(m.raw_weight.shape), seed=i) for i, (n, m) in enumerate(layers.items())
    }
    return Ticket.from_scores(scores, model, sparsity, granularity, meta={"method": "test"})


def test_a_ticket_from_a_file_keeps_the_order_of_layers_and_shuffles_alike(tmp_path: Path) -> None:
    made = lambda: nn.Sequential(*(nn.Linear(6, 6) for _ in range(12)))  # noqa: E731
    ticket = ticket_of(sc.sparsify_(seeded(made)))  # "10" is before "2" in a file
    ticket.save(tmp_path / "T")
    loaded = Ticket.load(tmp_path / "T")
    assert list(loaded.masks) == list(loaded.scores) == list(map(str, range(12)))
    for seed in range(3):
        assert loaded.shuffled(seed).hash == ticket.shuffled(seed).hash
    tensors, meta = safefile.read(tmp_path / "T", kind="ticket")
    for wrong in (["0"], [*meta["layers"], "0"], ["x", *meta["layers"][1:]], "01", [1, 2], {}):
        safefile.write(tmp_path / "wrong", tensors, meta | {"layers": wrong}, kind="ticket")
        with pytest.raises(TicketError, match="not a usable ticket"):
            Ticket.load(tmp_path / "wrong")
    del meta["layers"]  # as older versions wrote it
    safefile.write(tmp_path / "older", tensors, meta, kind="ticket")
    assert Ticket.load(tmp_path / "older").hash == ticket.hash


def conv_net(seed: int = 0) -> nn.Module:
    return sc.sparsify_(
        seeded(
            lambda: nn.Sequential(
                nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 4)
            ),
            seed,
        )
    )


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "t.safetensors"


@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
def test_round_trip_is_exact(granularity: Granularity, path: Path) -> None:
    ticket = ticket_of(conv_net(), 0.7, granularity)
    ticket.save(path)
    loaded = Ticket.load(path)
    assert loaded.meta == ticket.meta and loaded.hash == ticket.hash
    assert loaded.granularity == granularity
    for part in ("masks", "weights", "scores"):
        before, after = getattr(ticket, part), getattr(loaded, part)
        assert set(before) == set(after)
        for key, value in before.items():
            assert after[key].dtype == value.dtype and torch.equal(after[key], value)
    first = path.read_bytes()
    loaded.save(path)
    assert path.read_bytes() == first  # nothing in it depends on when it was written


@given(n=st.integers(1, 9), k=st.integers(1, 9), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=30)
def test_masks_of_any_shape_survive_packing(tmp_path_factory, n: int, k: int, seed: int) -> None:
    path = tmp_path_factory.mktemp("t") / "t"
    ticket = Ticket({"a": rand(n, k, seed=seed) > 0.5}, {"w": torch.zeros(())}, {"method": "x"})
    ticket.save(path)
    assert torch.equal(Ticket.load(path).masks["a"], ticket.masks["a"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.int64])
def test_weights_of_any_dtype_survive(dtype: torch.dtype, path: Path) -> None:
    weights = {"w": (100 * rand(3, 5)).to(dtype), "count": torch.tensor(7)}
    Ticket({"a": rand(2, 2) > 0.5}, weights).save(path)
    loaded = Ticket.load(path)
    assert all(torch.equal(loaded.weights[k], v) for k, v in weights.items())
    assert loaded.scores is None


@given(sparsity=st.floats(0, 0.999))
@settings(deadline=None, max_examples=30)
def test_from_scores_keeps_exactly_k(sparsity: float) -> None:
    ticket = ticket_of(sc.sparsify_(mlp()), sparsity)
    kept = sum(int(m.sum()) for m in ticket.masks.values())
    assert kept == kept_count(384, sparsity)
    assert ticket.sparsity == pytest.approx(1 - kept / 384)
    assert ticket.density == pytest.approx(kept / 384)


def test_apply_loads_weights_and_fixes_masks() -> None:
    source, model = conv_net(), conv_net(seed=1)
    ticket = ticket_of(source)
    ticket.apply_(model)
    for name, layer in sc.sparse_layers(model).items():
        original = source.get_submodule(name).raw_weight
        assert torch.equal(layer.raw_weight, original * ticket.masks[name])
    assert torch.equal(model[1].running_mean, source[1].running_mean)
    other = conv_net(seed=2)
    before = dense_state(other)
    ticket.apply_(other, weights=False)
    for name, layer in sc.sparse_layers(other).items():
        assert torch.equal(layer.raw_weight, before[f"{name}.weight"] * ticket.masks[name])


def test_layers_the_ticket_does_not_name_become_dense() -> None:
    ticket = ticket_of(sc.sparsify_(mlp(), "0"))
    model = sc.sparsify_(mlp())
    sc.sparse_layers(model)["2"].set_mask_(rand(4, 24) > 0.5)
    ticket.apply_(model)
    assert torch.equal(model[2].weight, mlp()[2].weight)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: mlp(), "sparsify_"),
        (lambda: sc.sparsify_(mlp(hidden=25)), r"\(24, 12\), the model's is \(25, 12\)"),
        (lambda: sc.sparsify_(mlp(), "0"), "another model: its sparse layers are 0, 2"),
        (lambda: conv_net(), "another model"),
    ],
)
def test_a_ticket_for_another_model_changes_nothing(build, message: str) -> None:
    ticket, model = ticket_of(sc.sparsify_(mlp())), build()
    before, kinds = copy.deepcopy(model.state_dict()), [type(m) for m in model.modules()]
    with pytest.raises(TicketError, match=message):
        ticket.apply_(model)
    assert [type(m) for m in model.modules()] == kinds
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
def test_shuffling_moves_weights_within_layers_only(granularity: Granularity) -> None:
    ticket = ticket_of(sc.sparsify_(mlp()), 0.8, granularity)
    shuffled = ticket.shuffled(0)
    assert shuffled.hash == ticket.shuffled(0).hash
    assert len({ticket.hash} | {ticket.shuffled(seed).hash for seed in range(6)}) > 3
    for name, mask in shuffled.masks.items():
        units = granularity.gather(mask.long()) > 0
        before = granularity.gather(ticket.masks[name].long()) > 0
        assert int(units.sum()) == int(before.sum())
        if isinstance(granularity, NM):
            assert int(mask.unflatten(1, (-1, 4)).sum(-1).max()) <= 2
    assert all(torch.equal(ticket.weights[k], v) for k, v in shuffled.weights.items())


def test_inverting_keeps_the_lowest_scores_of_each_layer() -> None:
    ticket = ticket_of(sc.sparsify_(mlp()), 0.8)
    inverted = ticket.inverted()
    assert ticket.scores is not None
    for name, mask in inverted.masks.items():
        assert int(mask.sum()) == int(ticket.masks[name].sum())
        assert ticket.scores[name][mask].max() <= ticket.scores[name][~mask].min()
    assert inverted.inverted().hash == ticket.hash
    with pytest.raises(TicketError, match="needs its scores"):
        ticket.shuffled(0).inverted()


def test_reinitialising_changes_the_weights_only() -> None:
    model = sc.sparsify_(mlp())
    ticket, fresh = ticket_of(model), sc.sparsify_(mlp(seed=9))
    other = ticket.reinitialised(fresh.state_dict())
    assert other.hash == ticket.hash
    assert torch.equal(other.weights["0.weight"], fresh[0].raw_weight)
    with pytest.raises(TicketError, match="another model"):
        ticket.reinitialised(mlp(hidden=9).state_dict())
    with pytest.raises(TicketError, match="another model"):
        ticket.reinitialised({})


def test_hash_is_of_the_masks() -> None:
    mask = rand(4, 4) > 0.5
    assert Ticket({"a": mask}, {}).hash == Ticket({"a": mask.clone()}, {"w": rand(3)}).hash
    assert Ticket({"a": mask}, {}).hash != Ticket({"b": mask}, {}).hash
    assert Ticket({"a": mask}, {}).hash != Ticket({"a": mask.view(2, 8)}, {}).hash
    assert Ticket({"a": mask}, {}).hash != Ticket({"a": ~mask}, {}).hash


# --- files that nobody should trust ---------------------------------------------------------------


def _load_fails(path: Path, match: str = "expected") -> None:
    with pytest.raises(TicketError, match=match) as caught:
        Ticket.load(path)
    assert path.name in str(caught.value)


@pytest.fixture
def good(path: Path) -> bytes:
    ticket_of(sc.sparsify_(mlp())).save(path)
    return path.read_bytes()


def test_every_truncation_is_told(good: bytes, path: Path) -> None:
    for length in [*range(64), *range(64, len(good), 97), len(good) - 1]:
        path.write_bytes(good[:length])
        _load_fails(path)


def test_every_flipped_bit_is_told(good: bytes, path: Path) -> None:
    expected = Ticket.load(path)
    header = 8 + struct.unpack("<Q", good[:8])[0]
    for position in [*range(0, header, 3), *range(header, len(good), 37)]:
        for bit in (0, 6):
            data = bytearray(good)
            data[position] ^= 1 << bit
            path.write_bytes(data)
            try:
                loaded = Ticket.load(path)
            except TicketError:
                continue
            # The only harmless place is white space that pads the header.
            assert good[position : position + 1] == b" " and loaded.hash == expected.hash


def test_trailing_bytes_and_oversized_headers_are_told(good: bytes, path: Path) -> None:
    for data in (
        good + b"x",
        struct.pack("<Q", 2**63) + good[8:],
        struct.pack("<Q", 2**31) + good[8:],
        struct.pack("<Q", 0) + good[8:],
    ):
        path.write_bytes(data)
        _load_fails(path)


def test_foreign_files_are_told(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    _load_fails(path, "nothing there")
    _load_fails(tmp_path, "a folder")

    class Bomb:
        def __reduce__(self):
            return (print, ("this must never run",))

    for data in (b"", b"\0" * 100, pickle.dumps(Bomb()), b"{}" * 50):
        path.write_bytes(data)
        _load_fails(path)
    save_file({"x": torch.zeros(2)}, path)
    _load_fails(path, "without a sparsecore header")
    deep = "[" * 100_000 + "]" * 100_000
    for header in ({"sparsecore": deep}, {"sparsecore": "[]"}, {"sparsecore": "{}"}):
        save_file({"x": torch.zeros(2)}, path, header)
        _load_fails(path)
    safefile.write(path, {"x": torch.zeros(2)}, {}, kind="checkpoint")
    _load_fails(path, "checkpoint")


def _meta(**changes: object) -> dict:
    return {"shapes": {"a": [2, 3]}, "provenance": {}} | changes


@pytest.mark.parametrize(
    ("tensors", "meta"),
    [
        ({"mask/a": torch.zeros(1, dtype=torch.uint8)}, {}),
        ({"mask/a": torch.zeros(1, dtype=torch.uint8)}, _meta(shapes={"a": [2**62, 2**62]})),
        ({"mask/a": torch.zeros(1, dtype=torch.uint8)}, _meta(shapes={"a": [-2, -3]})),
        ({"mask/a": torch.zeros(1, dtype=torch.uint8)}, _meta(shapes={"a": "23"})),
        ({"mask/a": torch.zeros(1, dtype=torch.uint8)}, _meta(shapes={"b": [2, 3]})),
        ({"mask/a": torch.zeros(1, dtype=torch.uint8)}, _meta(shapes=[1])),
        ({"mask/a": torch.zeros(1, dtype=torch.uint8)}, _meta(provenance=3)),
        ({"mask/a": torch.zeros(1, dtype=torch.uint8)}, _meta(provenance={"granularity": "os"})),
        ({"mask/a": torch.zeros(1, dtype=torch.uint8)}, _meta(provenance={"granularity": 4})),
        ({"mask/a": torch.zeros(2, dtype=torch.uint8)}, _meta()),
        ({"mask/a": torch.full((1,), 1, dtype=torch.uint8)}, _meta()),  # a padding bit is set
        ({"mask/a": torch.zeros(1)}, _meta()),
        ({"mask/a": torch.zeros(1, dtype=torch.uint8), "evil": torch.zeros(1)}, _meta()),
        ({"mask/a": torch.zeros(1, dtype=torch.uint8), "score/a": torch.zeros(9)}, _meta()),
        ({"mask/a": torch.zeros(1, dtype=torch.uint8), "score/b": torch.zeros(9)}, _meta()),
        ({}, _meta(shapes={})),
    ],
)
def test_well_formed_files_with_hostile_contents(tensors: dict, meta: dict, path: Path) -> None:
    safefile.write(path, tensors, meta, kind="ticket")
    _load_fails(path, "not a usable ticket")


def test_newer_versions_are_told(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(safefile, "VERSION", 2)
    ticket_of(sc.sparsify_(mlp())).save(path)
    monkeypatch.undo()
    _load_fails(path, "expected version 1, got 2")


def test_a_failed_write_keeps_the_old_file(
    good: bytes, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writing.os, "fsync", full)
    with pytest.raises(TicketError, match="No space left"):
        ticket_of(sc.sparsify_(mlp(seed=5))).save(path)
    assert path.read_bytes() == good and len(list(path.parent.iterdir())) == 1


def test_provenance_that_is_no_json_is_told_before_writing(path: Path) -> None:
    with pytest.raises(TicketError):
        Ticket({"a": rand(2, 2) > 0.5}, {}, {"x": object()}).save(path)
    assert not path.exists()


def test_another_program_can_read_a_ticket(good: bytes, path: Path) -> None:
    """The format in a dozen lines without sparsecore: header length, JSON, packed bits."""
    length = struct.unpack("<Q", good[:8])[0]
    header = json.loads(good[8 : 8 + length])
    shapes = json.loads(header["__metadata__"]["sparsecore"])["meta"]["shapes"]
    start, end = header["mask/0"]["data_offsets"]
    packed = good[8 + length :][start:end]
    bits = [bool(byte >> (7 - i) & 1) for byte in packed for i in range(8)]
    n, k = shapes["0"]
    assert bits[: n * k] == Ticket.load(path).masks["0"].flatten().tolist()


def test_numbers_of_numpy_and_torch_are_as_good_as_pythons(tmp_path: Path) -> None:
    """The natural loop, `for seed in np.arange(3)`, loses no ticket."""
    search = sc.ConcreteSearch(epochs=np.int64(2), seed=np.int64(1), gain_lr=np.float32(0))  # pyright: ignore
    for sparsity in (0.5, np.float32(0.5), torch.tensor([0.5]), np.float64(0.5)):
        ticket = search(sc.sparsify_(mlp()), Blobs(), sparsity=sparsity, checkpoint=tmp_path / "c")
        ticket.save(tmp_path / "t")
        assert Ticket.load(tmp_path / "t").meta["sparsity"] == 0.5
    for ticket in search.many(
        sc.sparsify_(mlp()), Blobs(), sparsities=np.array([0.5, 0.6]), seeds=np.arange(2)
    ):
        ticket.save(tmp_path / "t")
    meta = {"a": np.float32(1), "b": [torch.tensor(2)], "c": np.arange(2), "d": float("nan")}
    Ticket(ticket.masks, ticket.weights, meta).save(tmp_path / "t")
    assert Ticket.load(tmp_path / "t").meta == {"a": 1, "b": [2], "c": [0, 1], "d": None}


ODD = {
    "sparse": lambda v: v.to_sparse(),
    "csr": lambda v: v.to_sparse_csr(),
    "meta": lambda v: v.to("meta"),
    "nested": lambda v: torch.nested.nested_tensor([v, v]),
    "quantised": lambda v: torch.quantize_per_tensor(v.float(), 0.1, 0, torch.qint8),
}


@pytest.mark.parametrize(
    ("part", "kind"), [*itertools.product(("masks", "weights", "scores"), ODD), ("masks", "float")]
)
def test_tensors_that_no_ticket_has_are_refused_by_name(part: str, kind: str) -> None:
    mask, odd = torch.ones(2, 3, dtype=torch.bool), ODD.get(kind, lambda v: v.float())
    parts: dict[str, Any] = {
        "masks": {"0": mask},
        "weights": {"0.weight": mask.float()},
        "scores": {"0": mask.float()},
    }
    parts[part] = {name: odd(value) for name, value in parts[part].items()}
    with pytest.raises(TicketError, match=f"{part}: expected dense .* for 0"):
        sc.Ticket(**parts)
