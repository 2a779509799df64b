"""phi_c.machine on fake /proc and /sys trees, and on the machine that runs the tests."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from phi_c import machine

MIB = 1 << 20
MEMINFO = """MemTotal:       16384000 kB
MemFree:         1024000 kB
MemAvailable:    8192000 kB
Buffers:          100000 kB
Cached:          7000000 kB
"""


def write_tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return root


def memory_tree(root: Path, group: str, folder: str, files: dict[str, str]) -> Path:
    """Write a machine with MEMINFO and a control group.

    group: line of /proc/self/cgroup. folder: folder of the group below /sys/fs/cgroup. files: its files.
    """
    tree = {f"sys/fs/cgroup/{folder}/{name}": text for name, text in files.items()}
    return write_tree(root, {"proc/meminfo": MEMINFO, "proc/self/cgroup": f"{group}\n", **tree})


def topology(pairs: list[tuple[int, ...]], file: str = "thread_siblings_list") -> dict[str, str]:
    return {
        f"sys/devices/system/cpu/cpu{cpu}/topology/{file}": ",".join(map(str, group)) + "\n"
        for group in pairs
        for cpu in group
    }


class TestCpuName:
    def test_x86(self, tmp_path: Path) -> None:
        text = "processor\t: 0\nmodel name\t: Fast   CPU @ 3.0GHz\nflags\t: a b\n\nmodel name\t: Another\n"
        assert machine.cpu_name(write_tree(tmp_path, {"proc/cpuinfo": text})) == "Fast CPU @ 3.0GHz"

    def test_device_tree(self, tmp_path: Path) -> None:
        files = {"proc/cpuinfo": "processor\t: 0\nBogoMIPS\t: 100\n", "proc/device-tree/model": "Board 5\0"}
        assert machine.cpu_name(write_tree(tmp_path, files)) == "Board 5"

    def test_without_proc_there_is_a_fallback(self, tmp_path: Path) -> None:
        assert machine.cpu_name(tmp_path)


class TestCpuSeconds:
    def test_busy_and_stolen(self, tmp_path: Path) -> None:
        ticks = os.sysconf("SC_CLK_TCK") if sys.platform != "win32" else 100
        text = "cpu  100 20 30 4000 50 6 7 80 9 0\ncpu0 1 2 3 4 5 6 7 8 9 0\n"
        found = machine.cpu_seconds(write_tree(tmp_path, {"proc/stat": text}))
        assert found == ((100 + 20 + 30 + 6 + 7) / ticks, 80 / ticks)

    @pytest.mark.parametrize("text", ["", "cpu  1 2 3 4\n", "cpu a b c d e f g h\n"])
    def test_unknown(self, tmp_path: Path, text: str) -> None:
        assert machine.cpu_seconds(write_tree(tmp_path, {"proc/stat": text})) is None


class TestCores:
    @pytest.mark.parametrize("file", ["thread_siblings_list", "core_cpus_list"])
    def test_hyperthreads_count_once(self, tmp_path: Path, file: str) -> None:
        root = write_tree(tmp_path, topology([(0, 4), (1, 5), (2, 6), (3, 7)], file))
        assert machine.physical_cores(range(8), root) == 4
        assert machine.physical_cores([0, 1, 4], root) == 2
        assert machine.usable_cores(range(8), root) == 4

    def test_without_topology_each_cpu_is_a_core(self, tmp_path: Path) -> None:
        assert machine.physical_cores([0, 1, 2], tmp_path) == 3

    def test_at_least_one(self, tmp_path: Path) -> None:
        assert machine.usable_cores([], tmp_path) == 1

    @pytest.mark.parametrize(
        ("limits", "quota", "usable"),
        [
            ({"": "max 100000"}, None, 8),
            ({"": "250000 100000"}, 2.5, 2),
            ({"": "50000 100000"}, 0.5, 1),
            ({"": "9900000 100000"}, 99.0, 8),
            ({"a/b": "max 100000", "a": "300000 100000"}, 3.0, 3),  # an ancestor's quota applies
            ({"a/b": "200000 100000", "a": "300000 100000"}, 2.0, 2),
            ({"": "garbage"}, None, 8),
            ({"": "100000 0"}, None, 8),
        ],
    )
    def test_version_2_quota(self, tmp_path: Path, limits: dict[str, str], quota: float | None, usable: int) -> None:
        files = {f"sys/fs/cgroup/{folder}/cpu.max": text for folder, text in limits.items()}
        root = write_tree(tmp_path, {"proc/self/cgroup": "0::/a/b\n", **files})
        assert machine.cgroup_cores(root) == quota
        assert machine.usable_cores(range(8), root) == usable

    @pytest.mark.parametrize("folder", ["cpu,cpuacct/docker/x", "cpu/docker/x", "cpu,cpuacct", "cpu"])
    def test_version_1_quota(self, tmp_path: Path, folder: str) -> None:
        root = write_tree(
            tmp_path,
            {
                "proc/self/cgroup": "5:memory:/docker/x\n4:cpu,cpuacct:/docker/x\n0::/\n",
                f"sys/fs/cgroup/{folder}/cpu.cfs_quota_us": "150000\n",
                f"sys/fs/cgroup/{folder}/cpu.cfs_period_us": "50000\n",
            },
        )
        assert machine.cgroup_cores(root) == 3.0

    def test_version_1_without_quota(self, tmp_path: Path) -> None:
        files = {"cpu.cfs_quota_us": "-1\n", "cpu.cfs_period_us": "100000\n"}
        tree = {f"sys/fs/cgroup/cpu/{name}": text for name, text in files.items()}
        assert machine.cgroup_cores(write_tree(tmp_path, {"proc/self/cgroup": "1:cpu:/\n", **tree})) is None

    def test_no_control_groups(self, tmp_path: Path) -> None:
        assert machine.cgroup_cores(tmp_path) is None

    def test_group_path_cannot_leave_the_mount(self, tmp_path: Path) -> None:
        root = write_tree(tmp_path, {"proc/self/cgroup": "0::/../../..\n", "cpu.max": "100000 100000"})
        assert machine.cgroup_cores(root) is None


class TestMemory:
    def test_meminfo(self, tmp_path: Path) -> None:
        root = write_tree(tmp_path, {"proc/meminfo": MEMINFO})
        assert machine.memory_total(root) == 16384000 * 1024
        assert machine.memory_available(root) == 8192000 * 1024

    def test_kernel_without_mem_available(self, tmp_path: Path) -> None:
        text = "".join(line for line in MEMINFO.splitlines(keepends=True) if "Available" not in line)
        root = write_tree(tmp_path, {"proc/meminfo": text})
        assert machine.memory_available(root) == (1024000 + 100000 + 7000000) * 1024

    @pytest.mark.parametrize(
        ("group", "folder", "names", "stat"),
        [
            (
                "0::/pod",
                "pod",
                ("memory.max", "memory.current"),
                f"anon {200 * MIB}\ninactive_file {400 * MIB}\nactive_file {250 * MIB}\n",
            ),
            (
                "9:memory:/a/b",
                "memory",
                ("memory.limit_in_bytes", "memory.usage_in_bytes"),
                f"inactive_file 1\ntotal_inactive_file {400 * MIB}\ntotal_active_file {250 * MIB}\n",
            ),
        ],
        ids=["version 2", "version 1"],
    )
    def test_limit_with_page_cache(
        self, tmp_path: Path, group: str, folder: str, names: tuple[str, str], stat: str
    ) -> None:
        """The page cache of the group counts as available."""
        files = {names[0]: str(1000 * MIB), names[1]: str(900 * MIB), "memory.stat": stat}
        root = memory_tree(tmp_path, group, folder, files)
        assert machine.memory_total(root) == 1000 * MIB
        assert machine.memory_available(root) == (1000 - 900 + 650) * MIB

    @pytest.mark.parametrize(
        ("group", "folder", "files"),
        [
            ("0::/", ".", {"memory.max": "max\n", "memory.current": "5\n"}),
            ("1:memory:/", "memory", {"memory.limit_in_bytes": "9223372036854771712\n"}),
        ],
        ids=["version 2", "version 1"],
    )
    def test_no_limit(self, tmp_path: Path, group: str, folder: str, files: dict[str, str]) -> None:
        root = memory_tree(tmp_path, group, folder, files)
        assert machine.memory_total(root) == 16384000 * 1024
        assert machine.memory_available(root) == 8192000 * 1024

    def test_group_above_its_limit_has_no_memory_left(self, tmp_path: Path) -> None:
        root = memory_tree(tmp_path, "0::/", ".", {"memory.max": str(MIB), "memory.current": str(2 * MIB)})
        assert machine.memory_available(root) == 0

    @pytest.mark.parametrize("text", ["", "MemTotal: many kB\n", "\n:\n", "MemTotal"])
    def test_unreadable_meminfo_has_a_fallback(self, tmp_path: Path, text: str) -> None:
        root = write_tree(tmp_path, {"proc/meminfo": text})
        assert machine.memory_total(root) >= machine.memory_available(root) > 0


def test_vm_stat() -> None:
    report = (
        "Mach Virtual Memory Statistics: (page size of 16384 bytes)\n"
        "Pages free:                               10.\n"
        "Pages active:                            500.\n"
        "Pages inactive:                           20.\n"
        "Pages speculative:                         3.\n"
        "Pages purgeable:                           4.\n"
    )
    assert machine._darwin_available(report) == 37 * 16384
    assert machine._darwin_available("vm_stat: no such thing") is None


def test_macos(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = {"machdep.cpu.brand_string": "Apple M9", "hw.physicalcpu": "1", "hw.memsize": "4096"}
    monkeypatch.setattr(machine, "_sysctl", answers.__getitem__)
    monkeypatch.setattr(machine, "_output", lambda *command: "page size of 1024 bytes\nPages free: 2.\n")
    with monkeypatch.context() as patch:
        patch.setattr(sys, "platform", "darwin")
        found = machine.cpu_name(), machine.physical_cores([0, 1]), machine.memory_total()
        available = machine.memory_available()
    assert found == ("Apple M9", 1, 4096)
    assert available == 2048


@pytest.mark.parametrize("system", ["darwin", "win32"])
def test_failing_system_calls_have_fallbacks(monkeypatch: pytest.MonkeyPatch, system: str) -> None:
    """Runs the code for another operating system, whose calls fail on this one."""

    def fail(*args: object, **kwargs: object) -> None:
        raise OSError("no such call")

    monkeypatch.setattr(machine.subprocess, "run", fail)
    for name in ("_windows_memory", "_windows_affinity_mask", "_windows_physical_cores"):
        monkeypatch.setattr(machine, name, fail)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "platform", system)
        name, cores = machine.cpu_name(), machine.usable_cores()
        total, available = machine.memory_total(), machine.memory_available()
    assert name
    assert 1 <= cores <= (os.cpu_count() or 1)
    assert 0 < available <= total <= machine.UNKNOWN_BYTES


@pytest.mark.skipif(sys.platform != "linux", reason="compares with Linux system calls")
def test_agrees_with_linux_system_calls() -> None:
    assert machine.affinity_cpus() == os.sched_getaffinity(0)
    assert machine.memory_total() <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def test_values_of_this_machine_are_plausible() -> None:
    n_cpus = len(machine.affinity_cpus())
    assert 1 <= machine.physical_cores() <= n_cpus
    assert machine.default_threads() == machine.usable_cores()
    quota = machine.cgroup_cores()
    assert 1 <= machine.usable_cores() <= (n_cpus if quota is None else max(1, math.floor(quota)))
    assert 64 * MIB < machine.memory_available() <= machine.memory_total() < 1 << 50
    assert machine.cpu_name() == machine.cpu_name().strip() != ""


def test_peak_rss(tmp_path: Path) -> None:
    """Measured in a new process: in this one earlier tests may have reached a higher peak."""
    code = "from phi_c import machine; a = machine.peak_rss(); x = b'x' * (64 << 20); print(a, machine.peak_rss())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    before, after = map(int, done.stdout.split())
    assert before + (48 << 20) < after < before + (96 << 20)
    fallback = machine.peak_rss(tmp_path)  # without /proc: getrusage
    assert fallback is not None and 1 << 20 < fallback < machine.memory_total()
