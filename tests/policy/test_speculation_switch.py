"""When speculation is off, and what finding out costs."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from amusd.policy.speculation_length import StepTimes
from amusd.policy.speculation_switch import SpeculationSwitch, SwitchMember
from amusd.protocol.events import Verdict

VERDICT = Verdict(0, 2, num_checked=1, num_accepted=1, next_token=1)


class Device:
    """Sessions of one switch that get a token in each turn, at a speed for each way."""

    def __init__(self, num_sessions: int, on_seconds: float, off_seconds: float) -> None:
        self.times = StepTimes()
        self.switch = SpeculationSwitch(self.times)
        self.members = [self.switch.join() for _ in range(num_sessions)]
        self.seconds = {True: on_seconds, False: off_seconds}
        self.now = 0.0
        self.num_tokens = {True: 0, False: 0}
        for member in self.members:
            member.passed(VERDICT, 1, self.now, is_first=True)

    def run(self, num_tokens: int) -> "Device":
        """Let each session write so many tokens."""
        for _ in range(num_tokens):
            is_on = self.switch.speculates
            self.now += self.seconds[is_on]
            self.num_tokens[is_on] += 1
            for member in self.members:
                member.passed(VERDICT, 1, self.now, is_first=False)
        return self

    @property
    def efficiency(self) -> float:
        """Speed over that of the faster way alone."""
        total = sum(self.num_tokens.values())
        return total * min(self.seconds.values()) / self.now


@pytest.mark.parametrize("num_sessions", [1, 2, 8, 40])
@pytest.mark.parametrize("on_seconds", [0.005, 0.008, 0.012, 0.03])
def test_the_faster_way_is_found_and_finding_it_costs_little(
    num_sessions: int, on_seconds: float
) -> None:
    device = Device(num_sessions, on_seconds, off_seconds=0.01).run(4000)
    assert device.efficiency > 0.97
    is_on_better = on_seconds < 0.01
    assert device.num_tokens[is_on_better] > 0.9 * 4000


@given(st.floats(0.001, 0.1), st.floats(0.001, 0.1), st.integers(1, 16))
@settings(max_examples=50, deadline=None)
def test_speed_in_the_long_run_is_that_of_the_faster_way(
    on_seconds: float, off_seconds: float, num_sessions: int
) -> None:
    device = Device(num_sessions, on_seconds, off_seconds).run(300)
    device.now, device.num_tokens = 0.0, {True: 0, False: 0}
    for member in device.members:  # the clock starts again
        member._last_seconds = None
    assert device.run(3000).efficiency > 0.93


@pytest.mark.parametrize("num_sessions", [1, 4])
def test_a_change_of_the_speeds_is_noticed(num_sessions: int) -> None:
    device = Device(num_sessions, on_seconds=0.02, off_seconds=0.01).run(300)
    assert not device.switch.speculates
    device.seconds[True] = 0.003
    device.run(3000)
    assert device.switch.speculates
    device.seconds[True] = 0.05
    device.run(300)
    assert not device.switch.speculates


def test_a_single_new_session_speculates_whatever_the_one_before_did() -> None:
    device = Device(1, on_seconds=0.02, off_seconds=0.01).run(200)
    assert not device.switch.speculates
    device.members[0].leave()
    assert device.switch.join().speculates


def test_new_sessions_beside_others_do_as_the_others() -> None:
    device = Device(4, on_seconds=0.02, off_seconds=0.01).run(200)
    assert not device.switch.speculates
    assert not device.switch.join().speculates


def test_a_number_of_sessions_that_is_new_starts_like_the_nearest() -> None:
    device = Device(8, on_seconds=0.02, off_seconds=0.01).run(200)
    for member in device.members[:2]:
        member.leave()
    assert not device.switch.speculates


def test_plain_decoding_is_not_tried_where_it_cannot_be_faster() -> None:
    device = Device(1, on_seconds=0.002, off_seconds=0.01)
    for _ in range(10):
        device.times.observe_pass(1, 0.01)
    device.run(2000)
    assert device.num_tokens[False] == 0


def test_speculation_is_not_tried_where_rows_cost_more_than_they_yield() -> None:
    device = Device(8, on_seconds=0.02, off_seconds=0.01)
    for rows in range(1, 80):
        device.times.observe_pass(rows, rows * 0.002)
    device.run(2000)
    assert device.num_tokens[True] < 20


def test_a_stall_does_not_change_the_way() -> None:
    device = Device(2, on_seconds=0.008, off_seconds=0.01).run(400)
    assert device.switch.speculates
    device.now += 1.0  # a long prompt of another session
    device.run(1)
    assert device.switch.speculates


def test_each_session_is_counted_once_when_it_leaves() -> None:
    switch = SpeculationSwitch(StepTimes())
    first, second = switch.join(), switch.join()
    assert switch.num_sessions == 2
    assert not first.is_alone
    first.leave()
    first.leave()
    assert switch.num_sessions == 1
    assert second.is_alone


def test_the_interval_of_a_change_does_not_count_for_either_way() -> None:
    switch = SpeculationSwitch(StepTimes())
    member: SwitchMember = switch.join()
    now = 0.0
    member.passed(VERDICT, 1, now, is_first=True)
    for _ in range(20):
        now += 0.01
        member.passed(VERDICT, 1, now, is_first=False)
    before = switch.num_changes
    while switch.num_changes == before:  # until plain decoding is tried
        now += 0.01
        member.passed(VERDICT, 1, now, is_first=False)
    assert not member.speculates
    for seconds in (0.2, 0.2):  # the last passes with proposals, and the first without
        now += seconds
        member.passed(VERDICT, 1, now, is_first=False)
    for _ in range(16):
        now += 0.005
        member.passed(VERDICT, 1, now, is_first=False)
    assert not member.speculates  # it is twice as fast
