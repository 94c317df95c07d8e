"""From LLaVA annotations and image files to packed micro-batches (no Megatron in here).

Reading order of the folder: `annotations` (what is on disk), `templates` and `tokenizer` (text
to ids), `images` with `decode_dali` and `decode_pillow` (files to tiles), `order` (which sample
when), `packing` (which sample in which micro-batch), `pipeline` (all of it, ahead of the step).
`digits` makes the embedded data set.
"""
