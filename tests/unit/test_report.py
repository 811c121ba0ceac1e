import json
import math
import random
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from plaudit import plots, report
from plaudit.errors import PlauditError
from plaudit.outcome import Stage, headline, read
from plaudit.wording import duration, figure, number

HOSTILE = "</style></script><script>alert('x')</script><img src=x onerror=alert(1)>"
VOID = {"meta", "br", "img", "link", "input", "hr"}


class Page(HTMLParser):
    """Checks that tags close in order, and keeps tags, attributes and visible words."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open, self.tags, self.values, self.words = [], [], [], []
        self.feed(text)
        assert self.open == []
        self.text = re.sub(r"\s+", " ", " ".join(self.words))

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.values += [value for _, value in attributes if value]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.values += [value for _, value in attributes if value]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, words):
        if self.open[-1:] != ["style"]:
            self.words.append(words)


def put(folder: Path, *, metrics=(), samples=(), summary=None, config=None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in (("metrics", metrics), ("samples", samples)):
        if rows:
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if summary is not None:
        (folder / "summary.json").write_text(json.dumps(summary))
    if config is not None:
        (folder / "config.yaml").write_text("".join(f"{name}: {json.dumps(x)}\n" for name, x in config.items()))
    return folder


EVALUATED = {
    "sft": {"reward": -0.2914, "judge": 0.1312, "positive_share": 0.523, "kl": 0.0, "distinct_2": 0.812},
    "ppo": {"reward": 1.4803, "judge": 0.4719, "positive_share": 0.785, "kl": 2.287, "distinct_2": 0.743},
    **{"win_rate": 0.76074, "win_rate_low": 0.707, "win_rate_high": 0.8125, "p_value": 3.2e-17, "prompts": 256},
}


def pipeline(folder: Path) -> Path:
    """A finished quickstart, small."""
    draw = random.Random(0)
    sft = [{"step": s, "loss": 4.4 + math.exp(-s / 6) + draw.gauss(0, 0.05)} for s in range(1, 31)]
    ppo = [{"step": s, "score": s / 20 + draw.gauss(0, 0.2), "kl": s / 12, "odd_new_one": s} for s in range(1, 25)]
    put(folder / "sft", metrics=[{"step": 0, "heldout_nll": 5.2713}, *sft, {"step": 31, "heldout_nll": 4.3721}])
    put(
        folder / "ppo",
        metrics=ppo,
        config={"verb": "ppo", "learning_rate": 5e-5, "rewards": ["a", HOSTILE], "track": None},
        samples=[{"step": s, "prompt": "A film", "completion": f" at step {s}", "score": s} for s in (1, 9, 24)],
    )
    row = {"step": 0, "prompt": "Quietly moving and", "sft": " slow .", "ppo": HOSTILE, "sft_judge": -0.318}
    put(folder / "evaluate", samples=[row, *[{**row, "prompt": f"prompt {i}"} for i in range(1, 30)]])
    table = [{"confidence": 0.05 + i / 10, "observed": 0.1 + i / 11, "count": 100 + i} for i in range(10)]
    costs = {"seconds": 52.13, "peak_memory_mb": 2210.4, "tokens_per_second": 1534.12}
    histograms = {name: [draw.gauss(0, 1) for _ in range(99)] for name in ("sft", "ppo")}
    summary = {
        "stages": {"pull": {"seconds": 14.2}, "sft": costs, "reward": costs, "ppo": costs, "evaluate": costs},
        "sft": {"nll_before": 5.2713, "nll_after": 4.3721},
        "reward": {
            "accuracy": 0.88712,
            "accuracy_one_rater": 0.9361,
            "calibration_error": 0.0312,
            "reliability": table,
        },
        "evaluate": {**EVALUATED, "histograms": histograms},
    }
    return put(folder, summary=summary)


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> str:
    folder = pipeline(tmp_path_factory.mktemp("runs") / "quickstart")
    path = report.write(folder)
    assert path == folder / "report.html"
    return path.read_text("utf-8")


def test_the_headline_tells_the_outcome(page):
    assert (
        "The judge’s mean rose from 0.13 to 0.47, and PPO’s win rate over SFT on 256 prompts is 76.1% "
        "(95% interval 70.7–81.2%)." in Page(page).text
    )


def test_figures_are_there(page):
    text = Page(page).text
    for words in ("0.131 52.3% 0 0.812", "1.48 0.472 78.5% 2.29 0.743", "+0.341 +26.2 +2.29", "5.27 → 4.37", "88.7%"):
        assert words in text
    for words in ("one human rater 93.6%", "calibration error 0.0312", "52 s", "2.2 GB", "1,534", "3 min 43 s"):
        assert words in text
    for words in ("Odd new one", "Score against KL", "Reliability", "held out", "5e-05"):
        assert words in text
    assert not re.search(r"\d\.\d{7,}", text)


def test_every_curve_is_drawn_once(page):
    titles = re.findall(r"<figcaption><b>(.*?)</b>", page)
    assert titles == [
        *("Reward", "Score against KL"),
        *("Loss", "Reliability"),
        *("Score", "KL to the reference", "Odd new one"),
    ]
    assert page.count("<svg") == len(titles)


def test_ten_samples_side_by_side(page):
    text = Page(page).text
    assert "The first 10 prompts" in text
    assert "prompt 9" in text
    assert "prompt 10" not in text
    assert "<q>Quietly moving and</q> slow ." in page
    assert "judge −0.32" in text
    assert text.index("at step 1 ") < text.index("at step 24")
    assert "at step 9" not in text


def test_hostile_text_stays_text(page):
    parsed = Page(page)
    assert "script" not in parsed.tags
    assert "img" not in parsed.tags
    assert parsed.text.count("<script>alert('x')</script>") == 11  # ten samples and a setting
    assert page.count("</style>") == 1


def test_hostile_names_stay_text(tmp_path):
    values = [{"step": s, HOSTILE: s, "$\\x$": s} for s in (1, 2)]
    figures = {"judge": 0.5, HOSTILE: 1.0}
    summary = {HOSTILE: figures, "$\\frac$": figures, "histograms": {HOSTILE: [1.0, 2.0], "$\\frac$": [0.0, 1.0]}}
    parsed = Page(report.write(put(tmp_path, metrics=values, summary=summary, config={HOSTILE: 1})).read_text("utf-8"))
    assert not {"script", "img"} & set(parsed.tags)
    assert parsed.text.count(HOSTILE) == 4  # a column, a row, a setting, a histogram
    assert HOSTILE + ", mean 1.50" in parsed.text
    assert HOSTILE.replace("/", " ") in parsed.text  # a curve
    assert "$\\frac$" in parsed.text


def test_the_page_is_self_contained_and_small(page):
    assert not re.search(r"https?:|@import|<link|src=[\"']|href=[\"'][^#]", page)
    assert "url(#" in page
    assert set(re.findall(r"url\(([^)]*)\)", page)) <= {f"#{name}" for name in re.findall(r' id="([^"]*)"', page)}
    assert len(page.encode()) < 400_000


def test_plots_follow_the_colour_scheme(page):
    assert "prefers-color-scheme: dark" in page
    assert "#0a0b0" not in page
    plots = "".join(re.findall(r"<svg.*?</svg>", page, re.DOTALL))
    assert {"ink", "muted", "rule", "before", "after"} == set(re.findall(r"var\(--(\w+)\)", plots))
    assert not re.search(r"#[0-9a-f]{6}", plots)


def test_a_long_run_stays_small(tmp_path):
    draw = random.Random(1)
    rows = [{"step": s, **{f"metric_{i}": draw.random() for i in range(8)}} for s in range(4_000)]
    assert report.write(put(tmp_path, metrics=rows)).stat().st_size < 2_000_000


def test_a_single_run(tmp_path):
    rows = [{"step": s, "score": s / 10} for s in range(1, 21)]
    samples = [{"step": s, "prompt": "So", "completion": f" at {s}"} for s in (2, 20)]
    folder = put(tmp_path / "mine", metrics=rows, samples=samples, config={"verb": "ppo", "kl": 0.1})
    text = Page(report.write(folder).read_text("utf-8")).text
    assert "The score rose from 0.15 to 1.95 over 20 steps" in text
    assert "step 2 So at 2 step 20 So at 20" in text
    assert "kl 0.1" in text


@pytest.mark.parametrize(
    "given",
    [
        {"config": {"verb": "sft"}},
        {"metrics": [{"step": 1, "loss": 2.0}]},
        {"metrics": [{"step": s, "loss": None, "kl": "broken", "flag": True} for s in range(3)]},
        {"metrics": [{"step": s, "loss": 1.0} for s in range(40)]},
        {"summary": {"seconds": 3.0}},
        {"summary": {"stages": {}}},
        {"summary": {"stages": {"sft": {"seconds": 2.0}}, "sft": {"nll_before": 2.0, "nll_after": None}}},
        {"summary": {"sft": {"judge": 0.1}, "ppo": {"judge": None, "kl": 1.0}, "win_rate": 0.4}},
        {"summary": {"sft": {"judge": 0.1, "kl": 0.0}}},
        {
            "samples": [{"step": 0, "prompt": [{"role": "user", "content": "Hi"}], "completion": "Ho"}],
            "summary": {"a": 1},
        },
    ],
)
def test_missing_pieces_are_not_shown(tmp_path, given):
    text = report.write(put(tmp_path, **given)).read_text("utf-8")
    parsed = Page(text)
    assert not {"nan", "None", "null"} & set(re.findall(r"\w+", parsed.text))
    assert ("Before and after" in parsed.text) == (
        "sft" in given.get("summary", {}) and "stages" not in given["summary"]
    )


def test_what_is_no_run_is_refused(tmp_path):
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(PlauditError, match=r"is not a run"):
            report.write(folder)
        assert not (folder / "report.html").exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("summary.json", "{", r"summary\.json is not valid JSON"),
        ("summary.json", "[1]", r"summary\.json holds no figures"),
        ("metrics.jsonl", '{"step": 1}\n{"st\n{"step": 3}\n', r"metrics\.jsonl:2"),
        ("config.yaml", "a: [", r"config\.yaml:\d"),
    ],
)
def test_broken_files_are_named(tmp_path, name, content, message):
    put(tmp_path, config={"verb": "sft"})
    (tmp_path / name).write_text(content)
    with pytest.raises(PlauditError, match=message):
        report.write(tmp_path)


def test_stages_keep_their_order_and_costs(tmp_path):
    stages = read(pipeline(tmp_path))
    assert [stage.name for stage in stages] == ["pull", "sft", "reward", "ppo", "evaluate"]
    assert stages[1].facts["seconds"] == 52.13
    assert stages[1].facts["nll_after"] == 4.3721


def test_headlines_of_every_kind():
    even = {**EVALUATED, "win_rate": 0.52, "win_rate_low": 0.46, "win_rate_high": 0.58}
    assert headline([Stage("evaluate", facts=even)]).endswith("Chance alone could give that win rate.")
    worse = {"sft": {"judge": 0.3}, "ppo": {"judge": 0.1}}
    assert headline([Stage("evaluate", facts=worse)]) == "The judge’s mean fell from 0.30 to 0.10."
    rated = {"accuracy": 0.88712, "accuracy_one_rater": 0.9361}
    assert "88.7% of held-out pairs; one human rater, on 93.6%." in headline([Stage("reward", facts=rated)])
    assert "stayed at 2.00 nats" in headline([Stage("sft", facts={"nll_before": 2.001, "nll_after": 1.999})])
    assert headline([Stage("sft", metrics=[{"step": 12_000}])]) == "12,000 steps so far, and no outcome yet."


@pytest.mark.parametrize(
    ("value", "text"),
    [
        *((0, "0"), (0.134, "0.134"), (-5.2713, "-5.27"), (44.36, "44.4"), (12345.6, "12,346"), (1.0, "1")),
        *((999.6, "1,000"), (0.00012, "1.2×10⁻⁴"), (-2e-5, "-2×10⁻⁵"), (1e-12, "1×10⁻¹²")),
        *((None, "–"), (math.nan, "–"), (True, "–")),
    ],
)
def test_numbers_read_well(value, text):
    assert number(value) == text.replace("-", "\N{MINUS SIGN}")


def test_figures_have_units():
    assert number(-0.001, 2) == "0.00"
    assert [duration(s) for s in (3.25, 59.4, 59.7, 271, 7325)] == [
        "3.2 s",
        "59 s",
        "1 min 0 s",
        "4 min 31 s",
        "2 h 2 min",
    ]
    assert figure(0.88712, "accuracy") == "88.7%"
    assert figure(812.3, "peak_memory_mb") == "812 MB"
    assert figure(0.25, "kl") == "0.250"


def test_noise_is_calmed_and_trends_are_not_touched():
    steps = [float(s) for s in range(100)]
    ramp = (steps, [2e-4 * min(1, s / 10) * (1 - s / 101) for s in steps])
    assert plots._calmed(ramp) is ramp
    draw = random.Random(2)
    _, values = plots._calmed((steps, [1 + draw.gauss(0, 0.5) for _ in steps]))
    assert 0.5 < min(values) < max(values) < 1.5
    assert plots._calmed((steps, [3.0] * 100))[1] == [3.0] * 100


def test_matplotlib_waits_until_a_plot_is_drawn():
    loaded = "import sys, plaudit.report; print({'matplotlib', 'jinja2', 'numpy', 'torch'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", loaded], capture_output=True, text=True, check=True)
    assert result.stdout == "set()\n"
