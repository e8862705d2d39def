"""The client's side of the wire, on one thread with an event loop.

    user threads                     loop thread ("cloudexec")                   other threads
    ------------                     -------------------------                   -------------
    submit() -> inbox  --wake-->     driver: event -> machine -> commands
    Future.cancel()                    |            ^
                                       v            |
                                     servicer <== gRPC ==> workers
                                       |
    Future.result() <---- state -------+----> callbacks: Future.add_done_callback
                                       +----> output: what tasks print
                                       +----> large results are unpickled

``portal`` owns the thread and is the only crossing; ``driver`` reads the clock, feeds the machine
and carries out what it says; ``servicer`` turns messages into events and commands into messages,
and decides nothing. ``plain`` carries them for workers that this process has started on its own
machine, ``network``, which is gRPC, for all others. Everything mutable belongs to the loop thread,
except the inbox (a deque, whose append and popleft are atomic) and the futures (each with its own
lock).
"""
