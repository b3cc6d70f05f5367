"""Which way the imports run, and how long files and functions may be. A new file of the package goes into LEVEL."""

import ast
import graphlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).parents[1]
PACKAGE = "guided_distill"

# A room (a file or folder directly under the package) imports rooms of lower levels; within SIDE_BY_SIDE also its own.
LEVEL = {
    "errors": 0,
    "chips": 1,
    "costs": 1,
    "distributed": 1,
    "compilation": 2,
    "files": 1,
    "diffusion": 1,
    "config_files": 1,
    "factories": 1,
    "text": 1,
    "models": 1,
    "pictures": 1,
    "preemption": 1,
    "plots": 1,
    "profiling": 1,
    "progress": 1,
    "guidance": 2,
    "samplers": 3,
    "analytic": 3,
    "objectives": 4,
    "pairs": 1,
    "small_sets": 1,
    "tfds_files": 1,
    "masks": 1,
    "latents": 2,
    "records": 2,
    "data": 4,
    "optim": 4,
    "sharding": 4,
    "checkpoint": 4,
    "metrics": 4,
    "state": 4,
    "evaluation": 4,
    "interop": 4,
    "checks": 4,
    "experiment": 5,
    "editing": 4,
    "latent_space": 5,
    "generate": 5,
    "drawing": 6,
    "prepare_data": 5,
    "encode": 6,
    "train": 5,
    "evaluate": 7,
    "report": 6,
    "surface": 6,
    "summary_table": 6,
    "differences": 6,
    "teachers": 6,
    "stages": 7,
    "workdir": 8,
    "rounds": 9,
    "diagnostics": 9,
    "pipeline": 10,
    "plan": 11,
    "export": 11,
    "measure_files": 11,
    "sample": 11,
    "transfer": 11,
    "command_line": 11,
    "demo": 12,
    "main": 12,
}
SIDE_BY_SIDE = 4
# Rooms that only the named ones may import.
IMPORTED_ONLY_BY = {
    "train": {"pipeline", "plan", "rounds"},
    "evaluate": {"pipeline"},
}
MAX_FILE, MAX_FUNCTION = 400, 60


def modules(root):
    """{dotted name: syntax tree} of every module of the package under `root`."""
    found = {}
    for path in sorted((root / PACKAGE).rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = ast.parse(path.read_text())
    return found


def room(name):
    """The room of a dotted module name; "" for the package itself."""
    return (name.split(".") + [""])[1]


def imported(tree):
    """Every name that an import anywhere in `tree` may load, functions included; `from a import b` gives a and a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def within(name, package):
    return name == package or name.startswith(package + ".")


def edges(found):
    """(importer, imported) pairs of modules of the package, less the parents that Python loads for a module anyway."""
    for name, tree in found.items():
        for target in sorted({t for t in imported(tree) if t in found and t not in (name, PACKAGE)}):
            if not within(name, target):
                yield name, target


def wrong_way(found):
    for name, target in edges(found):
        above, below = room(name), room(target)
        if above == below or not {above, below} <= LEVEL.keys():
            continue
        if LEVEL[below] >= LEVEL[above] and not LEVEL[below] == LEVEL[above] == SIDE_BY_SIDE:
            yield f"{name} imports {target}"
        elif above not in IMPORTED_ONLY_BY.get(below, {above}):
            yield f"{name} imports {target}, which is for {sorted(IMPORTED_ONLY_BY[below])} alone"


def without_place(found):
    return (name for name in found if room(name) not in LEVEL and name != PACKAGE)


def cycles(found):
    graph = {name: set() for name in found}
    for name, target in edges(found):
        graph[name].add(target)
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        yield " -> ".join(error.args[1])


def relative(found):
    """Relative imports, which the other rules would not see."""
    for name, tree in found.items():
        lines = [node.lineno for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level]
        yield from (f"{name}, line {line}" for line in lines)


def flags_below_the_pipeline(found):
    for name, tree in found.items():
        if LEVEL.get(room(name), 0) < LEVEL["pipeline"]:
            for target in imported(tree):
                if within(target, "ml_collections") or within(target, "absl.flags") or within(target, "absl.app"):
                    yield f"{name} imports {target}"


def orbax_elsewhere(found):
    for name, tree in found.items():
        if room(name) != "checkpoint" and any(within(target, "orbax") for target in imported(tree)):
            yield name


def named_sharding_elsewhere(found):
    for name, tree in found.items():
        said = {getattr(node, key, None) for node in ast.walk(tree) for key in ("id", "attr", "name")}
        if room(name) != "sharding" and "NamedSharding" in said:
            yield name


def long_functions(found):
    for name, tree in found.items():
        lengths = {
            node.name: node.end_lineno - node.lineno + 1
            for node in ast.walk(tree)
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        }
        over = sorted((length, function) for function, length in lengths.items() if length > MAX_FUNCTION)
        # The training loop is the one function that may be long, and it is the longest of its file.
        for length, function in over[:-1] if room(name) == "train" else over:
            yield f"{name}.{function} has {length} lines"


def long_files(root):
    for folder in (PACKAGE, "configs", "benchmarks", "tests"):
        for path in sorted((root / folder).rglob("*.py")):
            lines = len(path.read_text().splitlines())
            if lines > MAX_FILE:
                yield f"{path.relative_to(root)} has {lines} lines"


def rooms_for_everything(root):
    """A file called utils has no subject, so everything ends up in it."""
    return (str(path.relative_to(root)) for path in (root / PACKAGE).rglob("util*"))


RULES_OF_MODULES = [
    wrong_way,
    without_place,
    cycles,
    relative,
    flags_below_the_pipeline,
    orbax_elsewhere,
    named_sharding_elsewhere,
    long_functions,
]
RULES_OF_FILES = [long_files, rooms_for_everything]

LONG = "def f():\n" + "    pass\n" * MAX_FUNCTION
VIOLATIONS = [
    (wrong_way, {"diffusion": "from guided_distill import guidance", "guidance": ""}),
    (wrong_way, {"models/unet": "import guided_distill.diffusion", "diffusion": ""}),
    (wrong_way, {"diffusion": "from guided_distill.models import unet", "models/unet": ""}),
    (wrong_way, {"objectives/stage1": "def f():\n    from guided_distill.train import g", "train": ""}),
    (wrong_way, {"train": "from guided_distill.evaluate import evaluate", "evaluate": ""}),
    (wrong_way, {"main": "from guided_distill import evaluate", "evaluate": ""}),
    (wrong_way, {"evaluate": "from guided_distill.train import f", "train": ""}),
    (without_place, {"helpers": ""}),
    (cycles, {"data": "from guided_distill import state", "state": "from guided_distill.data import f"}),
    (relative, {"guidance": "from .diffusion import f", "diffusion": ""}),
    (flags_below_the_pipeline, {"train": "from absl import flags"}),
    (flags_below_the_pipeline, {"objectives/stage2": "from ml_collections import ConfigDict"}),
    (orbax_elsewhere, {"train": "def f():\n    import orbax.checkpoint as ocp"}),
    (named_sharding_elsewhere, {"train": "import jax\njax.sharding.NamedSharding"}),
    (named_sharding_elsewhere, {"data": "from jax.sharding import NamedSharding as N"}),
    (long_functions, {"diffusion": LONG}),
    (long_functions, {"train": LONG + LONG.replace("f()", "g()")}),
    (long_files, {"diffusion": "\n" * (MAX_FILE + 1)}),
    (rooms_for_everything, {"models/utils": ""}),
]


def broken(rule, root):
    return list(rule(modules(root) if rule in RULES_OF_MODULES else root))


@pytest.mark.parametrize("rule", RULES_OF_MODULES + RULES_OF_FILES, ids=lambda rule: rule.__name__)
def test_the_package_keeps_the_rule(rule):
    assert broken(rule, REPO) == []


@pytest.mark.parametrize("rule, files", VIOLATIONS)
def test_each_rule_sees_a_violation(rule, files, tmp_path):
    for name, text in files.items():
        path = tmp_path / PACKAGE / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert broken(rule, tmp_path) != []


def test_the_order_itself_is_no_violation(tmp_path):
    order = ["main", "pipeline", "train", "objectives", "samplers", "guidance", "diffusion"]
    (tmp_path / PACKAGE).mkdir()
    for name, target in zip(order, order[1:] + ["errors"], strict=True):
        (tmp_path / PACKAGE / f"{name}.py").write_text(f"from {PACKAGE} import {target}")
    (tmp_path / PACKAGE / "errors.py").touch()
    (tmp_path / PACKAGE / "state.py").write_text(f"from {PACKAGE}.optim import f")
    (tmp_path / PACKAGE / "optim.py").touch()
    assert [broken(rule, tmp_path) for rule in RULES_OF_MODULES] == [[]] * len(RULES_OF_MODULES)


def test_nothing_below_the_pipeline_loads_tensorflow(tmp_path):
    """An empty package of that name stands first on the path, so that an import is seen where TensorFlow is missing."""
    (tmp_path / "tensorflow").mkdir()
    (tmp_path / "tensorflow" / "__init__.py").touch()
    below = [name for name in modules(REPO) if LEVEL.get(room(name), 0) <= LEVEL["train"]]
    program = f"import sys, {', '.join(below)}; print('tensorflow' in sys.modules)"
    path = os.pathsep.join([str(tmp_path), str(REPO)])
    done = subprocess.run(
        [sys.executable, "-c", program], env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout.strip()) == (0, "False"), done.stderr
