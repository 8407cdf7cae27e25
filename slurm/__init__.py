"""Run any function as a job: on a Slurm cluster, or in the background of this machine, by submitit."""
