"""Who does a stage's tasks: this machine, Slurm, Ray, or the ranks of mpirun. The result is the same byte for byte.

`base` is what a stage sees, `tasks` what runs in each task wherever it is, `progress` how far it got; one file an
executor, and `choose` picks one. All of them need what datatrove's do: a run directory that every worker can see.
"""
