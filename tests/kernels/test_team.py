"""Kernels run on torch's threads while these come when called, and alone while they do not."""

import time

import pytest
import torch

from gatelet.kernels.backends.numba import lists, team

pytestmark = [
    pytest.mark.cpu,
    pytest.mark.skipif(
        team._parallel is None, reason="torch is not linked with an OpenMP runtime that has GOMP_parallel"
    ),
]
MS = 1_000_000


@pytest.fixture(autouse=True)
def _two_threads(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(team, "_alone_until", 0)
    monkeypatch.setattr(team, "_multiple", team.LEAST)
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


def test_a_region_that_was_mostly_waiting_is_not_tried_again_for_a_while() -> None:
    assert team.threads() == 2
    now = time.monotonic_ns()
    team._judge(now, now + 2 * MS, now + MS, now + 3600_000 * MS)  # one millisecond of work, an hour of waiting
    assert team.threads() == 1
    assert team.threads(10) == 1
    assert team._alone_until - now > 3600_000 * MS * team.LEAST


def test_time_alone_grows_with_losses_and_shrinks_without() -> None:
    for _ in range(10):
        team._judge(0, MS, 0, MS)
    assert team._multiple == team.MOST
    assert team.threads() == 2  # that was long ago
    team._judge(0, MS, MS, MS)
    assert team._multiple == team.DECAY * team.MOST
    for _ in range(200):
        team._judge(0, MS, MS, MS)
    assert team._multiple == team.LEAST


@pytest.mark.parametrize(("left", "end"), [(1, 50_000), (10 * MS, 12 * MS), (MS, MS)])
def test_a_little_waiting_is_no_loss(left: int, end: int) -> None:
    team._judge(0, end, left, end)
    assert team._alone_until == 0


def test_threads_whose_tasks_differ_in_length_lose_nothing() -> None:
    team._judge(0, MS, 2 * MS, 3600_000 * MS)
    assert team._alone_until == 0
    assert team._multiple == team.LEAST


def test_regions_tell_when_their_last_thread_came_and_their_first_one_left(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, int, int, int]] = []
    monkeypatch.setattr(team, "_judge", lambda *times: seen.append(times))
    monkeypatch.setattr(team, "SLACK", -1)  # every region is looked at
    starts = torch.arange(0, 40_001, 4)
    units = torch.arange(4).repeat(10_000)
    found = lists.by_example(torch.ones(40_000), torch.ones(4, 16), None, starts, units)
    assert found.eq(4).all()
    assert len(seen) == 1
    begin, came, left, end = seen[0]
    assert begin < left <= end
    assert begin < came <= end


def test_alone_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    starts, units = torch.arange(0, 40_001, 4), torch.arange(4).repeat(10_000)
    values, weight = torch.randn(40_000), torch.randn(4, 16)
    together = lists.by_example(values, weight, None, starts, units)
    monkeypatch.setattr(team, "_alone_until", time.monotonic_ns() + 3600_000 * MS)
    assert lists.by_example(values, weight, None, starts, units).equal(together)
