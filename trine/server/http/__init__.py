"""The KServe v2 protocol over HTTP, with the extensions of Triton's clients.

A request is answered by the functions of this package through an `Exchange`; two things make exchanges of bytes: the
connection (`connection.py`, the fast path of plain HTTP/1.1) and the ASGI application (`asgi.py`, everything else).
"""
