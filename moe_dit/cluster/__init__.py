"""A run on a cluster: how many ranks its nodes can be, what happens when it ends, and what is checked before it begins.

The scripts in jobs/slurm start and signal what runs; whatever must be decided from a run's files is decided here.
"""
