"""Jobs on their way to where they run: this machine, hosts, Slurm or Kubernetes. Each ends in the same `dynmoe train`."""
