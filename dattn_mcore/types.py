"""What several parts of the package share and none of them owns. No imports."""

# (is_visual, rows) of each run of a sample, in reading order.
Layout = tuple[tuple[bool, int], ...]

# The label of a text row that has no loss, as in PyTorch's cross entropy and transformers.
IGNORED_LABEL = -100

# Stands for an image in annotations and questions, as LLaVA's files have it.
IMAGE_MARK = "<image>"
