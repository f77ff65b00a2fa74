"""Operators that do less work than the obvious code for the same numbers: one directory each.

To add one: write `<operator>/reference.py`, the specification in a few lines of torch. Each other file is one
implementation with the reference's signature; it opens with what it computes in three lines of plain torch, says why
it is faster, and has at most 400 lines. Triton is imported in files called `triton.py` only, which the package imports
when their backend is asked for; all else is torch and the standard library. Then

- add the implementation to the parametrization of `tests/kernels/test_<operator>.py`, marked `triton` where it needs
  Triton's interpreter: outputs and every gradient against the reference, odd sizes, fresh memory full of NaN;
- add its kernels to `tests/kernels/compiled.py`, where they are compiled for every architecture without a GPU and their
  registers, spills and shared memory are held to bounds;
- add it to `benchmarks/kernels.py`, which refuses to time a wrong result, and let a default choose a kernel on the
  devices where it has been measured, and only there. (`lora_linear` is plain torch that leaves out work of PEFT's, the
  same on every device, and so on by default everywhere.)
"""
