"""Every layout that a shipped configuration uses gives the losses of one process, at small width.

What is taken from the files: model family and attention mode, `parallel` as it stands, what is
trained, what is recomputed. What is scaled down: widths, layers, rows, and the data parallel size
that a batch script's nodes make of the rest, to at most two. In float32, so that the sums'
order is all that differs (bf16 and FP8 are for GPUs: tests/gpu).
"""

import dataclasses
import re
from pathlib import Path

import pytest

from dattn_mcore.config.checks import processes_per_replica
from dattn_mcore.config.load import load_config, merge, to_dict
from tests.distributed.jobs import read_metrics, run_training
from tests.distributed.small_models import small_config

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = [
    path
    for path in sorted((ROOT / "configs").glob("*.yaml"))
    + sorted((ROOT / "configs/planner").glob("*.yaml"))
    if path.name != "digits_base.yaml"
]
STEPS = {"steps": 2, "global_batch_size": 8}  # the second step has updated weights
FROM_TRAIN = ("trains", "recompute", "recompute_modules", "recompute_layers")


def replicas(path, config):
    """Data parallel size on the nodes of the file's batch script; without one, two."""
    script = ROOT / f"examples/slurm/{path.stem}.sbatch"
    if not script.exists():
        return 2
    nodes, ranks = (
        int(re.search(rf"^#SBATCH.* --{flag}=(\d+)", script.read_text(), re.MULTILINE).group(1))
        for flag in ("nodes", "ntasks-per-node")
    )
    return nodes * ranks // processes_per_replica(config)


def scaled(path):
    """The settings of a file that make its layout, on a small model; and its processes."""
    config = load_config(path)
    llm, vision, parallel = config.model.llm, config.model.vision, config.parallel
    first = parallel.first_stage_layers
    layers = 2 * parallel.pp * parallel.vpp
    if first is not None:  # one layer less beside the tower than elsewhere
        first, layers = 1, 1 + 2 * (parallel.pp - 1)
    if parallel.pp == 1:  # layers of every kind
        layers = max(layers, len(llm.layer_pattern))
    sizes = {
        **{"num_layers": max(layers, 2), "hidden_size": 64, "ffn_hidden_size": 96},
        **{"num_attention_heads": 8, "num_query_groups": 4, "head_dim": 16, "vocab_size": 384},
        **{"init_std": 0.05, "query_scale": 24.0 if llm.query_scale else None},
        **{"sliding_window": 6 if llm.sliding_window else None},
        **{name: getattr(llm, name) and 5.0 for name in ("attention_softcap", "final_softcap")},
    }
    tower = {
        **{"image_size": 56, "patch_size": 28, "num_layers": 1 - vision.select_layer},
        **{"hidden_size": 32, "ffn_hidden_size": 48, "num_attention_heads": 4, "init_std": 0.05},
    }
    tree = to_dict(config)
    # The norm's weight of Gemma's projector is as small as its embeddings are large.
    projector = {"ffn_hidden_size": 48, "output_norm_init": 1.0}
    sections = {
        "model": merge(tree["model"], {"llm": sizes, "vision": tower, "projector": projector}),
        "attention": tree["attention"],
        "parallel": {**tree["parallel"], "first_stage_layers": first},
        "train": {name: tree["train"][name] for name in FROM_TRAIN} | STEPS,
        "data": {"fixed_rows": config.data.fixed_rows, "pad_multiple": config.data.pad_multiple},
    }
    if config.train.recompute_layers is not None:  # some of them
        sections["train"]["recompute_layers"] = 1
    if parallel.tp_comm_overlap:  # needs Transformer Engine; changes no sum
        sections["parallel"]["tp_comm_overlap"] = False
    return sections, processes_per_replica(config) * min(2, replicas(path, config))


def layouts():
    """Each layout once, by the names of the files that use it."""
    found = []
    for path in CONFIGS:
        case = scaled(path)
        names = next((names for names, other in found if other == case), None)
        if names is None:
            found.append(([path.stem], case))
        else:
            names.append(path.stem)
    return {"+".join(names): case for names, case in found}


LAYOUTS = layouts()


@pytest.fixture(scope="module")
def rows_of(pool, digits, tmp_path_factory):
    """Metrics of a scaled run; the same settings run once."""
    done = {}

    def run(world_size, sections):
        key = world_size, repr(sections)
        if key not in done:
            run_dir = tmp_path_factory.mktemp("layout")
            tree = small_config(digits, run_dir, **sections)
            assert all(pool.run(run_training, world_size, tree))
            done[key] = read_metrics(run_dir)
        return done[key]

    return run


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_losses_are_those_of_one_process(rows_of, name):
    """Bounds as in test_features_by_layout: sums in another order, in float32, over two steps."""
    sections, world_size = LAYOUTS[name]
    plain = {**sections, "parallel": {}, "train": {"trains": sections["train"]["trains"], **STEPS}}
    expected, rows = rows_of(1, plain), rows_of(world_size, sections)
    assert len(rows) == len(expected) == 2
    for row, want in zip(rows, expected, strict=True):
        assert row["supervised_tokens"] == want["supervised_tokens"]
        assert row["loss"] == pytest.approx(want["loss"], abs=1e-5)
        assert row["grad_norm"] == pytest.approx(want["grad_norm"], rel=1e-4)
    # Otherwise the comparison says nothing: something is learned, also by a projector alone.
    assert all(row["grad_norm"] > 1e-3 for row in expected)
    assert expected[1]["loss"] < expected[0]["loss"] - 1e-3


def test_the_shipped_layouts_are_what_this_file_thinks():
    """So that a case does not vanish unseen: every file, and every kind of parallelism in use."""
    assert sorted("+".join(LAYOUTS).split("+")) == sorted(path.stem for path in CONFIGS)
    used = [sections["parallel"] for sections, _ in LAYOUTS.values()]
    shipped = [dataclasses.asdict(load_config(path).parallel) for path in CONFIGS]
    for field in ("tp", "pp", "vpp", "cp", "sp", "overlap_grad_reduce", "overlap_param_gather"):
        assert {layout[field] for layout in used} == {layout[field] for layout in shipped}, field
