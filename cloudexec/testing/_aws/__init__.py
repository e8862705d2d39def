"""The fake AWS. ``cloudexec.testing`` exports its public names.

``gateway`` receives each request, ``wire`` and ``judge`` read and check it with botocore's models,
and moto answers it, unless this package does: ``batch_jobs`` and ``batch_resources`` (with
``limits``), ``cloudformation`` (with ``templates`` and ``stack_resources``), ``prices``,
``registry`` and ``ghosts``. ``engine`` runs the jobs (``jobs``) through ``runners`` or
``containers``, within ``capacity``; ``logs`` and ``memory`` serve them. ``faults`` holds the faults
that a test has requested, and ``permissions`` applies an IAM policy. ``session`` starts and ends
all parts for ``fake.FakeAWS``.
"""
