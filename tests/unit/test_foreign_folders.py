"""Whose folder a run may go into."""

import pytest

from plaudit.errors import PlauditError
from plaudit.run import Run

SETTINGS = {"model": "m", "verb": "dpo"}


@pytest.mark.parametrize("name", ["thesis.txt", "metrics.jsonl", "final/model.safetensors", ".gitignore"])
def test_s3_12_a_folder_with_files_of_somebody_elses_is_refused(name, tmp_path):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("{}")
    with pytest.raises(PlauditError, match=r"holds files that no run of plaudit left there; choose another --output\."):
        Run.open(tmp_path, SETTINGS)
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()] == [name]
    assert (tmp_path / name).read_text() == "{}"


def test_s3_12_what_is_empty_or_a_runs_is_taken(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / ".gitkeep").touch()
    Run.open(tmp_path / "empty", SETTINGS).close()
    (tmp_path / "empty" / "notes.txt").write_text("mine, put there later")
    (tmp_path / "empty" / "config.yaml").unlink()  # as after a mistake before the first step
    Run.open(tmp_path / "empty", SETTINGS).close()
    (tmp_path / "copied").mkdir()  # by something that leaves hidden files behind
    (tmp_path / "copied" / "config.yaml").write_bytes((tmp_path / "empty" / "config.yaml").read_bytes())
    Run.open(tmp_path / "copied", SETTINGS).close()
    assert (tmp_path / "empty" / "notes.txt").exists()
