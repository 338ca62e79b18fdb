"""`fastdynat train --submit FILE.yaml`: the same training as a SLURM job, through submitit (extra `slurm`).

`job_file`: the YAML file of submitit's and SLURM's parameters; `preflight`: checks before the job waits in a
queue; `submission`: hands the job over; `train_task`: what each of its tasks runs.
"""
