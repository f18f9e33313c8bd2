from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import UUID

import libvirt
import pytest

from gpud.errors import Code, GpudError
from gpud.hypervisor import domains
from gpud.hypervisor.domains import DomainState
from gpud.hypervisor.domainxml import DomainSpec, Identity, UserNetwork, render
from gpud.model import PciAddress

UUID_1 = UUID("0d6a7c4e-58f0-5d1c-9a51-3c1f3c1f3c1f")

Faulty = Callable[..., Any]
MakeError = Callable[..., libvirt.libvirtError]


def xml_of(owner: str = "mine") -> str:
    return render(
        DomainSpec(
            name="gpud-i-1",
            uuid=UUID_1,
            owner=owner,
            upstream_id="i-1",
            mac="52:0a:1b:2c:3d:4e",
            memory_mib=512,
            cpu_cores=1,
            domain_type="qemu",
            firmware="uefi",
            base=Path("/b"),
            disk=Path("/d"),
            seed=Path("/s"),
            nvram=Path("/n"),
            network=UserNetwork(),
        )
    )


FOREIGN = f"""<domain type='test'><name>pet</name><uuid>{UUID_1}</uuid><memory>8192</memory>
<os><type>hvm</type></os></domain>"""


def test_started_guest_is_found_with_its_identity(plain_connection: libvirt.virConnect) -> None:
    assert domains.find(plain_connection, UUID_1) is None
    domains.start(plain_connection, UUID_1, xml_of())
    found = domains.find(plain_connection, UUID_1)
    expected = domains.Domain(
        UUID_1, "gpud-i-1", DomainState.RUNNING, Identity(owner="mine", upstream_id="i-1")
    )
    assert found == expected
    assert domains.active(plain_connection) == [expected]


def test_starting_a_running_guest_again_leaves_it_alone(
    plain_connection: libvirt.virConnect,
) -> None:
    domains.start(plain_connection, UUID_1, xml_of())
    before = plain_connection.lookupByName("gpud-i-1").ID()
    domains.start(plain_connection, UUID_1, xml_of())
    assert plain_connection.lookupByName("gpud-i-1").ID() == before


@pytest.mark.parametrize("other", [FOREIGN, xml_of(owner="another gpud")])
def test_guest_is_not_started_over_somebody_elses(
    plain_connection: libvirt.virConnect, other: str
) -> None:
    plain_connection.createXML(other, 0)
    with pytest.raises(GpudError, match="is not ours") as caught:
        domains.start(plain_connection, UUID_1, xml_of())
    assert caught.value.code is Code.GUEST_FAILED


def test_name_taken_by_a_foreign_domain_is_libvirts_refusal(
    plain_connection: libvirt.virConnect,
) -> None:
    plain_connection.createXML(FOREIGN.replace("pet", "gpud-i-1").replace(str(UUID_1), "1" * 32), 0)
    with pytest.raises(libvirt.libvirtError, match="already exists with uuid"):
        domains.start(plain_connection, UUID_1, xml_of())


def test_stopped_guest_leaves_nothing(plain_connection: libvirt.virConnect) -> None:
    domains.start(plain_connection, UUID_1, xml_of())
    domains.stop(plain_connection, UUID_1)
    domains.stop(plain_connection, UUID_1)
    assert domains.find(plain_connection, UUID_1) is None
    assert plain_connection.listAllDomains() == []


def test_foreign_and_inactive_domains_are_told_apart(plain_connection: libvirt.virConnect) -> None:
    plain_connection.createXML(FOREIGN, 0)
    plain_connection.defineXML(FOREIGN.replace("pet", "asleep").replace(str(UUID_1), "2" * 32))
    assert [(d.name, d.identity) for d in domains.active(plain_connection)] == [("pet", None)]
    assert domains.find(plain_connection, UUID("2" * 32)) is None


def test_paused_guest_is_seen_as_such(plain_connection: libvirt.virConnect) -> None:
    domains.start(plain_connection, UUID_1, xml_of())
    plain_connection.lookupByName("gpud-i-1").suspend()
    found = domains.find(plain_connection, UUID_1)
    assert found is not None
    assert found.state is DomainState.PAUSED


def lookup_giving(
    connection: libvirt.virConnect, faulty: Faulty, **replaced: Any
) -> libvirt.virConnect:
    """Make every domain of ``connection`` misbehave."""
    return faulty(
        connection,
        lookupByUUIDString=lambda u: faulty(connection.lookupByUUIDString(u), **replaced),
    )


def raiser(error: Exception) -> Callable[..., None]:
    def fail(*_arguments: object) -> None:
        raise error

    return fail


@pytest.mark.parametrize("code", [libvirt.VIR_ERR_NO_DOMAIN, libvirt.VIR_ERR_OPERATION_INVALID])
def test_guest_that_ends_by_itself_meanwhile_is_stopped(
    plain_connection: libvirt.virConnect, faulty: Faulty, libvirt_error: MakeError, code: int
) -> None:
    domains.start(plain_connection, UUID_1, xml_of())

    def destroy() -> None:
        plain_connection.lookupByName("gpud-i-1").destroy()
        raise libvirt_error("domain is not running", code)

    domains.stop(lookup_giving(plain_connection, faulty, destroy=destroy), UUID_1)


def test_guest_that_cannot_be_ended_is_libvirts_refusal(
    plain_connection: libvirt.virConnect, faulty: Faulty, libvirt_error: MakeError
) -> None:
    domains.start(plain_connection, UUID_1, xml_of())
    busy = libvirt_error("Failed to terminate process 7", libvirt.VIR_ERR_SYSTEM_ERROR)
    with pytest.raises(libvirt.libvirtError, match="terminate process 7"):
        domains.stop(lookup_giving(plain_connection, faulty, destroy=raiser(busy)), UUID_1)


def test_guest_that_survives_its_end_is_reported(
    plain_connection: libvirt.virConnect, faulty: Faulty
) -> None:
    domains.start(plain_connection, UUID_1, xml_of())
    with pytest.raises(GpudError, match="still runs") as caught:
        domains.stop(lookup_giving(plain_connection, faulty, destroy=lambda: 0), UUID_1)
    assert caught.value.transient


def test_failing_lookup_is_not_taken_for_absence(
    plain_connection: libvirt.virConnect, faulty: Faulty, libvirt_error: MakeError
) -> None:
    lost = raiser(libvirt_error("client socket is closed", 1, libvirt.VIR_FROM_RPC))
    connection = faulty(plain_connection, lookupByUUIDString=lost)
    for act in (domains.find, domains.stop):
        with pytest.raises(libvirt.libvirtError, match="closed"):
            act(connection, UUID_1)


def test_guest_that_ends_while_looked_at_is_gone(
    plain_connection: libvirt.virConnect, faulty: Faulty, libvirt_error: MakeError
) -> None:
    domains.start(plain_connection, UUID_1, xml_of())
    gone = raiser(libvirt_error("Domain not found", libvirt.VIR_ERR_NO_DOMAIN))
    assert domains.find(lookup_giving(plain_connection, faulty, state=gone), UUID_1) is None


@pytest.mark.parametrize("method", ["state", "metadata"])
def test_guest_that_cannot_be_looked_at_is_not_taken_for_gone(
    plain_connection: libvirt.virConnect, faulty: Faulty, libvirt_error: MakeError, method: str
) -> None:
    domains.start(plain_connection, UUID_1, xml_of())
    error = raiser(libvirt_error("cannot acquire lock", libvirt.VIR_ERR_OPERATION_TIMEOUT))
    with pytest.raises(libvirt.libvirtError, match="acquire lock"):
        domains.find(lookup_giving(plain_connection, faulty, **{method: error}), UUID_1)


def test_who_has_which_device_of_the_host_is_listed(
    plain_connection: libvirt.virConnect, faulty: Faulty, libvirt_error: MakeError
) -> None:
    source = "<source><address domain='0x0000' bus='0x41' slot='0x00' function='0x1'/></source>"
    device = f"<hostdev mode='subsystem' type='pci' managed='no'>{source}</hostdev>"
    xml = FOREIGN.replace("</domain>", f"<devices>{device}</devices></domain>")
    plain_connection.createXML(xml, 0)
    assert domains.passed(plain_connection)[PciAddress(0, 0x41, 0, 1)] == "pet"

    def listing(error: Exception) -> libvirt.virConnect:
        pet = plain_connection.lookupByName("pet")
        one = faulty(pet, XMLDesc=raiser(error))
        return faulty(plain_connection, listAllDomains=lambda _flags: [one])

    ended = libvirt_error("Domain not found", libvirt.VIR_ERR_NO_DOMAIN)
    assert domains.passed(listing(ended)) == {}
    locked = libvirt_error("cannot acquire lock", libvirt.VIR_ERR_OPERATION_TIMEOUT)
    with pytest.raises(libvirt.libvirtError, match="acquire lock"):
        domains.passed(listing(locked))


def test_a_resume_is_safe_to_repeat_and_of_a_guest_that_is_gone(
    plain_connection: libvirt.virConnect, faulty: Faulty, libvirt_error: MakeError
) -> None:
    domains.resume(plain_connection, UUID_1)
    domains.start(plain_connection, UUID_1, xml_of())
    domain = plain_connection.lookupByUUIDString(str(UUID_1))
    domain.suspend()
    paused = domains.find(plain_connection, UUID_1)
    assert paused is not None
    assert (paused.state, paused.io_error) == (DomainState.PAUSED, False)
    domains.resume(plain_connection, UUID_1)
    assert domain.state()[0] == libvirt.VIR_DOMAIN_RUNNING
    # What QEMU's driver says of one that runs; the test driver has no code for it.
    running = libvirt_error("domain is already running", libvirt.VIR_ERR_OPERATION_INVALID)
    domains.resume(lookup_giving(plain_connection, faulty, resume=raiser(running)), UUID_1)
    locked = libvirt_error("cannot acquire lock", libvirt.VIR_ERR_OPERATION_TIMEOUT)
    with pytest.raises(libvirt.libvirtError, match="acquire lock"):
        domains.resume(lookup_giving(plain_connection, faulty, resume=raiser(locked)), UUID_1)


def test_state_unknown_to_us_is_called_so(
    plain_connection: libvirt.virConnect, faulty: Faulty
) -> None:
    domains.start(plain_connection, UUID_1, xml_of())
    odd = lookup_giving(plain_connection, faulty, state=lambda: [99, 0])
    found = domains.find(odd, UUID_1)
    assert found is not None
    assert found.state is DomainState.UNKNOWN


CAPABILITIES = """<capabilities><guest><os_type>hvm</os_type><arch name='i686'>
<domain type='kvm'/></arch></guest><guest><os_type>hvm</os_type><arch name='x86_64'>
<domain type='qemu'/>{}</arch></guest></capabilities>"""


@pytest.mark.parametrize(
    ("flags", "kvm_offered", "kind"),
    [
        ("fpu vmx sse2", True, "kvm"),
        ("fpu svm", True, "kvm"),
        ("fpu svm", False, "qemu"),
        ("fpu svm_lock vmx_flags", True, "qemu"),
        ("", True, "qemu"),
    ],
)
def test_kvm_needs_both_the_cpu_and_libvirt(
    plain_connection: libvirt.virConnect,
    faulty: Faulty,
    flags: str,
    kvm_offered: bool,
    kind: str,
) -> None:
    capabilities = CAPABILITIES.format("<domain type='kvm'/>" if kvm_offered else "")
    connection = faulty(plain_connection, getCapabilities=lambda: capabilities)
    cpuinfo = f"processor\t: 0\nmodel name\t: vmx svm\nflags\t\t: {flags}\nbugs\t\t: svm\n"
    assert domains.best_type(connection, cpuinfo) == kind


def test_versions_are_named(plain_connection: libvirt.virConnect, faulty: Faulty) -> None:
    connection = faulty(
        plain_connection,
        getLibVersion=lambda: 10_003_001,
        getVersion=lambda: 7_002_022,
        getType=lambda: "QEMU",
    )
    assert domains.version(connection) == "libvirt 10.3.1, QEMU 7.2.22"
