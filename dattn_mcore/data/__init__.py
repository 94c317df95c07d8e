"""From annotation and image files to packed micro-batches (no Megatron in here).

Reading order of the folder: `sources` (what is on disk), `templates` and `tokenizer` (text to ids),
`tiles` (plans), `images` with `decode_dali`, `decode_pillow` and `resize` (files to tiles), `index`
(what is known of every sample), `order` and `steps` (which sample when), `packing` and `balance`
(which sample in which micro-batch of which rank), `samples` (reads one), `pipeline` (all of it,
ahead of the step).
`failures` are samples that cannot be trained on; `check` and `pages` show a data set to people.
`digits` makes the embedded one.
"""
