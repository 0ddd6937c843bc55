"""Workers as Slurm jobs: scripts and the queue, pools of jobs that follow the work."""
