"""A checkpoint's index is a pickle: it must not be able to run code."""

import io
import os
import pickle
import pickletools
from enum import Enum

import pytest
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import WriteItemType

from dattn_mcore.checkpoint.load import choose_checkpoint
from dattn_mcore.checkpoint.metadata import NEEDED, read_metadata
from dattn_mcore.errors import CheckpointError
from dattn_mcore.parallel.groups import single_process
from tests.unit.checkpoint.runs import vouch
from tests.unit.convert.convert_helpers import make_checkpoint, make_tokenizer, small_config
from tools.checkpoint_convert.__main__ import main


class Attack:
    """Calls a function when it is unpickled."""

    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call[0], self.call[1:]


@pytest.fixture
def checkpoint(tmp_path):
    """A whole checkpoint of a run."""
    path = tmp_path / "run/checkpoints/step_00000001"
    make_checkpoint(path, small_config(make_tokenizer(tmp_path)))
    return path


def forge(checkpoint, data):
    """Another index, and a manifest that vouches for it."""
    (checkpoint / ".metadata").write_bytes(data)
    vouch(checkpoint)


def attacks(target):
    """Pickles that make a file when plain `pickle.load` reads them."""
    return {
        "posix.system": Attack(os.system, f"touch {target}"),
        "builtins.exec": Attack(exec, f"open({str(target)!r}, 'w')"),
        # A dotted name reaches what a harmless module imports.
        "torch.distributed.checkpoint.metadata.os.system": None,
    }


@pytest.mark.parametrize("name", attacks(""))
def test_an_index_that_runs_code_is_refused(checkpoint, tmp_path, capsys, caplog, name):
    """By the converter and by a run that would start from it; nothing is called."""
    target = tmp_path / "called"
    attack = attacks(target)[name]
    if attack is not None:
        data = pickle.dumps(attack)
    else:
        module, _, inner = name.partition(".os")
        words = [module, "os" + inner]
        body = b"".join(b"\x8c" + bytes([len(w)]) + w.encode() for w in words)
        argument = f"touch {target}".encode()
        data = b"\x80\x04" + body + b"\x93\x8c" + bytes([len(argument)]) + argument + b"\x85R."
        assert [op.name for op, *_ in pickletools.genops(data)][-2:] == ["REDUCE", "STOP"]
    forge(checkpoint, data)
    with pytest.raises(CheckpointError, match="could run code; take a checkpoint from a place"):
        read_metadata(checkpoint)
    for command in (["inspect"], ["mcore-to-hf"]):
        arguments = [*command, str(checkpoint)] + [str(tmp_path / "out")] * (command != ["inspect"])
        assert main(arguments) == 2
        assert "could run code" in capsys.readouterr().err
    with single_process(), pytest.raises(CheckpointError, match="no checkpoint in"):
        choose_checkpoint(checkpoint.parents[1])
    assert "could run code" in caplog.text
    assert not target.exists() and not (tmp_path / "out").exists()
    if attack is not None:  # the attack is one: plain pickle runs it
        pickle.loads(data)
        assert target.exists()


@pytest.mark.parametrize("data", [b"", b"\x80\x04", pickle.dumps({"a": 1})[:-3], pickle.dumps(3)])
def test_a_damaged_index_is_one_line(checkpoint, data):
    forge(checkpoint, data)
    with pytest.raises(CheckpointError, match=r"\.metadata (cannot be read|is no index)"):
        read_metadata(checkpoint)


def test_a_whole_index_is_read(checkpoint):
    """As PyTorch itself reads it, and no name is allowed that is not one of PyTorch's or a path."""
    with (checkpoint / ".metadata").open("rb") as file:
        assert read_metadata(checkpoint) == pickle.load(file)
    for module, _ in NEEDED:
        assert module.split(".")[0] in ("torch", "pathlib", "collections")


class OldEnums(pickle.Pickler):
    """Writes members of enums as Python 3.11.0 to 3.11.3 does, Debian 12's 3.11.2 among them."""

    def reducer_override(self, thing):
        if isinstance(thing, Enum):
            return getattr, (type(thing), thing.name)
        return NotImplemented


def old_pickle(thing) -> bytes:
    stream = io.BytesIO()
    OldEnums(stream, protocol=4).dump(thing)
    return stream.getvalue()


def test_an_index_of_any_python_is_read(checkpoint):
    """Members of enums are distinguished from other uses of getattr."""
    whole = read_metadata(checkpoint)
    data = old_pickle(whole)
    assert b"getattr" in data
    forge(checkpoint, data)
    assert read_metadata(checkpoint) == whole


@pytest.mark.parametrize(
    "call",
    [(WriteItemType, "__init_subclass__"), (WriteItemType, "mro"), (Metadata, "__init__")],
)
def test_getattr_of_anything_else_is_refused(checkpoint, call):
    forge(checkpoint, pickle.dumps(Attack(getattr, *call)))
    with pytest.raises(CheckpointError, match=r"names builtins.getattr, .* could run code"):
        read_metadata(checkpoint)
