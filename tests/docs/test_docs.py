"""The documentation does what it says: every example is run, every link resolves, every verb has its page."""

from __future__ import annotations

import importlib.util
import inspect
import io
import json
import re
import shlex
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForSequenceClassification

import tiny
from plaudit import records
from plaudit.cli import _OTHERS, main
from plaudit.feedback.exchange import take_in
from plaudit.settings import FAMILIES, VERBS, Import

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
NOT_RUN = {
    "docs/quickstart.md": 4,  # installs packages, downloads a model, or needs the quickstart's own
    "docs/pull.md": 1,  # downloads
    "docs/gpus.md": 1,  # needs several processes
    "docs/annotate.md": 1,  # needs a label server
    "docs/label.md": 1,  # waits for people
    "README.md": 1,  # waits for people
}
COMMENT = re.compile(r"<!-- (not run|reads as): (.+) -->\n$")


@dataclass(frozen=True)
class Block:
    """A fenced block: where it stands, its language, its text, and the comment just before it."""

    where: str
    language: str
    text: str
    mark: tuple[str, ...]


@cache
def blocks(page: Path) -> list[Block]:
    text = page.read_text("utf-8")
    found = []
    for match in re.finditer(r"^```(\w+)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        before = text[: match.start()]
        mark = COMMENT.search(before)
        where = f"{name(page)}:{before.count(chr(10)) + 1}"
        found.append(Block(where, match[1], match[2], mark.groups() if mark else ()))
    return found


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def runnable(page: Path, language: str) -> list[Block]:
    return [block for block in blocks(page) if block.language == language and block.mark[:1] != ("not run",)]


SLOW = ("docs/bench.md",)  # it measures for as long as a measurement takes


def with_blocks(language: str) -> list[Any]:
    marks = {True: pytest.mark.slow, False: ()}
    return [
        pytest.param(page, id=name(page), marks=marks[name(page) in SLOW]) for page in PAGES if runnable(page, language)
    ]


# ------------------------------------------------------------------------------------------------- what readers have

QUESTIONS = [f"Question {i}: how is it?" for i in range(24)]


@pytest.fixture(scope="session")
def supplies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files that the pages speak of, tiny."""
    folder = tmp_path_factory.mktemp("supplies")
    tiny.folder(folder / "my-model")
    prompts = [{"prompt": question} for question in QUESTIONS]
    good, bad = [" All is well.", " Very good."], [" Bad.", " No."]
    answered = [{**row, "completion": good[i % 2]} for i, row in enumerate(prompts)]
    compared = [{**row, "chosen": good[i % 2], "rejected": bad[i % 2]} for i, row in enumerate(prompts)]
    ranked = [{**row, "completions": [good[i % 2], *bad], "ranking": "A > B = C"} for i, row in enumerate(prompts)]
    rated = [{**row, "completion": (good + bad)[i % 4], "ratings": [i % 4, 3]} for i, row in enumerate(prompts)]
    tiny.lines(folder / "prompts.jsonl", prompts)
    tiny.lines(folder / "heldout.jsonl", [{"prompt": f"And {row['prompt']}"} for row in prompts[:8]])
    tiny.lines(folder / "keywords.jsonl", [{**row, "keyword": "e"} for row in prompts])
    tiny.lines(folder / "demonstrations.jsonl", answered)
    tiny.lines(folder / "comparisons.jsonl", compared)
    tiny.lines(folder / "rankings.jsonl", ranked)
    tiny.lines(folder / "ratings.jsonl", rated)
    judged = [{**row, "response1": good[0], "response2": bad[0], "cmp_key": "new_old"} for row in prompts]
    judges = [{"annotator1": 1 + i % 2, "annotator2": 1 + i % 3 // 2, "annotator3": i % 3} for i in range(len(prompts))]
    tiny.lines(folder / "judged.jsonl", [row | said for row, said in zip(judged, judges, strict=True)])
    for store in ("answers.db", "labels.db"):
        take_in(Import(data=str(folder / "comparisons.jsonl"), output=str(folder / store), by="ann"))
    tiny.classifier(folder / "sentiment", ("NEGATIVE", "POSITIVE"))
    (folder / "book.txt").write_text("All is well, very well, and all will be well.\n" * 40)
    return folder


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What earlier verbs left behind, for the pages of later ones."""
    folder = tmp_path_factory.mktemp("trained")
    for seed, verb in enumerate(("sft", "ppo"), 1):
        tiny.folder(folder / "runs" / verb / "final", seed=seed)
    config = LlamaConfig(**{**tiny.config().to_dict(), "num_labels": 1, "pad_token_id": 0})
    torch.manual_seed(3)
    LlamaForSequenceClassification(config).save_pretrained(folder / "runs" / "reward" / "final")
    tiny.tokenizer().save_pretrained(folder / "runs" / "reward" / "final")
    for run in (folder / "runs").iterdir():
        (run / ".lock").touch()  # as every run leaves it
    return folder


@pytest.fixture
def desk(page: Path, supplies: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with all that; the README begins without any run. Blocks that name a file are written to it."""
    for source in [*supplies.iterdir(), *([] if page.name == "README.md" else trained.iterdir())]:
        link(source, tmp_path / source.name)
    functions = next(b.text for b in blocks(ROOT / "docs" / "rewards.md") if b.text.startswith("# reward.py"))
    (tmp_path / "reward.py").write_text(functions)
    for block in blocks(page):
        if found := re.match(r"# ([\w-]+\.(?:yaml|py))\n", block.text):
            (tmp_path / found[1]).write_text(block.text)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def link(source: Path, target: Path) -> None:
    """Runs are written beside what is there, so folders are made and only files are linked."""
    if source.is_dir():
        target.mkdir()
        for child in source.iterdir():
            link(child, target / child.name)
    else:
        target.write_bytes(source.read_bytes())


# -------------------------------------------------------------------------------------------------------- running


def shortened(text: str) -> str:
    """Two optimizer steps and two rollouts' worth of patience are enough to see that a command works."""
    return re.sub(r"(steps[ =])\d+", r"\g<1>2", text)


# peft still asks transformers by an older name whether gradients are checkpointed.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
@pytest.mark.parametrize("page", with_blocks("bash"))
def test_commands_run(page, desk, monkeypatch, capsys):
    for block in runnable(page, "bash"):
        for line in shortened(block.text).replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if not words:
                continue
            assert words[0] == "plaudit", f"{block.where}: only plaudit itself can be run here: {line}"
            monkeypatch.setattr(sys, "stdin", io.StringIO("How is it?\n\n"))
            status = main(words[1:])
            assert status == 0, f"{block.where}: {line}\n{capsys.readouterr().err}"


@pytest.mark.parametrize("page", with_blocks("python"))
def test_python_runs(page, desk):
    space: dict[str, Any] = {"__name__": "docs"}
    for block in runnable(page, "python"):
        exec(compile(shortened(block.text), block.where, "exec"), space)


@pytest.mark.parametrize("page", [ROOT / "docs" / "architecture.md"], ids=["architecture"])
def test_the_algorithm_on_a_screen_trains(page, desk, monkeypatch):
    from plaudit import PPO, train

    space: dict[str, Any] = {"__name__": "docs"}
    for block in runnable(page, "python"):
        exec(compile(block.text, block.where, "exec"), space)
    monkeypatch.setattr("plaudit.algorithms.ppo.ProximalPolicyOptimisation", space["MeanBaseline"])
    (desk / "varied.py").write_text(
        "def varied(completions, **rest):\n    return [sum(map(ord, c)) % 7 for c in completions]\n"
    )
    settings = {"rollout": 8, "batch_size": 8, "max_new_tokens": 8, "learning_rate": 1e-3, "precision": "float32"}
    run = train(PPO(model="my-model", data="prompts.jsonl", rewards="varied.py:varied", steps=3, **settings))
    rows = [row for row in run.metrics() if row["step"]]
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert rows[0]["ratio"] == pytest.approx(1, abs=1e-5)
    assert rows[0]["kl"] == pytest.approx(0, abs=1e-4)
    assert rows[2]["kl"] != 0
    assert "value_loss" not in rows[0]


@pytest.mark.parametrize("block", blocks(ROOT / "docs" / "records.md"), ids=lambda block: block.where)
def test_records_are_read_as_the_page_says(block):
    if block.language != "json":
        return
    assert block.mark[0] == "reads as"
    rows = [(block.where, json.loads(line)) for line in block.text.splitlines()]
    loaded = records.parse(rows, getattr(records, block.mark[1]))
    assert len(loaded.records) == len(rows)
    assert not loaded.dropped


# -------------------------------------------------------------------------------------------------- what is not run


def test_few_blocks_are_not_run_and_each_says_why():
    marked = {name(page): sum(block.mark[:1] == ("not run",) for block in blocks(page)) for page in PAGES}
    assert {page: count for page, count in marked.items() if count} == NOT_RUN


def test_commands_that_are_not_run_are_at_least_commands():
    from plaudit import config, pipeline

    recipe = ROOT / "recipes" / "quickstart.yaml"
    for block in [block for page in PAGES for block in blocks(page) if block.mark[:1] == ("not run",)]:
        for line in block.text.splitlines():
            tool, verb, *words = shlex.split(line)
            if tool == "plaudit" and verb in ("run", "quickstart"):
                pipeline.read(recipe, words[verb == "run" :])
            elif tool == "plaudit":
                config.from_arguments(VERBS[verb], words, verb)
            elif tool == "accelerate":
                assert words[words.index("-m") + 1] == "plaudit.cli"
            else:
                assert tool == "make"
                assert verb in targets()


def targets() -> set[str]:
    return set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def test_make_targets_that_are_spoken_of_exist():
    spoken = {
        word for page in PAGES for word in re.findall(r"(?:`|^)make (\w+)", page.read_text("utf-8"), re.MULTILINE)
    }
    assert {"quickstart", "test"} <= spoken
    assert spoken <= targets()


# ------------------------------------------------------------------------------------------------ links and coverage


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", page.read_text("utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_relative_links_resolve(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text("utf-8")):
        if target.startswith("http"):
            continue
        path, _, anchor = target.partition("#")
        found = page.parent / path if path else page
        assert found.exists(), f"{name(page)} links to {target}"
        assert not anchor or anchor in anchors(found), f"{name(page)} links to {target}, which has no such heading"


def test_every_verb_has_a_page_that_the_index_and_the_readme_link():
    for verb in (*VERBS, *_OTHERS):
        assert (ROOT / "docs" / f"{verb}.md").read_text("utf-8").startswith("# "), verb
        assert f"({verb}.md)" in (ROOT / "docs" / "index.md").read_text("utf-8"), verb
        assert f"(docs/{verb}.md)" in (ROOT / "README.md").read_text("utf-8"), verb


def test_every_page_is_in_the_index():
    index = (ROOT / "docs" / "index.md").read_text("utf-8")
    assert [page.name for page in PAGES if page.parent.name == "docs" and f"({page.name})" not in index] == ["index.md"]


def test_the_page_of_settings_is_up_to_date():
    path = ROOT / "docs" / "make_settings.py"
    spec = importlib.util.spec_from_file_location("make_settings", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.PAGE.read_text("utf-8") == module.page(), "run `python docs/make_settings.py`"


# Verbs that train nothing: what their few settings are for is said in prose.
NO_TABLE = {"pull", "sample", "evaluate", *FAMILIES["People"]}


def test_every_page_of_a_verb_runs_it():
    """At least once among its commands; some need what is not here."""
    elsewhere = {"pull", "label", "annotate"}
    for verb in VERBS:
        page = ROOT / "docs" / f"{verb}.md"
        found = [block for block in blocks(page) if block.language == "bash"]
        assert any(re.search(rf"^plaudit {verb} ", block.text, re.MULTILINE) for block in found), verb
        assert verb in elsewhere or all(block.mark[:1] != ("not run",) for block in found), verb


@pytest.mark.parametrize("verb", [verb for verb in VERBS if verb not in NO_TABLE])
def test_settings_that_pages_name_exist_with_the_defaults_they_give(verb):
    text = (ROOT / "docs" / f"{verb}.md").read_text("utf-8")
    section = re.split(r"^#+ ", text.partition("## Its main defaults\n")[2], maxsplit=1, flags=re.MULTILINE)[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    assert lines[:2] == ["| setting | default | why |", "|---|---|---|"]
    assert len(lines) > 3
    for line in lines[2:]:
        names, defaults = line.split(" | ")[:2]
        fields = re.findall(r"`(\w+)`", names)
        assert "| " + ", ".join(f"`{field}`" for field in fields) == names
        for field, default in zip(fields, defaults.split(", "), strict=True):
            assert value(default) == getattr(VERBS[verb], field), f"{verb}: {field}"


def value(shown: str) -> Any:
    """A default as a page writes it: 5 %, on, off, 1e-5, linear."""
    if shown in ("on", "off"):
        return shown == "on"
    number, percent, _ = shown.partition(" %")
    return float(number) / (100 if percent else 1) if re.fullmatch(r"[\d.]+(e-?\d+)?", number) else shown


def test_a_broken_example_is_noticed(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(shlex.split("sft --model my-model --data demonstrations.jsonl")) == 2
    assert "there is no file 'demonstrations.jsonl'" in capsys.readouterr().err


def test_the_readme_counts_the_lines_of_each_algorithm():
    from plaudit import families
    from plaudit.algorithms import ilql, reward, sft

    classes = {
        **families.preference_classes(),
        **families.on_policy_classes(),
        VERBS["sft"]: sft.SupervisedFineTuning,
        VERBS["reward"]: reward.FromComparisons,
        VERBS["ilql"]: ilql.ImplicitLanguageQLearning,
    }
    lines = {verb: len(inspect.getsource(classes[cls]).splitlines()) for verb, cls in VERBS.items() if cls in classes}
    rows = re.findall(
        r"^\| \[`(\w+)`\]\(docs/\w+\.md\) \|.*\| (\d+) \|$", (ROOT / "README.md").read_text("utf-8"), re.M
    )
    assert {verb: int(count) for verb, count in rows} == lines
