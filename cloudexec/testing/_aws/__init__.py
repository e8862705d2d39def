"""The fake AWS. ``cloudexec.testing`` exports its public names.

``gateway`` receives each request, ``wire`` and ``judge`` read and check it with botocore's models,
and moto answers it, unless this package does: ``batch_jobs`` and ``batch_resources`` (with
``limits``), ``cloudformation`` (with ``templates`` and ``stack_resources``), ``prices``,
``registry`` and ``ghosts``. ``engine`` runs the jobs (``jobs``) through ``runners`` or
``containers``, within ``capacity``; ``logs`` and ``memory`` serve them. ``faults`` holds what a
test has asked to go wrong, and ``permissions`` applies an IAM policy. ``session`` starts and ends
all of it for ``fake.FakeAWS``.
"""
