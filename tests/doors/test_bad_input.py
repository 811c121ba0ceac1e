"""Whatever a person can get wrong is one clear sentence and exit code 2, before anything heavy loads where that can
be; and nothing of theirs is lost."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from doorway import PROMPTS, QUICK, times, weights

import tiny
from plaudit.run import Run

FILES = {
    "good.jsonl": '{"prompt": "a", "completion": "b"}\n{"prompt": "c", "completion": "d"}\n',
    "empty.jsonl": "",
    "blank.jsonl": "\n\n",
    "broken.jsonl": '{"prompt": "a", "completion": "b"}\n{"prompt": "x", "compl\n',
    "list.jsonl": '["a", "b"]\n',
    "columns.jsonl": '{"inquiry": "a", "reply": "b"}\n',
    "rated.jsonl": '{"prompt": "a", "completion": "b", "rating": 3}\n{"prompt": "c", "completion": "d", "rating": 1}\n',
    "ranked.jsonl": '{"prompt": "a", "completions": ["b", "c"], "ranking": [1, 2]}\n',
    "tied.jsonl": '{"prompt": "a", "chosen": "b", "rejected": "c", "preference": 0.5}\n',
    "thumb.jsonl": '{"prompt": "a", "completion": "b", "label": true}\n',
    "pair.jsonl": '{"prompt": "a", "chosen": "b", "rejected": "c"}\n',
    "cpo.yaml": "model: m\ndata: pair.jsonl\nprecompute_reference: true\n",
    "number.jsonl": '{"prompt": "a", "completion": 3}\n',
    "same.jsonl": '{"prompt": "a", "chosen": "b", "rejected": "b"}\n',
    "silent.jsonl": '{"prompt": "a", "completion": " "}\n',
    "m/config.json": '{"model_type": "llama"}',
    "m/tokenizer.json": "{}",
    "mute/config.json": '{"model_type": "llama"}',
    "bare/tokenizer.json": "{}",
    "cut/config.json": '{"model_type": ',
    "list/config.json": "[]",
    "code/config.json": '{"model_type": "llama", "_attn_implementation": "evil/kernel"}',
    "typo.yaml": "model: m\ndata: good.jsonl\nlearning_rat: 1.0e-5\n",
    "type.yaml": "model: m\ndata: good.jsonl\nlearning_rate: fast\n",
    "shape.yaml": "model: {scratch: llama, layer: 3}\ndata: good.jsonl\n",
    "shapes.yaml": "stages:\n  sft: {model: {scratch: llama}, data: nowhere.txt}\n",
    "verb.yaml": "verb: ppo\nmodel: m\n",
    "open.yaml": "model: [m\n",
    "reward.py": "import torch\nlimit = 3\ndef score(prompts, completions, **columns):\n    return [0.0]\n",
    "wrong.py": "def score(:\n",
    "mine.jsonl": "precious\n",
    "stages.yaml": "stages:\n  sft: {model: m, data: good.jsonl}\n",
    "verbless.yaml": "stages:\n  imitate: {model: m}\n",
    "stagez.yaml": "stagez: {}\n",
    "none.yaml": "output: o\n",
    "scalar.yaml": "stages:\n  sft: 3\n",
    "field.yaml": "stages:\n  sft: {model: m, data: good.jsonl, stepz: 3}\n",
    "late.yaml": "output: late\nstages:\n  sft: {model: m, data: good.jsonl}\n"
    "  ppo: {model: '{output}/sft/final', data: good.jsonl, rewards: nowhere.py:score}\n",
}
SFT = "sft --model m --output o --data "
PPO = "ppo --model m --output o --data good.jsonl --rewards "
GRPO = "grpo --model m --output o --data good.jsonl --rewards count:a "
EVALUATE = "evaluate --data good.jsonl --output o --rewards count:a --policies "
CASES = {
    # data
    SFT + "nowhere.jsonl": "data: there is no file 'nowhere.jsonl'.",
    SFT + "good.jsonl --eval-data ./nowhere": "data: there is no file './nowhere'.",
    SFT + "empty.jsonl": "data: 'empty.jsonl' is empty.",
    SFT + "blank.jsonl": "blank.jsonl: the file holds no rows.",
    SFT + "broken.jsonl": "broken.jsonl:2: not valid JSON (",
    SFT + "list.jsonl": "list.jsonl:1: a row must be a JSON object, {...}, not a list.",
    SFT
    + "columns.jsonl": "columns.jsonl:1: a demonstration needs `prompt` and `completion` (or `messages`, `text`, or "
    "`prompt` and `chosen`), but this row holds `inquiry`, `reply`.",
    SFT + "number.jsonl": "number.jsonl:1: `completion` must be text or a list of messages with the texts `role` and "
    "`content`, not a number.",
    SFT + "silent.jsonl": "The data hold no usable demonstration (a completion is empty: 1, first silent.jsonl:1).",
    SFT + "good.jsonl --holdout 1": "data: nothing is left to train on with holdout 1.0: lower it.",
    "reward --model m --data same.jsonl": "The data hold no usable comparison (chosen and rejected are the same: 1, "
    "first same.jsonl:1).",
    "reward --model m --data good.jsonl": "a rating needs `completion` and one of `ratings`, `rating`, `score`, "
    "`label` and `token_rewards`, but this row is a demonstration (it holds `prompt`, `completion`)",
    "dpo --model m --data good.jsonl": "good.jsonl:1: a comparison needs `chosen` and `rejected`, but this row is a "
    "demonstration (it holds `prompt`, `completion`)",
    "dpo --model m --data rated.jsonl": "data: no prompt has two answers of which people prefer one: take data of "
    "comparisons, or learn from such ratings by `reward`.",
    "nca --model m --data tied.jsonl": "data: there is no pair of answers of which people prefer one: take data of ",
    "kto --model m --data rated.jsonl": "data: a rating of 3 is neither good (1, true) nor bad (0, false): give ",
    "kto --model m --data ranked.jsonl": "data: a ranking does not say which answers are good by themselves: take ",
    "bco --model m --data thumb.jsonl": "data: all answers are good, so there is nothing to tell apart: add ",
    "dpo --model m --data pair.jsonl --beta 0": "`beta` is 0.0, but must be greater than 0.",
    "simpo --model m --data pair.jsonl --beta -1": "`beta` is -1.0, but must be greater than 0.",
    "dpo --model m --data pair.jsonl --label-smoothing 0.5": "`label_smoothing` is 0.5, but must be less than 0.5.",
    "exo --model m --data pair.jsonl --label-smoothing 0": "`label_smoothing` is 0.0, but must be greater than 0.",
    "kto --model m --data pair.jsonl --batch-size 1": "`batch_size` is 1, but must be greater than or equal to 2.",
    "bco --model m --data pair.jsonl --min-density-ratio 20": "min_density_ratio (20.0) must not exceed ",
    "cpo --config cpo.yaml": "cpo.yaml: `cpo` has no setting `precompute_reference`; that is a setting "
    "of dpo, robust_dpo, dpo_norm and others.",
    "sample --model m --data nowhere.jsonl": "data: there is no file 'nowhere.jsonl'.",
    # models
    "sft --data good.jsonl --model ./nowhere": "model: there is no folder './nowhere'.",
    "sft --data good.jsonl --model nowhere/": "model: there is no folder 'nowhere/'.",
    "sft --data good.jsonl --model mute": "model: 'mute' has no tokenizer (none of tokenizer.json, ",
    "sft --data good.jsonl --model bare": "model: 'bare' has no config.json, so it is not a Hugging Face model folder "
    "(found: tokenizer.json).",
    "sft --data good.jsonl --model good.jsonl": "model: 'good.jsonl' has no config.json",
    "sft --data good.jsonl --model cut": "cut/config.json: not valid JSON (",
    "sft --data good.jsonl --model list": "list/config.json: must hold a JSON object, {...}",
    "sft --data good.jsonl --model code": "code/config.json: '_attn_implementation' does not belong into a config.json",
    "sft --data good.jsonl --model scratch:lama": "model: `scratch` is 'lama', but must be 'llama' or 'gpt2'.",
    "sft --data good.jsonl --model scratch:llama:widht=64": "model: `scratch` has no setting `widht`; the nearest is "
    "`width`.",
    "sft --data good.jsonl --model scratch:gpt2:width=32,heads=3": "model: `heads` (3) must divide `width` (32).",
    "sft --data good.jsonl --model scratch:gpt2:context=8 --overlap 8": "overlap (8) must be less than the model's "
    "context (8).",
    "sft --config shape.yaml": "model: `scratch` has no setting `layer`; the nearest is `layers`.",
    "sample --data good.jsonl --model scratch:llama": "model: only `sft` and `reward` begin from scratch: "
    "train 'scratch:llama' with one of them, and give its `final` folder here.",
    "run shapes.yaml": "stage 'sft': data: there is no file 'nowhere.txt'.",
    SFT + "good.jsonl --overlap 1024": "`overlap` (1024) must be less than `max_tokens` (1024).",
    # settings
    "sft --config typo.yaml": "typo.yaml: `sft` has no setting `learning_rat`; the nearest is `learning_rate`.",
    "sft --config type.yaml": "type.yaml: `learning_rate` is 'fast', but must be a valid number",
    "sft --config verb.yaml": "verb.yaml: these are settings of `ppo`, not of `sft`.",
    "sft --config open.yaml": "open.yaml:2: not valid YAML (",
    "sft --config nowhere.yaml": "nowhere.yaml: cannot be read (No such file or directory).",
    SFT + "good.jsonl --learning-rat 1": "there is no flag --learning-rat; the nearest is --learning-rate.",
    SFT + "good.jsonl --learning-rate fast": "Error parsing --learning-rate: could not convert string to float: 'fast'",
    SFT + "good.jsonl --schedule linaer": "invalid choice 'linaer' for argument '--schedule'",
    PPO + "count:a --kl -0.1": "`kl` is -0.1, but must be greater than or equal to 0.",
    PPO + "count:a --batch-size 7": "batch_size (7) must divide rollout (64).",
    PPO + "count:a --dual-clip 0.5": "dual_clip is 0.5: give more than 1, or 0 for no such bound.",
    PPO + "count:a --kl-target 3 --kl-budget 3": "kl_target holds the divergence, kl_budget only bounds it: choose one",
    PPO + "count:a --kl 0 --kl-target 3": "kl_target: the weight adapts by factors, so it cannot begin at 0: raise kl.",
    PPO + "count:a --reject-worst 0.5 --reject-best 0.5": "reject_worst (0.5) and reject_best (0.5) leave no",
    PPO + "count:a --reward-scale --reward-normalise": "reward_normalise takes the mean off, reward_scale leaves it",
    GRPO + "--dual-clip 0.5": "dual_clip is 0.5: give more than 1, or 0 for no such bound.",
    GRPO + "--group 1": "`group` is 1, but must be greater than or equal to 2.",
    GRPO + "--group 7": "group (7) must divide batch_size (64), or a prompt's answers are torn.",
    GRPO.replace("grpo", "reinforce_pp") + "--baseline group": "baseline: a group of one has no others to compare with",
    GRPO.replace("grpo", "online_dpo") + "--beta 0": "`beta` is 0.0, but must be greater than 0.",
    "sample --model m --data good.jsonl --best-of count:a": "best_of: there is one completion of each prompt",
    PPO + "count:a --group 3": "group (3) must divide batch_size (32), or a prompt's answers are torn.",
    # rewards
    PPO + "nowhere.py:score": "reward 'nowhere.py:score': there is no file 'nowhere.py'.",
    PPO + "reward.py:scroe": "reward 'reward.py:scroe': reward.py has no function 'scroe' (it has: score).",
    PPO + "reward.py": "reward 'reward.py': name the function too, as in 'reward.py:reward'.",
    PPO + "wrong.py:score": "wrong.py:1: not valid Python (",
    PPO + "nowhere:score": "reward 'nowhere:score': there is no module 'nowhere'.",
    PPO + "nowhere.deeper:score": "reward 'nowhere.deeper:score': there is no module 'nowhere.deeper'.",
    PPO + "count:": "reward 'count:': name what is to be counted, as in 'count:good'.",
    PPO + "label:GOOD": "reward 'label:GOOD': name a label and a model, as in 'label:POSITIVE@MODEL'.",
    PPO + "label:GOOD@./nowhere": "model: there is no folder './nowhere'.",
    PPO + "./nowhere": "model: there is no folder './nowhere'.",
    # other verbs
    "sample --model m --data good.jsonl --output mine.jsonl": "output: mine.jsonl exists already: name another "
    "file, or remove it.",
    EVALUATE + "a=m b=./nowhere": "model: there is no folder './nowhere'.",
    EVALUATE + "m --judge nowhere.py:f": "reward 'nowhere.py:f': there is no file 'nowhere.py'.",
    EVALUATE + "old/m new/m": "policies: two are called 'm': write name=folder for each.",
    EVALUATE + "=m": "policies: '=m' has no name or no folder: write name=folder for each.",
    "report nowhere": "nowhere is not a run",
    # pipelines
    "run nowhere.yaml": "nowhere.yaml: cannot be read (No such file or directory).",
    "run verbless.yaml": "verbless.yaml: stage 'imitate': there is no verb 'imitate'; the nearest is ",
    "run stagez.yaml": "stagez.yaml: a pipeline has `output` and `stages`, not `stagez`.",
    "run none.yaml": "none.yaml: there are no stages: give `stages`, each a name with its settings below it.",
    "run scalar.yaml": "scalar.yaml: stage 'sft' is 3: give `stages`, each a name with its settings below it.",
    "run field.yaml": "field.yaml: stage 'sft': `sft` has no setting `stepz`; the nearest is `steps`.",
    "run stages.yaml sfd.steps=3": "override 'sfd.steps=3': there is no stage 'sfd'; the nearest is 'sft', of sft.",
    "run stages.yaml steps=3": "'steps=3' is no override: write output=FOLDER or stage.field=value, a stage being sft.",
    "run stages.yaml sft.steps": "'sft.steps' is no override: write output=FOLDER or stage.field=value",
    "run stages.yaml sft.steps=[3": "'[3' is no YAML value: put quotation marks around it.",
    "run late.yaml": "stage 'ppo': reward 'nowhere.py:score': there is no file 'nowhere.py'.",
}
SCRIPT = """
import contextlib, io, json, sys
from plaudit.cli import main

found = {}
for case in json.load(sys.stdin):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(case.split())
    heavy = sorted({"torch", "transformers", "datasets"} & set(sys.modules))
    found[case] = [code, out.getvalue(), err.getvalue(), heavy]
json.dump(found, sys.stdout)
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Every case, run one after the other in one process that never needs a model; and the folder afterwards."""
    root = tmp_path_factory.mktemp("bad")
    for name, content in FILES.items():
        path = root / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(content)
    command = [sys.executable, "-c", SCRIPT]
    done = subprocess.run(command, input=json.dumps(list(CASES)), capture_output=True, text=True, cwd=root, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), root


@pytest.mark.parametrize("case", CASES)
def test_a_mistake_is_named_before_anything_heavy_loads(found, case):
    code, out, err, heavy = found[0][case]
    assert code == 2
    assert CASES[case] in err
    assert err.startswith(f"plaudit {case.split()[0]}: ")
    assert err.count("\n") == 1
    assert "Traceback" not in err
    assert out == ""
    assert heavy == []


def test_mistakes_change_no_file_and_leave_none_behind(found):
    _, root = found
    assert {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()} == set(FILES)
    assert all((root / name).read_text() == content for name, content in FILES.items())


# ----------------------------------------------------------------------------------- what only the run itself can tell


def sft(models, *words):
    return ("sft", "--model", models / "plain", "--steps", 2, "--batch-size", 2, *QUICK, *words)


def ppo(models, *words):
    return (
        "ppo", "--model", models / "plain", "--rollout", 4, "--batch-size", 4, "--steps", 2, "--max-new-tokens", 4,
        *QUICK, *words,
    )  # fmt: skip


def test_an_empty_completion_is_left_out_counted_and_told(plaudit, here, models):
    rows = [{"prompt": p, "completion": "" if i in (1, 4) else "x"} for i, p in enumerate(PROMPTS)]
    said = plaudit(*sft(models, "--data", tiny.lines(here / "d.jsonl", rows)))
    assert said.code == 0
    assert f"sft: 2 rows left out: a completion is empty (the first is {here}/d.jsonl:2)\n" in said.err


def test_chosen_equal_to_rejected_is_left_out_counted_and_told_of_held_out_rows_too(plaudit, here, models):
    rows = [{"prompt": p, "chosen": "x", "rejected": "x" if i == 2 else "y"} for i, p in enumerate(PROMPTS)]
    data, held = tiny.lines(here / "d.jsonl", rows), tiny.lines(here / "h.jsonl", rows[2:4])
    said = plaudit(
        "reward", "--model", models / "plain", "--data", data, "--eval-data", held, "--steps", 2, "--batch-size", 2,
        "--precision", "float32",
    )  # fmt: skip
    assert said.code == 0
    for place in ("d.jsonl:3", "h.jsonl:1"):
        assert f"1 rows left out: chosen and rejected are the same (the first is {here}/{place})\n" in said.err
    assert "accuracy" in json.loads(Path("runs/reward/summary.json").read_text())


def test_prompts_over_the_budget_are_counted_and_all_of_them_an_error(plaudit, models, prompts):
    words = ppo(models, "--data", prompts, "--rewards", "count:e", "--max-prompt-tokens")
    said = plaudit(*words, 7)  # "say one", "say two" and "say six" have seven bytes
    assert said.code == 0
    assert "ppo: 5 of 8 prompts are longer than 7 tokens and left out.\n" in said.err
    said = plaudit(*words, 6, "--output", "none")
    assert said.code == 2
    assert said.err == "plaudit ppo: every prompt is longer than 6 tokens (the shortest has 7): raise the limit.\n"


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        ("return [0.0]", "reward 'r.py:score' returned 1 values for 4 completions."),
        ("return [0.0, 1.0, float('nan'), 0.0]", "reward 'r.py:score' returned NaN or None for a completion of"),
        ("return ['good'] * 4", "reward 'r.py:score' returned 'good' for completion 0, of the prompt at "),
        ("raise SystemExit(3)", "reward 'r.py:score' failed: SystemExit: 3 ("),
    ],
)  # fmt: skip
def test_a_reward_that_is_no_list_of_numbers_stops_the_run(plaudit, here, models, prompts, body, sentence):
    (here / "r.py").write_text(f"def score(prompts, completions, **columns):\n    {body}\n")
    words = ppo(models, "--data", prompts, "--rewards", "r.py:score")
    said = plaudit(*words)
    assert said.code == 2
    assert sentence in said.err
    assert "Traceback" not in said.err
    assert not Path("runs/ppo/config.yaml").exists()  # so that the corrected command is free to differ


def test_an_unknown_device_is_named_and_the_corrected_command_goes_ahead(plaudit, models, demonstrations):
    said = plaudit(*sft(models, "--data", demonstrations, "--device", "tpu", "--learning-rate", 1))
    assert said.code == 2
    assert said.err.startswith("plaudit sft: device: 'tpu' is not to be found on this machine; it has ")
    assert plaudit(*sft(models, "--data", demonstrations)).code == 0


def test_weights_for_another_number_of_rewards_are_refused(plaudit, models, prompts):
    said = plaudit(*ppo(models, "--data", prompts, "--rewards", "count:e", "--reward-weights", 1, 2))
    assert (said.code, said.err) == (2, "plaudit ppo: reward_weights: 2 weights for 1 rewards.\n")


def test_a_run_folder_belongs_to_one_process_and_one_set_of_settings(plaudit, models, demonstrations):
    words = sft(models, "--data", demonstrations)
    with Run.open("runs/sft", {"verb": "sft"}):
        said = plaudit(*words)
    assert said.code == 2
    assert said.err == ("plaudit sft: runs/sft is in use by another process; wait for it or choose another --output.\n")
    Path("runs/sft/config.yaml").unlink()
    assert plaudit(*words).code == 0
    before, finished = weights("runs/sft/final"), times("runs/sft")
    said = plaudit(*words, "--learning-rate", 0.1)
    assert said.code == 2
    assert said.err == (
        "plaudit sft: runs/sft holds a run with other settings:\n  learning_rate: 2e-05 -> 0.1\n"
        "Restore the old values to resume, or choose another --output.\n"
    )
    assert plaudit(*words).code == 0
    assert (weights("runs/sft/final"), times("runs/sft")) == (before, finished)


def test_a_mistake_keeps_the_settings_of_a_run_that_has_begun(plaudit, here, models, prompts):
    score = here / "r.py"
    score.write_text("def score(prompts, completions, **columns):\n    return [len(c) / 9 for c in completions]\n")
    words = ppo(models, "--data", prompts, "--rewards", "r.py:score", "--save-every", 1, "--reuse", 1)
    fine = score.read_text()
    score.write_text(
        fine.replace("return", "calls.append(1)\n    if len(calls) > 1: return []\n    return") + "calls = []"
    )
    said = plaudit(*words)
    assert said.code == 2
    assert Path("runs/ppo/config.yaml").exists()
    assert sorted(path.name for path in Path("runs/ppo/checkpoints").iterdir()) == ["step-000001"]
    score.write_text(fine)
    said = plaudit(*words)
    assert said.code == 0
    assert "goes on from step 1" in said.err
