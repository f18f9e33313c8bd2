"""The guest image, in a real store."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from gpud import command
from gpud.command import Completed
from gpud.config import Config
from gpud.doctor.check import Level
from gpud.doctor.image import image
from gpud.errors import Code, GpudError
from gpud.guest.image import ImageStore
from tests.unit.doctor.parts import level, make_config, named, offer, only
from tests.unit.fakes.qemu_img import QemuImg, base_image


@pytest.fixture
def qemu_img(monkeypatch: pytest.MonkeyPatch) -> QemuImg:
    fake = QemuImg()
    monkeypatch.setattr(command, "run", fake.run)
    return fake


@pytest.fixture
async def config(tmp_path: Path, qemu_img: QemuImg) -> Config:
    assert not qemu_img.faults
    source = tmp_path / "source.qcow2"
    source.write_bytes(base_image(200 * 2**30))
    await ImageStore(tmp_path / "images").add(source, "base", judge=fit)
    big = offer(per_gpu={"cpu_cores": 1, "memory_gib": 1, "storage_gib": 200})
    return make_config(tmp_path, offers=[big])


async def fit(_: Path) -> None:
    """Finds any image fit to be cloned."""


def file_of(config: Config) -> Path:
    return ImageStore(config.state_dir / "images").resolve("base").path


async def test_a_sound_image_that_fits_is_well(config: Config) -> None:
    found = await image(config)
    assert {one.level for one in found} == {Level.OK}
    assert named(found, "disk")[1] == "the image has 200.0 GiB, no more than is sold"


async def test_an_image_that_nobody_looked_into_is_a_warning(config: Config) -> None:
    store = ImageStore(config.state_dir / "images")
    path = store.resolve("base").path
    source = path.with_name("again")
    source.write_bytes(path.read_bytes())
    store.remove("base")
    await store.add(source, "base")

    found, what, mend = named(await image(config), "seal")

    assert found is Level.WARNING
    assert "nobody looked" in what
    assert mend.startswith(f"gpud image check {path}")


async def test_a_missing_image_is_to_be_added(tmp_path: Path) -> None:
    found = only(await image(make_config(tmp_path)))
    assert found[0] is Level.FAULT
    assert found[2] == "gpud image add FILE --name base"


async def test_an_image_is_to_be_added_as_the_user_whose_the_others_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: tmp_path.stat().st_uid + 1)
    mend = only(await image(make_config(tmp_path)))[2]
    assert mend.startswith("runuser -u ")
    assert mend.endswith(" -- gpud image add FILE --name base")


async def test_an_image_that_was_written_to_is_a_fault(config: Config) -> None:
    os.utime(file_of(config), (1, 1))
    found = only(await image(config))
    assert found[0] is Level.FAULT
    assert "written to after it was added" in found[1]


async def test_an_image_whose_tables_are_damaged_is_a_fault(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def damaged(*_: object, **__: object) -> Completed:
        return Completed("", "qemu-img: Could not read the refcount table", 1)

    monkeypatch.setattr(command, "run", damaged)
    found = await image(config)
    assert level(found, "guest.image") is Level.FAULT
    assert "refcount table" in named(found, "guest.image")[1]


async def test_an_image_that_cannot_be_read_is_a_fault(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def refused(*_: object, **__: object) -> Completed:
        raise GpudError(Code.HOST_COMMAND_FAILED, "the program qemu-img is not installed")

    monkeypatch.setattr(command, "run", refused)
    assert "not installed" in named(await image(config), "guest.image")[1]


async def test_an_image_that_takes_too_long_is_a_note(config: Config) -> None:
    assert level(await image(config, limit_s=0), "guest.image") is Level.NOTE


async def test_an_image_larger_than_what_is_sold_is_a_fault(config: Config) -> None:
    small = config.model_copy(update={"offers": make_config().offers})  # 100 GiB a GPU
    found = named(await image(small), "disk")
    assert found[0] is Level.FAULT
    assert found[2].startswith("offers: per_gpu.storage_gib")
