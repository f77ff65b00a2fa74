"""Everything that only a GPU can show, in one process and nine minutes: `python -m benchmarks.gpu --out FOLDER`.

Stages follow each other, each with a deadline; what one leaves of its time goes to the next. An item that fails or
runs out of time is a row with its failure, and the next one begins. Models have random weights, made on the device.
Nothing is downloaded. `--rehearse` runs every line at tiny sizes on a CPU.
"""
