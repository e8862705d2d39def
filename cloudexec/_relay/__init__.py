"""The relay: how workers reach a client that nothing can dial, because it is behind NAT.

Client and workers dial out to the relay, which joins their connections in pairs and passes bytes
on. TLS runs from worker to client, so the relay sees ciphertext.

* ``handshake`` has what each side says first: a line that names the executor, and a proof that it
  knows the key of the relay.
* ``server`` is the relay, and ``program`` runs it (``cloudexec relay``, or where only a worker is
  installed, ``python -m cloudexec._relay``).
* ``tunnel`` is the client's end, a process that the client starts: it stays registered with the
  relay, and opens a connection for each worker that dials.
* ``joining`` passes bytes on, for both.
* ``proxies`` finds the way out through the HTTP proxy or SOCKS proxy that the client must use.

A worker asks for a ticket and then dials by gRPC's own support for HTTP proxies: for gRPC the relay
is a proxy that wants ``CONNECT``, and takes the ticket as password.
"""
