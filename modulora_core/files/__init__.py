"""Read files that strangers wrote: bounded in time and memory, and refused in one sentence."""
