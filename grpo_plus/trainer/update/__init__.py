"""One optimizer step: which rows meet in a micro-batch, in how many passes, and what the log says of them."""
