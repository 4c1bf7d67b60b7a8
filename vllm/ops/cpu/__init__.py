"""The compiled CPU kernels of `csrc/cpu`, seen from Python."""
