"""A bundle gives back the students that were written into it, and nothing else."""

import dataclasses
import hashlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from students import BATCH, experiments, make_student

import guided_distill
from guided_distill.errors import UserError
from guided_distill.export import bundle

OLD = Path(__file__).parent / "fixtures" / "bundle_v1"


def write(directory, *students):
    bundle.write(directory, [student for student, _, _ in students], 4, BATCH, {"licence": "CC0"})
    return directory


@pytest.mark.parametrize(
    "kind", [pytest.param("unet", marks=pytest.mark.slow), pytest.param("dit", marks=pytest.mark.slow), "mlp"]
)
def test_a_bundle_draws_what_its_students_drew_bit_for_bit(kind, tmp_path):
    experiment = experiments()[kind]
    kinds = [("det", 2), ("det", 1), ("teacher",)] + [("sto", 2), ("consistency",)] * (kind == "mlp")
    students = [make_student(experiment, *which) for which in kinds]
    loaded = guided_distill.load(write(tmp_path, *students))
    for student, grid, mesh in students:
        options = {"num_steps": student.num_steps, "w": 2.5, "labels": [3, 0, 2], "num": 5, "seed": 4}
        ours = student.sample(grid, mesh, batch_size=BATCH, **options)
        theirs = loaded.sample(series=student.series, **options)
        assert theirs.shape == (5, *experiment.data.sample_shape) and np.isfinite(theirs).all()
        np.testing.assert_array_equal(theirs, ours)
    assert loaded.about["licence"] == "CC0" and loaded.students[0].figures[0]["metrics"]["frechet_classifier"] == 2.5
    assert [s.model.calls_per_step for s in loaded.students][:3] == [1, 1, 2]


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """A bundle of two students and a teacher of points so small that a sample takes no time to compile."""
    experiment = experiments()["mlp"]
    students = [make_student(experiment, *which) for which in (("det", 2), ("det", 1), ("teacher",))]
    return write(tmp_path_factory.mktemp("bundles") / "one", *students)


def test_images_follow_the_arguments(one):
    model = guided_distill.load(one)
    assert model.sample(num_steps=1).shape == (1, 64, 1)
    x = model.sample(num_steps=1, labels=[0, 1, 2])
    np.testing.assert_array_equal(model.sample(num_steps=1, labels=[0, 1, 2], num=5)[:3], x)
    np.testing.assert_array_equal(model.sample(num_steps=1, labels=[0, 1, 2, 0, 1]), model.sample(labels=[0, 1, 2],
                                  num_steps=1, num=5))  # fmt: skip
    for other in ({"labels": [1, 1, 2]}, {"w": 3.0}, {"seed": 1}, {"num_steps": 2}, {"series": "teacher"}):
        changed = model.sample(**{"num_steps": 1, "labels": [0, 1, 2], **other})
        assert np.abs(changed[0] - x[0]).max() > 1e-4, other
    assert model.student().name == "det_0002"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"num_steps": 3}, r"num_steps = 3, series = det: there is no such student; there are 2 .det., 1 .det., any"),
        ({"num_steps": 2, "series": "sto"}, "series = sto: there is no such student"),
        ({"num_steps": 3, "series": "teacher"}, "num_steps = 3: teacher takes divisors of 4"),
        ({"num_steps": 0, "series": "teacher"}, "num_steps = 0: teacher takes divisors of 4"),
        ({"num_steps": 1, "w": 4.1}, r"w = 4.1 is outside the trained range \[0, 4\] of det_0001"),
        ({"num_steps": 1, "w": float("nan")}, "w = nan is outside"),
        ({"num_steps": 1, "labels": [0, 4]}, "labels: 4 is outside the classes 0 ... 3"),
        ({"num_steps": 1, "labels": [0.5]}, "labels: 0.5 is outside the classes"),
        ({"num_steps": 1, "labels": []}, "at least one image and, where they are given, one label"),
        ({"num_steps": 1, "num": 0}, "num = 0: at least one image"),
    ],
)
def test_what_no_student_was_trained_for_is_refused_by_name(one, arguments, says):
    with pytest.raises(UserError, match=says) as error:
        guided_distill.load(one).sample(**arguments)
    assert "\n" not in str(error.value)


def changed_json(**values):
    def change(directory):
        path = directory / "bundle.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return change


def changed_student(**values):
    def change(directory):
        students = json.loads((directory / "bundle.json").read_text())["students"]
        changed_json(students=[students[0] | values])(directory)

    return change


def changed_weights(function):
    """What someone who knows the format would do: the checksum agrees again."""

    def change(directory):
        path = directory / "students" / "det_0002.safetensors"
        params = safetensors.numpy.load_file(path)
        content = safetensors.numpy.save(function(dict(params)) or params)
        path.write_bytes(content)
        changed_student(sha256=hashlib.sha256(content).hexdigest())(directory)

    return change


def cut(directory):
    path = directory / "students" / "det_0002.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def flip(directory):
    path = directory / "students" / "det_0002.safetensors"
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(content)


BIAS = "dense_in/bias"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda d: (d / "bundle.json").unlink(), "bundle.json: no such file; give a directory"),
        (lambda d: (d / "bundle.json").write_text("{"), "bundle.json is not JSON"),
        (lambda d: (d / "bundle.json").write_text("[]"), "is not a bundle of guided_distill"),
        (changed_json(format="other"), "is not a bundle of guided_distill"),
        (changed_json(version=bundle.VERSION + 1), "has version 2; this guided_distill reads up to 1: upgrade it"),
        (changed_json(version=None), "has version None"),
        (changed_json(num_intervals="many"), "is damaged, or not of this package .TypeError"),
        (changed_json(num_intervals=3), "2 steps do not divide 3 intervals"),
        (changed_json(students=[]), "holds no students"),
        (changed_json(schedule={"name": "none"}), "is damaged, or not of this package .KeyError: 'none'"),
        (changed_student(file="../det_0002.safetensors"), "the file '../det_0002.safetensors', which is not within"),
        (changed_student(file="students/../../x.safetensors"), "which is not within students/"),
        (changed_student(file="students/x.safetensors"), "x.safetensors: no such file, though bundle.json names it"),
        (changed_student(sampler="exec"), "has the sampler exec"),
        (changed_student(w_range=[0]), "is damaged, or not of this package .ValueError"),
        (cut, "det_0002.safetensors is truncated or not safetensors"),
        (flip, "det_0002.safetensors is not the file that bundle.json was written with"),
        (changed_weights(lambda p: {k: v for k, v in p.items() if k != BIAS}), f"lacks {BIAS}"),
        (changed_weights(lambda p: p | {"more": p[BIAS]}), "has more, which the network of bundle.json lacks"),
        (changed_weights(lambda p: p | {BIAS: p[BIAS][:-1]}), r"dense_in/bias is float32\[7\]; .* takes float32\[8\]"),
        (changed_weights(lambda p: p | {BIAS: p[BIAS].astype(np.float64)}), r"is float64\[8\]; .* takes float32\[8\]"),
        (changed_weights(lambda p: p | {BIAS: p[BIAS] * np.nan}), "dense_in/bias holds values that are not finite"),
    ],
)
def test_a_damaged_or_foreign_bundle_is_refused_by_name(one, tmp_path, change, says):
    directory = tmp_path / "copy"
    for path in (path for path in one.rglob("*") if path.is_file()):
        target = directory / path.relative_to(one)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    change(directory)
    with pytest.raises(UserError, match=says) as error:
        guided_distill.load(directory)
    assert "\n" not in str(error.value)


def test_a_bundle_of_version_1_is_still_read_and_draws_the_same():
    """Written by version 0.1.0, of weights drawn at random: a student of 2 steps and the teacher."""
    model = guided_distill.load(OLD)
    assert (model.about["version"], model.about["licence"]) == (1, "CC0")
    expected = np.load(OLD / "expected.npz")
    for series, num_steps in (("det", 2), ("teacher", 4)):
        x = model.sample(num_steps=num_steps, series=series, w=2.0, labels=[0, 5, 9], seed=3)
        np.testing.assert_allclose(x, expected[f"{series}_{num_steps}"], atol=1e-5)


def test_a_network_of_ones_own_is_refused(tmp_path):
    student, *_ = make_student(experiments()["mlp"])
    with pytest.raises(UserError, match="det_0002: its network is a function of your own"):
        bundle.write(tmp_path / "a", [dataclasses.replace(student, network=None)], 4, BATCH, {})
    model = dataclasses.replace(student.model, schedule=object())
    with pytest.raises(UserError, match="the schedule object is your own"):
        bundle.write(tmp_path / "b", [dataclasses.replace(student, model=model)], 4, BATCH, {})


def test_loading_takes_jax_and_flax_and_no_training_code(one):
    program = f"""
import sys
import guided_distill
assert "jax" not in sys.modules
guided_distill.load({str(one)!r})
heavy = {{"orbax", "optax", "grain", "tensorflow", "tensorflow_datasets", "ml_collections", "clu", "matplotlib"}}
print(sorted(heavy & sys.modules.keys()))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=Path(__file__).parents[1]
    )
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr
