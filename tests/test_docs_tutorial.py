"""The tutorial is carried out: its commands and its Python, in their order, as test_docs_commands.py does."""

import re

import pytest
from forked import run_script
from test_docs import ENV, FENCE, commands, text_of, write_files
from test_docs_commands import SMALLER, carried_out, possible

pytestmark = pytest.mark.slow


def test_the_tutorial_from_its_first_line_to_its_last(tmp_path):
    text, count = text_of("docs/tutorial.md"), 0
    write_files(text, tmp_path)
    (tmp_path / "bars.py").rename(tmp_path / "shown.py")
    (tmp_path / "bars.py").write_text(SMALLER.format(shown=str(tmp_path / "shown.py")))
    for language, block in FENCE.findall(text):
        if language == "bash":
            for command in possible(commands(f"```bash\n{block}```\n")):
                carried_out(command, tmp_path)
                count += 1
        elif language == "python" and not re.match(r"# \w+\.py\n", block):
            (tmp_path / "block.py").write_text(block)
            done = run_script(tmp_path / "block.py", env=ENV, cwd=tmp_path)
            assert done.returncode == 0, f"{block}\n{done.stderr}"
    assert count == 6 and (tmp_path / "bars.png").exists() and (tmp_path / "runs" / "bars" / "report.html").exists()
