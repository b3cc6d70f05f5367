"""setup.py, constraints.txt and the sources tell the same story, and nothing says on whose machine it was written."""

import ast
import importlib
import re
import runpy
import sys
import types
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import guided_distill

REPO = Path(__file__).parents[1]

# Where the name to import is not the name to install with - turned into _.
IMPORT_NAME = {
    "absl-py": "absl",
    "orbax-checkpoint": "orbax",
    "pillow": "PIL",
    "scikit-learn": "sklearn",
    "tensorflow-cpu": "tensorflow",
}
# What stands in every checkout; build products and a user's runs lie beside them and are not looked at.
FOLDERS = [".ci", "benchmarks", "configs", "docs", "examples", "guided_distill", "launch", "tests"]
TEXT = {".py", ".md", ".txt", ".toml", ".cff", ".cfg", ".sh", ".yaml", ".yml", ".json", ".sbatch", ""}
FORBIDDEN = {
    "a path of one machine": r"(?<![\w.$}])/(?:home|root|work|Users|tmp/\w)/|\.\./(?:shared|\.library)|/tmp/w\b",
    "a host of a package registry": r"pypi\.\w|pythonhosted\.|registry\.\w+js\.",
    "a place to install from": r"--(?:extra-)?index-url|--find-links|--trusted-host| @ file:",
}


@pytest.fixture
def metadata(monkeypatch):
    """What setup.py says, without setuptools, which no environment has to have."""
    said = {}
    stub = types.SimpleNamespace(setup=lambda **keywords: said.update(keywords), find_packages=lambda include: include)
    monkeypatch.setitem(sys.modules, "setuptools", stub)
    runpy.run_path(str(REPO / "setup.py"))
    return said


def import_name(requirement):
    name = Requirement(requirement).name
    return IMPORT_NAME.get(name, name.replace("-", "_"))


def imports_of(*folders):
    """The top-level names that the sources of `folders` import."""
    names = set()
    for path in (path for folder in folders for path in (REPO / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names.add(node.module.split(".")[0])
    return names


def pins():
    lines = (REPO / "constraints.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


def test_every_core_requirement_is_imported(metadata):
    needed = {import_name(requirement) for requirement in metadata["install_requires"]}
    assert needed - imports_of("guided_distill") == set()


def test_every_import_is_declared(metadata):
    named = ("examples", "tfds", "eval", "text", "demo", "onnx", "diffusers")
    extras = [requirement for name in named for requirement in metadata["extras_require"][name]]
    declared = {import_name(requirement) for requirement in metadata["install_requires"] + extras}
    house = {"guided_distill", "configs"}
    undeclared = imports_of("guided_distill", "configs") - declared - house - sys.stdlib_module_names
    assert undeclared == set()


def test_constraints_are_exact_and_within_the_ranges(metadata):
    pinned = {canonicalize_name(name): version for name, version in pins().items()}
    extras = metadata["extras_require"]
    for requirement in map(Requirement, metadata["install_requires"] + extras["examples"] + extras["test"]):
        name = canonicalize_name(requirement.name)
        assert name in pinned, f"constraints.txt lacks {name}"
        assert requirement.specifier.contains(pinned[name]), f"{name}=={pinned[name]} is not in {requirement.specifier}"


def test_versions_agree(metadata):
    citation = re.search(r"^version: (.+)$", (REPO / "CITATION.cff").read_text(), re.MULTILINE)[1]
    assert metadata["version"] == guided_distill.__version__ == citation


def test_the_package_and_nothing_else_is_installed(metadata):
    assert metadata["packages"] == ["guided_distill", "guided_distill.*", "guided_distill.configs"]
    # configs/ lies at the top of the repository, and elsewhere is the name of somebody else's folder.
    assert metadata["package_dir"] == {"guided_distill.configs": "configs"}
    folders = {path.parent for path in (REPO / "guided_distill").rglob("*.py")}
    assert [str(folder) for folder in folders if not (folder / "__init__.py").exists()] == []


def test_the_command_is_a_function(metadata):
    (script,) = metadata["entry_points"]["console_scripts"]
    module, function = script.removeprefix("guided-distill=").split(":")
    assert callable(getattr(importlib.import_module(module), function))


def texts():
    paths = [path for path in REPO.iterdir() if path.is_file()]
    paths += [path for folder in FOLDERS for path in (REPO / folder).rglob("*") if path.is_file()]
    # .git is a file in a linked work tree, and then holds the path of the other one.
    paths = [path for path in paths if path.suffix in TEXT and path.name != ".git"]
    return {path.relative_to(REPO): path.read_text(errors="replace") for path in paths}


@pytest.mark.parametrize("what", FORBIDDEN)
def test_no_file_names(what):
    found = [
        f"{path}:{number}: {line.strip()}"
        for path, text in texts().items()
        for number, line in enumerate(text.splitlines(), start=1)
        if path != Path(__file__).relative_to(REPO) and re.search(FORBIDDEN[what], line)
    ]
    assert found == []


@pytest.mark.parametrize(
    "what, line",
    [
        ("a path of one machine", "data_dir = '/home/ada/data'"),
        ("a path of one machine", "see ../shared/notes.md"),
        ("a host of a package registry", "https://pypi.example/simple"),
        ("a place to install from", "torch @ file:///wheels/torch.whl"),
    ],
)
def test_each_pattern_sees_an_example(what, line):
    assert re.search(FORBIDDEN[what], line)
