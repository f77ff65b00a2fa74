"""Everything that a run on a CPU needs, built in memory: tokenizer, model, task, warm-up, and the demo itself.

`tiny` and `task` also serve the tests and the benchmarks. Import from the modules; this package imports none of them.
"""
