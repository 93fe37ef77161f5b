"""From timings to constants, on timings whose constants are known."""

import pytest

from real.calibration.fitting import Summary, fit_kernel, fit_train, overhead_ns, quietest, rising, slowdown, summary


def test_a_summary_is_median_and_the_outer_tenths():
    assert summary([30, 10, 20, 50, 40, 60, 70, 80, 90, 100, 0]) == Summary(50, 10, 90, 11)
    with pytest.raises(ValueError, match="there are no samples"):
        summary([])


def test_the_quietest_round_is_the_one_with_the_least_median():
    """Neither that with the least sample nor that with the least mean."""
    rounds = [[1.0, 30.0, 31.0], [20.0, 21.0, 400.0], [22.0, 23.0, 24.0]]
    assert quietest(rounds) == [20.0, 21.0, 400.0]
    assert quietest(rounds[::-1]) == [20.0, 21.0, 400.0]


def test_trains_give_back_start_and_copy():
    """28 us before, 240 us each."""
    assert fit_train({1: 268, 4: 28 + 4 * 240, 16: 28 + 16 * 240}) == (28, 240)


def test_a_train_s_line_goes_through_the_isolated_copy():
    """Of 3 more copies in 330 and 15 more in 1500: (3 x 330 + 15 x 1500) / (9 + 225) each."""
    found = fit_train({1: 150, 4: 480, 16: 1650})
    assert found.copy_ns == pytest.approx(23490 / 234)
    assert found.start_ns + found.copy_ns == 150


def test_trains_that_are_slower_than_isolated_copies_have_a_negative_start():
    assert fit_train({1: 100, 4: 430}) == (-10, 110)


@pytest.mark.parametrize("trains", [{1: 5}, {4: 5, 16: 9}])
def test_a_train_needs_the_isolated_copy_and_another(trains):
    with pytest.raises(ValueError, match="a train needs the time of 1 copy and of more"):
        fit_train(trains)


def test_a_curve_never_falls():
    assert rising({4096: 28_000.4, 65536: 27_500, 1024: 30_000, 10**6: 40_000.6}) == [
        (1024, 30_000),
        (4096, 30_000),
        (65536, 30_000),
        (1_000_000, 40_001),
    ]


def test_experts_give_back_launch_and_bandwidth():
    """12 us and 2 TB/s."""
    shapes = [(4, 17_000_000), (8, 12_000_000), (2, 350_000_000)]
    found = fit_kernel([(count, size, count * (12_000 + size / 2000)) for count, size in shapes])
    assert found.launch_ns == pytest.approx(12_000)
    assert found.bytes_per_s == pytest.approx(2e12)
    assert found.worst == pytest.approx(0, abs=1e-9)


def test_a_launch_is_never_negative():
    found = fit_kernel([(1, 1000, 900.0), (1, 2000, 2000.0)])
    assert found.launch_ns == 0
    assert found.bytes_per_s == pytest.approx(1e9 * 5_000_000 / 4_900_000)


def test_times_that_do_not_grow_with_bytes_say_nothing():
    with pytest.raises(ValueError, match="do not grow with their bytes"):
        fit_kernel([(1, 1000, -5.0), (1, 2000, -10.0)])


def test_overhead_is_what_reading_does_not_explain():
    assert overhead_ns([(1000, 21_000), (2000, 22_000), (3000, 23_500)], bytes_per_s=1e9) == 20_000
    assert overhead_ns([(1000, 900)], bytes_per_s=1e9) == 0


def test_slowdown_compares_medians():
    assert slowdown([100, 90, 110], [105, 500, 1]) == 1.05
