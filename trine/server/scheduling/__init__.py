"""Schedulers: what happens to a request between its model and an instance."""
