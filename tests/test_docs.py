"""What README.md, docs/, results/ and benchmarks/peers.md show is what works.

Their Python runs, the blocks of a file in order and in a directory of its own; a block that begins with the name of a
file is that file, too. Their commands are parsed up to a checked config, not carried out. Keys and links are there.
"""

import itertools
import json
import os
import re
import runpy
import shlex
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
from forked import parse_programs, run_script
from quickly import COMPILED_QUICKLY
from tiny import tiny_config

from configs import common, emoji_text, stable_diffusion
from guided_distill import samplers
from guided_distill.diffusion import make_grid
from guided_distill.experiment import from_config
from guided_distill.teachers import outside_teacher

REPO = Path(__file__).parents[1]
FOUND = [path for folder in ("docs", "results") for path in sorted((REPO / folder).rglob("*.md"))]
PAGES = ["README.md", "benchmarks/peers.md", *(str(path.relative_to(REPO)) for path in FOUND)]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
INLINE = re.compile(r"`((?:[A-Z_]+=\S+\s+)*(?:timeout|time|python -m|make|guided-distill)\s[^`]+)`")
VARIABLE = re.compile(r"([A-Z_]+)=(.*)")
LOOP = re.compile(r"for (\w+) in ([^;]+); do (.+); done")
ELSEWHERE = {"tensorboard", "source"}  # programs that are not ours
ENV = {**os.environ, "XLA_FLAGS": COMPILED_QUICKLY}


def text_of(name):
    return (REPO / name).read_text()


def blocks(text, *languages):
    """The fenced blocks in these languages; "" is one that names none, which holds commands."""
    return [block for language, block in FENCE.findall(text) if language in languages]


def without_blocks(text, *languages):
    """`text` with as many empty lines in place of the fenced blocks in these languages, all where none is named."""
    return FENCE.sub(lambda m: "\n" * m[0].count("\n") if m[1] in languages or not languages else m[0], text)


def python_of(text):
    """One program of all Python blocks, whose lines have the numbers they have in `text`."""
    kept = ["\n"] * len(text.splitlines())
    for match in FENCE.finditer(text):
        if match[1] == "python":
            first = text.count("\n", 0, match.start()) + 1
            lines = match[2].splitlines(keepends=True)
            kept[first : first + len(lines)] = lines
    return "".join(kept)


def commands(text):
    """The commands of the blocks that hold some, and those in the running text, as lists of words."""
    values = {}
    for line in "\n".join(blocks(text, "", "bash")).replace("\\\n", " ").splitlines():
        for turn in turns_of(line):
            words = shlex.split(turn, comments=True)
            if len(words) == 1 and (said := VARIABLE.fullmatch(words[0])):
                values[f"${said[1]}"] = said[2].split()
            elif words := run_by(words):
                yield [*values.get(words[0], words[:1]), *words[1:]]
    for found in INLINE.findall(without_blocks(text)):
        yield run_by(shlex.split(found))


def turns_of(line):
    """[`line`], or what a loop over files of the repository does with each."""
    if not (loop := LOOP.search(line)):
        return [line]
    name, patterns, body = loop.groups()
    files = [str(file.relative_to(REPO)) for pattern in patterns.split() for file in sorted(REPO.glob(pattern))]
    assert files, f"no file is {patterns}"
    return [body.replace(f"${name}", file) for file in files]


def run_by(words):
    """The command that `words` run in the end: no variables of its environment, no `time`, no `timeout 5`."""
    match words:
        case ["time", *rest]:
            return run_by(rest)
        case ["timeout", *rest]:
            return run_by([*itertools.dropwhile(lambda word: word.startswith("-"), rest)][1:])
        case [word, *rest] if VARIABLE.fullmatch(word):
            return run_by(rest)
    return words


def write_files(text, directory):
    for block in blocks(text, "python"):
        if named := re.match(r"# (\w+\.py)\n", block):
            (directory / named[1]).write_text(block)


@pytest.fixture
def desk(tmp_path):
    """A directory with what the blocks take as made by commands before them: a bundle, and a finished run's figures."""
    shutil.copytree(REPO / "tests" / "fixtures" / "bundle_v1", tmp_path / "exported")
    about = json.loads((tmp_path / "exported" / "bundle.json").read_text())
    about["students"][0]["num_steps"] = 4
    (tmp_path / "exported" / "bundle.json").write_text(json.dumps(about))
    row = {"stage": "stage1", "model": "student", "nfe": 4, "w": 1.0, "metrics": {"frechet_classifier": 2.0}}
    (tmp_path / "runs" / "bars").mkdir(parents=True)
    (tmp_path / "runs" / "bars" / "summary.json").write_text(json.dumps({"rows": [row]}))
    return tmp_path


@pytest.mark.parametrize("name", PAGES)
def test_the_python_runs(name, desk):
    text = text_of(name)
    write_files(text, desk)
    program = desk / "blocks.py"
    program.write_text(python_of(text))
    done = run_script(program, env=ENV, cwd=desk)
    assert done.returncode == 0, f"{done.stderr}\nline numbers are those of {name}"


@pytest.mark.parametrize("name", PAGES)
def test_the_commands_are_commands(name, tmp_path):
    write_files(text_of(name), tmp_path)
    ours = [program for words in commands(text_of(name)) for program in programs_of(words)]
    done = parse_programs(ours, env=ENV, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def programs_of(words):
    """[the module and its arguments] of a command that runs one of ours, [] of another, once that is seen to be one."""
    match words:
        case ["guided-distill"] | ["python", "-m", "guided_distill.main"]:
            return []  # spoken of
        case ["guided-distill", *arguments]:
            return [["guided_distill.main", *arguments]]
        case ["python", "-m", *program]:
            return [program]
        case ["make", *targets]:
            known = re.search(r"^\.PHONY: (.+)$", text_of("Makefile"), re.MULTILINE)[1].split()
            assert {target for target in targets if "=" not in target} <= set(known), words
        case ["pip", "install", *arguments]:
            known = re.findall(r'^    "(\w+)": ', text_of("setup.py").split("EXTRAS = {")[1], re.MULTILINE)
            said = [names.split(",") for names in re.findall(r"\[(.+?)\]", " ".join(arguments))]
            assert set(sum(said, [])) <= set(known), words
        case ["python", file]:
            assert (REPO / file).is_file(), words
        case [program, *_]:
            assert program in ELSEWHERE, words
    return []


def keys(config, prefix=""):
    for name, value in config.items():
        yield prefix + name
        if isinstance(value, ml_collections.ConfigDict):
            yield from keys(value, f"{prefix}{name}.")


@pytest.mark.parametrize("name", PAGES)
def test_the_keys_are_keys(name):
    key = r"(?:(?<![\w/.-])(?:--)?config\.|--set )([a-z]\w*(?:\.[a-z]\w*)*)"
    said = re.findall(key, without_blocks(text_of(name), "python"))
    known = {key for config in (common, emoji_text, stable_diffusion) for key in keys(config.get_config())}
    assert set(said) - known == set()


@pytest.mark.parametrize("name", PAGES)
def test_the_links_lead_somewhere(name):
    links = re.findall(r"\]\((?!https?:)([^)#\s]*)#?([^)\s]*)", without_blocks(text_of(name)))
    assert [(file, heading) for file, heading in links if not leads_somewhere(name, file, heading)] == []


def leads_somewhere(name, file, heading):
    there = (REPO / name).parent / file if file else REPO / name
    return there.exists() and (not heading or heading in anchors(there.read_text()))


def anchors(text):
    """What GitHub calls the headings of a page."""
    return [
        re.sub(r"[^\w -]", "", said.lower()).replace(" ", "-") for said in re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    ]


def test_every_page_is_linked_and_every_config_listed():
    readme = text_of("README.md")
    configs = {f"configs/{path.name}" for path in (REPO / "configs").glob("*.py")} - {"configs/common.py"}
    assert [name for name in [*PAGES[1:], "examples/own_denoiser.py", *configs] if name not in readme] == []


def test_the_example_of_a_teacher_of_ones_own_works_as_printed(tmp_path, monkeypatch):
    write_files(text_of("README.md"), tmp_path)
    assert (tmp_path / "my_teacher.py").read_text().count("\n") < 40
    monkeypatch.syspath_prepend(tmp_path)
    teacher = outside_teacher("my_teacher:make_teacher", from_config(tiny_config()))
    cond = {"label": jnp.array([0, 9]), "w": jnp.zeros(2)}
    grid = jax.tree.map(jnp.asarray, make_grid(teacher.schedule, 16))
    # Of noise that is nowhere, each class makes its own mean.
    x = samplers.deterministic(teacher.denoiser(teacher.params), grid, jnp.zeros((2, 8, 8, 1)), cond, 16)
    np.testing.assert_allclose(np.asarray(x).mean((1, 2, 3)), [-0.8, 0.8], atol=0.02)


def test_the_tutorials_data_are_what_its_text_says(tmp_path):
    write_files(text_of("docs/tutorial.md"), tmp_path)
    images, labels = runpy.run_path(str(tmp_path / "my_data.py"))["make_data"]()["train"]
    lit = (images > 0).sum((1, 2, 3))
    assert [set(lit[labels == label]) for label in range(3)] == [{8}, {8}, {15}]


@pytest.mark.parametrize(
    "text, says",
    [
        ("guided-distill --config=digits --config.stage1.updatess=3", "updatess"),
        ("python -m guided_distill.main --config=digits --nosuchflag", "nosuchflag"),
        ("SAY='guided-distill --config=digits'\n$SAY --mode=dance", "dance"),
        ("XLA_FLAGS=--x timeout --signal=TERM 5 guided-distill --config=cifar10_small:dance", "dance"),
        ("for one in configs/digits.py; do guided-distill --config=$one --mode=dance; done", "dance"),
        ("python -m benchmarks.claims runs/digits --bounds=dance", "dance"),
        ("python -m benchmarks.input --config=dance", "dance"),
        ("python -m benchmarks.dance", "dance"),
    ],
)
def test_a_wrong_command_is_seen(text, says, tmp_path):
    (words,) = commands(f"```bash\n{text}\n```\n")
    done = parse_programs(programs_of(words), env=ENV, cwd=tmp_path)
    assert done.returncode == 1 and says in done.stderr


@pytest.mark.parametrize("line", ["make dance", "pip install .[dance]", "dance", "XLA_FLAGS=x time timeout 5 dance"])
def test_a_wrong_word_is_seen(line):
    (words,) = commands(f"```\n{line}\n```\n")
    with pytest.raises(AssertionError, match="dance"):
        programs_of(words)
