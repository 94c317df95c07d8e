"""Which attention backend runs, why, and what is said of one that cannot."""

import builtins
import re
from typing import get_args

import pytest
import torch

from dattn_mcore.architectures.sizes import AttentionBackend
from dattn_mcore.config.checks import check_config
from dattn_mcore.config.load import load_config
from dattn_mcore.errors import ConfigError
from dattn_mcore.layers import attention
from dattn_mcore.layers.attention import BACKENDS, AttentionOptions, choose_backend, flash
from dattn_mcore.training import main
from dattn_mcore.training.dry_run import attention_backends, describe

PLAIN = AttentionOptions(scale=0.1)
CAPPED = AttentionOptions(scale=0.1, softcap=50.0)
WINDOWED = AttentionOptions(scale=0.1, window=4096)
PACKAGES = {2: "flash_attn", 3: "flash_attn_interface"}
BF16, FP32 = torch.bfloat16, torch.float32


@pytest.fixture
def installed(monkeypatch):
    """Says which optional packages there are, wherever the test runs."""
    from dattn_mcore.layers.attention import triton_backend

    def problem(version, names):
        return None if PACKAGES[version] in names else "is not installed"

    def install(*names):
        monkeypatch.setattr(flash, "_problem", lambda version: problem(version, names))
        said = None if "triton" in names else "is not installed"
        monkeypatch.setattr(triton_backend, "import_problem", lambda module: said)

    return install


@pytest.mark.parametrize(
    ("packages", "options", "device", "dtype", "head_dim", "expected", "reason"),
    [
        ((), PLAIN, "cpu", FP32, 128, "sdpa", "computes? this model"),
        (("triton", "flash_attn"), PLAIN, "cpu", FP32, 128, "sdpa", "computes? this model"),
        (("triton",), CAPPED, "cpu", FP32, 256, "reference", "soft-cap"),
        (("triton", "flash_attn"), CAPPED, "gpu", BF16, 256, "flash", "flash-attn 2"),
        (("triton", "flash_attn"), PLAIN, "gpu", FP32, 128, "triton", "not flash: .*float32"),
        (("triton",), CAPPED, "gpu", BF16, 256, "triton", "not flash: .*not installed"),
        (("triton",), WINDOWED, "gpu", BF16, 128, "triton", "joint Triton kernel"),
        (("triton",), PLAIN, "gpu", BF16, 80, "sdpa", "not triton: head size 80"),
        ((), PLAIN, "gpu", BF16, 128, "sdpa", "not triton: .*not installed"),
        ((), CAPPED, "gpu", BF16, 256, "reference", "not sdpa: .*soft-cap"),
    ],
)
def test_auto_takes_the_fastest_that_can(
    installed, packages, options, device, dtype, head_dim, expected, reason
):
    installed(*packages)
    choice = choose_backend("auto", options, device, dtype, head_dim)
    assert choice.name == expected
    assert re.search(reason, choice.reason)


@pytest.mark.parametrize(
    ("requested", "device", "dtype", "head_dim", "message"),
    [
        ("flash", "gpu", BF16, 128, "flash-attn is not installed"),
        ("triton", "gpu", BF16, 80, "head size 80"),
        ("triton", "gpu", torch.float64, 64, "float64"),
        ("sdpa", "gpu", FP32, 64, "float32"),
        ("turbo", "cpu", FP32, 64, "use one of auto, flash, triton, sdpa, reference"),
    ],
)
def test_asking_for_one_that_cannot_run_is_an_error(
    installed, requested, device, dtype, head_dim, message
):
    installed("triton")
    with pytest.raises(ConfigError, match=message) as error:
        choose_backend(requested, PLAIN, device, dtype, head_dim)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("packages", "head_dim", "ordered", "backend", "reason"),
    [
        (("flash_attn_interface", "flash_attn"), 256, False, "flash", "flash-attn 3 computes"),
        (("flash_attn_interface", "flash_attn"), 192, True, "flash", "flash-attn 3 computes"),
        (("flash_attn_interface", "flash_attn"), 256, True, "flash", "flash-attn 2 computes.*not"),
        (("flash_attn_interface", "triton"), 256, True, "triton", "not flash: .*deterministic"),
        (("flash_attn_interface", "triton"), 128, True, "flash", "flash-attn 3 computes"),
    ],
)
def test_a_deterministic_run_takes_no_kernel_that_aborts(
    installed, monkeypatch, packages, head_dim, ordered, backend, reason
):
    """On a Hopper GPU; flash-attn 3 has no deterministic backward pass above head size 192."""
    installed(*packages)
    monkeypatch.setattr(flash, "is_hopper", lambda: True)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: ordered)
    choice = choose_backend("auto", CAPPED, "gpu", BF16, head_dim)
    assert choice.name == backend and re.search(reason, choice.reason)
    if backend == "triton":
        with pytest.raises(ConfigError, match="head size 256 .train.deterministic.; use"):
            choose_backend("flash", CAPPED, "gpu", BF16, head_dim)


@pytest.mark.parametrize("package", PACKAGES.values())
def test_a_build_for_another_torch_is_said_not_run(package, tmp_path, monkeypatch, fresh_imports):
    """A stand-in that fails as such builds do, imported once."""
    folder = tmp_path / package
    folder.mkdir()
    failing = "raise ImportError('undefined symbol: _ZN3c10\\nmore')\n"
    (folder / "__init__.py").write_text("import builtins; builtins.tried += 1\n" + failing)
    monkeypatch.setattr(builtins, "tried", 0, raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(flash, "is_hopper", lambda: True)
    flash._problem.cache_clear()
    for _ in range(2):
        choice = choose_backend("auto", PLAIN, "gpu", BF16, 128)
        assert choice.name != "flash"
        assert "cannot be imported (undefined symbol: _ZN3c10)" in choice.reason
        assert "\n" not in choice.reason
    assert builtins.tried == 1
    flash._problem.cache_clear()


def test_an_interpreted_kernel_must_be_asked_for(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ConfigError, match="needs a GPU"):
        choose_backend("triton", PLAIN, "cpu", FP32, 64)


def test_each_backend_is_a_setting():
    for name in ("auto", *attention.BACKENDS):
        check_config(load_config(None, [f"attention.backend={name}"]))


def test_the_dry_run_names_the_backend():
    assert "attention backend on a CPU: sdpa, all layers (" in describe(
        load_config(None, ["train.device=cpu"]), 1
    )


def test_windowed_and_other_layers_may_differ(installed):
    installed()
    config = load_config(
        None,
        [
            "model.llm.sliding_window=8",
            "model.llm.layer_pattern=[sliding,full]",
            "train.precision=bf16",
        ],
    )
    chosen = {layers: choice.name for layers, choice in attention_backends(config, "gpu")}
    assert chosen == {"windowed layers": "reference", "other layers": "sdpa"}


@pytest.mark.parametrize("dry_run", [["--dry-run"], []], ids=["dry", "real"])
def test_the_command_refuses_up_front_in_one_line(dry_run, capfd, monkeypatch):
    monkeypatch.setattr(main, "_set_up_logging", lambda rank: None)  # it is for a whole process
    status = main.main(["--device", "cpu", "attention.backend=flash", *dry_run])
    error = capfd.readouterr().err
    assert status == 2
    assert error.startswith("error: attention.backend=flash cannot be used: ")
    assert len(error.splitlines()) == 1


def test_every_backend_has_its_word():
    assert set(BACKENDS) == set(get_args(AttentionBackend)) - {"auto"}
