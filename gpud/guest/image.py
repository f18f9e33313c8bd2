"""The image store: immutable base images, named by their content, that every guest's disk stands on.

    images/
      sha256-<hex>.qcow2      an image, mode 0444; its name is its digest
      sha256-<hex>.json       what it was when it came in, to notice later changes without hashing
      by-name/<NAME>          symlink to an image; what operators and the configuration say
      .incoming-*/            an image on its way in; locked by whoever brings it
      .lock                   held for every change of names

An instance holds a hard link to its base, so the kernel counts the users of an image: one link is the
store's own, each further one is an instance.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import re
import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Final

import structlog

from gpud.config import IMAGE_NAME
from gpud.errors import Code, GpudError
from gpud.guest import copying, imagerecord, intake
from gpud.guest.copying import Progress
from gpud.guest.durable import TEMPORARY_SUFFIX, commit, sync
from gpud.guest.imagerecord import Image, Record
from gpud.guest.intake import Candidate, Judge

_DIGEST: Final = re.compile(r"sha256:([0-9a-f]{64})")
_IMAGE_FILE: Final = re.compile(r"sha256-([0-9a-f]{64})\.qcow2")
_INCOMING: Final = ".incoming-"

__all__ = ["Image", "ImageStore"]

_log = structlog.get_logger()


class ImageStore:
    """The images below one directory. Any number of processes may use it at once.

    Args:
        root: ``<state_dir>/images``; made when the first image is added. It must be on the file system
            of the instances, for they hold hard links into it.
        clock: Seconds since the epoch.
    """

    def __init__(self, root: Path, clock: Callable[[], float] = time.time) -> None:
        self._root = root
        self._by_name = root / "by-name"
        self._clock = clock

    async def add(
        self,
        source: Path,
        name: str,
        expected_sha256: str | None = None,
        progress: Progress | None = None,
        judge: Judge | None = None,
    ) -> Image:
        """Bring an image in under a name; nothing of it is visible before it is found good.

        A qcow2 file is kept byte for byte; a raw disk is converted. The same content is kept once. A
        name that is taken moves to the new image; the old one stays until it is removed.

        Args:
            source: The file to copy.
            name: What to call it.
            expected_sha256: SHA-256 (hex) of ``source`` as its publisher states it.
            progress: Told of the bytes copied and their total.
            judge: Looks at the copy, and raises what forbids to clone it. Without one nobody knows
                whether the image is sealed.

        Raises:
            GpudError: ``image_invalid`` for an unusable image, name or checksum; ``state_unusable``
                when the store cannot be written.
        """
        if not IMAGE_NAME.fullmatch(name):
            raise _invalid(f"{name!r} cannot be an image's name", "letters, digits and ._- only")
        with self._storage_errors():
            self._make_directories()
            self.sweep()
            async with self._incoming() as incoming:
                candidate = await intake.take_in(source, incoming, expected_sha256, progress, judge)
                return await asyncio.to_thread(self._publish, candidate, name)

    def list(self) -> tuple[Image, ...]:
        """Every image, damaged ones included, by name and then by digest."""
        with self._storage_errors():
            if not self._root.is_dir():
                return ()
            names = self._names()
            files = (_IMAGE_FILE.fullmatch(entry.name) for entry in self._root.iterdir())
            digests = {f"sha256:{file[1]}" for file in files if file} | set(names.values())
            images = (self._load(digest, names) for digest in digests)
            return tuple(
                sorted(images, key=lambda image: (not image.names, image.names, image.digest))
            )

    def resolve(self, name_or_digest: str) -> Image:
        """Find a usable image, by comparing its file's size and time with what they were.

        Raises:
            GpudError: ``image_invalid`` when there is none, or its file is missing or was changed.
        """
        with self._storage_errors():
            image = self._find(name_or_digest)
        if image.fault:
            raise _invalid(
                f"image {name_or_digest} in {self._root} cannot be used: {image.fault}",
                "gpud image verify tells whether its content is intact; adding it again repairs it",
            )
        return image

    async def verify(self, name_or_digest: str, progress: Progress | None = None) -> Image:
        """Hash an image's whole content; one that is intact is usable again afterwards.

        Raises:
            GpudError: ``image_invalid`` when the content is not what its digest says.
        """
        with self._storage_errors():
            image = self._find(name_or_digest)
            if f"sha256:{await copying.sha256(image.path, progress)}" != image.digest:
                raise _invalid(
                    f"image {name_or_digest} is damaged: the content of {image.path} has changed",
                    "add it again from its source; guests that stand on it may be damaged too",
                )
            if image.fault:
                size_bytes = await intake.examine(image.path)
                intact = Candidate(image.path, image.digest, size_bytes, image.sealed)
                with self._locked():
                    self._write_record(image.path, intact)
            return self.resolve(image.digest)

    def remove(self, name_or_digest: str) -> None:
        """Remove a name, and the content with its last name; or, by digest, all names and the content.

        Raises:
            GpudError: ``image_in_use`` when the content would have to go while instances stand on it;
                ``image_invalid`` when there is no such image.
        """
        with self._storage_errors(), self._locked():
            image = self._find(name_or_digest)
            names = image.names if name_or_digest == image.digest else (name_or_digest,)
            last = set(names) == set(image.names)
            if last and image.in_use_by:
                raise GpudError(
                    Code.IMAGE_IN_USE,
                    f"image {name_or_digest} is in use by {image.in_use_by} instance(s)",
                    hint="it can be removed once they are terminated",
                )
            for name in names:
                (self._by_name / name).unlink()
            if last:
                image.path.unlink(missing_ok=True)
                imagerecord.path_of(image.path).unlink(missing_ok=True)
                sync(self._root)

    def sweep(self) -> None:
        """Remove what interrupted additions left behind; those under way are not touched."""
        if not self._root.is_dir():
            return
        with self._storage_errors(), self._locked():
            for entry in tuple(self._root.iterdir()):
                if entry.name.startswith(_INCOMING):
                    _remove_unless_locked(entry)
                elif entry.suffix == TEMPORARY_SUFFIX or _is_lone_record(entry):
                    entry.unlink()

    def _make_directories(self) -> None:
        there = self._root if self._root.is_dir() else self._root.parent
        if there.is_dir() and there.stat().st_uid != os.geteuid():
            # Linux lets an instance link only to a file of its own user (fs.protected_hardlinks).
            raise GpudError(
                Code.STATE_UNUSABLE,
                f"{there} belongs to uid {there.stat().st_uid}, and so must all images in it",
                hint="run this as the user that gpud runs as: runuser -u gpud -- gpud image add",
            )
        for directory in (self._root, self._by_name):
            if not directory.is_dir():
                directory.mkdir(parents=True)
                directory.chmod(0o755)  # not left to the umask

    def _publish(self, candidate: Candidate, name: str) -> Image:
        digest = f"sha256:{candidate.sha256}"
        path = self._path(digest)
        with self._locked():
            names = self._names()
            there = self._load(digest, names)
            if there.fault:  # not there yet, or damaged
                candidate.file.chmod(0o444)  # QEMU runs as another user
                self._write_record(path, candidate)
                commit(candidate.file, path)
            elif candidate.sealed and not there.sealed:
                self._write_record(path, replace(candidate, file=path))
            previous = names.get(name)
            if previous not in {None, digest}:
                _log.info("image name moved", name=name, digest=digest, previous=previous)
            link = self._by_name / f".{name}{TEMPORARY_SUFFIX}"
            link.unlink(missing_ok=True)
            link.symlink_to(Path("..", path.name))
            commit(link, self._by_name / name)
            return self.resolve(digest)

    def _find(self, name_or_digest: str) -> Image:
        all_names = self._names()
        digest = all_names.get(name_or_digest, name_or_digest)
        known = _DIGEST.fullmatch(digest) and (
            digest in all_names.values() or self._path(digest).exists()
        )
        if not known:
            raise _invalid(
                f"there is no image {name_or_digest!r} in {self._root}",
                "gpud image add brings one in",
            )
        return self._load(digest, all_names)

    def _load(self, digest: str, all_names: Mapping[str, str]) -> Image:
        path = self._path(digest)
        names = tuple(sorted(name for name, named in all_names.items() if named == digest))
        try:
            found = path.stat()
        except FileNotFoundError:
            return Image(digest, path, names, 0, 0, 0, 0, fault="its file is missing")
        record = imagerecord.read(path)
        fault = "its record is missing or unreadable" if record is None else record.differs(found)
        record = record or Record(0, 0, 0, 0)
        return Image(
            digest=digest,
            path=path,
            names=names,
            size_bytes=found.st_size,
            virtual_size_bytes=record.virtual_size_bytes,
            added_at=record.added_at,
            in_use_by=found.st_nlink - 1,
            sealed=record.sealed,
            fault=fault,
        )

    def _write_record(self, path: Path, candidate: Candidate) -> None:
        found = candidate.file.stat()
        record = Record(
            found.st_size, found.st_mtime_ns, candidate.virtual_size_bytes, self._clock(),
            candidate.sealed,
        )  # fmt: skip
        imagerecord.write(path, record)

    def _names(self) -> dict[str, str]:
        if not self._by_name.is_dir():
            return {}
        targets = {
            link.name: _IMAGE_FILE.fullmatch(link.readlink().name)
            for link in self._by_name.iterdir()
            if IMAGE_NAME.fullmatch(link.name) and link.is_symlink()
        }
        return {name: f"sha256:{file[1]}" for name, file in targets.items() if file}

    def _path(self, digest: str) -> Path:
        return self._root / f"{digest.replace(':', '-')}.qcow2"

    @contextmanager
    def _locked(self) -> Iterator[None]:
        descriptor = os.open(self._root / ".lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)  # held for milliseconds only
            yield
        finally:
            os.close(descriptor)

    @asynccontextmanager
    async def _incoming(self) -> AsyncIterator[Path]:
        with self._locked():  # so that no sweep comes between making and locking it
            directory = Path(tempfile.mkdtemp(prefix=_INCOMING, dir=self._root))
            descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
            fcntl.flock(descriptor, fcntl.LOCK_EX)  # the kernel lifts it however we end
        try:
            yield directory
        finally:
            await asyncio.to_thread(shutil.rmtree, directory)
            os.close(descriptor)

    @contextmanager
    def _storage_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise GpudError(
                Code.STATE_UNUSABLE, f"the image store {self._root} cannot be used: {error}"
            ) from error


def _remove_unless_locked(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return
    else:
        shutil.rmtree(directory)
        _log.info("interrupted image addition removed", directory=str(directory))
    finally:
        os.close(descriptor)


def _is_lone_record(path: Path) -> bool:
    return path.suffix == ".json" and not path.with_suffix(".qcow2").exists()


def _invalid(detail: str, hint: str = "") -> GpudError:
    return GpudError(Code.IMAGE_INVALID, detail, hint=hint)
