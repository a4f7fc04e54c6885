"""What is made of the figures; the runs themselves are no tests."""

from __future__ import annotations

import soak
import tables
import wrk
from wrk import Load

PRINTED = """Running 1s test @ http://127.0.0.1:8000/predict
  1 threads and 8 connections
  120 requests in 1.00s, 24KB read
{"answers": 120, "refused": 20, "broken": 3, "seconds": 0.500000, "p50": 4.250, "p99": 31.000}
"""


def load(rate: float, *, p99: float = 10.0, refused: int = 0) -> Load:
    return Load(answers=int(rate) + refused, refused=refused, broken=0, seconds=1.0, p50=1.0, p99=p99)


def test_the_figures_of_wrk_are_read_and_refusals_are_no_answers():
    read = wrk.parse(PRINTED)

    assert (read.good, read.rate, read.errors, read.p50, read.p99) == (100, 200.0, 23, 4.25, 31.0)


def test_a_ratio_compares_rounds_and_not_their_medians():
    ratio = tables.ratios([load(100), load(900), load(400)], [load(50), load(300), load(100)])

    assert ratio == tables.Spread(3.0, 2.0, 4.0)
    assert str(ratio) == "3.00 (2.00 to 4.00)"


def test_there_is_no_ratio_to_a_server_that_did_not_answer():
    assert tables.ratios([load(100)], [load(0, refused=5)]) is None


def test_a_soak_names_errors_growth_and_slow_minutes():
    def minutes(*figures: tuple[float, int]) -> list[soak.Minute]:
        return [soak.Minute(load(100, p99=p99), memory) for p99, memory in figures]

    assert soak.verdict(minutes((90, 50), (10, 100), (11, 101), (10, 102))) == []
    assert len(soak.verdict(minutes((10, 100), (10, 100), (10, 130), (10, 160)))) == 1
    assert len(soak.verdict(minutes((10, 100), (10, 100), (30, 100), (10, 100)))) == 1
    assert len(soak.verdict([soak.Minute(load(100, refused=1), 100)])) == 1
