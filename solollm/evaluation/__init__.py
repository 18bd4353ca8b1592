"""How good a model is, and how fast, in numbers that others can check.

Read in that order: `report` is `solollm eval` as a function and the one result file; `harness` runs
lm-evaluation-harness, with `harness_model` as our engine's face towards it, on the copies of the
benchmarks that `local_data` reads; `held_out_text` measures bits per byte; `latency` and
`energy` the speed and its price; `quoted` holds the published rows that a result stands beside;
`tuning_data` makes training data in the benchmarks' formats, never out of their tests.
"""
