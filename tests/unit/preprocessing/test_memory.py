"""Memory: what is free, and that no more is handed out."""

import pytest

from nnssl_ext.preprocessing import memory, parallel
from nnssl_ext.preprocessing.memory import MemoryGuard, available_memory
from nnssl_ext.preprocessing.parallel import Workers, run_all


def test_the_guard_lets_in_what_fits_and_always_one():
    guard = MemoryGuard(100, lambda item: item)
    assert guard.admits(0, 500)  # alone, whatever its size
    assert not guard.admits(1, 60)
    guard.release(0)
    assert guard.admits(1, 60) and guard.admits(2, 40)
    assert not guard.admits(3, 1)
    guard.release(1)
    assert guard.admits(3, 60)


def test_an_item_that_waits_is_measured_once():
    measured = []
    guard = MemoryGuard(10, lambda item: measured.append(item) or item)
    assert guard.admits(0, 10)
    assert [guard.admits(1, 5) for _ in range(4)] == [False] * 4
    assert measured == [10, 5]


@pytest.mark.parametrize("version", [1, 2])
def test_the_limit_of_a_job_counts_wherever_it_is_set_above_the_process(version, tmp_path):
    groups, own = tmp_path / "cgroup", tmp_path / "own"
    root, limit, used = (groups / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes") if version == 1 else (groups, "memory.max", "memory.current")
    own.write_text("4:cpu,cpuacct:/job/step\n7:memory:/job/step\n" if version == 1 else "0::/job/step\n")
    (root / "job" / "step").mkdir(parents=True)
    for folder, values in ((root / "job", (9000, 5000, 1500)), (root / "job" / "step", ("max", 4000, 0))):
        for name, value in zip((limit, used), values):
            (folder / name).write_text(f"{value}\n")
        (folder / "memory.stat").write_text(f"anon 17\ninactive_file {values[2]}\n")
    assert list(memory._free_in_groups(groups, own)) == [5500]  # cached files give way


def test_without_control_groups_the_machine_decides(tmp_path):
    assert list(memory._free_in_groups(tmp_path, tmp_path / "none")) == []
    assert available_memory() > 10_000_000


def _largest_sum(intervals):
    changes = sorted([(start, size) for start, _, size in intervals] + [(end, -size) for _, end, size in intervals])
    held = most = 0
    for _, change in changes:
        held += change
        most = max(most, held)
    return most


def _work(item):
    import time

    start = time.monotonic()
    time.sleep(0.1)
    return start, time.monotonic(), item


def test_cases_in_work_never_hold_more_than_the_budget():
    sizes, unit = [60, 50, 10, 90, 40, 40, 20, 300, 30, 30], 10**7
    workers = Workers(2, memory=100 * unit + 2 * parallel.PROCESS_BYTES)
    intervals, failed = run_all(_work, sizes, [str(i) for i in range(10)], workers, "test", lambda size: size * unit)
    assert not failed and len(intervals) == 10
    assert _largest_sum([found for found in intervals.values() if found[2] != 300]) <= 100
    alone = next(found for found in intervals.values() if found[2] == 300)
    assert all(other is alone or other[1] <= alone[0] or other[0] >= alone[1] for other in intervals.values())
