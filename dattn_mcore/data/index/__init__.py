"""The index: what is known of every sample without reading it, mapped from a file.

`layout` says what an index holds, `rows` makes its rows from records, `build` does so in parallel,
`store` finds, checks and opens it.
"""
