"""The model's side: what a Python model's process runs. It imports the standard library and numpy, nothing else."""
