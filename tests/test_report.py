"""report.html tells what summary.json tells, with nothing from outside, whatever is missing or strange in it."""

import base64
import html.parser
import io
import json
import re
import runpy
import sys
import types
from pathlib import Path

import fake_run
import numpy as np
import pytest
from fake_run import make_row, make_rows, make_run, make_summary
from PIL import Image

from guided_distill import pictures, plots, report
from guided_distill.errors import UserError
from guided_distill.metrics import read_metrics
from guided_distill.report import samples, words

HOSTILE = "<img src=x onerror=alert(1)>\"'&<script>alert(2)</script>{{ 7*7 }}"
VOID = {"meta", "link", "img", "input", "br"}


class Page(html.parser.HTMLParser):
    """Tags with their attributes, and the text of each element that was asked for; refuses tags that do not close."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.text = [], [], ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("script", "style"):
            self.text += " " + " ".join(data.split())

    def attributes(self, tag):
        return [attrs for name, attrs in self.tags if name == tag]


def page_of(workdir, summary=None, **options):
    make_run(workdir, summary, **options)
    return report.write_report(workdir).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return page_of(tmp_path_factory.mktemp("whole") / "digits")


def test_nothing_is_fetched(whole):
    without_pictures = re.sub(r'"data:image/webp;base64,[^"]+"', "", whole)
    assert not re.search(r"https?:|//\w|@import|url\(|fetch\(", without_pictures)
    page = Page(whole)
    sources = [attrs["src"] for attrs in page.attributes("img")]
    assert sources and all(source.startswith("data:image/webp;base64,") for source in sources)
    assert [attrs["href"] for attrs in page.attributes("link")] == ["data:,"]
    assert all(attrs["href"].startswith("#m-") for attrs in page.attributes("use"))


def test_the_policy_allows_the_pages_own_style_and_script_alone(whole):
    (policy,) = [a["content"] for a in Page(whole).attributes("meta") if a.get("http-equiv")]
    assert policy.startswith("default-src 'none'; img-src data:;") and "unsafe" not in policy
    assert not any(name == "style" or name.startswith("on") for _, attrs in Page(whole).tags for name in attrs)


def test_every_figure_of_every_row_is_in_the_table(whole):
    lines = re.findall(r"<tr>.*?</tr>", whole[whole.index("<h2>All figures") :], re.DOTALL)[1:]
    for row, line in zip(make_rows(), lines, strict=True):
        cells = [Page(cell).text.split() for cell in re.findall(r"<t[dh]>.*?</t[dh]>", line, re.DOTALL)]
        given = [row["stage"], row["sampler"], str(row["num_steps"]), str(row["nfe"]), f"{row['w']:g}"]
        given += [words.number(1000 * row["seconds_per_image"])]
        given += [words.figure(name, value) for name, value in row["metrics"].items()]
        assert [" ".join(cell) for cell in cells if not any("–" in part for part in cell)] == [
            *given[:6],
            *given[7:],
            "1",
            row["checkpoint"],
        ]
        low, high = row["intervals"]["frechet_classifier"]
        assert [given[6], f"{words.number(low)}–{words.number(high)}"] in cells
    for value in make_summary()["environment"].values():
        assert str(value) in whole
    assert "ab" * 32 in whole and "cd" * 32 in whole and "digits/train (1500 images)" in whole


def test_warnings_stand_before_everything_but_the_headline(whole):
    assert whole.index("<h1>") < whole.index("2.5 times that of the round before") < whole.index("<h2>")


def test_markup_in_names_stays_text(tmp_path):
    rows = [make_row("teacher", 32, 0.0), make_row("student", 1, 0.0, stage=HOSTILE), make_row("teacher", 1, 0.0)]
    for row in rows:
        row.update({key: HOSTILE for key in ("feature_network", "reference", "checkpoint", "weights_hash")})
        row["metrics"][HOSTILE] = 0.25
    summary = make_summary(rows, environment={HOSTILE: HOSTILE}, evaluate={HOSTILE: [HOSTILE]})
    summary["diagnostics"] = {HOSTILE: {"gap_by_w": [[0, 1], [1, 2]], "smoothness_over_w": 1.0, "warning": HOSTILE}}
    make_run(tmp_path / "run", summary)
    (tmp_path / "run" / "config.json").write_text(json.dumps({"data": {"name": HOSTILE}}))
    text = report.write_report(tmp_path / "run").read_text()
    page = Page(text)
    assert len(page.attributes("script")) == 1 and not any("onerror" in attrs for _, attrs in page.tags)
    assert page.text.count("{{ 7*7 }}") > 10 and "49" not in page.text[:200]


def headline(tmp_path, rows, **more):
    text = page_of(tmp_path / "run", make_summary(rows, **more), with_pictures=False)
    return Page(text[text.index("<header>") : text.index("</header>")] + "</header>").text


def test_headline_of_the_cheapest_student_within_five_percent(tmp_path):
    # 8 + 3 is the reference's Fréchet distance, far above the floor: 1.05 times is within, and more is not.
    rows = [make_row("teacher", 32, 1.0), make_row("teacher", 1, 1.0)]
    rows += [make_row("student", n, 1.0, worse) for n, worse in ((8, 0.9), (4, 1.05), (2, 1.051))]
    text = headline(tmp_path, rows)
    assert "16 × fewer network calls, 16 × faster" in text and "With 4 steps" in text
    assert "Fréchet distance (classifier) +5.0 % (w = 1)" in text and "no student" not in text


def test_headline_says_how_far_the_nearest_is_where_none_is_within(tmp_path):
    rows = [make_row("teacher", 32, w) for w in (1.0, 4.0)]
    rows += [make_row("student", 1, 1.0), make_row("student", 1, 4.0, 1.5), make_row("student", 2, 4.0, 1.2)]
    text = headline(tmp_path, rows)
    assert "64 × fewer" in text and "at w = 1." in text
    assert "w = 4: no student is within 5 %. The nearest, student with 2 steps, is 20 % further" in text


def test_headline_where_no_student_is_good_enough_claims_nothing(tmp_path):
    rows = [make_row("teacher", 32, 1.0), make_row("student", 1, 1.0, 2.0)]
    text = headline(tmp_path, rows)
    assert "No student comes within 5 % of its teacher" in text and "100 % further" in text
    assert "fewer network calls" not in text and "faster" not in text


@pytest.mark.parametrize(
    ("floor", "worse", "within"),
    [(3.6, 1.25, True), (3.6, 1.3, False), (None, 1.04, True), (None, 1.25, False), (0.0, 1.06, False)],
)
def test_the_noise_floor_stands_for_distances_below_it(tmp_path, floor, worse, within):
    # The reference is at 3.0: with the floor at 3.6, 3.75 is within 5 % of it and 3.9 is not.
    rows = [make_row("teacher", 32, 0.0), make_row("student", 1, 0.0, worse)]
    text = headline(tmp_path, rows, noise_floor=floor)
    assert ("64 × fewer" in text) == within


@pytest.mark.parametrize("rows", [[], [make_row("teacher", 32, 0.0)], [make_row("student", 1, 0.0)]])
def test_without_a_pair_to_compare_it_says_so(tmp_path, rows):
    assert "No student has been measured beside its teacher" in headline(tmp_path, rows)


def test_a_summary_of_an_older_version_is_enough(tmp_path):
    rows = [make_row("teacher", 2, 0.0), make_row("student", 1, 0.0)]
    for row in rows:
        for key in ("intervals", "weights_hash", "resize", "seed", "reference_hash", "nfe", "seconds_per_image"):
            del row[key]
        row["metrics"]["kid_classifier"] = float("nan")
        row["metrics"]["score_classifier"] = None
    text = page_of(tmp_path / "run", {"rows": rows}, with_pictures=False)
    assert "Within 5 % of its teacher" in text and "No noise floor" in text and 'id="samples"' not in text
    Page(text)
    for directory in (tmp_path / "run").iterdir():
        if directory.is_dir() and directory.name[0].isdigit():
            (directory / "metrics.jsonl").unlink()
    assert 'id="losses"' not in report.write_report(tmp_path / "run").read_text()


def test_what_cannot_be_read_is_named_and_the_rest_is_shown(tmp_path):
    make_run(tmp_path / "run")
    (tmp_path / "run" / "evaluation" / "000.png").write_bytes(b"no picture")
    (tmp_path / "run" / "evaluation" / "020.png").unlink()
    (tmp_path / "run" / "01_stage1" / "metrics.jsonl").write_text("no line\n")
    text = report.write_report(tmp_path / "run").read_text()
    assert text.count("cannot be shown") == 2 and "line 1 is" in text and text.count("no picture</p>") == 2


@pytest.mark.parametrize(
    ("content", "says"),
    [(None, "--mode=evaluate"), ("[]", "not a summary"), ('{"rows": [{}]}', "not a summary"), ("{", "is not JSON")],
)
def test_what_is_no_summary_is_refused_by_name(tmp_path, content, says):
    if content is not None:
        (tmp_path / "summary.json").write_text(content)
    with pytest.raises(UserError, match=f"summary.json.*{says}"):
        report.write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_each_feature_network_has_its_charts_and_the_floor_is_of_the_one_named(tmp_path):
    rows = make_rows()
    for row in rows:
        row["metrics"] = {"fid": 5.0, "inception_score": 3.0 + row["w"], **row["metrics"]}
    text = page_of(tmp_path / "run", make_summary(rows), with_pictures=False)
    assert text.index("Quality against steps: classifier") < text.index("Quality against steps: inception_v3")
    assert "FID against Inception Score" in text and text.count("noise floor, 3.60</li>") == 1


def decoded(uri):
    with Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))) as picture:
        return np.asarray(picture.convert("RGBA"))


@pytest.mark.parametrize("side", [8, 28, 64])
def test_pictures_keep_every_sample(side):
    x = np.random.default_rng(side).uniform(-1, 1, (10, side, side, 3))
    strip = pictures.image_grid(x, columns=10)[4:-4, 4:-4]
    uri, width, height, pixels = samples.data_uri(pictures.png_bytes(strip), 1)
    picture = decoded(uri)
    assert picture.shape == (height, width, 4) and pixels == (side < 40)
    step = side + max(1, side // 12)
    tiles = [picture[r * step : r * step + side, c * step : c * step + side] for r in range(2) for c in range(5)]
    np.testing.assert_array_equal(np.stack(tiles)[..., :3], pictures.to_uint8(x))
    assert (picture[..., 3] == 0).any()


@pytest.mark.parametrize("x", [np.zeros((12, 64, 2)) + np.sin(np.arange(64))[:, None], np.ones((50, 2))])
def test_signals_are_cut_and_points_stay_one_panel(x):
    strip = pictures.image_grid(x, columns=12)[4:-4, 4:-4]
    tiles = samples.cut(strip)
    assert len(tiles) == (12 if x.ndim == 3 else 1)
    np.testing.assert_array_equal(samples.fold(tiles)[: tiles.shape[1], : tiles.shape[2], :3], tiles[0])


def test_sixty_noisy_pictures_weigh_no_more_than_five_megabytes():
    noise = np.random.default_rng(0).integers(0, 256, (256, 16 * 260 - 4, 3), np.uint8)
    for k in range(1, 16):
        noise[:, k * 260 - 4 : k * 260] = 255
    uri, width, height, _ = samples.data_uri(pictures.png_bytes(noise), 60)
    assert len(uri) * 60 < 5e6 and width < 800 and abs(width - height) < 20


def test_tensorboard_gets_every_figure_once(tmp_path):
    make_run(tmp_path / "run", with_pictures=False)
    for _ in range(2):
        report.write_tensorboard(tmp_path / "run")
    lines = read_metrics(tmp_path / "run" / "evaluation")
    found = [(line["step"], key, line[key]) for line in lines for key in line if "/" in key]
    rows = make_rows()
    assert len(set(found)) == len(found) == sum(len(row["metrics"]) for row in rows)
    for row in rows:
        assert any(n == row["num_steps"] and value == row["metrics"]["diversity"] for n, _, value in found)
    (value,) = [v for n, tag, v in found if (n, tag) == (1, "frechet_classifier/student_deterministic_w4")]
    assert value == pytest.approx(fake_run.frechet(4, 1.14))


def test_the_colours_are_those_of_the_other_plots():
    style = (Path(report.__file__).parent / "style.css").read_text()
    light = re.findall(r"--c\d: (#\w+)", style)[: len(plots.COLOURS)]
    assert tuple(light) == plots.COLOURS


def test_the_files_of_the_page_are_installed(monkeypatch):
    said, folder = {}, Path(report.__file__).parent
    stub = types.SimpleNamespace(setup=lambda **keywords: said.update(keywords), find_packages=lambda include: include)
    monkeypatch.setitem(sys.modules, "setuptools", stub)
    runpy.run_path(str(Path(__file__).parents[1] / "setup.py"))
    declared = {path for pattern in said["package_data"]["guided_distill.report"] for path in folder.glob(pattern)}
    assert declared == {path for path in folder.iterdir() if path.is_file() and path.suffix != ".py"}
