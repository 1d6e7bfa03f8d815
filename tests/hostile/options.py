"""Command lines out of hostile values, drawn from a seed around a small case that works.

Every option of every command is drawn for, since they are asked of the command line itself; what stands in no pool
of its own gets what its type and all texts may be.  Not drawn are values that are legal and long (a thousand epochs of
training), what would be downloaded, and places outside of the folder.
"""

import random
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import typer
from PIL import Image

from sparsecore.cli import app, main
from sparsecore.methods import METHODS

LONG = "x" * 100_000
DIGITS = "9" * 400
# Of which a number is made, and what looks like one.
NUMBERS = (
    "inf", "-inf", "nan", "1e400", "-1e400", "1e308", "1e39", "1e-39", "5e-324", "-0.0", "0", "-1", "2147483647",
    "2147483648",
    "9223372036854775807", "9223372036854775808", "-9223372036854775809", "1000000000", "1000001", DIGITS, "-" + DIGITS,
    "0." + DIGITS, "0x10", "1_0", "٣", "½", "1e", "1,5", "1.5", "True", "null", "", " ", "\t",
)  # fmt: skip
TEXTS = (
    "", " ", "\t", "=", "==", "a=b=c", "[", "]", "**", "*", "!", "!!", "?", "(", "(?P<", "[!", "[]", "{}", "[1, 2]",
    '{"a": 1}', "%s%n", "{0}", "\x00", "\\x00", "\x1b[31mred", "[red]", "[/red]", "a\nb", "\ud800", "é", "💥", "-",
    "--", "-1", ":", "::", "+", "+shuffle", ",", ",,,", "null", "NaN", "../..", "~", "$HOME", LONG, "[" * 100_000,
    "x=" * 20_000,
)  # fmt: skip
KEYS = (
    "lr",
    "seed",
    "epochs",
    "width",
    "",
    " ",
    "self",
    "__class__",
    "shape",
    "classes",
    "*",
    LONG,
)
JSON = (
    "[]", "{}", "[[]]", "[1]", '"a"', '""', "[null]", '{"a": {"b": []}}', "[1e400]", "[NaN]", "true", "[true]",
    "[" * 5_000, "[0." + DIGITS + "]", "[" + "0.5," * 20_000 + "0.5]",
)  # fmt: skip
GRANULARITIES = (
    "block:100000x100000", "block:0x1", "block:1x", "block:-1x1", "block:2x2x2", f"block:{DIGITS}x1", "block:4096x1",
    "block:٣x٣", "block:1x9223372036854775808", "vector:0", "vector:", "vector:100000", f"vector:{DIGITS}",
    "vector:1.5",
    "3:2", "0:4", "1:10000000000", "2:4", "1:1", f"1:{DIGITS}", f"{DIGITS}:{DIGITS}", "1:2:4", ":", "channel:2",
    "channel", "weight ", "Weight", "block:4x4", "1:64",
)  # fmt: skip
CONTROLS = (
    "fixed=-1", "fixed=", "fixed=1e39", "fixed=1e400", "fixed=0x10", "gradbalance=3", "gradbalance=0",
    "gradbalance=1e300",
    "band=500", "band=0", "band=-3", "band=1e-300", "lagrangian=0", "lagrangian=-1", "lagrangian=1e39",
    "lagrangian=1e-320",
    "fixed=1=2", f"fixed={DIGITS}", "fixed=null", "band=3", "lagrangian=0.01", "fixed=0.5",
)  # fmt: skip
MODELS = (
    "vit-small", "conv-4", "resnet-20", "vgg-16-bn", "torchvision:", "torchvision:resnet18", "torchvision:nope",
    "torchvision:vit_b_16", "lenet-300-100 ", "LENET-300-100",
)  # fmt: skip
MODEL_OPTIONS = (
    "hidden=1000000000", "depth=1000000", "width=-1", "width=1000", "width=1e-300", "width=999.9", "dim=3000000",
    "hidden=9223372036854775807", "dim=9223372036854775806", "heads=1000000", "patch=1000000", "patch=8", "depth=20000",
    "activation=prelu", "activation=", "activation=[]", "init={}", "init=torch", "width=[1]", "width=true", "shape=1",
    "classes=1", "seed=1", "model=x", "shortcut=3x3", "affine=1", "bn_init=[]", "hidden=true", "depth=1.0",
)  # fmt: skip
TORCHVISION = {
    "resnet18": (
        "width_per_group=1000000000", "groups=0", "groups=-1", "zero_init_residual=[]", "norm_layer=1", "block=1",
        "replace_stride_with_dilation=[]", "replace_stride_with_dilation=[1,1,1]", "layers=[1]",
    ),
    "resnet50": ("width_per_group=1000000000", "groups=1000000007", "width_per_group=0", "width_per_group=-64"),
    "densenet121": (
        "growth_rate=1000000", "block_config=[1000000]", "num_init_features=0", "num_init_features=1000000000",
        "bn_size=1000000000", "drop_rate=2", "block_config=[]", "block_config={}", "memory_efficient=3",
    ),
    "mobilenet_v2": (
        "width_mult=1000000", "width_mult=-1", "width_mult=0", "round_nearest=0", "inverted_residual_setting=[]",
        "inverted_residual_setting=[[1,16,1000000,1]]", "inverted_residual_setting=[[1,16]]", "dropout=2", "dropout=[]",
    ),
    "squeezenet1_1": ("version=9", "dropout=-1", "dropout=[]"),
    "vit_b_16": (
        "num_layers=1000000", "hidden_dim=1000000008", "mlp_dim=1000000000", "num_heads=0", "image_size=1",
        "patch_size=0",
        "representation_size=1000000000000", "dropout=3",
    ),
    "convnext_tiny": ("layer_scale=1e300", "stochastic_depth_prob=5", "block_setting=[]", "block_setting=[[1,2,3]]"),
    "swin_t": ("depths=[1000000]", "window_size=0", "embed_dim=1000000000", "stochastic_depth_prob=-1"),
    "vgg11": ("init_weights=[]", "dropout=2", "features=1", "cfg=A", "batch_norm=1"),
}  # fmt: skip
RECIPES = (
    "lr=1e300", "lr=1e39", "lr=1e-300", "lr=-1", "lr=0", "lr=null", "lr=true", "lr=[]", "momentum=1",
    "momentum=0.99999999999999999",
    "weight_decay=1e300", "weight_decay=1e39", "batch=0", "batch=-1", "batch=2147483648", "batch=9223372036854775807",
    "batch=1.5",
    "epochs=1000001", "epochs=9223372036854775807", "milestones=[]", "milestones=0.5", "milestones=[[0.5]]",
    "milestones=[2]",
    "milestones=null", "gamma=1e-320", "gamma=0", "warmup_epochs=1e308", "warmup_epochs=5e-324", "label_smoothing=1",
    "ema=1",
    "ema=5e-324", "clip_norm=1e308", "clip_norm=5e-324", "clip_norm=0", "accumulate=1000", "accumulate=0", "amp=fp32",
    "amp=fp16",
    "amp=[]", "augment=3", "augment=null", "optimizer=lion", "optimizer=[]", "optimizer=sgd", "schedule=",
    "nesterov=true",
    "stable", "stable=1", "nope=1", "lr", "=", "=1", "lr=0.1=2", "batch=64",
)  # fmt: skip
LISTS = (
    ",".join(["0.5"] * 100_000), ",".join(f"0.{i}" for i in range(1, 100_000)), "0.5,0.5", "0.5,", ",", "1", "0",
    "-0.5", "nan",
    "0.5;0.6", "0.5 0.6", "1e-320", "0.99999999999999999", "0.9999999", "1e400", "[0.5]", "0.5,x", "½",
)  # fmt: skip
# Values of fields, in the forms of all of them; which field may have them is drawn too.
FIELD_VALUES = (
    *NUMBERS,
    *JSON,
    "random",
    "erk",
    "weights",
    "hard-concrete",
    "gaussian=1e39",
    "concrete=1e-300",
    "fixed=-1",
)
_METHOD_FIELDS = (
    "epochs", "lr", "gain_lr", "lr_drop", "lr_drop_at", "start_density", "ramp", "seed", "control", "gate", "objective",
    "pace", "rate", "rewind", "repel", "rounds", "batches_per_round", "score", "granularity", "distribution", "zeta",
    "drop",
    "interval", "stop", "begin", "end", "updates", "weights", "momentum", "weight_decay", "final_temperature",
    "initial",
    "layerwise", "engine", "dtype", "channels_last", "recipe", "start_epoch", "nope",
)  # fmt: skip
# Options that are files and folders.
_PLACES = (
    "out",
    "rounds",
    "json_file",
    "metrics",
    "checkpoint",
    "save",
    "cache",
    "weights",
    "data_dir",
)
_REPEATED = ("recipe", "model_option", "layers")


def prepare(folder: Path) -> None:
    """What `argv` names in `folder`: a ticket, weights that it was trained to, and images in images/."""
    drawn = np.random.default_rng(0)
    for label in "ab":
        (folder / "images" / label).mkdir(parents=True)
        for i in range(4):
            pixels = drawn.integers(0, 256, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / "images" / label / f"{i}.png")
    ticket = str(folder / "ticket.safetensors")
    trained = ["train", ticket, "--epochs", "1", "--save", str(folder / "weights.safetensors")]
    for command in (["search", "--out", ticket, *_SMALL, *_SEARCH], trained):
        assert main([*command, "--engine", "eager"]) == 0


_OFTEN = ("search", "search", "train", "compare", "analyze width")
_WIDTH = ["--model-option", "width=0.1"]
_SMALL = [
    "--data",
    "digits",
    *_WIDTH,
    "--rewind-epochs",
    "1",
    "--epochs",
    "1",
]
_SEARCH = ["--search-epochs", "1", "--method", "cts", "--sparsity", "0.5"]


def argv(seed: int, folder: Path) -> list[str]:
    """A command line, the same for a seed; to be run with `folder` (as `prepare` leaves it) as the current one."""
    rng = random.Random(seed)
    name = rng.choice([*_commands(), *_OFTEN * 6])
    line = _base(name, folder)
    options = _commands()[name]
    for option in rng.sample(sorted(options), min(len(options), rng.choice((1, 1, 1, 2, 3)))):
        line = _added(line, _given(option, options[option], rng, folder))
    if rng.random() < 0.05:
        line += [rng.choice(TEXTS)]  # an argument too many, or an option that there is not
    return line


def _added(line: list[str], more: list[str]) -> list[str]:
    """A line with more options; another model has no use for the small case's, and none is given twice."""
    if {"--model", "--model-option"} & {*more} and _WIDTH[1] in line:
        at = line.index(_WIDTH[1])
        line = line[: at - 1] + line[at + 1 :]
    return line + more


def _base(name: str, folder: Path) -> list[str]:
    """The shortest case of a command that works."""
    ticket, out = str(folder / "ticket.safetensors"), ["--out", str(folder / "out")]
    weights = str(folder / "weights.safetensors")
    few = ["--points", "2"]
    cases = {
        "search": [*_SMALL, *_SEARCH, *out, "--engine", "eager"],
        "train": [ticket, "--epochs", "1", "--engine", "eager"],
        "info": [ticket],
        "plan": [ticket, "--plan", "mask"],
        "compare": [*_SMALL, "--search-epochs", "1", "--methods", "magnitude", "--sparsities", "0.5", "--seeds", "1",
        *out,
                    "--engine", "eager"],
        "demo": ["--device", "meta", *out],  # which takes a minute where nothing is wrong
        "analyze path": [ticket, weights, weights, *few, *out],
        "analyze instability": [ticket, *few, *out],
        "analyze rewind": [*_SMALL, "--candidates", "0", *few, *out],
        "analyze rounds": [ticket, str(folder / "none"), *few, *out],
        "analyze sanity": [ticket, "--seeds", "1", "--checks", "shuffle", *out],
        "analyze progress": [ticket, *out],
        "analyze layers": [ticket, *out],
        "analyze gates": [ticket, *out],
        "analyze width": [*_SMALL, "--search-epochs", "1", "--method", "magnitude", "--widths", "0.1", *out],
    }  # fmt: skip
    return [*name.split(), *cases[name]]


@cache
def _commands() -> dict[str, dict[str, Any]]:
    """By command, its options by name."""
    found: dict[str, dict[str, Any]] = {}

    def note(command: Any, name: str) -> None:
        for child, inner in getattr(command, "commands", {}).items():
            note(inner, f"{name} {child}".strip())
        if not hasattr(command, "commands"):
            options = (p for p in command.params if p.param_type_name == "option")
            found[name] = {p.name: p for p in options if p.name != "help"}

    note(typer.main.get_command(app), "")
    return found


def _given(option: str, known: Any, rng: random.Random, folder: Path) -> list[str]:
    if known.is_flag:
        return [rng.choice(known.opts + known.secondary_opts)]
    name = known.opts[0]
    values = [_value(option, known, rng, folder)]
    if option in _REPEATED:
        values += [_value(option, known, rng, folder) for _ in range(rng.choice((0, 0, 1)))]
        values += values[:1] * rng.choice((0, 0, 1))  # the same key twice
    more = _fitting(option, values[0], rng)
    return [*more, *(part for value in values for part in (name, value))]


def _fitting(option: str, value: str, rng: random.Random) -> list[str]:
    """Options of another model than the small case's."""
    if option != "model_option":
        return []
    key = value.partition("=")[0]
    for model, options in TORCHVISION.items():
        if value in options:
            return ["--model", f"torchvision:{model}", "--data", "folder:images"]
    if key in ("hidden", "depth", "dim", "heads", "patch"):
        return ["--model", "vit-small"]
    return ["--model", "resnet-20"] if key in ("shortcut", "affine", "bn_init") else []


def _value(option: str, known: Any, rng: random.Random, folder: Path) -> str:
    pools: dict[str, tuple[str, ...]] = {
        "granularity": GRANULARITIES,
        "control": CONTROLS,
        "model": MODELS,
        "recipe": RECIPES,
        "sparsities": LISTS,
        "candidates": LISTS,
        "widths": LISTS,
        "data": ("folder:images", "folder:", "folder:none", "folder:[", "digits ", "mnist-",
        "folder:ticket.safetensors"),
        "model_option": (*MODEL_OPTIONS, *(o for options in TORCHVISION.values() for o in options)),
        "device": ("cuda", "cuda:7", "cuda:99999999999999999999", "cpu:7", "meta", "mps", "cuda:-1", "cuda:", "xpu"),
        "plan": ("block:0x0", "block:100000x100000", "block:3x3", "csr", "compact", f"block:{DIGITS}x1", "block:",
        "state"),
        "layers": ("*", "!*", "[", "**", "1", "!1", "[13]", "[!1]", "1" * 1_000, "*" * 1_000),
        "seeds": ("0", "-1", "10001", "2147483648", DIGITS, "1.5"),
        "search_batch": ("2147483647", "2147483648", "64", "0", "-1", DIGITS),
        "image_size": ("0", "-1", "16384", "16385", "8", "9", DIGITS),
        "train_samples": ("1", "0", "-1", "1438", "1439", "9223372036854775808", DIGITS),
        "points": ("1", "2", "10001", "1000000", "-1", DIGITS),
        "methods": ("magnitude," * 100_000, "magnitude,magnitude", "random+shuffle", "+", ",", "magnitude+",
        "random+nope"),
        "checks": ("shuffle,shuffle", ",", "nope", "shuffle," * 100_000),
        "objective": ("task", "features", "gram"),
        "tau": ("1e-300", "1e300", "1e-30", "0.5"),
    }  # fmt: skip
    if option in ("method", "methods") and rng.random() < 0.8:
        return _method(rng)
    if option in _PLACES and rng.random() < 0.9:
        return _place(rng, folder)
    if option in ("recipe", "model_option") and rng.random() < 0.3:
        return f"{rng.choice(KEYS)}={rng.choice(FIELD_VALUES)}"
    if option == "weights":
        return rng.choice(TEXTS)  # not "DEFAULT", which is downloaded
    own = pools.get(option, ())
    if own and rng.random() < 0.7:
        return rng.choice(own)
    # typer's own description of a type, or click's, on which older versions stand
    kind = str(getattr(known, "type", None) or known.type_descriptor.annotation).lower()
    numeric = "int" in kind or "float" in kind
    return rng.choice(NUMBERS if numeric or rng.random() < 0.2 else TEXTS)


def _method(rng: random.Random) -> str:
    """A method with one or two of all methods' fields."""
    name = rng.choice([*METHODS, *METHODS, "nope", "", "CTS", LONG])
    fields = [
        f"{rng.choice(_METHOD_FIELDS)}={rng.choice(FIELD_VALUES)}" for _ in range(rng.choice((0, 1, 1, 2)))
    ]  # fmt: skip
    return ":".join([name, *fields, *fields[: rng.choice((0, 0, 0, 1))]])


def _place(rng: random.Random, folder: Path) -> str:
    """Of a file or folder, always within `folder`, or a device that swallows everything."""
    names = ("", "ticket.safetensors", "images", "images/a", "none/none/none", "a\nb", "\x1b[31m", "[red]", "x" * 300,
        "weights.safetensors", "new", "ticket.safetensors/x", "é", "*", "-", " ")  # fmt: skip
    return rng.choice(
        ("/dev/null", "/dev/full", LONG, "\x00", *(str(folder / name) for name in names))
    )
