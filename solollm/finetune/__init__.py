"""Fine-tuning: rows of conversations become token samples, these a run like any other.

`rows` reads files, `shapes` says what a row means, `rendering` lays it out by the chat template,
`samples` keeps the result, `packing` makes batches of it, `check` looks at it before a run starts,
`tuning` starts the run. Training itself is `solollm.trainer`'s, as for every run.
"""
