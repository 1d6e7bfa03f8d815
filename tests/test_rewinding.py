"""Iterative pruning: exact rewinding, exact counts, and a search that dies anywhere and goes on."""

import copy
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import count, pairwise
from pathlib import Path

import pytest
import torch
from helpers import GRANULARITIES, Blobs, mlp, seeded
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import sparsecore as sc
from sparsecore import safefile
from sparsecore.batches import Batch
from sparsecore.granularity import NM, Block, Granularity
from sparsecore.patterns import Dense, Masked
from sparsecore.recipes import RECIPES, stable
from sparsecore.regions import angular_distances
from sparsecore.rounds import Round, RoundError, load_rounds, round_path
from sparsecore.search import SearchError, rewinding
from sparsecore.search.rewinding import Rewinding
from sparsecore.sparsities import kept_count, masks_from_scores
from sparsecore.tickets import Ticket, dense_state
from sparsecore.training import Recipe, evaluate, train

RECIPE = Recipe(optimizer="adam", lr=1e-2, batch=64, milestones=(0.5,))
SEARCH = Rewinding(RECIPE, epochs=2)
WEIGHTS = 384  # of helpers.mlp: 12 * 24 + 24 * 4


def small() -> nn.Module:
    return sc.sparsify_(mlp())


def batchnorm_net() -> nn.Module:
    net = seeded(
        lambda: nn.Sequential(
            nn.Unflatten(1, (3, 2, 2)),
            nn.Conv2d(3, 8, 2, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Dropout(0.1),
            nn.Flatten(),
            nn.Linear(8, 4),
        )
    )
    return sc.sparsify_(net)


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Equal bit for bit."""
    return a.keys() == b.keys() and all(
        torch.equal(a[k].reshape(-1).view(torch.uint8), b[k].reshape(-1).view(torch.uint8))
        for k in a
    )


def kept(masks: dict[str, Tensor]) -> int:
    return sum(int(mask.sum()) for mask in masks.values())


def under(masks: dict[str, Tensor], state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A dense state with +0 where masks remove."""
    weights = {f"{n}.weight": state[f"{n}.weight"].where(m, 0) for n, m in masks.items()}
    return {**state, **weights}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "rounds"


@pytest.fixture
def starts(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Tensor]]:
    """What each round's training was given."""
    seen = []

    def watched(model: nn.Module, *args, **options):
        assert all(isinstance(m.pattern, Masked) for m in sc.sparse_layers(model).values())
        seen.append(dense_state(model))
        return train(model, *args, **options)

    monkeypatch.setattr(rewinding, "train", watched)
    return seen


def test_one_round_keeps_the_largest_of_an_independent_training() -> None:
    model, trained = small(), mlp()
    before = copy.deepcopy(model.state_dict())
    ticket = SEARCH(model, Blobs(), sparsity=0.2)
    train(trained, Blobs(), None, RECIPE, stop_epoch=2, total_epochs=2)
    sizes = torch.cat([trained[i].weight.detach().abs().flatten() for i in (0, 2)])
    best = sorted(range(WEIGHTS), key=lambda i: (-sizes[i].item(), i))[: kept_count(WEIGHTS, 0.2)]
    mask = torch.cat([ticket.masks[name].flatten() for name in ("0", "2")])
    assert mask.nonzero().flatten().tolist() == sorted(best)
    assert same(ticket.weights, before) and not ticket.finished
    assert ticket.meta["method"] == "imp" and ticket.meta["sparsity"] == 0.2
    assert [r["density"] for r in ticket.meta["rounds"]] == [1]


@pytest.mark.parametrize("net", [small, batchnorm_net], ids=["mlp", "batchnorm"])
def test_every_round_starts_from_the_same_weights_bit_for_bit(
    net: Callable[[], nn.Module], folder: Path, starts: list[dict[str, Tensor]]
) -> None:
    model = net()
    if net is batchnorm_net:  # statistics that a rewind can get wrong
        train(model, Blobs(), None, RECIPE, stop_epoch=1)
    before = dense_state(model)
    ticket = replace(SEARCH, rounds=folder, start_epoch=1)(model, Blobs(), sparsity=0.6)
    rounds = load_rounds(folder)
    assert len(rounds) == len(starts) == 5 and same(ticket.weights, before)
    for found, start in zip(rounds, starts, strict=True):
        assert same(found.start, before) and same(start, under(found.masks, before))
        assert not same(found.trained, start)
        assert same(found.trained, under(found.masks, found.trained))


def test_rounds_are_nested_and_keep_exact_counts(folder: Path) -> None:
    ticket = replace(SEARCH, rounds=folder)(small(), Blobs(), sparsity=0.6)
    rounds = load_rounds(folder)
    assert [r.index for r in rounds] == [0, 1, 2, 3, 4]
    assert [r.density for r in rounds] == pytest.approx([1, 0.8, 0.64, 0.512, 0.4096])
    assert [kept(r.masks) for r in rounds] == [384, 307, 245, 196, 157]
    assert kept(ticket.masks) == 153
    steps = [r.masks for r in rounds] + [ticket.masks]
    for more, less in pairwise(steps):
        assert all(bool((more[n] | ~less[n]).all()) for n in more)
    # The survivors are the largest, by the network that was trained just before.
    for found, less in zip(rounds, steps[1:], strict=True):
        sizes = {n: w.abs() for n, w in found.weights().items()}
        low = min(sizes[n][less[n]].min() for n in less)
        assert all(bool((sizes[n][found.masks[n] & ~less[n]] <= low).all()) for n in less)


@given(rate=st.sampled_from([0.1, 0.2, 0.3, 0.5, 0.9]), k=st.integers(1, 30))
def test_the_number_of_networks(rate: float, k: int) -> None:
    search, exact = replace(SEARCH, rate=rate), (1 - rate) ** k
    if exact > 1e-9:  # 1 - exact still knows it
        assert search.count(1 - exact) == k
        assert search.count(1 - 0.99 * exact) == k + 1
        assert search.count(1 - min(1.01 * exact, 1 - 1e-9)) == k


def test_the_paper_s_sparsity_takes_22_networks() -> None:
    assert SEARCH.count(0.99262) == 22
    assert SEARCH.count(1e-9) == 1


def test_other_sparsities_reuse_the_rounds(folder: Path, starts: list[dict[str, Tensor]]) -> None:
    model, blobs, search = small(), Blobs(), replace(SEARCH, rounds=folder)
    middle = search(model, blobs, sparsity=0.5)
    assert len(starts) == 4
    high, low = search(model, blobs, sparsity=0.7), search(model, blobs, sparsity=0.3)
    assert len(starts) == 6  # two more for 0.7, none for 0.3
    files = {p: p.read_bytes() for p in folder.iterdir()}
    assert search(model, blobs, sparsity=0.5).hash == middle.hash
    assert len(starts) == 6 and files == {p: p.read_bytes() for p in folder.iterdir()}
    for ticket in (low, middle, high):
        assert SEARCH(model, blobs, sparsity=ticket.meta["sparsity"]).hash == ticket.hash
        seconds = [r["seconds"] for r in ticket.meta["rounds"]]
        assert ticket.meta["search_seconds"] == pytest.approx(sum(seconds)) and min(seconds) > 0
    assert high.meta["rounds"][:2] == low.meta["rounds"]  # as they were measured


class Killed(BaseException):
    """A process that dies: nothing may catch it."""


def dying(call: Callable, at: int, when: str) -> Callable:
    """`call`, which the process does not survive the `at`-th time."""
    calls = count()

    def counted(*args, **options):
        dies = next(calls) == at
        if dies and when == "before":
            raise Killed
        result = call(*args, **options)
        if dies:
            raise Killed
        return result

    return counted


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("what", ["write", "unlink", "train"])
@pytest.mark.parametrize(("keeps", "rewind"), [(False, "weights"), (True, "learning-rate")])
def test_killed_anywhere_it_goes_on_to_the_same_ticket(
    what: str, when: str, keeps: bool, rewind: str, tmp_path: Path
) -> None:
    model, blobs = batchnorm_net(), Blobs()
    search = replace(SEARCH, epochs=1.5, rewind=rewind)
    expected = search(model, blobs, sparsity=0.4)
    owner, name = {
        "write": (safefile, "write"), "unlink": (Path, "unlink"), "train": (rewinding, "train"),
    }[what]  # fmt: skip
    for at in count():
        folder, checkpoint = tmp_path / f"rounds-{at}", tmp_path / f"checkpoint-{at}"
        found, died = replace(search, rounds=folder if keeps else None), False
        try:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(owner, name, dying(getattr(owner, name), at, when))
                ticket = found(model, blobs, sparsity=0.4, checkpoint=checkpoint)
        except Killed:
            died = True
            ticket = found(model, blobs, sparsity=0.4, checkpoint=checkpoint)
        assert ticket.hash == expected.hash and same(ticket.weights, expected.weights)
        assert not checkpoint.exists()
        assert not keeps or len(load_rounds(folder)) == len(list(folder.iterdir())) == 3
        if not died:
            break
    # Three rounds, of which each writes two checkpoints and itself.
    assert at == {"write": 9, "unlink": 3 if keeps else 6, "train": 3}[what]


class Stops(Blobs):
    """Batches whose process dies at one of them."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.left = at

    def epoch(self, index: int) -> Iterator[Batch]:
        for batch in super().epoch(index):
            self.left -= 1
            if self.left < 0:
                raise Killed
            yield batch


def test_killed_inside_a_round_it_takes_up_the_last_epoch(tmp_path: Path) -> None:
    model, checkpoint = small(), tmp_path / "deep" / "checkpoint"
    expected = SEARCH(model, Blobs(), sparsity=0.4)
    # A batch for each fingerprint, 8 a round: dies in the last epoch of the third of three
    with pytest.raises(Killed):
        SEARCH(model, Stops(1 + 9 + 9 + 7), sparsity=0.4, checkpoint=checkpoint)
    names = sorted(p.name for p in checkpoint.iterdir())
    assert names == [
        "round-0000.safetensors", "round-0001.safetensors", "training-0002.safetensors",
    ]  # fmt: skip
    left = Stops(2 + 4)  # the fingerprints, and the one epoch that is left
    assert SEARCH(model, left, sparsity=0.4, checkpoint=checkpoint).hash == expected.hash
    assert left.left == 0


def test_learning_rate_rewinding_goes_on_from_trained_weights(
    folder: Path, starts: list[dict[str, Tensor]]
) -> None:
    model = batchnorm_net()
    search = replace(SEARCH, rewind="learning-rate", rounds=folder)
    ticket = search(model, Blobs(), sparsity=0.4)
    rounds = load_rounds(folder)
    assert same(starts[0], dense_state(model))
    for before, after, start in zip(rounds, rounds[1:], starts[1:], strict=False):
        assert same(after.start, before.trained)
        assert same(start, under(after.masks, before.trained))
    assert same(ticket.weights, under(ticket.masks, rounds[-1].trained))
    assert not ticket.finished and ticket.meta["rewind"] == "learning-rate"
    assert search(model, Blobs(), sparsity=0.4).hash == ticket.hash  # from the files
    first = replace(SEARCH, rewind="learning-rate")(model, Blobs(), sparsity=0.2)
    assert first.hash == SEARCH(model, Blobs(), sparsity=0.2).hash  # nothing to rewind yet


def test_the_schedule_and_the_data_start_again_at_a_fraction_of_an_epoch() -> None:
    seen: list[int] = []

    class Watched(Blobs):
        def epoch(self, index: int) -> Iterator[Batch]:
            seen.append(index)
            return super().epoch(index)

    model, trained = small(), mlp()
    search = replace(SEARCH, epochs=2.25, start_epoch=1.5)
    ticket = search(model, Watched(), sparsity=0.36)
    assert seen == [0, 1, 2, 3, 1, 2, 3]  # the first for the fingerprint
    train(trained, Blobs(), None, RECIPE, start_epoch=1.5, stop_epoch=3.75, total_epochs=3.75)
    first = search(model, Blobs(), sparsity=0.2)
    sizes = {name: trained.get_submodule(name).weight.detach().abs() for name in ("0", "2")}
    expected = masks_from_scores(sizes, {n: s.shape for n, s in sizes.items()}, 0.2)
    assert all(torch.equal(first.masks[n], m) for n, m in expected.items())
    assert ticket.meta["start_epoch"] == 1.5
    assert replace(search, start_epoch=1)(model, Blobs(), sparsity=0.2).hash != first.hash


@pytest.mark.parametrize("granularity", [*GRANULARITIES, NM(1, 4), NM(3, 5), Block(5, 7)], ids=str)
def test_units_are_kept_whole_and_never_come_back(granularity: Granularity, folder: Path) -> None:
    search = replace(SEARCH, granularity=granularity, rounds=folder)
    ticket = search(small(), Blobs(), sparsity=0.8)
    rounds = load_rounds(folder)
    masks = [r.masks for r in rounds] + [ticket.masks]
    largest = max(int(granularity.sizes(m.shape).max()) for m in ticket.masks.values())
    asked = [kept_count(WEIGHTS, 1 - r.density) for r in rounds] + [kept_count(WEIGHTS, 0.8)]
    assert len(masks) == 9
    for found, most in zip(masks, asked, strict=True):
        assert most - largest < kept(found) <= most
        for mask in found.values():
            share = granularity.gather(mask.long()) / granularity.sizes(mask.shape)
            assert bool(((share == 0) | (share == 1)).all())
    for more, less in pairwise(masks):
        assert all(bool((more[n] | ~less[n]).all()) for n in more)
    if isinstance(granularity, NM):
        # Every group as full as the pattern allows, before weights go for their size alone.
        fraction = granularity.n / granularity.m
        for found in (m for m, k in zip(masks, asked, strict=True) if k <= fraction * WEIGHTS):
            for mask in found.values():
                groups = mask[:, : mask.shape[1] // granularity.m * granularity.m]
                groups = groups.unflatten(1, (-1, granularity.m))
                assert int(groups.sum(-1).max()) <= granularity.n
    assert Ticket.from_scores(ticket.scores, small(), 0.8, granularity).hash == ticket.hash


def test_the_last_prune_ranks_a_block_by_its_mean(folder: Path) -> None:
    granularity = Block(5, 7)  # leaves smaller blocks at the edges
    ticket = replace(SEARCH, granularity=granularity, rounds=folder)(small(), Blobs(), sparsity=0.2)
    (only,) = load_rounds(folder)
    weight = only.trained["0.weight"].abs()
    assert ticket.scores["0"][1, 1].item() == pytest.approx(weight[5:10, 7:12].mean().item())
    assert ticket.scores["0"][4, 0].item() == pytest.approx(weight[20:, :7].mean().item())


def test_what_went_first_ranks_last(folder: Path) -> None:
    ticket = replace(SEARCH, rounds=folder)(small(), Blobs(), sparsity=0.6)
    rounds, scores = load_rounds(folder), ticket.scores
    # By the round they went in, then by their size there.
    for found, after in zip(rounds, [*(r.masks for r in rounds[1:]), ticket.masks], strict=True):
        gone = {n: found.masks[n] & ~m for n, m in after.items()}
        low = torch.cat([scores[n][m] for n, m in gone.items()])
        assert low.max() < min(scores[n][m].min() for n, m in after.items())
        sizes = torch.cat([found.weights()[n].abs()[m] for n, m in gone.items()])
        assert bool((low[sizes.argsort()].diff() >= 0).all())


def test_a_watch_sees_each_trained_network_and_changes_nothing(folder: Path) -> None:
    model, seen = batchnorm_net(), []
    plain = SEARCH(model, Blobs(), sparsity=0.4)
    assert [r["accuracy"] for r in plain.meta["rounds"]] == [None] * 3

    def watch(network: nn.Module) -> float:
        seen.append(dense_state(network))
        accuracy = evaluate(network, Blobs())
        with torch.no_grad():
            for p in network.parameters():
                p.zero_()
        return accuracy

    search = replace(SEARCH, rounds=folder)
    ticket = search(model, Blobs(), sparsity=0.4, watch=watch)
    rounds = load_rounds(folder)
    assert ticket.hash == plain.hash and len(seen) == 3
    assert all(same(r.trained, state) for r, state in zip(rounds, seen, strict=True))
    assert [r.accuracy for r in rounds] == [r["accuracy"] for r in ticket.meta["rounds"]]
    assert rounds[0].accuracy > 50
    again = search(model, Blobs(), sparsity=0.4, watch=watch)
    assert again.meta == ticket.meta and len(seen) == 3
    assert json.loads(json.dumps(ticket.meta)) == ticket.meta


def test_a_ticket_survives_its_file_and_trains(tmp_path: Path) -> None:
    ticket = replace(SEARCH, epochs=6)(small(), Blobs(), sparsity=0.8)
    ticket.save(tmp_path / "t")
    loaded = Ticket.load(tmp_path / "t")
    assert loaded.hash == ticket.hash and loaded.meta == ticket.meta
    network = loaded.apply_(sc.sparsify_(mlp(seed=3)))
    train(network, Blobs(), None, RECIPE, stop_epoch=6, total_epochs=6)
    assert evaluate(network, Blobs()) > 95


@pytest.mark.parametrize("masked", [False, True])
def test_the_model_is_not_touched_also_when_the_search_fails(masked: bool) -> None:
    model = batchnorm_net()
    if masked:  # from an earlier ticket: its mask is put aside
        sc.sparse_layers(model)["6"].set_mask_(torch.arange(32).view(4, 8) % 2 == 0)
    model.eval()
    model[1].raw_weight.grad = torch.ones_like(model[1].raw_weight)
    before, grad = copy.deepcopy(model.state_dict()), model[1].raw_weight.grad
    kinds = [type(m) for m in model.modules()]

    def untouched() -> bool:
        return (
            same(before, model.state_dict())
            and kinds == [type(m) for m in model.modules()]
            and model[1].raw_weight.grad is grad
            and all(p.grad is None for p in model[6].parameters())
            and not any(m.training for m in model.modules())
            and isinstance(model[1].pattern, Dense)
        )

    SEARCH(model, Blobs(), sparsity=0.4)
    assert untouched()
    with pytest.raises(SearchError, match="round 0: epoch 1: the loss is"):
        replace(SEARCH, recipe=Recipe(lr=1e38))(model, Blobs(), sparsity=0.4)
    assert untouched()
    with pytest.raises(Killed):
        SEARCH(model, Stops(12), sparsity=0.4)
    assert untouched()


@pytest.mark.parametrize(
    "other",
    [
        lambda s, m: (replace(s, recipe=replace(RECIPE, lr=0.02)), m, Blobs()),
        lambda s, m: (replace(s, rate=0.3), m, Blobs()),
        lambda s, m: (replace(s, seed=1), m, Blobs()),
        lambda s, m: (replace(s, epochs=3), m, Blobs()),
        lambda s, m: (replace(s, start_epoch=1), m, Blobs()),
        lambda s, m: (replace(s, rewind="learning-rate"), m, Blobs()),
        lambda s, m: (replace(s, granularity=Block(2, 2)), m, Blobs()),
        lambda s, m: (s, sc.sparsify_(mlp(seed=1)), Blobs()),
        lambda s, m: (s, m, Blobs(batch=32)),
    ],
    ids=["recipe", "rate", "seed", "epochs", "start", "rewind", "granularity", "weights", "data"],
)
def test_another_run_s_folder_is_refused(other: Callable, tmp_path: Path) -> None:
    folder, model = tmp_path / "rounds", small()
    search = replace(SEARCH, rounds=folder)
    search(model, Blobs(), sparsity=0.2)
    before = {p: p.read_bytes() for p in folder.iterdir()}
    changed, model, blobs = other(search, model)
    with pytest.raises(SearchError, match="belongs to another run"):
        changed(model, blobs, sparsity=0.2)
    assert before == {p: p.read_bytes() for p in folder.iterdir()}


def test_another_run_s_unfinished_round_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        SEARCH(small(), Stops(2 + 6), sparsity=0.2, checkpoint=tmp_path)
    with pytest.raises(SearchError, match=r"round 0: .* belongs to another run"):
        replace(SEARCH, seed=1)(small(), Blobs(), sparsity=0.2, checkpoint=tmp_path)


def test_a_file_in_the_folder_s_place_is_refused_before_anything_begins(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("something else")
    for search, options in (
        (SEARCH, {"checkpoint": path}),
        (replace(SEARCH, rounds=path), {}),
    ):
        with pytest.raises(SearchError, match="expected a folder"):
            search(small(), Stops(0), sparsity=0.4, **options)
    assert path.read_text() == "something else"


def test_a_full_disk_loses_no_finished_round(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, checkpoint = small(), folder / "checkpoint"
    search = replace(SEARCH, rounds=folder)
    expected = SEARCH(model, Blobs(), sparsity=0.6)

    def full(path: Path, *args, **options) -> None:
        if "0002" in path.name:
            raise safefile.FileError(f"{path} could not be written: No space left on device")
        write(path, *args, **options)

    write = safefile.write
    monkeypatch.setattr(safefile, "write", full)
    for options in ({"checkpoint": checkpoint}, {}):
        with pytest.raises(SearchError, match=r"0002.* No space left .* make room"):
            search(model, Blobs(), sparsity=0.6, **options)
        assert [r.index for r in load_rounds(folder)] == [0, 1]
    monkeypatch.undo()
    # No round is trained again: three are left of five, and the search's fingerprint.
    assert search(model, Stops(1 + 3 * 8), sparsity=0.6).hash == expected.hash


def test_damaged_and_misplaced_rounds_are_told_with_the_mend(folder: Path) -> None:
    model, search = small(), replace(SEARCH, rounds=folder)
    expected = search(model, Blobs(), sparsity=0.6)
    paths = [round_path(folder, i) for i in range(5)]
    good = [p.read_bytes() for p in paths]

    def refused(match: str) -> None:
        with pytest.raises(SearchError, match=match):
            search(model, Blobs(), sparsity=0.6)

    for junk in (b"", b"junk", good[2][:-9], good[2][:-1] + bytes([good[2][-1] ^ 1])):
        paths[2].write_bytes(junk)
        refused(r"round-0002.* is no usable round .*; remove it and the rounds after it")
        with pytest.raises(RoundError, match=r"round-0002.* is no usable round"):
            load_rounds(folder)
    paths[2].unlink()
    refused(r"round-0002.* is missing among 4 rounds; put it back")
    with pytest.raises(RoundError, match=r"round-0002.* is missing"):
        load_rounds(folder)
    paths[2].write_bytes(good[3])
    refused(r"round-0002.* does not follow from the round before it")
    with pytest.raises(RoundError, match=r"round-0002.*: expected round 2 of .*, got round 3"):
        load_rounds(folder)
    paths[2].write_bytes(good[2])
    other = {n: m.flip(0) for n, m in Round.load(paths[2]).masks.items()}
    replace(Round.load(paths[2]), masks=other).save(paths[2])
    refused(r"round-0002.* does not follow from the round before it")
    for path in paths[2:]:
        path.unlink()
    paths[1].with_name(paths[1].name + "x7_h").write_bytes(b"half")  # a kill while writing
    assert search(model, Blobs(), sparsity=0.6).hash == expected.hash
    assert len(load_rounds(folder)) == 5


def test_a_damaged_training_is_told_with_the_mend(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        SEARCH(small(), Stops(8), sparsity=0.4, checkpoint=tmp_path)
    path = tmp_path / "training-0000.safetensors"
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(SearchError, match=r"training-0000.*; make room, or remove a damaged file"):
        SEARCH(small(), Blobs(), sparsity=0.4, checkpoint=tmp_path)
    path.unlink()
    ticket = SEARCH(small(), Blobs(), sparsity=0.4, checkpoint=tmp_path)
    assert ticket.hash == SEARCH(small(), Blobs(), sparsity=0.4).hash


def test_removing_the_checkpoint_leaves_what_is_not_the_search_s(tmp_path: Path) -> None:
    (tmp_path / "notes").write_text("mine")
    SEARCH(small(), Blobs(), sparsity=0.4, checkpoint=tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["notes"]
    # One folder for both: the rounds stay.
    replace(SEARCH, rounds=tmp_path)(small(), Blobs(), sparsity=0.4, checkpoint=tmp_path)
    assert len(load_rounds(tmp_path)) == 3 and len(list(tmp_path.iterdir())) == 4


def test_rounds_round_trip(folder: Path) -> None:
    folder.mkdir()
    state = {"weight": torch.tensor([[1.5, -0.0, 3.0]]), "count": torch.tensor(7)}
    mask = torch.tensor([[True, False, True]])
    for accuracy in (None, 91.25):
        path = folder / "a round"
        given = Round(3, 0.5, {"": mask}, state, under({}, state), 2.5, accuracy, "run")
        given.save(path)
        found = Round.load(path)
        assert replace(found, masks={}, start={}, trained={}) == replace(
            given, masks={}, start={}, trained={}
        )
        assert torch.equal(found.masks[""], mask)
        assert same(found.start, state) and same(found.trained, state)
        assert torch.equal(found.weights()[""], state["weight"])
    with pytest.raises(RoundError, match="found none; a search keeps them"):
        load_rounds(folder)
    with pytest.raises(RoundError, match="found none"):
        load_rounds(folder / "nowhere")
    with pytest.raises(RoundError, match="found nothing there"):
        Round.load(folder / "nowhere")
    with pytest.raises(RoundError, match="could not be written"):
        given.save(folder / "nowhere" / "r")
    for index, run in enumerate(("one", "other")):
        replace(given, index=index, run=run).save(round_path(folder, index))
    with pytest.raises(RoundError, match="of the run one, got round 1 of other"):
        load_rounds(folder)


@pytest.mark.parametrize(
    "change",
    [
        {"masks": {"a": torch.ones(2, 3, dtype=torch.bool)}},
        {"masks": {"": torch.ones(3, dtype=torch.bool)}},
        {"masks": {}},
        {"trained": {"weight": torch.zeros(2, 2)}},
        {"index": "1"},
        {"density": None},
        {"run": 5},
    ],
    ids=str,
)
def test_rounds_that_do_not_hang_together_are_refused(change: dict, tmp_path: Path) -> None:
    state = {"weight": torch.zeros(2, 3)}
    good = Round(0, 1.0, {"": torch.ones(2, 3).bool()}, state, state, 1.0, None, "run")
    replace(good, **change).save(tmp_path / "r")
    with pytest.raises(RoundError, match="no usable round"):
        Round.load(tmp_path / "r")


@pytest.mark.parametrize(
    "bad",
    [
        {"epochs": 0},
        {"epochs": float("nan")},
        {"start_epoch": -1},
        {"rate": 0},
        {"rate": 1},
        {"rewind": "never"},
    ],
    ids=str,
)
def test_bad_fields_are_refused(bad: dict) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(bad))}: expected"):
        replace(SEARCH, **bad)


def test_bad_arguments_are_told_before_long_work() -> None:
    untouched = Stops(0)
    for sparsity in (-0.1, 0, 1, float("nan")):
        with pytest.raises(ValueError, match="sparsity"):
            SEARCH(small(), untouched, sparsity=sparsity)
    with pytest.raises(ValueError, match="sparsify_"):
        SEARCH(mlp(), untouched, sparsity=0.5)
    with pytest.raises(ValueError, match="2:4 allows at most"):
        replace(SEARCH, granularity=NM(2, 4))(small(), untouched, sparsity=0.3)
    with pytest.raises(ValueError, match="expected at least one of 4 batches"):
        replace(SEARCH, epochs=0.1)(small(), untouched, sparsity=0.5)


def test_the_stable_recipe_has_large_batches_at_the_same_rate() -> None:
    unstable = RECIPES["resnet-20"]
    recipe = stable(unstable)
    assert recipe == replace(unstable, batch=1024, warmup_epochs=8)
    assert stable(recipe) == recipe and stable(replace(unstable, batch=2048)).batch == 2048
    assert stable(replace(unstable, warmup_epochs=20)).warmup_epochs == 20
    assert stable(RECIPES["lenet-300-100"]) == RECIPES["lenet-300-100"]


def test_rounds_can_be_driven_apart_or_together(tmp_path: Path) -> None:
    distances = {}
    for strength in (-4.0, 0.0, 4.0):
        search = replace(SEARCH, epochs=4, repel=strength, rounds=tmp_path / f"{strength}")
        ticket = search(small(), Blobs(), sparsity=0.5)
        angles = angular_distances(load_rounds(tmp_path / f"{strength}"))
        distances[strength] = angles[~torch.eye(len(angles), dtype=torch.bool)].mean().item()
        assert ticket.meta["repel"] == strength
    assert distances[-4.0] < distances[0.0] - 0.01 < distances[4.0] - 0.02


def test_a_repelled_search_killed_between_rounds_knows_the_earlier_optima(tmp_path: Path) -> None:
    search = replace(SEARCH, repel=2.0)
    expected = search(small(), Blobs(), sparsity=0.5)
    first = replace(search, rounds=tmp_path)
    first(small(), Blobs(), sparsity=0.2)  # one round, kept
    assert first(small(), Blobs(), sparsity=0.5).hash == expected.hash
