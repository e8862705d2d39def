"""Code that all launchers on AWS share: their ``settings``, ``platform`` and ``image``."""
