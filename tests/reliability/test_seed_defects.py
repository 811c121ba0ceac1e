"""The mistakes of the seed projects, none of which may come back: one test each, here or where the table says."""

from __future__ import annotations

import ast
import json
import re
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import examples
import plaudit
import tiny
from plaudit.batch import collate
from plaudit.loading import load_policy
from plaudit.rewards import load_rewards
from plaudit.templates import Template

TESTS = Path(__file__).parents[1]
ELSEWHERE = {
    "held-out pieces of a text are in training pieces of another size (S0-14)": (
        "algorithms/test_reward_from_scratch.py::test_s0_14_nothing_held_out_is_in_a_training_piece_of_any_size"
    ),
    "a learned reward is given lists that it cannot read (S0-11)": (
        "algorithms/test_reward_from_scratch.py::test_s0_11_s0_23_the_model_and_the_count_reward_one_policy_gradient"
    ),
    "padding on the left is attended to (S0-24)": (
        "unit/test_policy.py::test_B26_padding_on_either_side_of_the_model_itself_gives_these_logprobs_values_and_scores"
    ),
    "the README names a script that is the wrong one (S0-02)": "docs/test_docs.py::test_commands_run",
    "a fraction is spoken of and all is taken (S1-06)": (
        "doors/test_parts_of_data.py::test_s1_06_the_share_is_drawn_by_the_seed_and_what_is_held_out_stays"
    ),
    "2 to 7 tokens where 2 to 8 are said (S1-12)": (
        "doors/test_parts_of_data.py::test_s1_12_prompts_are_cut_to_2_to_7_tokens_each_as_often_and_read_as_their_text"
    ),
    "the policy is lost at the end (S1-19)": "algorithms/test_pretraining.py::test_its_folder_is_a_plain_one",
    "an example that runs in no release (S2-03, S2-04)": "docs/test_docs.py::test_python_runs",
    "flags of the README are rejected (S3-06)": "doors/test_rm_train.py::test_s3_06_both_spellings_are_one_command",
    "an early end waits for a figure that nobody reports (S0-24)": (
        "reliability/test_watching.py::test_s0_24_a_figure_that_is_absent_is_refused_before_the_first_step"
    ),
    "a shell reads unquoted arguments (S3-06)": (
        "doors/test_rm_train.py::test_s3_06_several_devices_are_launched_without_a_shell"
    ),
    "the end token is masked with the padding (S3-10)": (
        "unit/test_policy.py::test_B27_an_end_token_that_is_also_the_padding_is_learned"
    ),
}


@pytest.mark.parametrize("place", ELSEWHERE.values(), ids=ELSEWHERE)
def test_the_others_are_where_the_table_says(place):
    file, _, name = place.partition("::")
    assert re.search(rf"^def {name}\(", (TESTS / file).read_text("utf-8"), re.MULTILINE)


@pytest.fixture(scope="module")
def at(tmp_path_factory):
    return examples.place(tmp_path_factory.mktemp("data"))


def test_s0_13_token_0_is_a_token_like_any_other(tmp_path):
    folder = tiny.folder(tmp_path / "m", chat=False)
    tokenizer = tiny.tokenizer(chat=False)
    assert tokenizer("!").input_ids == [0]
    batch = collate([[5, 0]], [[0, 7, 0]])
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        found = load_policy(folder)(batch).logprobs[0]
        plain = model(batch.tokens).logits[0].log_softmax(-1)
    expected = [0.0, 0.0, *(float(plain[i - 1, batch.tokens[0, i]]) for i in (2, 3, 4))]
    assert found.tolist() == pytest.approx(expected, abs=1e-5)
    assert expected[2] < 0
    assert load_rewards("count:!")(["a!"], ["!b!"], {}).tolist() == [3.0]
    tokenizer.bos_token = "!"
    assert Template(tokenizer).prompt("") == [0]


def test_s0_14_each_score_is_compared_with_its_own_rating_and_no_other(at, tmp_path):
    algorithm = examples.built(examples.settings("regression", at, tmp_path / "run"))
    batch = algorithm.rows(algorithm.held)
    ratings = batch.targets.nanmean(1)
    assert ratings.unique().numel() > 1
    assert algorithm.report(batch, ratings.clone())["mse"] == 0
    assert algorithm.report(batch, ratings + 2)["mse"] == pytest.approx(4)


@pytest.mark.parametrize("kind", ["sft", "vpg"])
def test_s0_24_a_run_has_the_steps_that_were_asked_for_and_not_one_more(kind, at, tmp_path):
    run = plaudit.train(examples.settings(kind, at, tmp_path / "run", steps=3, evaluate_every=0, save_every=0))
    assert [row["step"] for row in run.metrics() if row["step"]] == [1, 2, 3]
    assert run.summary["steps"] == 3


def test_s0_24_no_tracker_is_touched_that_was_not_asked_for(at, tmp_path, monkeypatch):
    for module in ("wandb", "trackio", "torch.utils.tensorboard"):
        monkeypatch.setitem(sys.modules, module, None)  # importing it is an ImportError
    settings = examples.settings("rankings", at, tmp_path / "run", steps=1, save_every=0)
    assert settings.track == "none"
    assert plaudit.train(settings).finished
    with pytest.raises(plaudit.PlauditError, match="track: wandb is not installed"):
        plaudit.train(examples.settings("rankings", at, tmp_path / "tracked", steps=1, save_every=0, track="wandb"))


def test_s0_06_weight_decay_reaches_the_weights(at, tmp_path):
    """Of two runs of one step, one with a decay: the difference is the learning rate times the decay of what there was
    in the beginning, in matrices, and nothing elsewhere."""
    once = {"model": str(at / "model"), "dropout": False, "steps": 1, "warmup": 0.0, "schedule": "constant"}
    rates = {"learning_rate": 0.01, "evaluate_every": 0, "save_every": 0}
    finals = [
        load_file(plaudit.train(settings).final / "model.safetensors")
        for decay in (0.0, 0.5)
        for settings in [examples.settings("sft", at, tmp_path / f"{decay}", **once, **rates, weight_decay=decay)]
    ]
    before = load_file(at / "model" / "model.safetensors")
    for name, weights in before.items():
        shrunk = 0.01 * 0.5 * weights if weights.dim() > 1 else torch.zeros_like(weights)
        torch.testing.assert_close(finals[0][name] - finals[1][name], shrunk, rtol=1e-3, atol=1e-6)


def test_s1_10_prompts_come_from_the_data_that_were_named(at, tmp_path):
    for name in ("one", "two"):
        data = tiny.lines(tmp_path / f"{name}.jsonl", [{"query": f"{name} {i}"} for i in range(8)])
        changes = {"data": data, "steps": 2, "save_every": 0, "max_new_tokens": 2}
        run = plaudit.train(examples.settings("vpg", at, tmp_path / name, **changes))
        asked = [json.loads(line)["prompt"] for line in (run.folder / "samples.jsonl").read_text().splitlines()]
        assert asked
        assert all(prompt.startswith(f"{name} ") for prompt in asked)


def never_fails(source: str) -> list[int]:
    """Lines that assert a value and give what it should have been as the message: `assert f(x), [0.5]`."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Assert):
            continue
        said = node.msg
        called = isinstance(said, ast.Call) and ast.unparse(said.func).split(".")[-1] in ("tensor", "array", "approx")
        number = isinstance(said, ast.Constant) and not isinstance(said.value, str)
        value = called or number or isinstance(said, ast.List | ast.Tuple)
        compared = isinstance(node.test, ast.Compare | ast.BoolOp | ast.UnaryOp)
        if isinstance(node.test, ast.Tuple) or (value and not compared):
            found.append(node.lineno)
    return found


def test_s4_06_no_test_asserts_what_cannot_fail():
    assert never_fails("assert reward(['I am happy']), torch.tensor([0.98])") == [1]
    assert never_fails("assert score(x), 0.5\nassert score(x), [0.5]\nassert (a, b)") == [1, 2, 3]
    assert never_fails("assert a == b, (a, b)\nassert not found, found\nassert f(x), 'why'") == []
    wrong = {str(file): never_fails(file.read_text("utf-8")) for file in TESTS.rglob("*.py")}
    assert {file: lines for file, lines in wrong.items() if lines} == {}
