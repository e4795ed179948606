"""The tar index: it agrees with webdataset on good shards and names every loss on damaged ones."""

import io
import random
import re
import tarfile
from pathlib import Path

import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm_adapt.data.index import build_index, load_index, split_name
from vlm_adapt.data.problems import BadSample
from vlm_adapt.data.shards import ShardSet, expand, expand_braces, read_sample
from vlm_adapt.data.storage import Settings
from vlm_adapt.data.storage import cache as storage_cache
from vlm_adapt.errors import UserError


def write_tar(path: Path, members, format=tarfile.PAX_FORMAT) -> Path:
    with tarfile.open(path, "w", format=format) as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            if data is None:
                info.type, data = tarfile.DIRTYPE, b""
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def good_members(samples: int, size: int = 700):
    source = random.Random(3)
    for number in range(samples):
        yield f"{number:04d}.jpg", source.randbytes(size + number)
        yield f"{number:04d}.json", b"{}"


def by_webdataset(path: Path):
    data = webdataset.WebDataset(str(path), shardshuffle=False, empty_check=False)
    return [
        (sample.pop("__key__"), {name: data for name, data in sample.items() if name[:2] != "__"})
        for sample in data
    ]


# webdataset leaves its files to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

NAMES = st.lists(
    st.tuples(
        st.sampled_from(["", "a/", "b.d/", "./", "x/y/", "long" * 40 + "/", "ü/"]),
        st.sampled_from(["k1", "k2", "K3", "k é", "n" * 120, "", "__m"]),
        st.sampled_from([".jpg", ".0.jpg", ".JSON", ".mask.png", "", "."]),
    ).map("".join),
    max_size=12,
    unique=True,
)


@settings(max_examples=60, deadline=None)
@given(names=NAMES, format=st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]))
def test_equal_to_webdataset_on_good_shards(tmp_path_factory, names, format):
    """Keys, order, extensions and bytes, over unusual names and the three formats of tar."""
    folder = tmp_path_factory.mktemp("shards")
    groups: dict[str | None, list[str]] = {}
    for name in names:  # webdataset wants the members of a key together, and each extension once
        key, extension = split_name(name) or (None, "")
        if extension.lower() not in [(split_name(n) or ("", ""))[1].lower() for n in groups.get(key, [])]:
            groups.setdefault(key, []).append(name)
    members = [(n, n.encode() * 3) for group in groups.values() for n in group if n and not n.endswith("/")]
    members.insert(len(members) // 2, ("folder", None))
    try:
        path = write_tar(folder / "s.tar", members, format)
    except ValueError:
        return  # a name too long for ustar
    expected = by_webdataset(path)
    shards = ShardSet(path)
    assert list(shards) == expected
    assert len(shards) == shards.samples == len(expected)


@settings(max_examples=500, deadline=None)
@given(st.text(alphabet="ab./_", max_size=12))
def test_keys_are_cut_as_webdataset_cuts_them(name):
    key = webdataset.tariterators.base_plus_ext(name)
    assert (split_name(name) or (None, None)) == key


def test_pax_sizes_and_global_headers(tmp_path):
    path = tmp_path / "s.tar"
    headers = {"comment": "made by hand"}
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT, pax_headers=headers) as archive:
        info = tarfile.TarInfo("a.json")
        info.size, info.pax_headers = 5, {"size": "5", "mtime": "1.5"}
        archive.addfile(info, io.BytesIO(b"hello"))
    assert list(ShardSet(path)) == by_webdataset(path) == [("a", {"json": b"hello"})]


def header_offsets(path: Path) -> list[int]:
    with tarfile.open(path) as archive:
        return [member.offset for member in archive]


def test_cut_in_data_and_cut_at_a_header(tmp_path):
    path = write_tar(tmp_path / "s.tar", good_members(10))
    whole, offsets = path.read_bytes(), header_offsets(path)
    for cut, kept in [(offsets[12] + 600, 6), (offsets[12] + 100, 5), (offsets[13], 6), (offsets[14], 6)]:
        path.write_bytes(whole[:cut])
        index = build_index(path)
        # Between members nobody can tell whether the last sample had more: it is not kept.
        assert len(index) == kept, cut
        assert [index.key(i) for i in range(kept)] == [f"{i:04d}" for i in range(kept)]
        assert any("cut off" in problem.reason for problem in index.problems)
        if cut != offsets[12] + 100:
            assert any(problem.key == f"{kept:04d}" for problem in index.problems)
        if cut == offsets[12] + 600:
            assert any("cut off inside a member" in problem.reason for problem in index.problems)
    path.write_bytes(b"")
    assert len(build_index(path)) == 0 and build_index(path).problems


def test_a_cut_inside_the_end_mark_loses_nothing(tmp_path):
    path = write_tar(tmp_path / "s.tar", good_members(3))
    last = [name for name, _ in good_members(3)][-1]
    with tarfile.open(path) as archive:
        end = archive.getmember(last).offset_data + 512
    path.write_bytes(path.read_bytes()[: end + 100])
    index = build_index(path)
    assert len(index) == 3 and not index.problems


def test_corrupt_header_costs_its_neighbours_and_no_more(tmp_path):
    path = write_tar(tmp_path / "s.tar", good_members(10))
    data = bytearray(path.read_bytes())
    data[header_offsets(path)[9] + 3] ^= 0x40  # the json of sample 4
    path.write_bytes(data)
    index = build_index(path)
    assert [index.key(i) for i in range(len(index))] == ["0000", "0001", "0002", "0003"] + [
        f"{i:04d}" for i in range(6, 10)
    ]
    assert {problem.key for problem in index.problems} == {"", "0004", "0005"}


def test_joined_archives_are_read_on_and_reported(tmp_path):
    one = write_tar(tmp_path / "one.tar", good_members(3)).read_bytes()
    more = [(f"z{name}", data) for name, data in good_members(3)]
    two = write_tar(tmp_path / "two.tar", more).read_bytes()
    path = tmp_path / "joined.tar"
    path.write_bytes(one + two)
    index = build_index(path)
    assert [index.key(i) for i in range(len(index))] == ["0000", "0001", "z0001", "z0002"]
    assert any("joined" in problem.reason for problem in index.problems)


def test_every_fuzzed_shard_is_whole_or_reported(tmp_path):
    """A flipped byte in a header is always found (tar sums headers); all kept samples are unharmed."""
    path = write_tar(tmp_path / "s.tar", good_members(12, size=10))
    whole, expected = path.read_bytes(), dict(by_webdataset(path))
    source = random.Random(5)
    headers = header_offsets(path)
    for _ in range(150):
        data = bytearray(whole)
        data[source.choice(headers) + source.randrange(500)] ^= 1 << source.randrange(8)
        path.write_bytes(data)
        shards = ShardSet(path)
        lost = set(expected) - {key for key, _ in shards}
        # The last part of a header is padding that tar sums too, so no flip goes unseen.
        assert lost and any(problem.key == "" for problem in shards.problems)
        assert len(lost) <= 2 and all(expected[key] == members for key, members in shards)


def test_scattered_and_doubled_members_are_named(tmp_path):
    members = [("a.jpg", b"1"), ("b.jpg", b"2"), ("a.json", b"3"), ("b.json", b"4"), ("c.json", b"5")]
    index = build_index(write_tar(tmp_path / "s.tar", [*members, ("d.txt", b"6"), ("d.TXT", b"7")]))
    assert [index.key(i) for i in range(len(index))] == ["c"]
    reasons = {problem.key: problem.reason for problem in index.problems}
    assert "not adjacent" in reasons["a"] and "not adjacent" in reasons["b"] and "two members" in reasons["d"]


def test_links_are_named_and_not_guessed(tmp_path):
    path = tmp_path / "s.tar"
    with tarfile.open(path, "w") as archive:
        for name in ("a.jpg", "b.jpg"):
            info = tarfile.TarInfo(name)
            if name == "b.jpg":
                info.type, info.linkname = tarfile.LNKTYPE, "a.jpg"
            archive.addfile(info, io.BytesIO(b""))
    index = build_index(path)
    assert len(index) == 1 and "link" in index.problems[0].reason and index.problems[0].key == "b"


def test_cache_is_used_renewed_and_never_trusted_when_broken(tmp_path, monkeypatch):
    path = write_tar(tmp_path / "s.tar", [*good_members(5), ("x.json", b"1"), ("x.json", b"2")])
    cache = tmp_path / "cache"
    first = load_index(path, cache)
    (file,) = (cache / "entries").rglob("*/*")
    with monkeypatch.context() as patch:
        patch.setattr("vlm_adapt.data.index.build_index", None)  # a second look must not scan
        again = load_index(path, cache)
    assert again.members(4) == first.members(4) and again.key(4) == "0004"
    assert again.problems == first.problems != ()
    storage_cache._checked.clear()  # as another process would find it
    file.write_bytes(file.read_bytes()[:100])
    assert len(load_index(path, cache)) == 5
    write_tar(path, good_members(7))
    assert len(load_index(path, cache)) == 7
    assert len(load_index(path, "/proc/no/such/place")) == 7  # unwritable: slower, not an error


def test_patterns(tmp_path):
    for number in range(3):
        write_tar(tmp_path / f"s-{number:03d}.tar", good_members(number + 1))
    names = [str(tmp_path / f"s-{number:03d}.tar") for number in range(3)]
    assert expand(f"{tmp_path}/s-{{000..002}}.tar") == expand(tmp_path) == expand(names) == names
    assert expand(f"{names[2]}::{names[0]}") == [names[2], names[0]]
    assert expand(f"{tmp_path}/s-*.tar") == names
    assert expand_braces("{a,b}{8..10}") == ["a8", "a9", "a10", "b8", "b9", "b10"]
    for missing in ("s-{000..003}.tar", "t-*.tar", "no", "s-000.tar::"):
        missing = f"{tmp_path}/{missing}"
        with pytest.raises(UserError, match=re.escape(str(tmp_path)) + "|empty part"):
            expand(missing)
    with pytest.raises(UserError, match="no shards were named"):
        expand([])
    shards = ShardSet(tmp_path)
    assert shards.counts == (1, 2, 3) and shards.samples == 6
    assert [shards.ref(i).key for i in range(6)] == ["0000", "0000", "0001", "0000", "0001", "0002"]


def test_a_shard_that_changes_under_the_reader_is_an_error(tmp_path):
    path = write_tar(tmp_path / "s.tar", good_members(2))
    ref = ShardSet(path).ref(0)
    write_tar(path, good_members(3))
    with pytest.raises(UserError, match="changed while in use"):
        read_sample(ref)
    path = write_tar(tmp_path / "t.tar", good_members(2))
    shards = ShardSet(path)
    shards.read(0)
    with open(path, "r+b") as file:
        file.truncate(2000)
    with pytest.raises(BadSample, match="ends inside"):
        shards.read(1)


def test_not_tar_files(tmp_path):
    text = tmp_path / "text.tar"
    text.write_text("hello " * 200)
    assert len(build_index(text)) == 0 and "not a tar" in build_index(text).problems[0].reason
    (tmp_path / "z.tar").write_bytes(b"\x1f\x8b\x08\x00" + bytes(600))
    index = build_index(tmp_path / "z.tar", Settings(cache=str(tmp_path / "cache")))
    assert len(index) == 0 and "gzip file is damaged" in index.problems[0].reason
