"""--config finds a file as typed, or by its name here and in the package, and configs find each other."""

import importlib
import sys

import pytest

from guided_distill import config_files
from guided_distill.errors import UserError


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """An empty current directory, which the path begins with, and `configs` as it was afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.split(".")[0] == "configs"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "configs", None)  # so that it is taken away again
    return tmp_path


def write(path, text=""):
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)


@pytest.mark.parametrize("name", ["digits", "digits.py", "configs/digits.py", "configs/digits"])
def test_a_name_means_the_packages_where_there_is_no_such_file(elsewhere, name):
    assert config_files.find(name) == str(config_files.SHIPPED / "digits.py")


def test_the_variant_of_a_config_stays(elsewhere):
    assert config_files.find("pieces:dit") == str(config_files.SHIPPED / "pieces.py") + ":dit"


def test_what_is_typed_goes_before_ones_own_and_that_before_the_packages(elsewhere):
    write(elsewhere / "configs" / "digits.py")
    assert config_files.find("digits") == "configs/digits.py"
    write(elsewhere / "digits.py")
    assert config_files.find("digits.py") == "digits.py"


@pytest.mark.parametrize("name", ["nothing", "nothing.py:x", "other/digits.py", "configs", ""])
def test_where_nothing_is_found_the_names_are_listed(elsewhere, name):
    (elsewhere / "configs").mkdir()
    with pytest.raises(UserError, match=r"no such file; .*one of ablation, cifar10, .*digits, .*transfer$") as error:
        config_files.find(name)
    assert str(error.value).startswith(f"--config={name}: ") and "common" not in str(error.value)


def test_a_config_is_loaded_by_its_name_or_file_as_the_variant_that_is_named(elsewhere):
    write(elsewhere / "configs" / "mine.py", "def get_config(size='small'):\n    return size")
    assert config_files.load("mine") == "small"
    assert config_files.load("configs/mine.py:large") == "large"
    assert config_files.load("cifar10_small:cores").data.image_size == 16


@pytest.mark.parametrize(
    ("name", "says"),
    [("cifar10_small:tpu", "the sizes are gpu, cores"), ("digits:x", "it comes in no variants; leave out :x")],
)
def test_a_variant_that_a_config_does_not_have_gets_one_line(elsewhere, name, says):
    with pytest.raises(UserError, match=f"^--config={name}: .*{says}.*$"):
        config_files.load(name)


def imported(name):
    return importlib.import_module(f"configs.{name}").__file__


def test_ones_own_config_imports_what_lies_beside_it_and_what_the_package_has(elsewhere):
    write(elsewhere / "configs" / "mine.py")
    write(elsewhere / "configs" / "digits.py")
    config_files.find("mine")
    assert imported("digits") == str(elsewhere / "configs" / "digits.py")
    assert imported("common") == str(config_files.SHIPPED / "common.py")


def test_a_projects_own_configs_do_not_hide_the_packages(elsewhere):
    for name in ("__init__", "common", "theirs"):
        write(elsewhere / "configs" / f"{name}.py", "raise AssertionError" if name != "theirs" else "")
    config_files.find("digits")
    assert imported("common") == str(config_files.SHIPPED / "common.py")
    assert imported("theirs") == str(elsewhere / "configs" / "theirs.py")
