"""What a layout does that its user will hardly have wanted; a line for each."""

from __future__ import annotations

from dattn_mcore.config.schema import Config
from dattn_mcore.plan.estimate import Plan
from dattn_mcore.plan.workload import Step, pack_multiple

NEARLY_FULL = 0.9  # of the samples that micro-batches could hold: more is nobody's concern


def warnings_of(plan: Plan) -> list[str]:
    """Warnings of a layout on its cluster, on any kind of GPU."""
    lines = [part_full(plan.config, plan.step, plan.dp), _tensor_parallel_over_nodes(plan)]
    return [line for line in lines if line]


def _tensor_parallel_over_nodes(plan: Plan) -> str:
    tp, per_node = plan.config.parallel.tp, plan.cluster.gpus_per_node
    if per_node % tp == 0:
        return ""
    within = max(size for size in range(1, tp) if per_node % size == 0 and tp % size == 0)
    return (
        f"tp {tp} crosses nodes of {per_node} GPUs: every layer's exchanges wait for the network "
        f"between nodes; use --tp {within}, and --pp for a model that does not fit then"
    )


def part_full(config: Config, step: Step, dp: int) -> str:
    """Whether a step's samples are too few for the replicas; empty where they are not.

    Args:
        config: with the layout.
        step: from `step_of`.
        dp: data parallel size.
    """
    if step.packs == step.needed or step.fill >= NEARLY_FULL:
        return ""
    enough = step.packs * step.per_pack
    most = max(1, dp * step.needed // pack_multiple(config, dp))
    if step.samples < step.packs:
        found = f"a step's {step.samples} samples leave {step.packs - step.samples} of its "
        found += f"{step.packs} packs empty ({dp} replicas)"
    else:
        found = f"packs of a step are {step.fill:.0%} full ({step.packs} for {dp} replicas)"
    return (
        f"{found}: raise train.global_batch_size to at least {enough} or use fewer replicas "
        f"(at most {most})"
    )
