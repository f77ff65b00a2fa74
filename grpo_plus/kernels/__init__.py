"""Operators that do less work than the obvious code for the same numbers: one directory each.

`reference.py` is the specification in a few lines of torch. Every other file of the directory has the same signature,
and the tests hold it to the reference, outputs and gradients. The files import torch and the standard library only.
"""
