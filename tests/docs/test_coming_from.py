"""The page for those who come from other tools: every flag that it names is one of its verb."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import pytest

from plaudit.settings import VERBS

PAGE = (Path(__file__).parents[2] / "docs" / "coming-from.md").read_text("utf-8")
SECTIONS = re.findall(r"^## [^\n]*: `plaudit (\w+)`\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL)


def unknown(verb: str, rows: list[str]) -> list[str]:
    known = {field.name for field in fields(VERBS[verb])}
    flags = [flag for row in rows for flag in re.findall(r"`--([\w-]+)`", row.split(" | ")[1])]
    return [flag for flag in flags if flag.replace("-", "_") not in known]


@pytest.mark.parametrize(("verb", "section"), SECTIONS, ids=[f"{verb}-{i}" for i, (verb, _) in enumerate(SECTIONS)])
def test_s1_04_s1_10_s3_06_every_flag_of_the_tables_exists(verb, section):
    rows = [line for line in section.splitlines() if line.startswith("| `") or line.startswith("| a ")]
    assert len(rows) >= 3
    assert all(" | `--" in row or " | nothing: " in row for row in rows)
    assert unknown(verb, rows) == []


def test_a_flag_that_does_not_exist_is_noticed():
    assert unknown("reward", ["| `--a` | `--model`, `--models` |"]) == ["models"]
    assert len(SECTIONS) == 6


def test_s1_04_the_flags_of_the_seed_s_command_are_all_on_the_page():
    seed = """
    model_name_or_path output_dir per_device_train_batch_size num_train_epochs gradient_checkpointing max_length
    learning_rate report_to remove_unused_columns optim logging_steps evaluation_strategy
    exp_name seed log_with model_name query_dataset reward_model lora_alpha lora_r use_seq2seq trust_remote_code
    use_peft ppo_epochs train_file valid_file train_data valid_data
    """
    assert [flag for flag in seed.split() if not re.search(rf"`--{flag}\b", PAGE)] == []
