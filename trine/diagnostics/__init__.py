"""What a machine has and whether a model will run on it: findings with remedies. `trine doctor` prints them."""
