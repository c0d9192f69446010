"""Executors, which run a stage's tasks: on this machine, on Slurm, on Ray, or on the ranks of mpirun.

The results are the same byte for byte. `base` is the interface that stages use, `stage_tasks` runs in each task, and
`choose` picks the executor; there is one file per executor. As with datatrove's executors, all workers must see the
run directory.
"""
