"""Side-by-side timings, memory and compiled-program checks."""
