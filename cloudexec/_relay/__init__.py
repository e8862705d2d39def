"""The relay: lets workers reach a client that accepts no connections, because it is behind NAT.

Client and workers open connections to the relay, which joins them in pairs and passes bytes on. TLS
runs from worker to client, so the relay sees ciphertext only.

* ``handshake`` defines the first lines on a connection: a line that names the executor, and a proof
  that the sender knows the relay's key.
* ``server`` is the relay, and ``program`` runs it: as ``cloudexec relay``, or as
  ``python -m cloudexec._relay`` on a machine where only a worker is installed.
* ``tunnel`` is the client's end. It is a process that the client starts and ``process`` watches: it
  stays registered with the relay, and opens a connection for each worker that dials.
* ``joining`` passes bytes on, for relay and tunnel.
* ``proxies`` connects through the HTTP proxy or SOCKS proxy that the client must use.

A worker asks the relay for a ticket, and then connects with gRPC's support for HTTP proxies: to
gRPC, the relay is a proxy that accepts ``CONNECT`` requests, with the ticket as the password.
"""
