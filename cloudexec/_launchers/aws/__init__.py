"""What launchers on AWS have in common: ``settings`` and ``platform``."""
