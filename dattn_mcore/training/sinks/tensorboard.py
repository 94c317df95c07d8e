"""Rows as TensorBoard events in the run's folder."""

from __future__ import annotations

from collections.abc import Sequence

from dattn_mcore.training.sinks.images import pixels_of
from dattn_mcore.training.sinks.run_facts import RunFacts
from dattn_mcore.training.sinks.sink import Example, Kind, Row


class TensorBoardSink:
    """Writes scalars, the settings and examples to run_dir/tensorboard.

    Args:
        facts: of the run.
    """

    def __init__(self, facts: RunFacts) -> None:
        # Imported only where it is wanted: it takes a second.
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(
            str(facts.run_dir / "tensorboard"), purge_step=facts.first_step + 1
        )
        self._writer.add_text("settings", f"```yaml\n{facts.settings_yaml}\n```", facts.first_step)

    def write(self, row: Row) -> None:
        """Writes a scalar for each value."""
        for name, value in row.values.items():
            if value is not None:
                self._writer.add_scalar(f"{row.kind}/{name}", value, row.step)

    def show(self, kind: Kind, step: int, examples: Sequence[Example]) -> None:
        """Writes the images, and a table of questions and answers."""
        lines = ["| question | answer | right |", "|---|---|---|"]
        for number, example in enumerate(examples):
            cells = (example.question, example.answer, example.reference)
            lines.append("| " + " | ".join(_cell(cell) for cell in cells) + " |")
            if example.image is not None:
                pixels = pixels_of(example.image)
                self._writer.add_image(f"{kind}/{number}", pixels, step, dataformats="HWC")
        self._writer.add_text(f"{kind}/answers", "\n".join(lines), step)

    def close(self) -> None:
        """Writes what is left."""
        self._writer.close()


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
