"""Workers as Slurm jobs: job scripts, the queue, and pools that scale with the work."""
