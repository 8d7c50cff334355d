"""A message of every kind, for tests."""

from uuid import UUID

from xman import messages as m
from xman.errors import FaultCode

ID = UUID("00010203-0405-0607-0809-0a0b0c0d0e0f")
DOMAIN = UUID("a0a1a2a3-a4a5-a6a7-a8a9-aaabacadaeaf")
ALICE = "alice@EX.ORG"
BOB = "bob/admin@EX.ORG"
CURSOR = m.Cursor(ID, 7)

ROW = m.DomainRow(
    name="web1",
    uuid=DOMAIN,
    hypervisor="qemu:///system",
    id=3,
    state=m.DomainState.PAUSED,
    reason="paused by user",
    memory_kib=1024,
    max_memory_kib=2048,
    vcpus=1,
    max_vcpus=2,
    cpu_time_ns=5,
    autostart=True,
    persistent=True,
    saved=False,
    since_ms=None,
    owners=(ALICE, BOB),
    class_="grid",
    labels=(("site", "Brno"), ("tier", "žlutý")),
    metadata_trouble="",
    age_ms=12,
    stale=False,
)
PROGRESS = m.Progress("memory", 12, 1, 2, 3, 4, 5, 6)
JOB = m.JobRow(ID, ALICE, "migrate", "web1", DOMAIN, "to beta", m.JobState.RUNNING, "", 1, None, PROGRESS)
INFO = m.Info(
    hostname="alpha",
    xmand="0.1.0",
    hypervisors=(m.Hypervisor("test:///default", "Test", "", "11.3", "", 9),),
    cpu_model="i686",
    cpus=16,
    mhz=1400,
    memory_kib=3,
    free_memory_kib=2,
    load=(0.25, 1.0, 2.5),
    active=1,
    domains=2,
    used_vcpus=3,
    used_memory_kib=4,
    stuck_lanes=0,
)
EXPLAINED = m.Explained(ALICE, "pause", "web1", True, "k5login", (m.Step("cedar", "none", "", ("owner",)),))
PERMIT = m.Permit(bytes(range(32)))

REPLIES = (
    m.Done(),
    m.Whoami(ALICE, 1, ("list", "pause"), "k5login", ("wheel",), None, "5f3a"),
    INFO,
    ROW,
    m.Gone("web1", DOMAIN),
    m.Memory(ROW, 512),
    JOB,
    EXPLAINED,
    PERMIT,
    m.Attached(ROW, m.InterfaceWith("52:54:00:12:34:56")),
)
ITEMS = (
    ROW,
    "a piece of XML",
    JOB,
    m.Trouble("lxc:///", "libvirt is silent"),
    m.Image("before-upgrade", "web1", DOMAIN, "qemu:///system", 5, 6),
    b"\x1b[2J",
    m.ConsoleAttached(ALICE, True, (BOB,)),
    m.ConsoleJoined(BOB),
    m.ConsoleLeft(BOB),
    m.ConsoleKeyboard(BOB, False),
    m.ConsoleDropped(17),
    m.EventRow(CURSOR, 8, "test:///default", "web1", DOMAIN, m.What.PAUSED, "", m.DomainState.PAUSED),
    CURSOR,
    m.Gap(CURSOR, 9, "", "xmand began anew"),
)
ARGUMENTS = {
    "whoami": m.Nothing(),
    "list": m.List(("web*",), (m.DomainState.RUNNING, m.DomainState.OFF)),
    "info": m.Nothing(),
    "dmesg": m.Dmesg(DOMAIN, True),
    "describe": m.Describe("web1"),
    "describe-secrets": m.Describe("web1", True),
    "create": m.Create("<domain/>", True),
    "define": m.Define("<domain/>", "<domain></domain>"),
    "undefine": m.Undefine(DOMAIN, False, True),
    "start": m.Start(DOMAIN, True),
    "destroy": m.OneDomain(DOMAIN),
    "reboot": m.Reboot(DOMAIN, True, False),
    "shutdown": m.Reboot(DOMAIN, False, True),
    "pause": m.OneDomain(DOMAIN),
    "unpause": m.Unpause("web1", True),
    "mem-set": m.MemSet(DOMAIN, 1024, True),
    "vcpu-set": m.VcpuSet(DOMAIN, 4, False, True),
    "migrate": m.Migrate(DOMAIN, "beta.ex.org", 100, None, m.Channel(9626, PERMIT)),
    "migrate-abort": m.OneDomain(DOMAIN),
    "job-list": m.Nothing(),
    "job-wait": m.OneJob(ID),
    "job-cancel": m.OneJob(ID),
    "owner": m.Owner(DOMAIN, (ALICE,), (BOB,)),
    "label": m.Label(DOMAIN, (("site", "Brno"),), ("tier",)),
    "class": m.Class(DOMAIN, "grid"),
    "explain": m.Explain("pause", m.AboutDomain(DOMAIN)),
    "explain-other": m.ExplainOther(BOB, "act-for", m.AboutPrincipal(ALICE)),
    "save": m.OneDomain(DOMAIN),
    "restore": m.Start(DOMAIN),
    "discard-saved": m.OneDomain(DOMAIN),
    "save-to": m.SaveTo(DOMAIN, "before-upgrade"),
    "images": m.Nothing(),
    "restore-from": m.RestoreFrom("before-upgrade", True),
    "discard-image": m.OneImage("before-upgrade"),
    "autostart": m.Autostart(DOMAIN, True),
    "reset": m.OneDomain(DOMAIN),
    "rename": m.Rename(DOMAIN, "web2"),
    "attach": m.Attach(DOMAIN, m.Disk("/srv/data.qcow2", "vdb", m.Format.QCOW2), True),
    "detach": m.Detach(DOMAIN, m.InterfaceWith("52:54:00:12:34:56")),
    "console": m.OpenConsole(DOMAIN, True),
    "events": m.Events((), CURSOR, True),
    "migrate-in": m.MigrateIn(DOMAIN, "web1", "alpha.ex.org", 4096),
    "carry": m.Carry(PERMIT, DOMAIN, "web1"),
    "settle": m.Settle(PERMIT, m.Settlement.DROP),
}
OUTGOING = (
    m.Hello(b"XMAN", b"XMAN", "test", 5),
    m.Call(ID, 1000, 14, "qemu:///system", BOB, b"body"),
    m.Call(ID, None, 1, None, None, b""),
    m.Input(ID, b"ls\n"),
    m.Cancel(ID),
    m.Renew(b"token", 6),
)
FAULT = m.FaultRow(FaultCode.DENIED, "you may not do that here", False)
INCOMING = (
    m.Welcome(b"XMAN", b"XMAN", "xmand 0.1.0", ALICE, 7, "5f3a"),
    m.Items(ID, ITEMS),
    m.Items(ID, ()),
    m.ProgressOf(ID, PROGRESS),
    *(m.DoneWith(ID, reply) for reply in REPLIES),
    m.DoneWith(ID, FAULT),
    m.Alive(),
    m.Expiring(120),
    m.Renewed(b"", 8),
    m.Closing(FAULT),
    m.Room(ID, 65_536),
)
