"""Executes the compiled PTX of a kernel on the CPU in NumPy, many threads at once, and checks it meanwhile.

text: reads PTX. types: numbers. registers, shared_memory, global_memory: what holds them. races: what is ordered.
machine: threads, warps, schedules, barriers. One file of instructions for each kind of them. driver: runs what Triton
would launch. Written from the PTX ISA; no device has confirmed it. docs/gpu.md says what it cannot show.
"""
