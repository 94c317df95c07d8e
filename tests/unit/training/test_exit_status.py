"""What the trainer's command says and returns: a user's mistake and a fault differ."""

import pytest

from dattn_mcore.errors import ConfigError, FaultError, RankError
from dattn_mcore.parallel.groups import join_store
from tests.ranks import end_ranks, start_ranks


def command(arguments, ill=False) -> int:
    """`pretrain_dattn.py`'s; a rank without arguments ends before it does anything."""
    from dattn_mcore.parallel import platform
    from dattn_mcore.training import main

    def fails(device, local_rank):
        raise FaultError("GPU 3 does not compute")

    main.SPEAKER_SECONDS = 0.0
    if ill:
        platform.check_device = fails
    return 0 if arguments is None else main.main(arguments)


def ended(folder, *arguments):
    """Exit status and output of each rank."""
    ranks = start_ranks(command, list(arguments), folder)
    try:
        for rank in ranks:
            rank.join(300)
        return [
            (rank.exitcode, (folder / f"rank{number}.log").read_text())
            for number, rank in enumerate(ranks)
        ]
    finally:
        end_ranks(ranks)


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("parallel.tpp=2", "error: unknown configuration key 'parallel.tpp'"),
        ("model.llm.head_dim=33", "error: model.llm.head_dim=33 and model.llm.hidden_size=128 "),
    ],
)
def test_a_mistake_of_all_ranks_is_reported_by_the_first(tmp_path, setting, said):
    (status, first), *others = ended(tmp_path, ([setting],), ([setting],))
    assert status == 2 and first.startswith(said) and first.count("\n") == 1
    assert others == [(2, "")]


def test_a_fault_that_all_ranks_know_is_reported_by_the_first(tmp_path):
    start = ["--device", "cpu"]
    (status, first), second = ended(tmp_path, (start,), (start, True))
    assert status == 4 and first.count("\n") == 1
    assert first.startswith("fault: rank 1 on ") and first.endswith(": GPU 3 does not compute\n")
    assert second == (4, "")


def test_a_fault_that_one_rank_knows_is_reported_by_that_rank(tmp_path):
    """The first rank, which holds the run's store, never comes."""
    start = ["--device", "cpu", "health.start_timeout_seconds=1"]
    _, (status, said) = ended(tmp_path, (None,), (start,))
    assert status == 4
    last = said.splitlines()[-1]  # what PyTorch's store says stands before it
    assert last.startswith("fault: rank 1 on ") and "cannot join the run" in last


def test_a_run_that_nobody_holds_is_a_fault_and_no_address_a_mistake(monkeypatch):
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MASTER_PORT", raising=False)
    with pytest.raises(ConfigError, match="MASTER_PORT"):
        join_store(1.0)
    monkeypatch.setenv("MASTER_PORT", "9")  # nobody listens there
    with pytest.raises(RankError, match="rank 1 on .* cannot join the run at 127.0.0.1:9 within 1"):
        join_store(1.0)
