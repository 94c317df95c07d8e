"""A disk that fills up while a checkpoint is written: one line, and the checkpoints before it stay."""

import contextlib
import resource
from dataclasses import replace

import pytest
import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor

from dattn_mcore.checkpoint import files, save
from dattn_mcore.checkpoint.reasons import ANY_FAILURE, reason
from dattn_mcore.errors import CheckpointError
from tests.unit.checkpoint.runs import small_run


@contextlib.contextmanager
def files_end_at(size):
    """The kernel refuses to write any file beyond a size, in this process and its forks."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def names(root):
    return sorted(path.name for path in root.iterdir())


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize(
    "limit", [500_000, 60_000, 1_000, 0], ids=["a shard", "the index", "common.pt", "everything"]
)
def test_one_line_and_earlier_checkpoints_stay(
    checkpoints, small_configuration, monkeypatch, capfd, asynchronous, limit
):
    monkeypatch.setattr(save, "RESERVE_BYTES", min(limit, save.RESERVE_BYTES))
    if limit == 60_000:  # which is not enough for the index alone where shards are smaller
        monkeypatch.setattr(files, "FILES_OF_A_RANK", 64)
    checkpoint = replace(small_configuration.checkpoint, asynchronous=asynchronous, keep=9)
    with small_run(checkpoints, replace(small_configuration, checkpoint=checkpoint)) as run:
        run.step(3)
        with files_end_at(limit), pytest.raises(CheckpointError) as error:
            run.saver.save(3)
            run.saver.poll(blocking=True)
        message = str(error.value)
        assert message.startswith(f"{checkpoints}/step_00000003 could not be written (")
        assert "free space or choose another log.run_dir" in message and "\n" not in message
        assert run.saver.poll(blocking=True) is None  # it is given up
        assert names(checkpoints) == ["step_00000001", "step_00000002"]
        run.saver.save(3)  # there is space again
        run.saver.poll(blocking=True)
        assert names(checkpoints) == ["step_00000001", "step_00000002", "step_00000003"]
    said = capfd.readouterr()
    assert "Traceback" not in said.err and "error" not in said.err.lower()


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
def test_the_system_says_why(checkpoints, small_configuration, monkeypatch, asynchronous):
    monkeypatch.setattr(save, "RESERVE_BYTES", 1000)
    checkpoint = replace(small_configuration.checkpoint, asynchronous=asynchronous)
    with small_run(checkpoints, replace(small_configuration, checkpoint=checkpoint)) as run:
        run.step(3)
        with files_end_at(500_000), pytest.raises(CheckpointError, match="File too large"):
            run.saver.save(3)
            run.saver.poll(blocking=True)


def test_one_file_of_two(checkpoints, small_configuration, tmp_path, capfd):
    """Fails where all ranks ask for the results, and not before, where the others would wait."""
    (tmp_path / "__0_0.distcp").mkdir()
    tensors = {
        name: ShardedTensor.from_rank_offsets(name, torch.ones(8), replica_id=0) for name in "ab"
    }
    with small_run(checkpoints, small_configuration) as run:
        run.saver.save(3)
        request = files.begin_save(tensors, tmp_path, run.groups.dp_cp)
        request.finalize_fns.insert(0, lambda: (tmp_path / "reached").touch())
        with pytest.raises(ANY_FAILURE) as error:
            request.execute_sync()
    assert "Is a directory" in reason(error.value)
    assert (tmp_path / "reached").exists()
    assert "Is a directory" not in capfd.readouterr().err


def test_nothing_of_the_reserve_is_left(checkpoints, small_configuration, caplog):
    """And Megatron-Core, which looks into the folder first, finds it empty."""
    with small_run(checkpoints, small_configuration) as run:
        run.step(3)
        folder = run.saver.save(3)
    assert names(checkpoints) == ["step_00000002", "step_00000003"]
    assert "Overwriting" not in caplog.text
    assert names(folder) == [
        ".metadata",
        "__0_0.distcp",
        "__0_1.distcp",
        "common.pt",
        "dattn.json",
        "metadata.json",
    ]
