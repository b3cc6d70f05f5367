"""Commands in forks of one process that has imported everything already: a second each, in place of ten.

Each begins before JAX has made its devices, with an environment of its own, and ends with its own exit code. What
importing does, and what JAX reads of the environment when it is imported, is that of the process they are forks of.
"""

import argparse
import multiprocessing
import os
import pathlib
import runpy
import subprocess
import sys
import tempfile
import traceback

REPO = pathlib.Path(__file__).parents[1]
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["guided_distill.main", "guided_distill.sample", "configs.digits"])


def run_main(arguments, *, env, cwd=REPO):
    """`python -m guided_distill.main` with these arguments in the directory `cwd`: a CompletedProcess."""
    return _run(_main, arguments, env, cwd)


def run_script(path, *, env, cwd):
    """`python path` in the directory `cwd`: a CompletedProcess."""
    return _run(_script, [str(path)], env, cwd)


def parse_programs(commands, *, env, cwd):
    """What `python -m` of each list of words would do up to read flags and a checked config, in the directory `cwd`."""
    return _run(_parse_each, commands, env, cwd)


def _run(body, arguments, env, cwd):
    with tempfile.TemporaryDirectory() as directory:
        paths = [os.path.join(directory, name) for name in ("stdout", "stderr")]
        process = _CONTEXT.Process(target=_child, args=(body, arguments, dict(env), cwd, *paths))
        process.start()
        process.join()
        texts = [pathlib.Path(path).read_text() for path in paths]
    return subprocess.CompletedProcess(arguments, process.exitcode, *texts)


def _child(body, arguments, env, cwd, stdout, stderr):
    for path, descriptor in ((stdout, 1), (stderr, 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT, 0o644), descriptor)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    try:
        code = body(arguments)
    except SystemExit as left:
        code = left.code if isinstance(left.code, int) else bool(left.code)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code or 0)


def _main(arguments):
    from guided_distill import main

    sys.argv = ["guided_distill.main", *arguments]  # where ml_collections looks for the keys of a config
    main.console()


def _parse_each(commands):
    """The number of commands that are wrong, each in a fork of its own, as flags are parsed once in a process."""
    wrong = 0
    for words in commands:
        child = os.fork()
        if not child:
            os._exit(_parse(words))
        wrong += os.waitpid(child, 0)[1] != 0
    return wrong


def _parse(words):
    _stop_where_flags_are_read()
    sys.argv = words
    try:
        runpy.run_module(words[0], run_name="__main__")
        error = "reads no flags"
    except _Parsed:
        return 0
    except (Exception, SystemExit) as raised:
        error = repr(raised)
    print(*words, "->", error, file=sys.stderr, flush=True)
    return 1


class _Parsed(BaseException):
    """Flags have been read, and nothing is wrong with them."""


def _stop_where_flags_are_read():
    """Has programs raise _Parsed where they would begin their work: those with our flags, and those with argparse's."""
    from guided_distill import command_line, config_files
    from guided_distill.experiment import from_config

    read_ours, read_theirs = command_line.parse, argparse.ArgumentParser.parse_args

    def ours(argv):
        read_ours(argv)
        if command_line.CONFIG.value is not None:
            from_config(command_line.CONFIG.value.to_dict())
        raise _Parsed

    def theirs(*arguments):
        if config := getattr(read_theirs(*arguments), "config", None):
            config_files.find(config)
        raise _Parsed

    command_line.parse, argparse.ArgumentParser.parse_args = ours, theirs


def _script(arguments):
    sys.argv = arguments
    sys.path.insert(0, os.path.dirname(arguments[0]))
    runpy.run_path(arguments[0], run_name="__main__")
