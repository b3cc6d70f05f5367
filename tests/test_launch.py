"""How a run is launched on several processes, as far as can be seen without a cluster."""

import copy
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from forked import run_main
from jobset_schema import faults

from guided_distill.distributed import arguments_of
from guided_distill.errors import UserError

LAUNCH = Path(__file__).parents[1] / "launch"
SCRIPTS = ["local.sh", "tpu_pod.sh", "slurm.sbatch"]


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, None),
        ({"SLURM_NTASKS": "16", "SLURM_PROCID": "0"}, None),  # the batch script itself, which no srun started
        ({"SLURM_STEP_NUM_TASKS": "1"}, None),
        ({"SLURM_STEP_NUM_TASKS": "16"}, {}),
        ({"OMPI_COMM_WORLD_SIZE": "1"}, None),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, {}),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, None),
        ({"TPU_WORKER_HOSTNAMES": "host-0,host-1"}, {}),
        ({"MEGASCALE_COORDINATOR_ADDRESS": "host-0"}, {}),
    ],
)
def test_a_cluster_is_known_by_its_environment(environment, expected):
    assert arguments_of(None, None, None, environment) == expected


def test_what_is_told_goes_before_the_environment():
    told = {"coordinator_address": "10.0.0.2:1234", "num_processes": 4, "process_id": 3}
    assert arguments_of("10.0.0.2:1234", 4, 3, {"SLURM_STEP_NUM_TASKS": "16"}) == told
    assert arguments_of("auto", None, None, {}) == {}


OPEN_MPI_5 = {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}


def test_under_open_mpi_the_address_of_process_0_is_enough():
    told = {"coordinator_address": "node0:1234", "num_processes": 4, "process_id": 3}
    assert arguments_of("node0:1234", None, None, OPEN_MPI_5) == {**told, "local_device_ids": 1}
    assert arguments_of("node0:1234", 4, 3, OPEN_MPI_5) == told
    with pytest.raises(UserError, match="--coordinator=node0: must be host:port"):
        arguments_of("node0", None, None, OPEN_MPI_5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("environment", "says"),
    [
        (OPEN_MPI_5, r"say where process 0 is: --coordinator=host:port$"),
        ({"SLURM_STEP_NUM_TASKS": "2"}, "--coordinator=host:port, with --num_processes and --process_id$"),
    ],
)
def test_a_cluster_that_jax_does_not_find_its_way_in_is_one_line_with_the_remedy(tmp_path, environment, says):
    done = run_main(["--config=configs/digits.py", f"--workdir={tmp_path}"], env=os.environ | environment)
    (line,) = done.stderr.splitlines()
    assert done.returncode == 2 and re.search(says, line), line


@pytest.mark.parametrize(
    ("told", "says"),
    [
        ((None, 2, None), "--num_processes=2 needs --coordinator"),
        ((None, None, 0), "--process_id=0 needs --coordinator"),
        (("auto", 2, 0), "--num_processes=2 needs --coordinator"),
        (("host:1", None, 0), "--coordinator=host:1 needs --num_processes"),
        (("host:1", 2, None), "--coordinator=host:1 needs --process_id"),
        (("host", 2, 0), "--coordinator=host: must be host:port"),
        (("host:1", 2, 2), "--process_id=2: must be one of 0 ... 1"),
        (("host:1", 2, -1), "--process_id=-1"),
    ],
)
def test_half_of_it_is_refused(told, says):
    with pytest.raises(UserError, match=says):
        arguments_of(*told, {})


@pytest.mark.parametrize("name", sorted(path.name for path in LAUNCH.iterdir()))
def test_each_says_at_its_top_what_it_needs_and_what_to_type(name):
    top = "\n".join((LAUNCH / name).read_text().splitlines()[:20])
    assert re.search(r"^# Needs:", top, re.MULTILINE) and re.search(r"^# Type:", top, re.MULTILINE)


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_pass_shellcheck_and_can_be_run(name):
    shellcheck = Path(sys.executable).parent / "shellcheck"
    done = subprocess.run([shellcheck, LAUNCH / name], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert os.access(LAUNCH / name, os.X_OK)


JOB_SET = yaml.safe_load((LAUNCH / "gke_jobset.yaml").read_text())


def test_the_jobset_is_of_its_schema():
    assert list(faults(JOB_SET)) == []


JOB_AT = ("spec", "replicatedJobs", 0, "template", "spec")
POD_AT = (*JOB_AT, "template", "spec")


@pytest.mark.parametrize(
    ("where", "value", "says"),
    [
        (("spec", "failurepolicy"), {}, "JobSet.spec: unknown key failurepolicy"),
        (("spec", "failurePolicy", "maxRestarts"), "100", "JobSet.spec.failurePolicy.maxRestarts is '100'"),
        (("spec", "failurePolicy", "rules", 0), {"action": "Fail"}, "rules[0]: no name"),
        ((*JOB_AT, "backOffLimit"), 0, "template.spec: unknown key backOffLimit"),
        ((*POD_AT, "restartPolicy"), "Always", "restartPolicy is 'Always'"),
        ((*POD_AT, "containers", 0, "args"), "--config", "args is '--config'"),
        ((*POD_AT, "nodeSelector", "chips"), 4, "nodeSelector.chips is 4"),
    ],
)
def test_what_is_not_of_the_schema_is_found(where, value, says):
    wrong = copy.deepcopy(JOB_SET)
    *above, last = where
    part = wrong
    for key in above:
        part = part[key]
    part[last] = value
    assert says in "\n".join(faults(wrong))


def test_the_jobset_has_what_a_slice_needs():
    job_set = JOB_SET
    assert job_set["spec"]["failurePolicy"]["maxRestarts"] > 0
    (replicated,) = job_set["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    sides = map(int, pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x"))
    chips = 1
    for side in sides:
        chips *= side
    # One pod for each host, all of whose chips it takes, and no restart but of all of them together.
    assert job["parallelism"] == job["completions"] == chips // container["resources"]["limits"]["google.com/tpu"]
    assert (job["backoffLimit"], pod["restartPolicy"]) == (0, "Never")
    flags = [argument.split("=")[0] for argument in container["args"]]
    assert flags == ["--config", "--workdir", "--config.data.data_dir"] and container["image"]


def test_the_image_is_built_from_the_constraints():
    text = (LAUNCH / "Dockerfile").read_text()
    assert re.search(r"pip install .*-c constraints\.txt", text) and "constraints.txt" in re.search("COPY .*", text)[0]
    copied = [word for line in re.findall(r"^COPY (.*)", text, re.MULTILINE) for word in line.split()[:-1]]
    assert [name for name in copied if not (LAUNCH.parent / name).exists()] == []


def local(tmp_path, program, *arguments):
    """launch/local.sh with another program, written to a file."""
    script = tmp_path / "program.sh"
    script.write_text(program)
    environment = os.environ | {"PROGRAM": f"bash {script}", "PORT": "7001", "OUT": str(tmp_path)}
    bash = shutil.which("bash")
    return subprocess.run(
        [bash, LAUNCH / "local.sh", *arguments], env=environment, capture_output=True, text=True, timeout=60
    )


@pytest.mark.slow
def test_local_starts_every_process_with_its_number(tmp_path):
    done = local(tmp_path, 'echo "$@"', "3", "--config=a b")
    told = [f"--config=a b --coordinator=127.0.0.1:7001 --num_processes=3 --process_id={i}" for i in range(3)]
    assert done.returncode == 0 and sorted(done.stdout.splitlines()) == told


@pytest.mark.slow
def test_local_stops_the_others_when_one_fails(tmp_path):
    program = 'if [[ "$*" == *--process_id=1* ]]; then sleep 1; exit 7; fi\n'
    program += 'trap "touch $OUT/stopped; exit" TERM; sleep 20 >/dev/null 2>&1 & wait'
    done = local(tmp_path, program, "2")
    assert done.returncode == 7
    assert (tmp_path / "stopped").exists()


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [(), ("two",), ("0",)])
def test_local_says_how_it_is_used(tmp_path, arguments):
    done = local(tmp_path, "", *arguments)
    assert done.returncode == 2 and "usage: launch/local.sh N" in done.stderr


def stub(directory, name, program, interpreter="/usr/bin/env bash"):
    """A program of that name, in a directory for PATH."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / name).write_text(f"#!{interpreter}\n{program}\n")
    (directory / name).chmod(0o755)


def launched(script, *arguments, **environment):
    environment = {key: str(value) for key, value in environment.items()}
    return subprocess.Popen(
        [LAUNCH / script, *arguments],
        env={key: value for key, value in os.environ.items() if key not in ("TPU_NAME", "ZONE")} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def said_by(process):
    """(what it said, its exit code)."""
    stdout, stderr = process.communicate(timeout=60)
    return stdout + stderr, process.returncode


def batch(tmp_path, srun, *arguments):
    """(exit code, arguments of srun, arguments of scontrol or None) of slurm.sbatch, `srun` in place of SLURM's."""
    stub(tmp_path / "bin", "srun", f"printf '%s\\n' \"$@\" >{tmp_path}/srun\n{srun}")
    stub(tmp_path / "bin", "scontrol", f'echo "$@" >{tmp_path}/scontrol')
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    _, code = said_by(
        launched("slurm.sbatch", *arguments, PATH=path, VENV="/env", SLURM_JOB_ID=123, SLURM_CPUS_PER_TASK=8)
    )
    scontrol = tmp_path / "scontrol"
    return code, (tmp_path / "srun").read_text().splitlines(), scontrol.read_text() if scontrol.exists() else None


@pytest.mark.parametrize(
    ("srun", "expected"),
    [
        ("exit 0", (0, None)),
        ("exit 1", (1, None)),
        ("exit 2", (2, None)),
        ("exit 75", (0, "requeue 123\n")),
        ("kill -TERM $PPID; sleep 0.1; exit 75", (0, "requeue 123\n")),  # the script itself is told as well
    ],
)
def test_a_job_of_slurm_is_queued_again_after_75_alone(tmp_path, srun, expected):
    code, told, scontrol = batch(tmp_path, srun, "--config=a b", '--workdir=it\'s "here"')
    assert (code, scontrol) == expected
    program = ["/env/bin/python", "-m", "guided_distill.main"]
    assert told == ["--wait=60", "--cpus-per-task=8", *program, "--config=a b", '--workdir=it\'s "here"']


WORKER = """
import json, pathlib, signal, sys, time

def say(what):
    with open("said", "a") as file:
        print(json.dumps(what), file=file)

def stop(*_):
    time.sleep(0.3)
    say("stopped")
    sys.exit(75)

signal.signal(signal.SIGTERM, stop)
say(sys.argv[1:])
if "--long" in sys.argv:
    time.sleep(60)
"""


@pytest.fixture
def slice_of_one(tmp_path):
    """A home of a worker, and the environment in which gcloud runs there what it is told to run on all workers."""
    told = f'printf "%s\\n" "$@" >{tmp_path}/gcloud\n'
    told += f'for last; do :; done; cd {tmp_path}/home && exec bash -c "${{last#--command=}}"'
    stub(tmp_path / "bin", "gcloud", told)
    stub(tmp_path / "home/guided_distill/.venv/bin", "python", WORKER, f"{sys.executable} -S")
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    return tmp_path / "home/guided_distill", {"PATH": path, "TPU_NAME": "my-slice", "ZONE": "my-zone"}


def lines_of(path, count):
    """The JSON of the first lines of a file, once they are there."""
    for _ in range(600):
        lines = path.read_text().splitlines() if path.exists() else []
        if len(lines) >= count:
            return list(map(json.loads, lines))
        time.sleep(0.05)
    pytest.fail(f"{lines} after half a minute")


def test_the_same_command_on_a_tpu_stops_what_was_left_running_and_starts_anew(slice_of_one, tmp_path):
    home, environment = slice_of_one
    arguments = ["--config=a b", '--note=it\'s "$HOME"; exit  3', "--empty="]
    first = launched("tpu_pod.sh", *arguments, "--long", **environment)
    command = ["-m", "guided_distill.main", "--coordinator=auto", *arguments]
    assert lines_of(home / "said", 1) == [[*command, "--long"]]
    assert said_by(launched("tpu_pod.sh", *arguments, **environment)) == ("", 0)
    assert lines_of(home / "said", 3) == [[*command, "--long"], "stopped", command]
    assert said_by(first) == ("", 75)
    told = (tmp_path / "gcloud").read_text().splitlines()
    assert told[:7] == ["compute", "tpus", "tpu-vm", "ssh", "my-slice", "--zone=my-zone", "--worker=all"]


def test_on_a_tpu_the_exit_code_is_the_programs(slice_of_one):
    home, environment = slice_of_one
    (home / ".venv/bin/python").write_text("#!/bin/sh\nexit 2\n")
    assert said_by(launched("tpu_pod.sh", "--config=x", **environment))[1] == 2


def test_a_tpu_without_the_sources_is_told_how_to_get_them(slice_of_one):
    home, environment = slice_of_one
    shutil.rmtree(home)
    said, code = said_by(launched("tpu_pod.sh", "--config=x", **environment))
    assert code == 2 and "launch/tpu_pod.sh setup" in said and not (home.parent / "run.pid").exists()


@pytest.mark.parametrize(
    ("arguments", "environment", "says"),
    [
        ((), {}, "usage: launch/tpu_pod.sh setup | "),
        (("--config=x",), {}, "export TPU_NAME="),
        (("--config=x",), {"TPU_NAME": "slice"}, "ZONE="),
    ],
)
def test_a_tpu_that_is_not_named_is_asked_for_in_one_line(arguments, environment, says):
    said, code = said_by(launched("tpu_pod.sh", *arguments, **environment))
    assert code == 2 and says in said and said.count("\n") == 1
