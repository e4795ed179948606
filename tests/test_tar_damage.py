"""Archives cut at any byte and flipped anywhere: every sample is read as it was, or named as lost."""

from __future__ import annotations

import random
import tarfile
from pathlib import Path

import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st
from shard_server import members, write_tar

from vlm_adapt.data.index import build_index
from vlm_adapt.data.shards import ShardSet

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}
# webdataset leaves its files to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def long_members(samples: int) -> list[tuple[str, bytes]]:
    """Every third name needs an extended header in GNU and pax, a prefix in ustar."""
    return [
        (("folder/" * 15 if number % 3 == 0 else "") + name, data)
        for number, (name, data) in enumerate(
            (name, data) for name, data in members(samples, size=700) if True
        )
        for number in [int(name[:4])]
    ]


@pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)
def test_cut_at_any_byte(tmp_path, format):
    path = write_tar(tmp_path / "s.tar", long_members(6), format)
    whole, expected = path.read_bytes(), dict(ShardSet(path))
    with tarfile.open(path) as archive:
        last = archive.getmembers()[-1]
    end = last.offset_data + -(-last.size // 512) * 512
    source = random.Random(1)
    blocks = range(0, len(whole), 512)
    cuts = {*blocks, *(at + 1 for at in blocks), *(at - 1 for at in blocks if at)}
    cuts |= {source.randrange(len(whole)) for _ in range(100)}
    with open(path, "r+b") as file:
        for cut in sorted(cuts, reverse=True):
            file.truncate(cut)
            shards = ShardSet(path)
            found = dict(shards)
            assert all(expected[key] == members for key, members in found.items()), cut
            named = {problem.key for problem in shards.problems}
            if cut > end:  # some of the end mark is left: nothing is lost
                assert found == expected and not named, cut
            else:
                assert len(found) < 6 and "" in named, cut
                # The last sample that is kept is followed by the one that is named, as far as it is known.
                assert list(found) == list(expected)[: len(found)], cut


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_flipped_anywhere(tmp_path_factory, data):
    """In a header: named, and no more than the neighbours lost. In a member: the decoder's business."""
    folder = tmp_path_factory.mktemp("flips")
    format = data.draw(st.sampled_from(list(FORMATS.values())))
    path = write_tar(folder / "s.tar", long_members(8), format)
    whole, index = bytearray(path.read_bytes()), build_index(path)
    expected = dict(ShardSet(path))
    data_of = [
        range(offset, offset + size) for i in range(len(index)) for _, offset, size in index.members(i)
    ]
    with tarfile.open(path) as archive:  # all that tar sums (not the long names themselves), and data
        spans = [range(at, at + 512) for m in archive for at in (m.offset, m.offset_data - 512)] + data_of
    places = st.sampled_from(spans).flatmap(lambda span: st.integers(span[0], span[-1]))
    flips = data.draw(st.lists(st.tuples(places, st.integers(0, 7)), min_size=1, max_size=3))
    for place, bit in flips:
        whole[place] ^= 1 << bit
    path.write_bytes(whole)
    shards = ShardSet(path)
    found = dict(shards)
    lost = set(expected) - set(found)
    named = {problem.key for problem in shards.problems}
    for key, parts in found.items():
        if expected.get(key) != parts:  # only where a flip lies in the data itself, and of the same sizes
            assert key in expected and parts.keys() == expected[key].keys(), (key, flips)
            assert {name: len(part) for name, part in parts.items()} == {
                name: len(part) for name, part in expected[key].items()
            }
            assert any(place in span for place, _ in flips for span in data_of)
    if lost:
        assert named and len(lost) <= 3 * len(flips)  # a long name's two headers, and the samples beside


def test_what_webdataset_writes_is_read(tmp_path):
    """Its own writer, plain and gz, with metadata, upper-case extensions, several dots and folders."""
    for name in ("w.tar", "w.tar.gz"):
        with webdataset.TarWriter(str(tmp_path / name), encoder=False) as writer:
            for number in range(5):
                key = ("deep/" * 30 if number % 2 else "") + f"k{number}"
                content = {"JPG": b"j%d" % number, "mask.0.PNG": b"m", "json": b"{}"}
                writer.write({"__key__": key, **content})
        data = webdataset.WebDataset(str(tmp_path / name), shardshuffle=False)
        expected = [
            (sample["__key__"], {name: part for name, part in sample.items() if name[:2] != "__"})
            for sample in data
        ]
        found = list(ShardSet(tmp_path / name, cache=tmp_path / "cache"))
        assert found == expected and len(found) == 5 and set(found[1][1]) == {"jpg", "mask.0.png", "json"}


@pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)
def test_sparse_members_are_named_and_the_rest_is_read(tmp_path, format):
    """GNU tar writes them with --sparse: in its own format, and in pax with a map in the data."""
    import shutil
    import subprocess

    if not shutil.which("tar"):
        pytest.skip("needs the tar command")
    for name in ("a.json", "b.bin", "c.json"):
        (tmp_path / name).write_bytes(b"{}")
    with open(tmp_path / "b.bin", "wb") as file:
        for hole in range(1, 9):  # more than four pieces: GNU's format needs further blocks for the map
            file.seek(hole * 1_000_000)
            file.write(b"x" * 4096)
    kind = {"ustar": "gnu", "gnu": "gnu", "pax": "posix"}[{v: k for k, v in FORMATS.items()}[format]]
    words = ["tar", "--sparse", f"--format={kind}", "-cf", "s.tar", "a.json", "b.bin", "c.json"]
    if subprocess.run(words, cwd=tmp_path, capture_output=True).returncode:
        pytest.skip("this tar knows no sparse files")
    index = build_index(tmp_path / "s.tar")
    assert [index.key(number) for number in range(len(index))] == ["a", "c"]
    ((problem),) = index.problems
    assert problem.key.endswith("b") and "sparse" in problem.reason, problem


def test_headers_of_unusual_kinds(tmp_path):
    """Global pax headers that set a size or a path, a contiguous file, a device, a volume's name."""
    path = tmp_path / "s.tar"
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as archive:
        for name, kind in [("a.txt", tarfile.CONTTYPE), ("b.txt", tarfile.CHRTYPE), ("v.x", b"V"),
                           ("p.txt", tarfile.FIFOTYPE), ("c.txt", tarfile.REGTYPE)]:  # fmt: skip
            info = tarfile.TarInfo(name)
            info.type = kind
            archive.addfile(info)
    data = webdataset.WebDataset(str(path), shardshuffle=False)
    expected = [sample["__key__"] for sample in data]
    shards = ShardSet(path)
    assert [key for key, _ in shards] == expected == ["a", "c"] and not shards.problems


def test_the_damage_of_a_folder_of_shards_is_named_by_shard(tmp_path):
    for number in range(3):
        write_tar(tmp_path / f"{number}.tar", members(4, prefix=f"{number}-"))
    Path(tmp_path / "1.tar").write_bytes((tmp_path / "1.tar").read_bytes()[:9000])
    shards = ShardSet(tmp_path)
    assert shards.counts[::2] == (4, 4) and shards.counts[1] < 4
    assert {Path(problem.shard).name for problem in shards.problems} == {"1.tar"}


def test_a_damaged_pax_header_is_named(tmp_path):
    """Its records lie one after the other without a gap, which a wrong length or separator breaks."""
    path = write_tar(tmp_path / "s.tar", long_members(3), tarfile.PAX_FORMAT)
    whole = path.read_bytes()
    assert b" path=folder" in whole
    for change in (b" path=folder", b"_path=folder"), (b" path=folder", b" path_folder"):
        path.write_bytes(whole.replace(*change, 1))
        shards = ShardSet(path)
        assert len(shards) < 3 and "" in {problem.key for problem in shards.problems}
