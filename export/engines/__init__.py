"""Engines for every runtime behind one interface: a verified ONNX model in, an engine with its
manifest out.
"""
