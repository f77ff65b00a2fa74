"""Operators that give the numbers of the obvious code with less work: one directory each.

To add an operator, write `<operator>/reference.py`, the specification in a few lines of torch. Every other file is one
implementation with the signature of the reference. The file opens with its computation in three lines of plain torch,
and says why the implementation is faster. Only files called `triton.py` import Triton, and the package imports such a
file when its backend is asked for. All else is torch and the standard library. Then

- add the implementation to the parametrization of `tests/kernels/test_<operator>.py`, marked `triton` where it needs
  Triton's interpreter. The tests compare outputs and every gradient with the reference, at odd sizes, in fresh memory
  full of NaN;
- add its kernels to `tests/kernels/compiled.py`, which compiles them for every architecture without a GPU and holds
  their registers, spills and shared memory to bounds;
- add it to `benchmarks/kernels.py`, which refuses to time a wrong result. A default chooses a kernel only on devices
  where the kernel has been measured. (`lora_linear` is on by default everywhere, because it is plain torch that leaves
  out work of PEFT's, the same on every device.)
"""
