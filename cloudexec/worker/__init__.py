"""What runs in a worker: one supervisor with the connection, one child process per slot.

    client <== gRPC ==> supervisor (session, supervisor) <-- pipes --> slot processes (slot)
                             |                                              ^
                             +-- socket pair --> zygote (zygote) -- forks --+

The supervisor forwards payloads unread and never runs user code, so it answers heartbeats whatever
a task does. On the client's own machine a plain socket stands in the place of gRPC. The zygote is
forked from the supervisor before that starts a thread; it imports what the tasks will need, forks
the slots, in milliseconds, and reports how each one ended. A slot runs one task at a time.

``supervisor`` creates the parts that serve the slots. Each part knows those before it in this list,
and of later ones only functions that it is given to call: ``functions`` (the callables that tasks
name), ``waiting`` (tasks that no slot has), ``slots`` (the processes), ``large_results`` (results
in files), ``footprint`` (limits of time and memory), ``answers`` (reads what slots answer),
``dispatch`` (sends tasks to slots) and ``taking_back`` (takes tasks back from slots).
``slot_model`` is the state of a slot, and what the supervisor concludes from the cells (shared
numbers) of the slot's page; it does no I/O.

``session`` exchanges messages with the client: it calls the client through ``calls``, sends
messages from ``outbox`` and passes received ones to ``inbox``. ``uploads`` sends large results, and
``downloads`` fetches blobs and the user's modules.

Only ``platform`` reads on which platform the worker runs, and what it is called there.

Nothing in this package imports an AWS SDK, ``_server`` or ``_launchers``.
"""
