"""What the machine decides is decided once: a run that goes on does as it did, whatever the machine is like by then."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

import examples
import watched
from plaudit import speed
from plaudit.recipes import FOUND, settled
from plaudit.trainer import Interrupted
from plaudit.world import World


@pytest.fixture
def settings(at, tmp_path):
    return replace(examples.settings("sft", at, tmp_path / "run"), tokens_per_pass=0, precision="auto", epochs=1.0)


def test_a_run_goes_on_with_what_was_found_when_it_began(settings, tmp_path, monkeypatch):
    monkeypatch.setattr(speed, "choose", lambda asked, device: speed.Choice("float32", ""))
    whole = watched.train(replace(settings, output=str(tmp_path / "whole")))
    with pytest.raises(Interrupted):
        watched.train(settings, signal_after=2)
    found = tmp_path / "run" / FOUND
    assert json.loads(found.read_text()) == {"precision": "float32", "tokens_per_pass": 4096}
    monkeypatch.setattr(speed, "choose", lambda asked, device: speed.Choice("bfloat16", ""))
    rest = watched.train(settings)
    assert rest.first == 3
    assert rest.trainer.world.precision == "float32"
    assert rest.digests[4] == whole.digests[4]
    assert watched.final(tmp_path / "run") == watched.final(tmp_path / "whole")


def test_the_number_found_is_the_one_that_cuts_the_batches(settings, tmp_path):
    with pytest.raises(Interrupted):
        watched.train(settings, signal_after=1)
    (tmp_path / "run" / FOUND).write_text(json.dumps({"precision": "float32", "tokens_per_pass": 40}))
    seen = watched.train(settings)
    assert seen.trainer.settings.tokens_per_pass == seen.trainer.algorithm.tokens_per_pass == 40


def test_a_run_without_a_step_to_go_on_from_is_settled_anew(settings, tmp_path):
    (tmp_path / FOUND).write_text(json.dumps({"precision": "bfloat16", "tokens_per_pass": 40}))
    world = World.start("float32", "cpu")
    assert settled(settings, tmp_path, world).tokens_per_pass == 4096
    assert world.precision == "float32"
    (tmp_path / "checkpoints").mkdir()
    assert settled(settings, tmp_path, world).tokens_per_pass == 40
    assert world.precision == "bfloat16"
    asked = replace(settings, precision="float32", tokens_per_pass=7)  # says no run that goes on: it would be refused
    assert settled(asked, tmp_path, World.start("float32", "cpu")).tokens_per_pass == 7


def test_the_first_process_settles_it_for_all(settings, tmp_path):
    class Second(World):
        """The second of two, to which the first says what it found."""

        def share(self, value):
            assert not self.is_main
            return "bfloat16", 1280

    world = Second(World.start("float32", "cpu").device, "float32", rank=1, size=2)
    assert settled(replace(settings, model="not looked at"), tmp_path, world).tokens_per_pass == 1280
    assert world.precision == "bfloat16"
