"""The benchmark over seeds: what it keeps, what it runs again, and what it calls too low."""

import json
import subprocess

import pytest

from benchmarks import quickstart_seeds
from benchmarks.quickstart_seeds import Results, main, summary


def _row(seed, correct, blind=False):
    return {
        "seed": seed,
        "blind": blind,
        "correct": correct,
        "total": 400,
        "status": 0,
        "seconds": 200.0,
    }


@pytest.fixture
def runs(monkeypatch):
    """Runs in place of the quickstart's: 97 % whatever the seed, blind 22 %; those made so far."""
    made = []

    def quickstart(seed, blind, folder):
        if seed == 666:
            raise KeyboardInterrupt
        made.append((seed, blind))
        return _row(seed, 88 if blind else 388, blind)

    monkeypatch.setattr(quickstart_seeds, "run_quickstart", quickstart)
    return made


def test_a_run_that_was_stopped_goes_on_where_it_was(runs, tmp_path, capsys):
    with pytest.raises(KeyboardInterrupt):
        main(["--out", str(tmp_path), "--seeds", "1", "2", "666", "--blind-seeds"])
    assert runs == [(1, False), (2, False)]
    assert main(["--out", str(tmp_path), "--seeds", "1", "2", "3", "--blind-seeds", "1"]) == 0
    assert runs == [(1, False), (2, False), (3, False), (1, True)]
    shown = capsys.readouterr().out
    assert "2 of 4 runs are known already" in shown
    assert "seed 3: 388/400 (97.0%) in 200 s; 1 of 2, ETA" in shown
    assert "| 1, blind | 88 | 400 | 22.0% | 200 |" in shown
    assert "Mean of 3 seeds 97.0%, lowest 97.0%." in shown


def test_results_of_other_settings_are_not_taken(runs, tmp_path, monkeypatch):
    arguments = ["--out", str(tmp_path), "--seeds", "1", "--blind-seeds"]
    main(arguments)
    monkeypatch.setattr(quickstart_seeds, "settings_digest", lambda: "other")
    main(arguments)
    assert runs == [(1, False), (1, False)]


def test_seeds_are_drawn_once_and_are_new_ones(tmp_path):
    results = Results(tmp_path / "results.json")
    drawn = results.draw(3, taken=[1, 2])
    assert len(set(drawn)) == 3
    assert Results(tmp_path / "results.json").draw(2, taken=[1, 2]) == drawn[:2]
    assert json.loads((tmp_path / "results.json").read_text())["drawn"] == drawn


def test_what_is_out_of_bounds_is_named():
    _, problems = summary([_row(1, 400), _row(2, 359), _row(3, 121, blind=True)], drawn=[2])
    assert problems == [
        "seed 2, drawn reaches 89.8%, below 90%",
        "seed 3, blind reaches 30.2%, above 30%",
        "the mean is 94.9%, below 95%",
    ]
    table, problems = summary([_row(1, 400), _row(2, 360), _row(3, 120, blind=True)], drawn=[])
    assert problems == []
    assert "Mean of 2 seeds 95.0%, lowest 90.0%." in table


def test_a_low_seed_ends_with_status_1(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(
        quickstart_seeds, "run_quickstart", lambda seed, blind, folder: _row(seed, 194, blind)
    )
    assert main(["--out", str(tmp_path), "--seeds", "7", "--blind-seeds"]) == 1
    assert "error: seed 7 reaches 48.5%, below 90%" in capsys.readouterr().err


def test_a_run_without_a_score_of_its_own_is_no_result(tmp_path, monkeypatch):
    (tmp_path / "score.json").write_text('{"overall": {"correct": 400, "total": 400}}')
    monkeypatch.setattr(
        quickstart_seeds.subprocess,
        "run",
        lambda *given, **settings: subprocess.CompletedProcess(
            given, 1, "", "error: step 3 failed"
        ),
    )
    with pytest.raises(SystemExit, match="step 3 failed"):
        quickstart_seeds.run_quickstart(7, False, tmp_path)
