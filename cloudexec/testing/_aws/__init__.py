"""The fake AWS; ``cloudexec.testing`` has its public names."""
