"""Estimates of how long a run will still take."""

import re

import pytest

import search_state
import train_search
from support import clock
from support.clock import Clock, EveryMinute, Work, duration

from helpers import search, search_line


@pytest.fixture
def passing(monkeypatch):
    """`passing(seconds)` lets time pass for clocks."""
    now = [1000.0]
    monkeypatch.setattr(clock.time, "perf_counter", lambda: now[0])

    def wait(seconds):
        now[0] += seconds

    return wait


def test_estimate_is_the_work_left_at_the_speed_so_far(passing):
    run = Clock(training=Work(100), fitness=Work(50))
    passing(20)
    run.add("training", 10)  # 2 s each, 90 left
    passing(5)
    run.add("fitness", 10)  # 0.5 s each, 40 left
    assert run.seconds_left() == 90 * 2 + 40 * 0.5
    assert run.seconds_timed() == 25


def test_work_that_has_not_been_timed_takes_its_weight(passing):
    run = Clock(training=Work(10), fitness=Work(30, weight=1 / 3))
    assert run.seconds_left() is None
    assert run.text() == ""
    passing(8)
    run.add("training", 2)  # 4 s each
    assert run.seconds_left() == pytest.approx(8 * 4 + 30 * 4 / 3)


def test_time_between_start_and_add_alone_counts(passing):
    run = Clock(training=Work(10))
    passing(1000)
    run.start()
    passing(3)
    run.add("training", 1)
    assert run.seconds_timed() == 3


def test_finished_work_has_no_text(passing):
    run = Clock(training=Work(1))
    passing(3)
    run.add("training", 1)
    assert run.text() == ""


def test_duration_of_the_whole_is_told_once_after_a_minute(passing):
    told = []
    run = Clock(told.append, training=Work(100))
    for _ in range(50):
        passing(7)
        run.add("training", 1)
    assert told == [700]


def test_short_rest_is_not_told(passing):
    told = []
    run = Clock(told.append, training=Work(100))
    passing(99)
    run.add("training", 99)
    assert told == []


def test_every_minute_is_due_after_a_minute(passing):
    minute = EveryMinute()
    passing(59)
    assert not minute.due()
    passing(2)
    assert minute.due()
    assert not minute.due()


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (100, "100 s"), (150, "2.5 min"), (1500, "25 min"), (12_000, "3.3 h"), (9 * 86_400, "9.0 days")],
)
def test_duration_is_told_in_a_fitting_unit(seconds, text):
    assert duration(seconds) == text


# ---- in a run


@pytest.mark.usefixtures("quick_report", "tiny_supernet")
def test_search_logs_the_time_left(tmp_path, monkeypatch):
    monkeypatch.setattr(clock, "SHORTEST", 0)
    log = (search(tmp_path, "--plain", epochs=3) / "log.txt").read_text()
    generations = [line for line in log.splitlines() if "fitness best" in line]
    assert len(generations) == 3
    assert all(re.search(r"; about .* left$", line) for line in generations)  # the last measurement is still to come


@pytest.mark.usefixtures("quick_report", "tiny_supernet")
def test_long_search_on_a_cpu_tells_what_would_fit_a_day(tmp_path, monkeypatch):
    """Here a minute is a millisecond, and so a day is 1.4 s."""
    monkeypatch.setattr(clock, "MINUTE", 0.001)

    monkeypatch.setattr(search_state, "DAY", 0.01)
    log = (search(tmp_path, "--plain", epochs=3, report_freq=1) / "log.txt").read_text()
    assert log.count("the search will take about") == 1
    (advice,) = [line for line in log.splitlines() if "in a day" in line]
    assert "--train_samples" in advice
    assert "--valid_samples" in advice


@pytest.mark.usefixtures("quick_report", "tiny_supernet")
def test_slow_fitness_tells_each_minute_how_far_it_is(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(clock, "MINUTE", 1e-9)
    train_search.main(["--plain", *search_line(dir=tmp_path, run_name="run", epochs=1)])
    out = capsys.readouterr().out
    assert "fitness: 1 of 8 measurements" in out  # 4 individuals, 2 batches
