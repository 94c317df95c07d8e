"""The quickstart's own commands, a few steps long: three layouts, export, answers, picture."""

import dataclasses
import io
import json

from rich.console import Console

from dattn_mcore.quickstart.picture import draw
from dattn_mcore.quickstart.run import make_run_dir, run_steps
from dattn_mcore.quickstart.steps import STAGES, make_plan
from dattn_mcore.quickstart.summary import score, show

SHORT = ("train.steps=2", "train.global_batch_size=16", "log.interval=1", "log.tensorboard=false")


def test_every_step_takes_what_the_one_before_it_left(digits, tmp_path):
    plan = make_plan(tmp_path / "run", digits, SHORT)
    plan = dataclasses.replace(plan, steps=plan.steps[1:])  # the small data set is there already
    make_run_dir(plan.run_dir, {})
    shown = io.StringIO()
    console = Console(file=shown, width=100)
    seconds = run_steps(plan, console)
    result = score(plan)
    draw(plan, result)
    show(plan, result, seconds, sum(seconds.values()), console)

    text = shown.getvalue()
    assert list(seconds) == [*STAGES, "convert", "answer"]
    for stage in STAGES:
        rows = [json.loads(line) for line in plan.metrics(stage).read_text().splitlines()]
        assert [row["step"] for row in rows] == [1, 2]
        assert (plan.run_dir / stage / "checkpoints" / "step_00000002" / "dattn.json").is_file()
    assert f"weights from {plan.run_dir}/align/checkpoints/step_00000002" in text
    assert f"weights from {plan.run_dir}/pretrain/checkpoints/step_00000002" in text
    for layout in ("tp 2 x pp 1 x dp 1", "tp 1 x pp 1 x dp 2", "tp 1 x pp 2 x dp 1"):
        assert layout in text
    assert result.overall.total == 16
    assert (plan.run_dir / "hf" / "config.json").is_file()
    assert plan.picture.stat().st_size > 10_000
    assert "Held-out questions" in text
