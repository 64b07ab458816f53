"""gRPC: the inference service, health and reflection, on an HTTP/2 server made for nothing else.

Why our own: a gRPC library's echo alone takes 0.15 ms a request from Python and copies a large message several times;
here a unary call costs about as much as an HTTP one. `server.py` and `connection.py` are HTTP/2, `stream.py` gRPC's
calls on it, `infer.py` and `codec.py` inference, `service.py` the rest of the methods.
"""
