"""The machine phi-c runs on: CPU name, usable cores, available memory.

On Linux, results respect the scheduler affinity and the limits of control groups (versions 1 and 2), so inside a
container they are the container's. Nothing here raises: a value that cannot be determined has a fallback. Functions
with a `root` argument read Linux's /proc and /sys below that folder; with None they query the running system.
"""

import contextlib
import ctypes
import math
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TypeVar

UNKNOWN_BYTES = sys.maxsize  # returned by the memory functions if the amount cannot be determined

_ROOT = Path("/")
_GROUPS = Path("sys/fs/cgroup")
_T = TypeVar("_T")


def cpu_name(root: Path | None = None) -> str:
    """Return the CPU's marketing name, or its architecture if the system does not report one."""
    if root is None and sys.platform == "darwin":
        name = _sysctl("machdep.cpu.brand_string")
    elif root is None and sys.platform == "win32":
        name = _windows_cpu_name()
    else:
        name = _linux_cpu_name(root or _ROOT)
    return " ".join(name.split()) or platform.processor() or platform.machine() or "unknown"


def affinity_cpus() -> frozenset[int]:
    """Return the indices of the logical CPUs on which the scheduler may run this process."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            return frozenset(os.sched_getaffinity(0))
    if sys.platform == "win32":
        mask = _try(_windows_affinity_mask, 0)
        if mask:
            return frozenset(i for i in range(mask.bit_length()) if mask >> i & 1)
    return frozenset(range(os.cpu_count() or 1))


def cgroup_cores(root: Path = _ROOT) -> float | None:
    """Return the control groups' CPU quota in cores (may be fractional, such as 1.5); None: no quota."""
    quotas = []
    for folder in _group_folders(root, "cpu"):
        fields = _read(folder / "cpu.max").split()  # version 2: "QUOTA PERIOD" or "max PERIOD", microseconds
        if len(fields) != 2:
            fields = [_read(folder / "cpu.cfs_quota_us"), _read(folder / "cpu.cfs_period_us")]
        quota, period = map(_integer, fields)
        if quota is not None and period is not None and quota > 0 and period > 0:  # -1: no quota
            quotas.append(quota / period)
    return min(quotas, default=None)


def physical_cores(cpus: Iterable[int] | None = None, root: Path | None = None) -> int:
    """Return the number of physical cores behind the logical CPUs `cpus` (None: the process's affinity)."""
    chosen = affinity_cpus() if cpus is None else frozenset(cpus)
    n_cpus = max(1, len(chosen))
    if root is None and sys.platform == "darwin":
        return min(n_cpus, _integer(_sysctl("hw.physicalcpu")) or n_cpus)
    if root is None and sys.platform == "win32":
        return min(n_cpus, _try(lambda: _windows_physical_cores(chosen), 0) or n_cpus)
    return max(1, len({_siblings(root or _ROOT, cpu) for cpu in chosen}))


def usable_cores(cpus: Iterable[int] | None = None, root: Path | None = None) -> int:
    """Return the number of physical cores this process can keep busy, at least 1.

    It is limited by the affinity and by the control groups' quota. The quota is rounded down: with one thread too many,
    the kernel stops a thread for the rest of each period, and the other threads wait for it.
    """
    cores = physical_cores(cpus, root)
    quota = cgroup_cores(root or _ROOT)
    return cores if quota is None else max(1, min(cores, math.floor(quota)))


def default_threads() -> int:
    """Return the default number of compute threads: one per usable core."""
    return usable_cores()


def memory_total(root: Path | None = None) -> int:
    """Return the memory this process may use at most, in bytes: RAM, or its control group's limit."""
    if root is None and sys.platform == "darwin":
        total = _integer(_sysctl("hw.memsize"))
    elif root is None and sys.platform == "win32":
        total = _try(lambda: _windows_memory()[0], None)
    else:
        total = _meminfo(root or _ROOT).get("MemTotal")
        limits = [limit for limit, _ in _group_memory(root or _ROOT)]
        total = min([*limits, total if total is not None else _sysconf_bytes("SC_PHYS_PAGES")])
    return total or _sysconf_bytes("SC_PHYS_PAGES")


def memory_available(root: Path | None = None) -> int:
    """Return the memory this process can allocate now without swapping, in bytes.

    The page cache counts as available: the system drops cached files when a process needs memory.
    """
    if root is None and sys.platform == "darwin":
        available = _darwin_available()
    elif root is None and sys.platform == "win32":
        available = _try(lambda: _windows_memory()[1], None)
    else:
        info = _meminfo(root or _ROOT)
        available = info.get("MemAvailable")
        if available is None and "MemFree" in info:  # kernels before 3.14
            available = info["MemFree"] + info.get("Buffers", 0) + info.get("Cached", 0)
        if available is None:
            available = _sysconf_bytes("SC_AVPHYS_PAGES")
        return min([available, *(max(0, limit - used) for limit, used in _group_memory(root or _ROOT))])
    return memory_total() if available is None else available


def peak_rss(root: Path | None = None) -> int | None:
    """Return the process's peak resident memory in bytes, mapped files included; None: unknown."""
    if root is None and sys.platform == "win32":
        return _try(_windows_peak_rss, None)
    # On Linux a new program inherits ru_maxrss from the process that started it; VmHWM counts this program only.
    peak = _integer(_fields(_read((root or _ROOT) / "proc/self/status")).get("VmHWM", "").removesuffix("kB"))
    return peak * 1024 if peak is not None else _try(_unix_peak_rss, None)


def cpu_seconds(root: Path | None = None) -> tuple[float, float] | None:
    """Return (busy, stolen) CPU time of all CPUs since the system started, in seconds; None: unknown.

    busy: of all processes and the kernel. stolen: for which this virtual machine's CPUs waited for others.
    """
    if root is None and sys.platform != "linux":
        return None
    fields = [_integer(field) for field in _read((root or _ROOT) / "proc/stat").split("\n", 1)[0].split()[1:9]]
    if len(fields) < 8 or None in fields:  # user, nice, system, idle, iowait, irq, softirq, steal
        return None
    user, nice, system, _, _, irq, softirq, steal = (field or 0 for field in fields)
    ticks = os.sysconf("SC_CLK_TCK") if sys.platform != "win32" else 100
    return (user + nice + system + irq + softirq) / ticks, steal / ticks


def _linux_cpu_name(root: Path) -> str:
    fields = _fields(_read(root / "proc/cpuinfo"))
    for key in ("model name", "Hardware", "cpu model", "cpu"):  # x86; some ARM; MIPS; POWER
        if fields.get(key):
            return fields[key]
    return _read(root / "proc/device-tree/model").rstrip("\0")


def _siblings(root: Path, cpu: int) -> str:
    """Return a key for the physical core of a logical CPU: the list of CPUs that share it."""
    topology = root / f"sys/devices/system/cpu/cpu{cpu}/topology"
    siblings = _read(topology / "core_cpus_list") or _read(topology / "thread_siblings_list")
    return siblings or f"cpu {cpu}"


def _meminfo(root: Path) -> dict[str, int]:
    info = {}
    for key, value in _fields(_read(root / "proc/meminfo")).items():
        kibibytes = _integer(value.removesuffix("kB"))
        if kibibytes is not None:
            info[key] = kibibytes * 1024
    return info


def _group_memory(root: Path) -> Iterator[tuple[int, int]]:
    """Yield (limit, used) in bytes of each control group that limits this process; used excludes the page cache."""
    for folder in _group_folders(root, "memory"):
        limit = _integer(_read(folder / "memory.max"))  # version 2; "max": no limit
        used = _integer(_read(folder / "memory.current"))
        if limit is None:
            limit = _integer(_read(folder / "memory.limit_in_bytes"))  # version 1; no limit: a value far above any RAM
            used = _integer(_read(folder / "memory.usage_in_bytes"))
        if limit is None:
            continue
        stat = _fields(_read(folder / "memory.stat"), separator=None)
        files = 0
        for kind in ("inactive_file", "active_file"):  # version 1: the total_ fields include child groups
            files += _integer(stat.get("total_" + kind, stat.get(kind, ""))) or 0
        yield limit, max(0, (used or 0) - files)


def _group_folders(root: Path, controller: str) -> Iterator[Path]:
    """Yield the folders of this process's control group and of the group's ancestors.

    In a container /proc/self/cgroup may name a path that is not visible; the mount's root is then the process's group.
    """
    mount = root / _GROUPS
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers == "":
            bases = [mount]
        elif controller in controllers.split(","):
            bases = [mount / controllers, mount / controller]
        else:
            continue
        base = next((base for base in bases if base.is_dir()), bases[0])
        parts = [part for part in path.split("/") if part not in ("", ".", "..")]
        for n in range(len(parts), -1, -1):
            yield base.joinpath(*parts[:n])


def _sysconf_bytes(name: str) -> int:
    if sys.platform != "win32":
        with contextlib.suppress(ValueError, OSError):
            n_bytes = os.sysconf(name) * os.sysconf("SC_PAGE_SIZE")
            if n_bytes > 0:
                return n_bytes
    return UNKNOWN_BYTES


def _sysctl(name: str) -> str:
    return _output("/usr/sbin/sysctl", "-n", name)


def _darwin_available(report: str | None = None) -> int | None:
    """Return the memory that vm_stat reports as free, inactive, speculative or purgeable, in bytes; None: unknown."""
    text = _output("/usr/bin/vm_stat") if report is None else report
    fields = _fields(text)
    page_bytes = next((_integer(word) for word in text.split() if word.isdigit()), None)
    kinds = ("Pages free", "Pages inactive", "Pages speculative", "Pages purgeable")
    counts = [_integer(fields.get(kind, "").rstrip(".")) for kind in kinds]
    if page_bytes is None or counts[0] is None:
        return None
    return page_bytes * sum(count or 0 for count in counts)


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return ""
    return done.stdout.strip()


def _windows_cpu_name() -> str:
    if sys.platform == "win32":
        with contextlib.suppress(ImportError, OSError):
            import winreg  # noqa: PLC0415 - exists on Windows only

            key = r"HARDWARE\DESCRIPTION\System\CentralProcessor\0"
            with winreg.OpenKey(winreg.HKEY_LOCAL_MACHINE, key) as handle:
                return str(winreg.QueryValueEx(handle, "ProcessorNameString")[0])
    return ""


class _MemoryStatus(ctypes.Structure):
    """MEMORYSTATUSEX of the Windows API."""

    _fields_ = (
        ("length", ctypes.c_uint32),
        ("load_percent", ctypes.c_uint32),
        ("total_physical", ctypes.c_uint64),
        ("available_physical", ctypes.c_uint64),
        ("total_page_file", ctypes.c_uint64),
        ("available_page_file", ctypes.c_uint64),
        ("total_virtual", ctypes.c_uint64),
        ("available_virtual", ctypes.c_uint64),
        ("available_extended_virtual", ctypes.c_uint64),
    )


class _ProcessorInformation(ctypes.Structure):
    """SYSTEM_LOGICAL_PROCESSOR_INFORMATION of the Windows API."""

    _fields_ = (
        ("mask", ctypes.c_size_t),
        ("relationship", ctypes.c_uint32),
        ("details", ctypes.c_uint64 * 2),
    )


def _windows_memory() -> tuple[int, int]:
    """Return (total, available) bytes of physical memory. Raises OSError."""
    if sys.platform == "win32":
        status = _MemoryStatus(length=ctypes.sizeof(_MemoryStatus))
        if ctypes.windll.kernel32.GlobalMemoryStatusEx(ctypes.byref(status)):
            return status.total_physical, status.available_physical
    raise OSError("GlobalMemoryStatusEx failed")


def _windows_affinity_mask() -> int:
    """Return the process's affinity as a bit mask. Raises OSError."""
    if sys.platform == "win32":
        kernel32 = ctypes.windll.kernel32
        kernel32.GetCurrentProcess.restype = ctypes.c_void_p
        process, system = ctypes.c_size_t(), ctypes.c_size_t()
        handle = ctypes.c_void_p(kernel32.GetCurrentProcess())
        if kernel32.GetProcessAffinityMask(handle, ctypes.byref(process), ctypes.byref(system)):
            return process.value
    raise OSError("GetProcessAffinityMask failed")


def _windows_physical_cores(cpus: frozenset[int]) -> int:
    """Return the number of physical cores behind the logical CPUs. Raises OSError."""
    if sys.platform == "win32":
        query = ctypes.windll.kernel32.GetLogicalProcessorInformation
        n_bytes = ctypes.c_uint32(0)
        query(None, ctypes.byref(n_bytes))  # fails, and sets n_bytes to the size it needs
        rows = (_ProcessorInformation * (n_bytes.value // ctypes.sizeof(_ProcessorInformation)))()
        if query(rows, ctypes.byref(n_bytes)):
            affinity = sum(1 << cpu for cpu in cpus)
            return sum(row.relationship == 0 and row.mask & affinity != 0 for row in rows)  # 0: RelationProcessorCore
    raise OSError("GetLogicalProcessorInformation failed")


class _MemoryCounters(ctypes.Structure):
    """PROCESS_MEMORY_COUNTERS of the Windows API."""

    _fields_ = (
        ("length", ctypes.c_uint32),
        ("page_faults", ctypes.c_uint32),
        ("peak_working_set", ctypes.c_size_t),
        ("rest", ctypes.c_size_t * 7),
    )


def _windows_peak_rss() -> int:
    """Return the peak working set in bytes. Raises OSError."""
    if sys.platform == "win32":
        kernel32 = ctypes.windll.kernel32
        kernel32.GetCurrentProcess.restype = ctypes.c_void_p
        counters = _MemoryCounters(length=ctypes.sizeof(_MemoryCounters))
        handle = ctypes.c_void_p(kernel32.GetCurrentProcess())
        if kernel32.K32GetProcessMemoryInfo(handle, ctypes.byref(counters), counters.length):
            return counters.peak_working_set
    raise OSError("GetProcessMemoryInfo failed")


def _unix_peak_rss() -> int:
    """Return ru_maxrss in bytes. Raises OSError."""
    if sys.platform == "win32":
        raise OSError("getrusage does not exist on Windows")
    import resource  # noqa: PLC0415 - does not exist on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS reports bytes, other systems KiB


def _try(query: Callable[[], _T], fallback: _T) -> _T:
    """Return the query's result, or the fallback if the system call fails or does not exist."""
    try:
        return query()
    except (OSError, AttributeError, ValueError):
        return fallback


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def _fields(text: str, separator: str | None = ":") -> dict[str, str]:
    """Parse lines of "key: value" (separator None: white space). The first line with a key counts."""
    fields: dict[str, str] = {}
    for line in text.splitlines():
        key, *rest = line.split(separator, 1)
        if rest:
            fields.setdefault(key.strip(), rest[0].strip())
    return fields


def _integer(text: str) -> int | None:
    try:
        return int(text)
    except ValueError:
        return None
