"""One progress bar for a whole run, with the time left, or a line now and then where there is no terminal."""

import time

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

_LINE_EVERY_SECONDS = 10.0


def _clock(seconds):
    minutes, seconds = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}" if minutes >= 60 else f"{minutes}:{seconds:02d}"


class RunProgress:
    """Progress over work counted in forward passes of one image, so that training and sampling add up.

    `total` is the work of the whole run. Work that an earlier run did is `skip`ped: it fills the bar and does not count
    for the rate, nor does the first work after `begin`, which waits for programs to be compiled. `enabled=False`, on
    every process but the first, shows nothing. `after_work`, called after each piece of work, may raise.
    """

    def __init__(self, total, *, enabled=True, console=None, clock=time.monotonic):
        self.after_work = lambda: None
        self._total, self._done, self._worked, self._busy = total, 0.0, 0.0, 0.0
        self._compiling = False
        self._clock_now, self._last, self._last_line = clock, clock(), -_LINE_EVERY_SECONDS
        self._console = console or Console(stderr=True, quiet=not enabled)
        self._bar = None
        if self._console.is_terminal and enabled:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.percentage:>3.0f}% {task.fields[note]}"),
            )
            self._bar = Progress(*columns, console=self._console)
            self._task = self._bar.add_task("starting", total=total, note="")

    def __enter__(self):
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *_):
        if self._bar:
            self._bar.stop()

    def begin(self):
        """A stage begins: the next work done will have waited for its compilation."""
        self._compiling, self._last = True, self._clock_now()

    def skip(self, work):
        """Work found done."""
        self._done += work
        self._last = self._clock_now()

    def advance(self, work, title, note=""):
        """Work just done; `title` says where the run is (stage and step), `note` what it sees."""
        now = self._clock_now()
        if not self._compiling:
            self._busy += now - self._last
            self._worked += work
        self._compiling, self._last = False, now
        self._done += work
        if self._worked:
            left = (self._total - self._done) * self._busy / self._worked
            note = "  ".join(filter(None, [note, f"{_clock(max(left, 0.0))} left"]))
        if self._bar:
            self._bar.update(self._task, completed=self._done, description=title, note=note)
        elif now - self._last_line >= _LINE_EVERY_SECONDS:
            self._last_line = now
            self.say(f"{100 * self._done / self._total:3.0f}%  {title}  {note}".rstrip())
        self.after_work()

    def say(self, text):
        """A line that stays."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def say_table(self, table):
        """A rich table that stays."""
        self._console.print(table)
