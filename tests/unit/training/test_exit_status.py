"""What the trainer's command says and returns: a user's mistake and a fault are told apart."""

import pytest

from dattn_mcore.errors import ConfigError, DataError, FaultError, RankError
from dattn_mcore.parallel.groups import join_store
from dattn_mcore.training import main


@pytest.mark.parametrize(
    ("rank", "error", "status", "said"),
    [
        (0, ConfigError("tp is odd"), 2, "error: tp is odd\n"),
        (1, DataError("no file"), 2, ""),
        (0, FaultError("GPU 3 is ill"), 4, "fault: GPU 3 is ill\n"),
        (1, FaultError("GPU 3 is ill"), 4, ""),
        (1, RankError("alone"), 4, "fault: alone\n"),
    ],
)
def test_status_and_line(monkeypatch, capsys, rank, error, status, said):
    def fails(config, arguments):
        raise error

    monkeypatch.setattr(main, "_run", fails)
    monkeypatch.setattr(main, "_set_up_logging", lambda rank: None)
    monkeypatch.setattr(main, "SPEAKER_SECONDS", 0.0)
    monkeypatch.setenv("RANK", str(rank))
    assert main.main([]) == status
    assert capsys.readouterr().err == said


def test_a_run_that_nobody_holds_is_a_fault_and_no_address_a_mistake(monkeypatch):
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MASTER_PORT", raising=False)
    with pytest.raises(ConfigError, match="MASTER_PORT"):
        join_store(1.0)
    monkeypatch.setenv("MASTER_PORT", "9")  # nobody listens there
    with pytest.raises(RankError, match="rank 1 on .* cannot join the run at 127.0.0.1:9 within 1"):
        join_store(1.0)
