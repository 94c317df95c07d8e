"""A run whose rank, data or numbers go wrong ends soon, says why, and loses no checkpoint."""

import json
import re
import socket
import threading
import time
from datetime import timedelta

import pytest
import torch.distributed as dist

from dattn_mcore.checkpoint import folders
from dattn_mcore.checkpoint.manifest import read_manifest
from dattn_mcore.config.schema import Config
from dattn_mcore.errors import CheckpointError, ConfigError, DattnError, FaultError
from dattn_mcore.training import start_checks, watchdog
from dattn_mcore.training.start_checks import check_ranks, describe_rank
from tests.distributed.faults import start_ranks
from tests.distributed.jobs import read_metrics, run_training
from tests.distributed.pool import WorkerError
from tests.distributed.small_models import small_config
from tests.distributed.start_jobs import agree_on, check_folder, wait_for_a_slow_rank
from tests.distributed.watched_jobs import train_with_poison
from tests.ranks import end_ranks

HOST = socket.gethostname()
LIMIT = 8.0  # seconds a step may take here; one takes a fraction of a second
# The watchdog asks the others where they are (at most 3 beats) before it ends the rank. The rest
# is what two busy cores may delay.
BOUND = LIMIT + 3 * watchdog.BEAT_SECONDS + 10


def whole_checkpoints(run_dir):
    """Names of checkpoints whose every file is as it was written."""
    found = []
    for folder in sorted((run_dir / "checkpoints").glob("step_*")):
        files = read_manifest(folder)["files"]
        if folders.damage(folder, sorted(files), files) is None:
            found.append(folder.name)
    return found


@pytest.mark.parametrize(
    ("fault", "where", "rank_0_says"),
    [
        ("stopped", "step 2", f"rank 1 on {HOST} gives no sign of life"),
        ("dead_loader", "step 2", f"rank 1 on {HOST} is elsewhere: waiting for data of step 2"),
    ],
)
def test_a_rank_that_stands_still_ends_the_run(pool, digits, tmp_path, fault, where, rank_0_says):
    tree = small_config(
        digits,
        tmp_path / "run",
        checkpoint={"save_interval": 1},
        health={"step_timeout_seconds": LIMIT},
    )
    ranks = start_ranks(tree, tmp_path, fault)
    try:
        deadline = time.monotonic() + 240
        while not (tmp_path / "fault").exists():
            assert time.monotonic() < deadline, (tmp_path / "rank1.log").read_text()
            time.sleep(0.1)
        began = time.monotonic()
        ended = ranks if fault == "dead_loader" else ranks[:1]
        for process in ended:
            process.join(BOUND - (time.monotonic() - began))
            assert process.exitcode == watchdog.EXIT_STATUS
    finally:
        end_ranks(ranks)
    log = (tmp_path / "rank0.log").read_text()
    assert f"hung: rank 0 on {HOST}: {where} takes longer than health.step_timeout_seconds" in log
    assert "Current thread" in log or "Thread 0x" in log
    if fault == "dead_loader":
        other = (tmp_path / "rank1.log").read_text()
        assert f"hung: rank 1 on {HOST}: waiting for data of step 2 takes longer than" in other
        assert "global_batch" in other  # the stack shows where it waits
        # Both end at about the same time; the one that asks last finds the other gone.
        gone = f"last heard of: {rank_0_says.partition('elsewhere: ')[2]}, ended by its watchdog"
        assert rank_0_says in log or gone in log
    else:
        assert rank_0_says in log
        assert "train_step" in log
    assert whole_checkpoints(tmp_path / "run") == ["step_00000001"]
    assert all(pool.run(run_training, 2, tree))
    assert [row["step"] for row in read_metrics(tmp_path / "run")] == [1, 2, 3]


def ended_by(digits, tmp_path, fault, world_size=2, **sections):
    """Starts ranks of which rank 1 has a fault; returns exit status and output of each."""
    checkpoint = {"save_interval": 1}
    tree = small_config(digits, tmp_path / "run", checkpoint=checkpoint, **sections)
    ranks = start_ranks(tree, tmp_path, fault, world_size=world_size)
    try:
        for process in ranks:
            process.join(240)
    finally:
        end_ranks(ranks)
    logs = [(tmp_path / f"rank{rank}.log").read_text() for rank in range(world_size)]
    return [(process.exitcode, log) for process, log in zip(ranks, logs, strict=True)]


def last_line(log):
    """The last line, which must be all that was said of the end."""
    assert "Traceback" not in log, log
    return log.splitlines()[-1]


def test_a_rank_that_was_killed_is_named_by_one_that_is_left(digits, tmp_path):
    (status, first), (killed, _), (other, third) = ended_by(digits, tmp_path, "killed", 3)
    assert (status, killed, other) == (4, -9, 4)
    said = last_line(first)
    # A rank tells every two seconds where it is.
    assert said.startswith(f"fault: rank 1 on {HOST} ended (last heard of: ")
    assert f") while rank 0 on {HOST} was in step 2; look at" in said
    assert "start again to go on from the newest checkpoint" in said
    assert "fault:" not in third and "Traceback" not in third
    assert whole_checkpoints(tmp_path / "run") == ["step_00000001"]


def test_a_defect_of_one_rank_has_its_traceback_there_alone(digits, tmp_path):
    (status, first), (broken, second) = ended_by(digits, tmp_path, "defect")
    assert (status, broken) == (4, 1)
    assert "KeyError: 'nobody foresaw this'" in second.splitlines()[-1]
    assert "Traceback" not in first and "fault:" not in first


def test_any_error_in_data_loading_is_one_line(digits, tmp_path):
    (status, first), (other, second) = ended_by(digits, tmp_path, "broken_loader")
    assert (status, other) == (2, 2)
    trace = tmp_path / "run/traceback_rank1.txt"
    assert last_line(first) == (
        "error: loading the data of step 2 failed (RuntimeError: decoder lost its context); the "
        f"traceback is in {trace} (rank 1 on {HOST})"
    )
    assert "Traceback" not in second and "error:" not in second
    assert "in breaks" in trace.read_text()
    assert whole_checkpoints(tmp_path / "run") == ["step_00000001"]


def test_a_gpu_that_fails_while_data_is_loaded_is_one_line_of_its_rank(digits, tmp_path):
    """It goes through no collective, which the GPU would take part in."""
    (status, first), (sick, second) = ended_by(digits, tmp_path, "sick_gpu")
    assert (status, sick) == (4, 4)
    assert last_line(second) == (
        f"fault: rank 1 on {HOST}: the GPU fails while it resizes an image, a.jpg (ECC); take it out"
    )
    assert "Traceback" not in first and "fault:" not in first


def test_out_of_memory_names_the_pack_and_what_to_lower(digits, tmp_path):
    sections = {"data": {"text_budget": 64}, "train": {"global_batch_size": 16}}
    (status, first), (full, second) = ended_by(digits, tmp_path, "full_memory", **sections)
    assert (status, full) == (4, 2)
    said = last_line(second)
    assert re.match(
        rf"error: rank 1 on {HOST} is out of memory at step 2, in pack 2 of \d+ \(\d+ samples, "
        r"\d+ text and \d+ visual rows; RuntimeError: .*can't allocate memory.*\); lower "
        r"data.text_budget=64, data.visual_budget=96 or train.loss_chunk=1024, set "
        r"train.recompute=full, or divide the model over more processes \(--tp, --pp\)$",
        said,
    ), said
    assert "Traceback" not in first and "fault:" not in first


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("full_memory_of_the_optimizer", "is out of memory at step 2, in the optimizer's update ("),
        ("full_memory_of_the_loader", "loading the data of step 1 failed (MemoryError); the trace"),
    ],
)
def test_out_of_memory_elsewhere(digits, tmp_path, fault, message):
    (_, first), (status, second) = ended_by(digits, tmp_path, fault)
    assert status == 2
    assert message in last_line(second if "optimizer" in fault else first)


@pytest.mark.parametrize("poison", ["weight", "gradient"])
def test_what_is_not_finite_stops_all_ranks_before_the_update(pool, digits, tmp_path, poison):
    """One replica of two is poisoned in step 2; the other learns of it, and nobody updates."""
    tree = small_config(digits, tmp_path, checkpoint={"save_interval": 1})
    results = pool.run(train_with_poison, 2, tree, poison)
    messages = {message for message, _ in results}
    assert len(messages) == 1, messages
    (message,) = messages
    what = "loss" if poison == "weight" else "gradient norm"
    assert f"the {what} is nan at step 2" in message and "\n" not in message
    assert all(unchanged for _, unchanged in results)
    samples = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert [row["step"] for row in samples] == [1]
    named = message.split("samples ")[1].split(";")[0].split(" and ")[0].split(", ")
    assert len(named) > 1
    assert whole_checkpoints(tmp_path) == ["step_00000001"]
    assert all(pool.run(run_training, 2, tree))
    second = json.loads((tmp_path / "samples.jsonl").read_text().splitlines()[1])
    assert set(named) <= set(second["ids"])
    if poison == "weight":  # only the poisoned replica's micro-batches are named
        assert len(named) < len(second["ids"])


def test_ranks_with_other_settings_are_named(digits, tmp_path):
    tree = small_config(digits, tmp_path / "run")
    ranks = start_ranks(tree, tmp_path, "nothing", {1: ["optim.lr=1.0"]})
    try:
        for process in ranks:
            process.join(240)
            assert process.exitcode == 2
    finally:
        end_ranks(ranks)
    expected = f"error: rank 1 on {HOST}: optim.lr is 1.0, and rank 0 on {HOST} has 0.003"
    lines = (tmp_path / "rank0.log").read_text().splitlines()
    assert len(lines) == 1 and lines[0].startswith(expected)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("kind", "raised", "message"),
    [
        ("FaultError", "FaultError", "it is so"),
        ("RankError", "FaultError", "it is so"),
        ("RecordError", "DataError", "no id"),
        ("CheckpointError", "CheckpointError", "it is so"),
        ("ConfigError", "ConfigError", "first; also: second"),
        ("UnknownError", "DattnError", "new here"),
    ],
)
def test_ranks_agree_on_an_error_of_any_kind(pool, kind, raised, message):
    """None waits for a rank that could not say what it has."""
    expected = (raised, f"{message} (rank 1 on {HOST})")
    assert pool.run(agree_on, 2, kind, timeout=60) == [expected] * 2


def compare(facts, problems, timeout_seconds=20.0):
    """Lets ranks, one a thread, compare themselves; returns what each raises."""
    store = dist.HashStore()
    raised = {}

    def one(rank):
        try:
            check_ranks(store, rank, len(problems), facts[rank], problems[rank], timeout_seconds)
        except DattnError as error:
            raised[rank] = error

    threads = [threading.Thread(target=one, args=(rank,)) for rank in facts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return raised


def test_equal_ranks_pass():
    facts = describe_rank(Config(), "cpu")
    assert compare({0: facts, 1: facts}, [None, None]) == {}


@pytest.mark.parametrize(
    ("change", "problem", "kind", "message"),
    [
        ({"the code of dattn_mcore (digest)": "0"}, None, ConfigError, "the code of dattn_mcore"),
        ({"the version of torch": "2.0"}, None, ConfigError, "the version of torch is '2.0'"),
        ({"the kind of device": "gpu"}, None, FaultError, "the kind of device is 'gpu'"),
        ({}, ConfigError("GPU 3 is not visible"), ConfigError, "GPU 3 is not visible"),
        ({}, FaultError("GPU 3 does not compute"), FaultError, "GPU 3 does not compute"),
    ],
)
def test_a_rank_that_differs_is_named_on_all(change, problem, kind, message):
    facts = describe_rank(Config(), "cpu")
    raised = compare({0: facts, 1: {**facts, **change}}, [None, problem])
    assert set(raised) == {0, 1} and len({str(error) for error in raised.values()}) == 1
    assert {type(error) for error in raised.values()} == {kind}
    assert str(raised[0]).startswith(f"rank 1 on {HOST}: {message}")


@pytest.mark.parametrize(
    ("blind", "kind"), [({1, 3}, ConfigError), ({3}, FaultError)], ids=["every-host", "one-host"]
)
def test_a_gpu_that_one_host_alone_lacks_is_that_hosts_fault(blind, kind):
    """Two ranks a host; where every host lacks one, the run was started wrongly."""
    store = dist.HashStore()
    for rank, host in enumerate("aabb"):
        problem = "GPU 1 is not visible" if rank in blind else None
        report = {"host": host, "problem": problem, "fault": False, "facts": {}}
        store.set(f"start/{rank}", json.dumps(report))
    found = start_checks._compare(store, 4)
    assert type(found) is kind
    assert str(found) == f"rank {min(blind)} on {'aabb'[min(blind)]}: GPU 1 is not visible"


def test_a_rank_that_does_not_start_is_named():
    facts = describe_rank(Config(), "cpu")
    began = time.monotonic()
    raised = compare({0: facts}, [None, None], timeout_seconds=1.0)
    assert time.monotonic() - began < 10
    assert type(raised[0]) is FaultError
    assert str(raised[0]).startswith(
        "rank 1 of 2 did not start within health.start_timeout_seconds=1"
    )


def test_ranks_wait_for_one_that_makes_the_index(pool, tmp_path):
    assert all(pool.run(wait_for_a_slow_rank, 3, str(tmp_path)))


def test_a_checkpoint_folder_that_is_not_shared_is_found(pool, tmp_path):
    with pytest.raises(WorkerError, match=rf"not the folder that rank 0 sees.*rank 1 on {HOST}"):
        pool.run(check_folder, 2, [str(tmp_path / "a"), str(tmp_path / "b")])


def test_a_checkpoint_folder_that_cannot_be_written_is_found(pool, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(WorkerError, match=rf"cannot be written there .*\(rank 1 on {HOST}\)") as e:
        pool.run(check_folder, 2, [str(tmp_path / "a"), str(tmp_path / "file/b")])
    assert e.value.kind is CheckpointError
    pool.run(check_folder, 2, [str(tmp_path / "a")] * 2)
    assert list((tmp_path / "a/checkpoints").iterdir()) == []


def test_a_watchdog_that_is_closed_or_notified_of_progress_stays_quiet(tmp_path):
    with open(tmp_path / "log", "w") as output:
        dog = watchdog.Watchdog(0, 1, output=output)
        # The limit is far above what a busy machine adds to a short sleep, and below all of them.
        for index in range(9):
            dog.phase(f"step {index}", 2.0, "health.step_timeout_seconds")
            time.sleep(0.25)
        dog.close()
        time.sleep(2.1)
    assert (tmp_path / "log").read_text() == ""


def test_a_store_that_answers_no_more_does_not_hold_the_watchdog(tmp_path):
    """The rank that holds the store is the one that hangs."""
    store = dist.HashStore()
    store.set_timeout(timedelta(seconds=1))
    with open(tmp_path / "log", "w") as output:
        dog = watchdog.Watchdog(0, 2, store, output)
        phase = watchdog._Phase("step 1", time.monotonic(), 1.0, "x")
        assert "gives no answer" in dog._others(phase)[0]  # rank 1 never wrote its key
        dog.close()


def test_communication_share_is_measured_where_it_is_asked_for(pool, digits, tmp_path):
    for parallel, name in (({"tp": 2}, "two"), ({}, "off")):
        log = {"communication_share": name == "two"}
        run_dir = tmp_path / name
        tree = small_config(digits, run_dir, parallel=parallel)
        tree["log"].update(log)
        pool.run(run_training, 2, tree)
        shares = [row.get("communication_share") for row in read_metrics(run_dir)]
        if name == "off":
            assert shares == [None] * 3
        else:
            # Tensor parallel ranks wait for each other in every layer.
            assert all(0.01 < share < 1 for share in shares)
