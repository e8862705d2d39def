"""The packages that are here, as layers of an image: no container engine, no build service.

``inventory`` lists what is installed. ``selection`` says which of it a worker needs, and what it
needs that is not here. ``components`` copies what fits as it is, which ``elf`` helps to tell;
``fetching`` has uv or pip get the rest as wheels, and build those of projects, also of those that
``local_requirements`` finds in files. ``layers`` packs all of that reproducibly, ``base`` copies
the image below, ``registry`` sends, with a login that ``docker_login`` finds where there is none
for it, and ``assembly`` does all this in order, once for each content.
"""
