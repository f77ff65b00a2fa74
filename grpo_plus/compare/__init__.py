"""Which advantages learn better here? Every variant trained over several seeds from the same start.

    from grpo_plus.compare.report import write_comparison
    from grpo_plus.compare.task import Task
    from grpo_plus.compare.train import Variant, compare

    variants = ["grpo", "gdpo", Variant("dr_grpo", "dr_grpo")]
    write_comparison(compare(task, variants, seeds=range(5), folder="comparison"), "comparison")

A `Task` says what is trained. `compare` trains what its folder does not hold yet, and returns a `Comparison`: the
results as values. `write_comparison` writes the report. Import from the modules: this package imports none of them,
because what trains loads TRL.

With `sweep={"learning_rate": [1e-5, 3e-5]}`, each variant is judged at its own best setting. `sweep.py` says how.

To add a number that is measured on every arm, add a field to `ArmResult` (`comparison.py`), fill it in `arm.py`, and
write it as a row in `rows.py`, which makes `results.csv`. To add a statistic of what was measured, compute it in
`rows.py`. A section of `report.py` shows either.
"""
