"""What a run without a terminal says of its progress."""

from dattn_mcore.evaluation.progress import RunProgress


def test_lines_name_count_rate_and_eta(capsys):
    with RunProgress(shown=True) as progress:
        progress.begin("pope", 2, 6)
        progress.update("pope", 4, 6)  # too soon for a line
        progress.update("pope", 6, 6)
    first, last = capsys.readouterr().err.splitlines()
    assert first == "pope: 6 questions, 2 answered before"
    assert last.startswith("pope: 6/6, ") and last.endswith("questions/s, ETA 0 s")


def test_other_ranks_are_silent(capsys):
    with RunProgress(shown=False) as progress:
        progress.begin("pope", 0, 6)
        progress.update("pope", 6, 6)
    assert capsys.readouterr().err == ""


def test_a_note_ends_the_line(capsys):
    with RunProgress(shown=True) as progress:
        progress.begin("pope", 0, 6)
        progress.update("pope", 6, 6, "94% of images cached")
    assert capsys.readouterr().err.splitlines()[-1].endswith("ETA 0 s, 94% of images cached")
