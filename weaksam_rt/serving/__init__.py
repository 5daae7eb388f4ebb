"""Glue for Triton's Python backend: decode a request, call the runtime, encode the response."""
