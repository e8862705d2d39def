"""What runs in a worker: one supervisor with the connection, one child process per slot.

    client <== gRPC ==> supervisor (session, supervisor) <-- pipes --> slot processes (slot)
                             |                                              ^
                             +-- socket pair --> zygote (zygote) -- forks --+

The supervisor forwards payloads unread and never runs user code, so it answers heartbeats whatever
a task does. On the client's own machine a plain socket stands in the place of gRPC. The zygote is
forked from the supervisor before that starts a thread; it imports what the tasks will need, forks
the slots, in milliseconds, and reports how each one ended. A slot runs one task at a time.

``supervisor`` puts the parts together that serve the slots. Each knows those before it here, and
of those behind it only what it is given to call: ``functions`` (which callables there are),
``waiting`` (tasks that no slot has), ``slots`` (the processes), ``large_results`` (results in
files), ``footprint`` (limits of time and memory), ``answers`` (what slots say), ``dispatch`` (which
task goes where) and ``taking_back`` (tasks that are to come back). What is concluded from the cells
that a slot shares with its supervisor is in ``slot_model``, without I/O.

``session`` speaks with the client: over ``calls``, with messages from ``outbox`` and to ``inbox``.
Large results go through ``uploads``, and what the client has to give through ``downloads``.

Which platform a worker is on, and what it is called there, is read in ``platform`` alone.

Nothing in this package imports an AWS SDK, ``_server`` or ``_launchers``.
"""
