import io

from rich.console import Console

from guided_distill.progress import RunProgress


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def lines_of(run):
    text, clock = io.StringIO(), Clock()
    with RunProgress(1000.0, console=Console(file=text, width=200), clock=clock) as progress:
        run(progress, clock)
    return text.getvalue().splitlines()


def test_time_left_comes_from_work_done_here_alone():
    def run(progress, clock):
        progress.skip(500.0)
        clock.now += 30.0
        progress.advance(100.0, "stage1 10/50", "loss 1")

    # 100 units in 30 s, 400 units left.
    assert lines_of(run) == [" 60%  stage1 10/50  loss 1  2:00 left"]


def test_the_time_of_compilation_does_not_count():
    def run(progress, clock):
        progress.begin()
        clock.now += 500.0
        progress.advance(100.0, "teacher 1/9")
        clock.now += 20.0
        progress.advance(100.0, "teacher 2/9")

    assert lines_of(run) == [" 10%  teacher 1/9", " 20%  teacher 2/9  2:40 left"]


def test_lines_come_now_and_then():
    def run(progress, clock):
        for _ in range(100):
            clock.now += 1.0
            progress.advance(10.0, "teacher")

    assert len(lines_of(run)) == 10


def test_other_processes_are_silent():
    text = io.StringIO()
    with RunProgress(10.0, enabled=False) as progress:
        progress._console.file = text
        progress.advance(5.0, "teacher")
        progress.say("hello")
    assert text.getvalue() == ""
