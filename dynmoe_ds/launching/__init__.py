"""Jobs on their way to where they run: here, on hosts, Slurm or Kubernetes. Each ends in the same `dynmoe train`."""
