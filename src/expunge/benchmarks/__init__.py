"""Published benchmarks: their files read and checked, and their scores computed as their papers define them."""
