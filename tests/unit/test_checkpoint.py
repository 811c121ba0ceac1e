"""A checkpoint is whole or absent, and comes back bit for bit."""

import json
import math
import os
import pickle
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from plaudit import checkpoint
from plaudit.checkpoint import latest, load, pack, random_states, restore_random_states, save, unpack
from plaudit.errors import PlauditError

FILES = ("tensors.safetensors", "state.json", "manifest.json")


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch):
    """No test pulls the plug, so only when fsync is called matters."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def content(step):
    return {"weight": torch.full((3, 4), float(step)), "count": torch.tensor(step)}, {"step": step}


def put(folder, step, **options):
    return save(folder, step, *content(step), **options)


def steps(folder):
    return sorted(int(path.name.removeprefix("step-")) for path in folder.glob("step-*"))


def hidden(folder):
    return [path.name for path in folder.glob(".*")]


def is_whole(path):
    tensors, state = load(path)
    expected, _ = content(state["step"])
    return path.name.lstrip(".").startswith(f"step-{state['step']:06d}") and all(
        torch.equal(tensors[name], expected[name]) for name in expected
    )


# --- what goes in comes out ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool]
)
def test_every_dtype_survives_bit_for_bit(tmp_path, dtype):
    original = {"a": torch.arange(-6, 6).reshape(3, 4).to(dtype), "scalar": torch.tensor(1, dtype=dtype)}
    original["empty"] = torch.zeros(0, 5, dtype=dtype)
    tensors, _ = load(save(tmp_path, 1, original, {}))
    for name, tensor in original.items():
        assert tensors[name].dtype == dtype
        assert torch.equal(tensors[name], tensor)


def test_tied_weights_are_stored_once_and_stay_tied(tmp_path):
    table = nn.Parameter(torch.randn(100, 10))
    path = save(tmp_path, 1, {"embedding": table, "head": table.detach().view_as(table), "other": table + 1}, {})
    tensors, _ = load(path)
    assert tensors["head"] is tensors["embedding"]
    assert torch.equal(tensors["embedding"], table.detach())
    assert (path / "tensors.safetensors").stat().st_size < 2.2 * table.numel() * 4


def test_views_of_one_memory_are_stored_in_full(tmp_path):
    base = torch.arange(12.0).reshape(3, 4)
    views = {"base": base, "transposed": base.T, "rows": base[1:], "columns": base[:, ::2], "row": base[0]}
    tensors, _ = load(save(tmp_path, 1, views, {}))
    assert all(torch.equal(tensors[name], view) for name, view in views.items())
    tensors["row"].zero_()
    assert torch.equal(tensors["base"], base)


def test_optimizer_and_plain_values_survive_pack_and_unpack(tmp_path):
    model = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1 + 0.2, betas=(0.9, 0.95))
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    extra = [math.pi, 5e-324, -0.0, math.inf, math.nan, 2**70, True, None, "é\u0000\ud800", (1, [2.5, ()]), {}]
    tree = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "extra": extra,
        "keys": {1: "int", "1": "str", None: 0, 0.5: 1, False: torch.tensor(7)},
        "tag": {"$": "tensor", "name": "not one"},
        "clash": {"a/b": torch.zeros(1), "a": {"b": torch.ones(1)}},
    }
    back = unpack(*load(save(tmp_path, 1, *pack(tree))))
    assert repr(back["extra"]) == repr(extra)
    assert back["keys"] == tree["keys"]
    assert [type(key) for key in back["keys"]] == [int, str, type(None), float, bool]
    assert back["tag"] == tree["tag"]
    assert back["clash"]["a/b"].item() == 0
    assert back["clash"]["a"]["b"].item() == 1
    saved, restored = tree["optimizer"], back["optimizer"]
    assert restored["param_groups"] == saved["param_groups"]
    assert isinstance(restored["param_groups"][0]["betas"], tuple)
    for key, moments in saved["state"].items():
        assert all(torch.equal(restored["state"][key][name], moment) for name, moment in moments.items())
    optimizer.load_state_dict(restored)
    model.load_state_dict(back["model"])


@settings(max_examples=200, deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.tuples(inner, inner)
            | st.dictionaries(st.text(max_size=2) | st.integers() | st.just("$"), inner, max_size=3)
        ),
        max_leaves=12,
    )
)
def test_any_plain_tree_survives_json(value):
    tensors, state = pack({"value": value})
    assert repr(unpack(tensors, json.loads(json.dumps(state)))["value"]) == repr(value)


@pytest.mark.parametrize(
    "tree", [{"a": {"b": {1, 2}}}, {"a": {"b": np.float64(1)}}, {"a": {"b": object()}}, {"a": {"b": {(1, 2): 3}}}]
)
def test_what_cannot_be_stored_is_refused_by_place(tree):
    with pytest.raises(TypeError, match=r"^a/b"):
        pack(tree)


def test_random_states_continue_exactly(tmp_path):
    random.seed(1)
    np.random.seed(2)
    torch.manual_seed(3)
    random.gauss(0, 1), np.random.standard_normal()  # both keep half a pair of normals
    path = save(tmp_path, 1, *pack(random_states()))

    def draw():
        return [random.gauss(0, 1), random.random(), np.random.standard_normal(), np.random.rand(), torch.randn(3)]

    first = draw()
    restore_random_states(unpack(*load(path)))
    assert repr(draw()) == repr(first)


# --- R8: whatever stops a save, a complete checkpoint is found -------------------------------------------------------


class Killed(BaseException):
    """Not an Exception, as a kill is not one: nothing may clean up after it."""


class Faults:
    """Stops the process at the n-th disk operation: before it, half-way through it, or after it.

    With `power_loss`, what was not flushed by then is lost as well: unflushed bytes and unflushed names.
    """

    def __init__(self, monkeypatch, stop=None, power_loss=False):
        self.count, self.stop, self.power_loss = 0, stop, power_loss
        self.unflushed, self.moves = set(), []
        for name in ("_write", "_write_tensors", "_flush", "_move", "_delete"):
            monkeypatch.setattr(checkpoint, name, self.wrap(name, getattr(checkpoint, name)))
        monkeypatch.setattr(os, "mkdir", self.wrap("mkdir", os.mkdir))

    def wrap(self, name, function):
        def operation(path, *rest):
            if "checkpoint" not in str(path):  # another folder than the test's
                return function(path, *rest)
            self.point()
            if name == "_delete":
                next(iter(Path(path).iterdir())).unlink()
                self.point()
            result = function(path, *rest)
            if name.startswith("_write"):
                self.unflushed.add((path, os.stat(path).st_ino))
                self.half(Path(path))
            elif name == "_flush":
                self.unflushed = {item for item in self.unflushed if item[0] != path}
                self.moves = [move for move in self.moves if move[1].parent != path]
            elif name == "_move":
                self.moves.append((path, *rest))
                self.unflushed = {(rest[0] / p.name if p.parent == path else p, i) for p, i in self.unflushed}
            self.point()
            return result

        return operation

    def half(self, path):
        if self.count == self.stop:
            os.truncate(path, path.stat().st_size // 2)
        self.point()

    def point(self):
        self.count += 1
        if self.count - 1 == self.stop:
            if self.power_loss:
                self.lose()
            raise Killed

    def lose(self):
        for path, _ in self.unflushed:
            if path.exists():
                os.truncate(path, 0)
        for source, target in reversed(self.moves):
            if target.exists() and not source.exists():
                os.rename(target, source)


def three_saves(folder):
    """Yields the steps that must be found: a first save, a second that retires it, a third in the second's place."""
    for step in (1, 2, 2):
        put(folder, step, keep=1)
        yield step


def number_of_points(tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        faults = Faults(patch)
        list(three_saves(tmp_path / "checkpoints-count"))
    return faults.count


@pytest.mark.parametrize("power_loss", [False, True])
def test_a_crash_at_any_point_leaves_a_complete_checkpoint(tmp_path, power_loss):
    points = number_of_points(tmp_path)
    assert points >= 60
    for stop in range(points):
        folder = tmp_path / f"checkpoints-{stop}"
        finished = 0
        with pytest.MonkeyPatch.context() as patch:
            Faults(patch, stop, power_loss)
            with pytest.raises(Killed):
                for finished in three_saves(folder):  # noqa: B007
                    pass
        path, skipped = latest(folder)
        assert (path is None) == (finished == 0 and not steps(folder)), stop
        assert skipped == [], stop
        if path is not None:
            assert is_whole(path), stop
            assert load(path)[1]["step"] >= finished, stop
        put(folder, 3)
        assert steps(folder) == [3], stop
        assert hidden(folder) == [], stop


def test_replacing_a_step_never_loses_both(tmp_path):
    put(tmp_path, 1)
    (tmp_path / "step-000001").rename(tmp_path / ".step-000001.old")  # where a replacement may be interrupted
    path, skipped = latest(tmp_path)
    assert (path.name, skipped) == (".step-000001.old", [])
    assert is_whole(path)
    put(tmp_path, 2, keep=2)
    assert steps(tmp_path) == [1, 2]


@pytest.fixture(scope="module")
def real_process(tmp_path_factory):
    """Saves killed by SIGKILL, and a save under a file size limit, in processes of their own."""
    script = Path(__file__).parents[1] / "processes" / "killed_saves.py"
    folder = tmp_path_factory.mktemp("killed")
    done = subprocess.run([sys.executable, script, folder], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_sigkill_leaves_a_complete_checkpoint(real_process):
    assert len(real_process["kills"]) == 12
    assert all(kill["whole"] and kill["skipped"] == [] for kill in real_process["kills"])
    assert all(kill["found"] >= kill["acknowledged"] for kill in real_process["kills"])
    assert any(kill["litter"] for kill in real_process["kills"])  # some were hit in the middle of a save
    assert real_process["litter at last"] == []


# --- R9: a disk that refuses --------------------------------------------------------------------------------------


def test_a_file_size_limit_is_reported_and_harmless(real_process):
    assert "step-000002" in real_process["limit"]["error"]
    assert "File too large" in real_process["limit"]["error"]
    assert real_process["limit"]["found"] == "step-000001"
    assert real_process["limit"]["litter"] == []


@pytest.mark.parametrize(
    ("owner", "name", "call", "step"),
    [
        (*fault, step)
        for step in (1, 2)  # replaced, new
        for fault in (
            (checkpoint, "_write_tensors", 1),
            (checkpoint, "_write", 1),
            (checkpoint, "_write", 2),
            (os, "mkdir", 2),  # the first is for the folder of all checkpoints
            *((os, "fsync", call) for call in (1, 2, 3, 4)),
            *((checkpoint, "_move", call) for call in (1, 2)[: 3 - step]),
        )
    ],
)
def test_an_error_of_the_disk_names_the_path_and_keeps_the_old(tmp_path, monkeypatch, owner, name, call, step):
    put(tmp_path, 1)
    function = getattr(owner, name)
    count = 0

    def refuse(*arguments):
        nonlocal count
        count += 1
        if count == call:
            raise OSError(28, "No space left on device")
        return function(*arguments)

    monkeypatch.setattr(owner, name, refuse)
    with pytest.raises(PlauditError, match=rf"step-00000{step}.*No space left on device"):
        put(tmp_path, step)
    monkeypatch.undo()
    path, skipped = latest(tmp_path)
    assert (path.name, skipped, hidden(tmp_path)) == ("step-000001", [], [])
    assert is_whole(path)


def test_a_removal_that_fails_is_reported_after_the_save(tmp_path, monkeypatch):
    put(tmp_path, 1)

    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(checkpoint, "_delete", refuse)
    with pytest.raises(PlauditError, match=r"step-000002 is safe.*Permission denied"):
        put(tmp_path, 2)
    assert latest(tmp_path)[0].name == "step-000002"


def test_a_file_in_the_way_is_refused(tmp_path):
    (tmp_path / "file").write_text("precious")
    with pytest.raises(PlauditError, match="file"):
        put(tmp_path / "file", 1)
    (tmp_path / "step-000007").write_text("precious")
    with pytest.raises(PlauditError, match="step-000007 is not a folder"):
        put(tmp_path, 7)
    (tmp_path / "step-000008").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(PlauditError, match="step-000008 is not a folder"):
        put(tmp_path, 8)
    assert (tmp_path / "file").read_text() == (tmp_path / "step-000007").read_text() == "precious"


# --- R10: what is kept --------------------------------------------------------------------------------------------


def test_retention_counts_numbers_not_letters(tmp_path):
    for step in range(999_900, 1_000_101, 50):  # six digits become seven, so names don't sort as numbers do
        put(tmp_path, step, keep=2, best=999_950)
        assert latest(tmp_path)[0].name == f"step-{step}"
    assert steps(tmp_path) == [999_950, 1_000_050, 1_000_100]


def test_retention_around_ten_thousand_and_a_best_deleted_by_hand(tmp_path):
    for step in range(9_900, 10_101, 20):
        best = None if step == 9_900 else 9_920  # as when the first metric is NaN
        put(tmp_path, step, keep=2, best=best)
        if step == 10_000:
            assert steps(tmp_path) == [9_920, 9_980, 10_000]
            checkpoint.shutil.rmtree(tmp_path / "step-009920")
    assert steps(tmp_path) == [10_080, 10_100]


def test_the_checkpoint_just_written_and_later_ones_stay(tmp_path):
    for step in (10, 20, 30):
        put(tmp_path, step, keep=3)
    put(tmp_path, 25, keep=1)  # a run that was rewound
    assert steps(tmp_path) == [25, 30]
    with pytest.raises(PlauditError, match="keep = 0"):
        put(tmp_path, 40, keep=0)


# --- R11 and R20: damage and malice -------------------------------------------------------------------------------


def flip(data, position):
    return data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :]


@pytest.mark.parametrize("name", FILES)
def test_damage_to_any_file_is_named_and_the_previous_is_found(tmp_path, name):
    put(tmp_path, 1, keep=2)
    file = put(tmp_path, 2, keep=2) / name
    good = file.read_bytes()
    other = (tmp_path / "step-000001" / name).read_bytes()
    damages = [flip(good, i) for i in range(0, len(good), 7)] + [flip(good, len(good) - 1)]
    damages += [good[:-1], good[: len(good) // 2], b"", good + b"\0", other, None]
    for damage in damages:
        file.unlink(missing_ok=True)
        if damage is not None:
            file.write_bytes(damage)
        with pytest.raises(PlauditError, match=f"step-000002/{name}"):
            load(file.parent)
        path, (sentence,) = latest(tmp_path)
        assert path.name == "step-000001"
        assert str(file) in sentence
    file.write_bytes(good)
    assert latest(tmp_path) == (file.parent, [])


def test_nothing_to_find(tmp_path):
    assert latest(tmp_path / "absent") == (None, [])
    (tmp_path / "step-000001").mkdir()
    path, (sentence,) = latest(tmp_path)
    assert path is None
    assert "manifest.json is missing" in sentence
    with pytest.raises(PlauditError, match="absent is not a checkpoint"):
        load(tmp_path / "absent")


class Canary:
    def __reduce__(self):
        return exec, ("import pathlib, os; pathlib.Path(os.environ['CANARY']).touch()",)


@pytest.mark.parametrize("name", [*FILES, "optimizer.pt", "rng_state.pkl", "pytorch_model.bin"])
@pytest.mark.parametrize("trusted", [False, True])
def test_a_pickle_is_never_executed(tmp_path, monkeypatch, name, trusted):
    monkeypatch.setenv("CANARY", str(tmp_path / "canary"))
    path = put(tmp_path / "run", 1)
    (path / name).write_bytes(pickle.dumps(Canary()))
    if trusted:  # a manifest forged to vouch for the file
        entries = {
            file: {"size": (path / file).stat().st_size, "sha256": checkpoint._digest(path / file)}
            for file in FILES[:2]
        }
        if name != "manifest.json":
            (path / "manifest.json").write_bytes(checkpoint._manifest(1, entries))
    with pytest.raises(PlauditError, match=name if not trusted else "step-000001"):
        unpack(*load(path))
    assert not (tmp_path / "canary").exists()
    pickle.loads(pickle.dumps(Canary()))
    assert (tmp_path / "canary").exists()


def test_links_folders_and_giant_headers_are_refused(tmp_path):
    path = put(tmp_path, 1)
    (path / "more").mkdir()
    with pytest.raises(PlauditError, match="more is not a plain file"):
        load(path)
    (path / "more").rmdir()
    (path / "state.json").rename(tmp_path / "state.json")
    (path / "state.json").symlink_to(tmp_path / "state.json")
    with pytest.raises(PlauditError, match=r"state\.json is not a plain file"):
        load(path)
    (path / "state.json").unlink()
    (tmp_path / "state.json").rename(path / "state.json")
    (path / "tensors.safetensors").write_bytes((2**40).to_bytes(8, "little") + b"{" * 100)
    entries = {
        file: {"size": (path / file).stat().st_size, "sha256": checkpoint._digest(path / file)} for file in FILES[:2]
    }
    (path / "manifest.json").write_bytes(checkpoint._manifest(1, entries))
    with pytest.raises(PlauditError, match=r"tensors\.safetensors announces a header of 1,099,511,627,776 bytes"):
        load(path)


def test_a_desktop_file_does_not_cost_a_checkpoint(tmp_path):
    path = put(tmp_path, 1)
    (path / ".DS_Store").write_bytes(b"icons")
    assert is_whole(path)
