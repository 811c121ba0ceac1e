"""Sources: pinned bits in, one complete folder out; nothing is downloaded here."""

import dataclasses
import hashlib
import importlib.util
import io
import json
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from plaudit import sources
from plaudit.errors import PlauditError
from plaudit.sources import Source, pull, read_ratings, read_texts, split_reviews

TEXTS = (
    "1\t1.5\tThe Rock is destined to be the 21st Century's new ''Conan''.\r\n"
    "2\t-0.5\tEffective but too tepid biopic of Lilo &amp; Stitch    and  friends \r\n"
    "10605\t0.0\tA caf\u00e9\r\n"
)
RATINGS = "1\t1.5\t1.06249\t[3, 0]\r\n2\t-0.5\t0.8\t[-1, 0, -1, 0]\r\n10605\t0\t0.0\t[4, -4]\r\n"


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def tarball(members: dict[str, str]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content.encode())
            tar.addfile(entry, io.BytesIO(content.encode()))
    return buffer.getvalue()


def reviews(texts: str = TEXTS, ratings: str = RATINGS) -> dict[str, str]:
    return {sources._TEXTS: texts, sources._RATINGS: ratings}


def split(tmp_path: Path, members: dict[str, str]) -> dict[str, list[dict]]:
    (tmp_path / "a.tar.gz").write_bytes(tarball(members))
    folder = tmp_path / "out"
    folder.mkdir(exist_ok=True)
    split_reviews(tmp_path / "a.tar.gz", folder)
    return {
        name: [json.loads(line) for line in (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]
        for name in ("train", "heldout")
    }


class Shop:
    """A package index of one archive, and a count of how often it was asked."""

    def __init__(self, tmp_path: Path, **changes: object) -> None:
        self.archive, self.asked = tmp_path / "shop.zip", 0
        with zipfile.ZipFile(self.archive, "w") as opened:
            opened.writestr("data/thing.txt", "the thing")
            opened.writestr("LICENSE", "do as you like")
            opened.writestr("../../escaped.txt", "out of the folder")
        self.source = Source(
            requirement="thing==1",
            sha256=sha256(self.archive.read_bytes()),
            format="wheel",
            member="data/thing.txt",
            member_sha256=sha256(b"the thing"),
            licence="LICENSE",
            notice="A thing.",
            build=self.build,
        )
        self.source = dataclasses.replace(self.source, **changes)

    def build(self, member: Path, folder: Path) -> str:
        (folder / "thing.txt").write_text(member.read_text().upper())
        return "One thing."

    def download(self, source: Source, folder: Path) -> Path:
        self.asked += 1
        return Path(shutil.copy(self.archive, folder))


@pytest.fixture
def shop(tmp_path, monkeypatch):
    def opened(**changes: object) -> Shop:
        shop = Shop(tmp_path, **changes)
        monkeypatch.setattr(sources, "SOURCES", {"thing": shop.source})
        monkeypatch.setattr(sources, "download", shop.download)
        return shop

    return opened


def test_a_pull_leaves_one_complete_folder_and_the_next_one_finds_it(shop, tmp_path):
    index, cache, told = shop(), tmp_path / "cache", []
    folder = pull("thing", cache, told.append)
    assert folder == cache / "thing"
    assert [path.name for path in cache.iterdir()] == ["thing"]
    assert (folder / "thing.txt").read_text() == "THE THING"
    assert (folder / "LICENSE.txt").read_text() == "do as you like"
    assert (
        folder / "README.txt"
    ).read_text() == "A thing.\nFrom the package thing==1, member data/thing.txt.\nOne thing.\n"
    files = json.loads((folder / "manifest.json").read_text())["files"]
    assert sorted(files) == ["LICENSE.txt", "README.txt", "thing.txt"]
    assert files["thing.txt"] == {"size": 9, "sha256": sha256(b"THE THING")}
    assert told == ["downloading thing==1", "building thing", "One thing."]
    assert pull("thing", cache) == folder
    assert index.asked == 1
    assert not [path for path in tmp_path.rglob("*") if path.name == "escaped.txt"]


@pytest.mark.parametrize(
    "spoil",
    [
        lambda folder: (folder / "manifest.json").unlink(),
        lambda folder: (folder / "manifest.json").write_text('{"files": ['),
        lambda folder: (folder / "manifest.json").write_text("[]"),
        lambda folder: (folder / "thing.txt").write_text("THE THI"),
        lambda folder: (folder / "thing.txt").unlink(),
    ],
)
def test_what_is_not_complete_is_pulled_again(shop, tmp_path, spoil):
    index = shop()
    spoil(pull("thing", tmp_path / "cache"))
    folder = pull("thing", tmp_path / "cache")
    assert index.asked == 2
    assert (folder / "thing.txt").read_text() == "THE THING"
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["thing"]


def test_a_folder_of_another_revision_is_built_again(shop, tmp_path):
    shop()
    pull("thing", tmp_path)
    index = shop(revision=2)
    pull("thing", tmp_path)
    pull("thing", tmp_path)
    assert index.asked == 1


@pytest.mark.parametrize("pin", ["sha256", "member_sha256"])
def test_other_bits_than_the_pinned_ones_are_refused_and_nothing_is_kept(shop, tmp_path, pin):
    shop(**{pin: "0" * 64})
    with pytest.raises(PlauditError, match=r"is not the pinned file \(SHA-256 [0-9a-f]{64} instead of 0{64}\)"):
        pull("thing", tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_build_that_fails_leaves_nothing(shop, tmp_path):
    def fail(member: Path, folder: Path) -> str:
        (folder / "half.txt").write_text("half")
        raise KeyboardInterrupt

    shop(build=fail)
    with pytest.raises(KeyboardInterrupt):
        pull("thing", tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize("broken", [False, True])
def test_of_two_pulls_at_once_the_quicker_one_stands(shop, tmp_path, broken):
    index, cache = shop(), tmp_path / "cache"
    if broken:
        (cache / "thing").mkdir(parents=True)
        (cache / "thing" / "half.txt").write_text("half")
    inner: list[int] = []

    def build(member: Path, folder: Path) -> str:
        if not inner:
            inner.append(1)
            inner.append(pull("thing", cache).stat().st_ino)
        return index.build(member, folder)

    sources.SOURCES["thing"] = dataclasses.replace(index.source, build=build)
    folder = pull("thing", cache)
    assert index.asked == 2
    assert folder.stat().st_ino == inner[1]
    assert not (folder / "half.txt").exists()
    assert [path.name for path in cache.iterdir()] == ["thing"]


def test_a_missing_member_a_missing_package_and_a_wrong_name_are_said_in_a_sentence(shop, tmp_path):
    shop(member="data/other.txt")
    with pytest.raises(PlauditError, match=r"shop.zip has no member 'data/other.txt'"):
        pull("thing", tmp_path / "cache")
    index = shop(needs=("no_such_module",))
    with pytest.raises(PlauditError, match="'no_such_module' is missing: run `pip install no_such_module`"):
        pull("thing", tmp_path / "cache")
    assert index.asked == 0
    with pytest.raises(PlauditError, match="there is no source 'think'; there are thing"):
        pull("think")


def test_a_cache_that_cannot_be_made_is_said_in_a_sentence(shop, tmp_path):
    shop()
    (tmp_path / "file").write_text("")
    with pytest.raises(PlauditError, match="set PLAUDIT_CACHE"):
        pull("thing", tmp_path / "file" / "cache")


def test_where_the_cache_is(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("PLAUDIT_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert sources.cache_folder() == tmp_path / ".cache" / "plaudit"
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert sources.cache_folder() == Path("/x/plaudit")
    monkeypatch.setenv("PLAUDIT_CACHE", "~/own")
    assert sources.cache_folder() == tmp_path / "own"


def test_only_names_of_sources_are_resolved(shop, monkeypatch, tmp_path):
    shop()
    monkeypatch.setenv("PLAUDIT_CACHE", str(tmp_path / "cache"))
    assert sources.resolve("gpt2") == "gpt2"
    assert sources.resolve("thing") == str(tmp_path / "cache" / "thing")


@pytest.mark.parametrize(("form", "choice"), [("wheel", "--only-binary=:all:"), ("sdist", "--no-binary=thing")])
def test_pip_is_asked_for_the_pinned_archive_alone(tmp_path, monkeypatch, form, choice):
    asked = {}

    def run(command, **options):
        asked["command"] = command
        asked["requirements"] = Path(command[command.index("--requirement") + 1]).read_text()
        Path(command[command.index("--dest") + 1], "thing-1.zip").write_text("bits")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(sources.subprocess, "run", run)
    source = dataclasses.replace(Shop(tmp_path).source, format=form, sha256="ab" * 32)
    folder = tmp_path / "fetched"
    folder.mkdir()
    assert sources.download(source, folder) == folder / "thing-1.zip"
    assert asked["command"][:5] == [sys.executable, "-m", "pip", "download", "--no-deps"]
    assert {choice, "--require-hashes", "--no-cache-dir"} <= set(asked["command"])
    assert asked["requirements"] == f"thing==1 --hash=sha256:{'ab' * 32}\n"


@pytest.mark.parametrize(
    ("output", "said"),
    [
        ("WARNING: slow\nERROR: No matching distribution\n   Got abc\n\n", "ERROR: No matching distribution"),
        ("first\nlast\n", "last"),
        ("", "it gave no reason"),
    ],
)
def test_why_pip_failed_is_shown(tmp_path, monkeypatch, output, said):
    monkeypatch.setattr(
        sources.subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 1, "", output)
    )
    with pytest.raises(PlauditError, match=f"pip could not download thing==1: {said}"):
        sources.download(Shop(tmp_path).source, tmp_path)


def test_a_python_without_pip_is_told_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setattr(sources.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(PlauditError, match="-m ensurepip"):
        sources.download(Shop(tmp_path).source, tmp_path)


def test_the_original_lines_are_read():
    assert dict(read_texts(TEXTS)) == {
        "1": (1.5, "The Rock is destined to be the 21st Century's new ''Conan''."),
        "2": (-0.5, "Effective but too tepid biopic of Lilo & Stitch    and  friends"),
        "10605": (0.0, "A caf\u00e9"),
    }
    assert dict(read_ratings(RATINGS)) == {"1": [3.0, 0.0], "2": [-1.0, 0.0, -1.0, 0.0], "10605": [4.0, -4.0]}


@pytest.mark.parametrize(
    ("read", "line", "said"),
    [
        (read_texts, "3\tgood\tA film.", "GroundTruth.txt:4: the mean rating is 'good'"),
        (read_texts, "3\t1.0", "GroundTruth.txt:4: expected a new id and 2 more fields"),
        (read_texts, "2\t1.0\tAgain.", "GroundTruth.txt:4: expected a new id"),
        (read_texts, "x\t1.0\tA film.", "GroundTruth.txt:4: expected a new id"),
        (read_ratings, "3\t1\t0\t[1, 5]", r"anonDataRatings.txt:4: the ratings are '\[1, 5\]'"),
        (read_ratings, "3\t1\t0\t[]", "anonDataRatings.txt:4: the ratings are"),
        (read_ratings, "3\t1\t[1]", "anonDataRatings.txt:4: expected a new id and 3 more fields"),
    ],
)
def test_a_bad_line_is_named(read, line, said):
    with pytest.raises(PlauditError, match=said):
        list(read((TEXTS if read is read_texts else RATINGS) + line + "\r\n"))


def many(count: int) -> dict[str, str]:
    texts = "".join(f"{i}\t1.0\tA film  of {i} words, no more \u2013 and no less.\r\n" for i in range(1, count + 1))
    return reviews(texts, "".join(f"{i}\t1.0\t0\t[1, 2, 0]\r\n" for i in range(1, count + 1)))


def test_prompt_and_completion_are_the_snippet(tmp_path):
    rows = split(tmp_path, many(300))
    assert len(rows["train"]) + len(rows["heldout"]) == 300
    for row in rows["train"] + rows["heldout"]:
        assert row["prompt"] + row["completion"] == f"A film  of {row['id']} words, no more \u2013 and no less."
        assert row["completion"].startswith(" ")
        assert row["ratings"] == [1.0, 2.0, 0.0]
    order = [int(row["id"]) for row in rows["train"]]
    assert order == sorted(order, key=lambda i: hashlib.sha256(str(i).encode()).digest())
    lengths = {len(row["prompt"].split()) for row in rows["train"]}
    assert lengths == {3, 4, 5}


def test_the_split_is_fixed_by_the_id_alone(tmp_path):
    few, lots = split(tmp_path, many(100)), split(tmp_path, many(300))
    held = {name: {row["id"] for row in rows["heldout"]} for name, rows in (("few", few), ("lots", lots))}
    assert held["few"] == {i for i in held["lots"] if int(i) <= 100}
    assert held["lots"].isdisjoint(row["id"] for row in lots["train"])
    assert 0.05 < len(held["lots"]) / 300 < 0.15
    assert held["few"] == {str(i) for i in range(1, 101) if hashlib.sha256(str(i).encode()).digest()[0] % 10 == 0}


def test_copies_of_a_snippet_are_on_one_side(tmp_path):
    texts = "".join(
        f"{i}\t0\t{'A' if i % 2 else 'a'} pretentious mess of a film{'.' * (i % 3)}\r\n" for i in range(1, 61)
    )
    rows = split(tmp_path, reviews(texts, "".join(f"{i}\t0\t0\t[0]\r\n" for i in range(1, 61))))
    assert sorted(len(side) for side in rows.values()) == [0, 60]


def test_snippets_with_nothing_to_continue_are_counted(tmp_path):
    snippets = ["No surprises.", "One two three four five six", "Slummer", "No real surprises.", "A big yawn  "]
    texts = "".join(f"{i}\t0\t{snippet}\r\n" for i, snippet in enumerate(snippets, 1))
    ratings = "".join(f"{i}\t0\t0\t[0]\r\n" for i in range(1, 6))
    (tmp_path / "a.tar.gz").write_bytes(tarball(reviews(texts, ratings)))
    assert split_reviews(tmp_path / "a.tar.gz", tmp_path).endswith("4 snippets too short to continue.")
    rows = (tmp_path / "train.jsonl").read_text() + (tmp_path / "heldout.jsonl").read_text()
    assert [json.loads(line)["id"] for line in rows.splitlines()] == ["2"]


@pytest.mark.parametrize(
    ("ratings", "said"),
    [
        (RATINGS.replace("[3, 0]", "[3, 1]"), "the ratings of snippet 1 in .* don't have the mean"),
        (RATINGS.replace("2\t-0.5", "3\t-0.5"), "2 snippets of a.tar.gz lack their text or their ratings"),
    ],
)
def test_ratings_of_other_snippets_are_refused(tmp_path, ratings, said):
    with pytest.raises(PlauditError, match=said):
        split(tmp_path, reviews(ratings=ratings))


def test_members_named_out_of_the_folder_are_never_written_and_links_never_followed(tmp_path):
    inside = tmp_path / "in"
    inside.mkdir()
    split(inside, reviews() | {"../escaped.txt": "x", f"{tmp_path}/escaped.txt": "x"})
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
    assert sorted(path.name for path in inside.iterdir()) == ["a.tar.gz", "out"]
    with tarfile.open(inside / "link.tar.gz", "w:gz") as tar:
        entry = tarfile.TarInfo(sources._TEXTS)
        entry.type, entry.linkname = tarfile.SYMTYPE, "../target.txt"
        tar.addfile(entry)
        target = tarfile.TarInfo("target.txt")
        target.size = 5
        tar.addfile(target, io.BytesIO(b"1\t0\tA"))
    with pytest.raises(PlauditError, match=f"has no file '{sources._TEXTS}'"):
        split_reviews(inside / "link.tar.gz", inside)


def byte_symbols() -> list[str]:
    """GPT-2's printable stand-ins for the 256 bytes, in the order of the bytes."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = (n for n in range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


def write_gguf(path: Path) -> None:
    """A llama of one layer, its projections in 4-bit blocks (type Q4_1), and a byte-pair tokenizer of two merges."""
    gguf = pytest.importorskip("gguf")
    np = pytest.importorskip("numpy")
    tokens = ["<|endoftext|>", "<|start|>", *byte_symbols(), "he", "the"]
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(64)
    writer.add_block_count(1)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(16)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3] + [1] * 258)
    writer.add_token_merges(["h e", "t he"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(0)
    writer.add_pad_token_id(0)
    writer.add_unk_token_id(0)
    writer.add_add_bos_token(False)
    writer.add_chat_template("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    random = np.random.default_rng(0)
    for name, shape in {"attn_q": 64, "attn_k": 32, "attn_v": 32, "attn_output": 64, "ffn_gate": 64}.items():
        weight = random.normal(size=(shape, 64)).astype(np.float32)
        quantised = gguf.quants.quantize(weight, gguf.GGMLQuantizationType.Q4_1)
        writer.add_tensor(f"blk.0.{name}.weight", quantised, raw_dtype=gguf.GGMLQuantizationType.Q4_1)
    for name in ("blk.0.ffn_up", "blk.0.ffn_down", "token_embd"):
        rows = len(tokens) if name == "token_embd" else 64
        writer.add_tensor(f"{name}.weight", random.normal(size=(rows, 64)).astype(np.float32))
    for name in ("blk.0.attn_norm", "blk.0.ffn_norm", "output_norm"):
        writer.add_tensor(f"{name}.weight", random.normal(size=64).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_model_becomes_a_plain_folder(tmp_path):
    import torch
    from gguf import GGUFReader, dequantize
    from transformers import AutoModelForCausalLM, AutoTokenizer

    write_gguf(tmp_path / "tiny.gguf")
    folder = tmp_path / "out"
    folder.mkdir()
    torch.manual_seed(5)
    before = torch.get_rng_state()
    assert sources.convert(tmp_path / "tiny.gguf", folder).endswith("with a vocabulary of 260 tokens.")
    assert torch.equal(torch.get_rng_state(), before)
    assert not list(folder.glob("*.gguf"))
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.bfloat16
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    # The file's own numbers, unpacked without transformers; llama.cpp keeps the rotary halves of q and k interleaved.
    raw = {t.name: torch.tensor(dequantize(t.data, t.tensor_type)) for t in GGUFReader(tmp_path / "tiny.gguf").tensors}
    layer = model.model.layers[0]
    key = raw["blk.0.attn_k.weight"].reshape(2, 8, 2, 64).transpose(1, 2).reshape(32, 64)
    assert torch.equal(layer.self_attn.k_proj.weight, key.bfloat16())
    assert torch.equal(layer.self_attn.v_proj.weight, raw["blk.0.attn_v.weight"].bfloat16())
    assert torch.equal(layer.mlp.down_proj.weight, raw["blk.0.ffn_down.weight"].bfloat16())
    assert torch.equal(model.model.norm.weight, raw["output_norm.weight"].bfloat16())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (
        "<|start|>",
        "<|endoftext|>",
        "<|endoftext|>",
    )
    assert tokenizer.model_max_length == 64
    assert tokenizer.chat_template
    ids = tokenizer("the caf\u00e9<|endoftext|>").input_ids
    assert tokenizer.decode(ids) == "the caf\u00e9<|endoftext|>"
    assert (ids[0], len(ids), ids[-1]) == (259, 8, 0)


@pytest.mark.parametrize("wrong", ["more tokens than the model", "another way with spaces"])
def test_a_misread_tokenizer_is_refused(wrong, tmp_path, monkeypatch):
    from tokenizers import decoders
    from transformers import AutoTokenizer

    write_gguf(tmp_path / "tiny.gguf")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path, gguf_file="tiny.gguf")
    if wrong == "more tokens than the model":
        tokenizer.add_tokens([f"<{i}>" for i in range(99)])
    else:
        tokenizer.backend_tokenizer.decoder = decoders.Metaspace()
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *names, **options: tokenizer)
    with pytest.raises(PlauditError, match=r"transformers [0-9.]+ misreads the tokenizer of tiny.gguf"):
        sources.convert(tmp_path / "tiny.gguf", tmp_path)


def judge():
    path = Path(__file__).parents[2] / "recipes" / "judge.py"
    spec = importlib.util.spec_from_file_location("judge", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_judge_reads_prompt_and_completion_together():
    pytest.importorskip("vaderSentiment")
    scores = judge().vader(["It is not", "It is", "The"], [" good.", " good.", " table."], id=["1", "2", "3"])
    # VADER's own figures for these sentences: "good" weighs 1.9, a negation -0.74 of it; then x / sqrt(x^2 + 15).
    assert scores == pytest.approx([-1.406 / (1.406**2 + 15) ** 0.5, 1.9 / (1.9**2 + 15) ** 0.5, 0.0], abs=1e-4)


def test_a_missing_judge_is_said_in_a_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "vaderSentiment.vaderSentiment", None)
    with pytest.raises(PlauditError, match="run `pip install vaderSentiment`"):
        judge().vader(["a"], ["b"])
