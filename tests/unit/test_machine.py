"""What the machine says of itself: its processor, and the memory that is free, on trees of files like the system's."""

from __future__ import annotations

import subprocess
import sys

import pytest

from plaudit import machine

MEMINFO = "MemTotal:  16000 kB\nMemFree:  2000 kB\nMemAvailable:  8000 kB\n"
AVAILABLE = 8000 * 1024


@pytest.fixture
def system(tmp_path):
    """Writes a tree of the system's files, and says what is free there."""

    def free(cgroup="0::/\n", **files):
        contents = {"proc/meminfo": MEMINFO, "proc/self/cgroup": cgroup, **files}
        for name, content in contents.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(str(content))
        return machine.free_memory(tmp_path / "proc", tmp_path / "groups")

    return free


def test_what_the_machine_has_left(system):
    assert system() == AVAILABLE


def test_a_system_that_does_not_say(tmp_path):
    assert machine.free_memory(tmp_path / "proc", tmp_path / "groups") is None


def test_a_container_s_limit_lies_at_the_root_whatever_the_group_is_called(system):
    files = {"groups/memory.max": 5_000_000, "groups/memory.current": 1_500_000}
    stat = "anon 1000000\ninactive_file 250000\nactive_file 7\n"
    assert system("0::/somewhere/else\n", **files, **{"groups/memory.stat": stat}) == 3_750_000


def test_the_tightest_of_nested_groups_counts(system):
    files = {
        "groups/job/memory.max": 4_000_000,
        "groups/job/memory.current": 3_000_000,
        "groups/job/step/memory.max": 3_000_000,
        "groups/job/step/memory.current": 1_000_000,
        "groups/job/step/task/memory.max": "max\n",
        "groups/job/step/task/memory.current": 900_000,
    }
    assert system("0::/job/step/task\n", **files) == 1_000_000


def test_a_group_that_is_full_leaves_nothing(system):
    assert system(**{"groups/memory.max": 1000, "groups/memory.current": 5000}) == 0


def test_the_old_kind_of_group(system):
    files = {
        "groups/memory/batch/memory.limit_in_bytes": 6_000_000,
        "groups/memory/batch/memory.usage_in_bytes": 2_000_000,
        "groups/memory/batch/memory.stat": "inactive_file 5\ntotal_inactive_file 9\n",
        "groups/memory/memory.limit_in_bytes": 2**63 - 4096,  # what stands for no limit
        "groups/memory/memory.usage_in_bytes": 9_000_000,
    }
    assert system("4:cpu,memory:/batch\n3:cpuset:/memory\n0::/\n", **files) == 4_000_005


def test_processors_of_one_name_are_told_apart(tmp_path):
    other = "vendor_id\t: x\ncpu family\t: 26\nmodel\t\t: 2\nmodel name\t: AMD EPYC\n\nmodel name\t: second\n"
    (tmp_path / "cpuinfo").write_text(other)
    assert machine.processor(tmp_path) == "AMD EPYC (family 26, model 2)"
    (tmp_path / "cpuinfo").write_text("BogoMIPS : 50\n")
    assert "AMD EPYC" not in machine.processor(tmp_path)
    assert machine.processor(tmp_path)


FAULTS = """
import resource, sys
from plaudit import machine
if sys.argv[1:]:
    machine.keep_memory()
for turn in range(3):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    held = bytearray(b"x") * 2**26
    del held
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the allocator of another system")
def test_memory_that_was_freed_is_used_again_without_the_system_clearing_it():
    asked = [[], ["keep"]]
    faults = [
        int(subprocess.run([sys.executable, "-c", FAULTS, *words], capture_output=True, check=True).stdout)
        for words in asked
    ]
    assert faults[1] < faults[0] / 4  # each page of 64 MB, whatever their size is here


HANDED = """
from plaudit import machine

def left():
    before = machine.resident_mb()
    held = bytearray(b"x") * 2**26
    after = bytearray(b"y") * 2**21
    del held
    return machine.resident_mb() - before

machine.keep_memory()
with machine.handing_back():
    print(left())
print(left())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the allocator of another system")
def test_memory_goes_back_where_it_is_asked_to_and_is_kept_again_afterwards():
    done = subprocess.run([sys.executable, "-c", HANDED], capture_output=True, check=True, text=True)
    handed, kept = map(float, done.stdout.split())
    assert handed < 16  # of 64 MB
    assert kept > 60


HOLES = """
from plaudit import machine

machine.keep_memory()
before = machine.bounded(0.0)
blocks = [bytearray(b"x") * size for _ in range(8) for size in (2**24, 2**16)]
del blocks[::2]
print(machine.resident_mb() - before)
print(machine.bounded(before))
print(machine.resident_mb() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the allocator of another system")
def test_holes_between_what_lasts_go_back_to_the_system():
    """Of eight blocks of 16 MB, with small ones between them."""
    done = subprocess.run([sys.executable, "-c", HOLES], capture_output=True, check=True, text=True)
    held, told, left = map(float, done.stdout.split())
    assert held > 128
    assert told == 0
    assert left < 16


def test_what_is_held_is_compared_with_what_the_same_took_before(monkeypatch):
    given = []
    monkeypatch.setattr(machine, "release", lambda: given.append(True))
    monkeypatch.setattr(machine, "_usual", {"M_MMAP_MAX": 0})
    before, told = 0.0, []
    for now in (100.0, 149.0, 151.0, 120.0, 175.0, 181.0):
        monkeypatch.setattr(machine, "resident_mb", lambda now=now: now)
        before = machine.bounded(before)
        told.append((before, len(given)))
    assert told == [(100.0, 0), (100.0, 0), (0.0, 1), (120.0, 1), (120.0, 1), (0.0, 2)]
    monkeypatch.setattr(machine, "_usual", {})
    assert machine.bounded(100.0) == 100.0
    assert len(given) == 2
