"""What benchmarks of runs say where there is none."""

import sys

import pytest

from benchmarks import consistency, mixture2d, rounds


@pytest.mark.parametrize(
    ("benchmark", "arguments"),
    [(mixture2d, ["none"]), (rounds, ["--from=none"]), (consistency, ["--from=none"])],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_benchmark_of_a_run_that_is_not_there_says_so_in_a_line(benchmark, arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [benchmark.__name__, *arguments])
    with pytest.raises(SystemExit) as ended:
        benchmark.main()
    said = capsys.readouterr().err
    assert ended.value.code == 2 and said.startswith("error: ") and said.count("\n") == 1 and "none" in said
