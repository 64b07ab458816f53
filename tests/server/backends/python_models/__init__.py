"""Python models of the tests, each a file that is copied into a model's version directory."""
